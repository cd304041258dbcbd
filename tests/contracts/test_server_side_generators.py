"""Generators that the server trains: options of the module are followed or refused; what is drawn is drawn once."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from fedgan_lightning import GAN, ConfigurationError, FederatedDataModule, SequentialExecutor, VectorizedExecutor
from fedgan_lightning.aggregators import CoordinateMedian, GeometricMedian, Krum, NearestNeighborMixing
from fedgan_lightning.algorithms import F2U, MDGAN, UAGAN, FedGAN, ServedGenerator
from fedgan_lightning.federation.rules import RoundRules
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.partitions import ClassesPerClient
from fedgan_lightning.privacy import ExampleLevelPrivacy
from fedgan_lightning.sources import Digits, Ring
from tests.conftest import adam, federate, ring_data, ring_gan, sgd
from tests.privacy.parts import settings as private_settings

SYNC = {"generator": "server", "discriminator": "local"}
ALGORITHMS = {
    "served": {"algorithm": ServedGenerator(num_samples=32), "sync": {"generator": "served"}},
    "MD-GAN": {"algorithm": MDGAN(num_batches=1, num_samples=32), "sync": SYNC},
    "UA-GAN": {"algorithm": UAGAN(num_samples=32), "sync": SYNC},
}


def run(kind, *, gan=None, data=None, **options):
    settings = {"rounds": 2, "local_steps": 1, "executor": SequentialExecutor(), **ALGORITHMS[kind], **options}
    gan = ring_gan(optimizer=sgd) if gan is None else gan
    return federate(gan, ring_data() if data is None else data, **settings)


def moved(gan, kind):
    before = {name: value.clone() for name, value in gan.generator.state_dict().items()}
    server, _, _ = run(kind, gan=gan)
    after = server.model.generator.state_dict()
    return float(torch.cat([(after[name] - before[name]).flatten() for name in before]).norm())


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_the_generators_gradient_is_clipped_at_the_server_too(kind):
    assert moved(ring_gan(optimizer=sgd), kind) > 1e-5
    assert moved(ring_gan(optimizer=sgd, clip_gradient_norm=1e-9), kind) < 1e-9


def slow_down(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"g_steps": 7}, "must take one step of the generator after a round of clients; got g_steps=7"),
        ({"generator_scheduler": slow_down}, "must leave the generator's learning rate to the server"),
        ({"updates": "simultaneous"}, "must step the discriminators first; got updates=simultaneous"),
    ],
)
def test_an_option_that_nobody_would_follow_is_refused(kind, options, says):
    with pytest.raises(ConfigurationError, match=says):
        run(kind, gan=ring_gan(optimizer=sgd, **options))


def test_augmentation_that_the_server_would_leave_out_is_refused():
    from fedgan_lightning.gan.augment import Augmentation

    torch.manual_seed(0)
    networks = MLPGenerator(4, (1, 8, 8), hidden=(16,)), MLPDiscriminator((1, 8, 8), hidden=(16,))
    gan = GAN(*networks, generator_optimizer=sgd, discriminator_optimizer=sgd, augment=Augmentation())
    data = FederatedDataModule(Digits(), num_clients=3, batch_size=16)
    for kind in ALGORITHMS:
        with pytest.raises(ConfigurationError, match="must judge samples as they are; got augment=Augmentation"):
            run(kind, gan=gan, data=data)


class Dropping(MLPGenerator):
    """Draws something itself."""

    def forward(self, z, y=None):
        return super().forward(torch.nn.functional.dropout(z, 0.5, self.training), y)


@pytest.mark.parametrize("executor", [SequentialExecutor, VectorizedExecutor])
def test_samples_that_are_made_again_are_those_that_clients_judged(executor):
    seen = []

    class Watched(MDGAN):
        def task(self, server, round):
            found = super().task(server, round)
            seen.append(found["fakes/against"].clone())
            return found

        def server_step(self, server, total):
            model = server.model
            again = model.generate_with_graph

            def kept(z, labels):
                samples = again(z, labels)
                seen.append(samples.detach().clone())
                return samples

            model.generate_with_graph = kept
            try:
                super().server_step(server, total)
            finally:
                del model.generate_with_graph

    torch.manual_seed(0)
    networks = Dropping(4, (2,), hidden=(16,), output="linear"), MLPDiscriminator((2,), hidden=(16,))
    gan = GAN(*networks, generator_optimizer=sgd, discriminator_optimizer=sgd)
    run("MD-GAN", gan=gan, algorithm=Watched(num_batches=1, num_samples=32), executor=executor())
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


# ---------------------------------------------------------------------- what a robust rule is asked for


RULES = {
    "Krum": lambda: Krum(num_bad=1),
    "multi-Krum": lambda: Krum(num_bad=1, num_selected=3),
    "geometric median": GeometricMedian,
    "mixed Krum": lambda: NearestNeighborMixing(Krum(num_bad=1), num_bad=1),
}


@pytest.mark.parametrize("name", RULES)
def test_a_robust_rule_sees_answers_where_no_parameters_come_up(name):
    """It combined nothing, and answers got the coordinate median whatever the rule was."""
    data = FederatedDataModule(Ring(num_samples=960), num_clients=6, batch_size=16)
    found = {}
    for kind, rule in {"median": CoordinateMedian, name: RULES[name]}.items():
        totals = found[kind] = []

        class Watched(MDGAN):
            def server_step(self, server, total, totals=totals):
                totals.append(total.extras["algorithm/feedback"].clone())
                super().server_step(server, total)

        run("MD-GAN", data=data, algorithm=Watched(num_batches=1, num_samples=32), aggregator=rule(), rounds=1)
    assert not torch.equal(found["median"][0], found[name][0])


# ---------------------------------------------------------------------- privacy


def conditional_gan(**options):
    torch.manual_seed(0)
    networks = {
        "generator": MLPGenerator(4, (1, 8, 8), hidden=(16,), num_classes=10),
        "discriminator": MLPDiscriminator((1, 8, 8), hidden=(16,), num_classes=10, conditioning="projection"),
    }
    return GAN(**networks, generator_optimizer=sgd, discriminator_optimizer=sgd, **options)


def half_of_the_digits():
    """Four clients that hold two kinds each: eight of ten."""
    return FederatedDataModule(Digits(), partition=ClassesPerClient(2), num_clients=4, batch_size=16)


def test_which_classes_there_are_is_no_secret_that_the_generator_tells():
    """Under privacy every class is generated, whoever holds it: classes of samples must follow from no data."""
    seen = []

    class Watched(MDGAN):
        def task(self, server, round):
            found = super().task(server, round)
            seen.append(set(found["labels/against"].tolist()))
            return found

    algorithm = Watched(num_batches=1, num_samples=256)
    federate(conditional_gan(), half_of_the_digits(), algorithm=algorithm, **{**private_settings(), "sync": SYNC})
    assert seen[0] == set(range(10))
    seen.clear()
    options = {"rounds": 1, "local_steps": 1, "sync": SYNC, "executor": SequentialExecutor()}
    federate(conditional_gan(), half_of_the_digits(), algorithm=Watched(num_batches=1, num_samples=256), **options)
    assert seen[0] != set(range(10)), "without privacy classes that nobody holds are not asked for"


@pytest.mark.parametrize(
    ("algorithm", "says"),
    [
        (MDGAN(num_batches=1, num_samples=200, labels="clients"), "got labels: clients, and privacy, under which they"),
        (UAGAN(num_samples=200), "got per_class: null, and privacy, under which they stay with clients. Set per_class"),
        (F2U(num_samples=200, per_class=True), "got per_class: true, and privacy, under which they stay with clients"),
    ],
)
def test_label_counts_are_not_used_under_privacy(algorithm, says):
    privacy = ExampleLevelPrivacy(clip=0.5, noise_multiplier=1.0, delta=1e-3, batch_size=8, testing_seed=1)
    gan = conditional_gan(privacy=privacy, fake_labels="all")
    options = {"rounds": 1, "local_steps": 1, "sync": SYNC, "algorithm": algorithm, "executor": SequentialExecutor()}
    with pytest.raises(ConfigurationError, match=says):
        federate(gan, half_of_the_digits(), **options)


def test_samples_are_as_many_as_a_private_minibatch_has_rows():
    privacy = ExampleLevelPrivacy(clip=0.5, noise_multiplier=1.0, delta=1e-3, batch_size=60, testing_seed=1)
    gan = conditional_gan(privacy=privacy, fake_labels="all")
    options = {"rounds": 1, "local_steps": 1, "sync": SYNC, "executor": SequentialExecutor()}
    rows = privacy.rows
    assert rows > 60
    with pytest.raises(
        ConfigurationError, match=f"got num_samples=60 with minibatches of {rows}. Set num_samples to {rows}"
    ):
        federate(gan, half_of_the_digits(), algorithm=MDGAN(num_samples=60), **options)
    federate(gan, half_of_the_digits(), algorithm=MDGAN(num_samples=rows), **options)


def test_what_a_subclass_sends_beside_is_not_covered():
    from fedgan_lightning.protocol import UpdateEntry

    class Telling(MDGAN):
        def entries(self, context):
            return {**super().entries(context), "secret": UpdateEntry((), torch.float64)}

        def answer(self, visit):
            return {**super().answer(visit), "secret": torch.tensor(42.0, dtype=torch.float64)}

    with pytest.raises(ConfigurationError, match="must cover all that clients send; got secret of Telling"):
        algorithm = Telling(num_batches=1, num_samples=32)
        federate(ring_gan(optimizer=sgd), ring_data(), algorithm=algorithm, **{**private_settings(), "sync": SYNC})


# ---------------------------------------------------------------------- other people's modules, networks on their way


class Half(L.LightningModule):
    """Has the abilities by name, and not what they need."""

    generate_with_graph = generator_feedback = feedback = only_discriminator = None
    sample_shape = (2,)

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.generator.parameters(), 0.1),
            torch.optim.SGD(self.discriminator.parameters(), 0.1),
        ]

    def training_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_a_module_without_an_ability_is_refused_by_name(kind):
    with pytest.raises(ConfigurationError, match="must have a module with .* got Half without"):
        run(kind, gan=Half())


@pytest.mark.parametrize("algorithm", [FedGAN(), MDGAN(num_samples=32)])
def test_a_discriminator_is_not_handed_on_while_its_client_is_at_work(algorithm):
    from fedgan_lightning.asynchronous import Asynchronous

    generator = "average" if isinstance(algorithm, FedGAN) else "server"
    options = {"sync": {"generator": generator, "discriminator": "exchange"}, "algorithm": algorithm}
    rules = RoundRules(asynchronous=Asynchronous(buffer_size=2))
    with pytest.raises(ConfigurationError, match="must be with nobody who is still at work|must drop late answers"):
        federate(ring_gan(optimizer=adam), ring_data(), rounds=2, local_steps=1, rules=rules, **options)
