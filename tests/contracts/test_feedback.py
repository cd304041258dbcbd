"""Algorithms whose generator learns from gradients that clients send of its samples: proofs, parity, what is refused.

Letters are those of the list of proofs in docs/methods.md.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedgan_lightning import (
    GAN,
    ConfigurationError,
    FederatedDataModule,
    RoundRules,
    SequentialExecutor,
    ServerModule,
    UpdateValidator,
    VectorizedExecutor,
)
from fedgan_lightning.aggregators import CoordinateMedian, WeightedMean
from fedgan_lightning.algorithms import F2A, F2U, MDGAN, UAGAN, FedGAN, MeanDiscriminator
from fedgan_lightning.data.in_memory import ItemsSource
from fedgan_lightning.federation.exchange import cycle
from fedgan_lightning.federation.feedback.samples import generated
from fedgan_lightning.losses import R1, Hinge, Minimax, NonSaturating, RelativisticPairing
from fedgan_lightning.networks import (
    DCGANDiscriminator,
    DCGANGenerator,
    MLPDiscriminator,
    MLPGenerator,
)
from fedgan_lightning.partitions import IID, Dirichlet, GivenIndices
from fedgan_lightning.samplers import FractionOfClients
from fedgan_lightning.schedules import StepRounds
from fedgan_lightning.sources import Samples
from fedgan_lightning.transforms import Int8, PowerSGD, TopK
from tests.conftest import (
    adam,
    assert_states_equal,
    digits_data,
    federate,
    quiet_trainer,
    ring_data,
    ring_gan,
    sgd,
    slow,
)

EXECUTORS = {"sequential": SequentialExecutor, "vectorized": VectorizedExecutor}
SYNC = {"generator": "server", "discriminator": "local"}
EXCHANGE = {"generator": "server", "discriminator": "exchange"}
FAMILY = {
    "MD-GAN, k=1": lambda **own: MDGAN(num_batches=1, **own),
    "MD-GAN, k=2": lambda **own: MDGAN(num_batches=2, **own),
    "UA-GAN": UAGAN,
    "UA-GAN, summed": lambda **own: UAGAN(summed=True, **own),
    "F2U": F2U,
    "F2A": F2A,
    "mean": MeanDiscriminator,
}


def slow_case(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def run(algorithm, *, gan=None, data=None, executor=None, **options):
    gan = ring_gan(optimizer=sgd).double() if gan is None else gan
    options = {"rounds": 3, "local_steps": 2, "sync": SYNC, **options}
    executor = SequentialExecutor() if executor is None else executor
    return federate(gan, ring_data() if data is None else data, algorithm=algorithm, executor=executor, **options)


def conditional_gan(**options):
    torch.manual_seed(0)
    generator = MLPGenerator(4, (1, 8, 8), hidden=(16,), num_classes=10)
    discriminator = MLPDiscriminator((1, 8, 8), hidden=(16,), num_classes=10, conditioning="projection")
    options = {"generator_optimizer": sgd, "discriminator_optimizer": sgd, **options}
    return GAN(generator, discriminator, **options).double()


def everything(result):
    server, orchestrator, _ = result
    private = {f"{k} {n}": v for k, own in orchestrator.store.state_dict().items() for n, v in own.items()}
    return {**server.model.state_dict(), **server.algorithm_state, **private}


def critics(orchestrator, gan):
    """Return every client's discriminator, as a network."""
    import copy

    found = []
    for _, own in sorted(orchestrator.store.state_dict().items(), key=lambda pair: int(pair[0])):
        critic = copy.deepcopy(gan.discriminator)
        critic.load_state_dict(
            {n.removeprefix("discriminator."): v for n, v in own.items() if n.startswith("discriminator.")}
        )
        found.append(critic)
    return found


def start_of(gan):
    return {name: value.detach().clone() for name, value in gan.generator.named_parameters()}


def gradient_of(gan, parameter):
    return gan.generator.get_parameter(parameter).grad


def moved(server, start, rate=0.05):
    """Return the gradient that a step of SGD took."""
    return {n: (start[n] - v.detach()) / rate for n, v in server.model.generator.named_parameters()}


# ---------------------------------------------------------------------- 1(a): the server's gradient


OBJECTIVES = {
    "MD-GAN, k=1": lambda loss, logits, w: (w * torch.stack([loss.generator(own) for own in logits])).sum(),
    "UA-GAN": lambda loss, logits, w: loss.generator(torch.log((w[:, None] * logits.exp()).sum(0))),
    "UA-GAN, summed": lambda loss, logits, w: loss.generator(torch.log((w[:, None] * logits.exp()).sum(0))),
    "F2U": lambda loss, logits, w: loss.generator(logits.max(0).values),
    "mean": lambda loss, logits, w: loss.generator(torch.logit((w[:, None] * logits.sigmoid()).sum(0))),
    "F2A": lambda loss, logits, w: loss.generator(torch.logit(_f2a(logits, w))),
}


def _f2a(logits, weights, sharpness=1.0):
    beliefs = logits.sigmoid()
    chosen = weights[:, None] * (sharpness * beliefs).exp()
    return (chosen / chosen.sum(0) * beliefs).sum(0)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("loss", [NonSaturating, Minimax], ids=["non-saturating", "saturating"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_all_discriminators_in_one_graph(name, loss, executor):
    """Clients hold unequal data, and pi_i = N_i / N; also with several local steps."""
    gan, data = ring_gan(optimizer=sgd, loss=loss()).double(), ring_data(partition=Dirichlet(1.0, min_samples=16))
    start, algorithm = start_of(gan), FAMILY[name]()
    server, orchestrator, _ = run(algorithm, gan=gan, data=data, rounds=1, executor=EXECUTORS[executor]())
    again = ring_gan(optimizer=sgd).double()
    again.generator.load_state_dict(start)
    (inputs,) = algorithm.batches(server, 0)
    samples = again.generator(inputs.z, None)
    logits = torch.stack([critic(samples, None).flatten() for critic in critics(orchestrator, gan)])
    sizes = torch.tensor([float(data.num_examples(k)) for k in range(4)], dtype=torch.float64)
    OBJECTIVES[name](loss(), logits, sizes / sizes.sum()).backward()
    for parameter, value in moved(server, start).items():
        torch.testing.assert_close(
            value, dict(again.generator.named_parameters())[parameter].grad, atol=1e-12, rtol=1e-9
        )


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("num_batches", [1, 2, 3, 4])
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_md_gan_s_gradient_whatever_the_number_of_batches(weighting, num_batches, executor):
    gan, data = ring_gan(optimizer=sgd).double(), ring_data(partition=Dirichlet(1.0, min_samples=16))
    start, algorithm = start_of(gan), MDGAN(num_batches=num_batches)
    options = {"aggregator": WeightedMean(weighting), "rounds": 1, "executor": EXECUTORS[executor]()}
    server, orchestrator, _ = run(algorithm, gan=gan, data=data, **options)
    again = ring_gan(optimizer=sgd).double()
    again.generator.load_state_dict(start)
    points, total, mass = algorithm.batches(server, 0), 0.0, 0.0
    for k, critic in enumerate(critics(orchestrator, gan)):
        weight = data.num_examples(k) if weighting == "examples" else 1
        logits = critic(again.generator(points[algorithm.slots(k)[0]].z, None), None)
        total, mass = total + weight * NonSaturating().generator(logits), mass + weight
    (total / mass).backward()
    for parameter, value in moved(server, start).items():
        torch.testing.assert_close(
            value, dict(again.generator.named_parameters())[parameter].grad, atol=1e-12, rtol=1e-9
        )


def test_md_gan_has_the_auxiliary_classifier_s_gradient_too():
    """The published setting is ACGAN's; labels travel with the samples."""
    torch.manual_seed(0)
    gan = GAN(
        MLPGenerator(4, (1, 8, 8), hidden=(16,), num_classes=10),
        MLPDiscriminator((1, 8, 8), hidden=(16,), num_classes=10, conditioning="auxiliary"),
        generator_optimizer=sgd,
        discriminator_optimizer=sgd,
        auxiliary_weight=0.7,
    ).double()
    start, algorithm = start_of(gan), MDGAN(num_batches=1, num_samples=16)
    server, orchestrator, _ = run(algorithm, gan=gan, data=digits_data(), rounds=1, aggregator=WeightedMean("uniform"))
    again = conditional_gan()
    again.generator.load_state_dict(start)
    (inputs,) = algorithm.batches(server, 0)
    total = 0.0
    for critic in critics(orchestrator, gan):
        logits, classes = critic(again.generator(inputs.z, inputs.labels), inputs.labels)
        total = total + NonSaturating().generator(logits) / 5
        total = total + 0.7 * torch.nn.functional.cross_entropy(classes, inputs.labels) / 5
    total.backward()
    for parameter, value in moved(server, start).items():
        torch.testing.assert_close(
            value, dict(again.generator.named_parameters())[parameter].grad, atol=1e-12, rtol=1e-9
        )


# ---------------------------------------------------------------------- 1(b), 3(b), 3(c): plain GANs


def plain_rounds(gan, data, *, algorithm, server, rounds, local_steps=1):
    """Train as a plain loop does: D on real minibatches and given samples, then G against D; on the first client."""
    opt_g, opt_d = (
        gan.generator_optimizer(gan.generator.parameters()),
        gan.discriminator_optimizer(gan.discriminator.parameters()),
    )
    asked, against = algorithm.slots(0)
    for round in range(rounds):
        inputs = algorithm.batches(server, round)
        fakes = generated(gan, inputs)[against]
        batches = data.client_batches(0, first_step=round * local_steps, num_steps=local_steps)
        for x, _ in batches:
            x = x.double()
            loss = gan.loss.discriminator(gan.discriminator(x, None), gan.discriminator(fakes[: len(x)], None))
            opt_d.zero_grad()
            loss.backward()
            opt_d.step()
        value = gan.loss.generator(gan.discriminator(gan.generator(inputs[asked].z, None), None))
        opt_g.zero_grad()
        value.backward()
        opt_g.step()
    return gan


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("name", ["MD-GAN, k=1", "MD-GAN, k=2", "UA-GAN", "UA-GAN, summed", "F2U", "mean"])
def test_with_one_client_it_is_a_plain_gan(name, local_steps):
    """1(b): N = 1, k = 2, Adam; 3(b): one site."""
    options = {"num_clients": 1, "partition": GivenIndices([range(64)])}
    algorithm, data = FAMILY[name](num_samples=16), ring_data(**options)
    gan = ring_gan(optimizer=adam, penalties=[]).double()
    server, orchestrator, _ = run(algorithm, gan=gan, data=data, rounds=6, local_steps=local_steps)
    plain = ring_gan(optimizer=adam, penalties=[]).double()
    data = ring_data(**options)
    data.setup()
    plain_rounds(plain, data, algorithm=algorithm, server=server, rounds=6, local_steps=local_steps)
    assert_states_equal(server.model.generator.state_dict(), plain.generator.state_dict(), atol=1e-12, rtol=1e-10)
    (own,) = critics(orchestrator, plain)
    assert_states_equal(own.state_dict(), plain.discriminator.state_dict(), atol=1e-12, rtol=1e-10)


# ---------------------------------------------------------------------- 3(e): sums, and what the server learns


def test_lambda_is_learned_and_held_down_by_its_penalty():
    found = {}
    for options in ((0.0, 0.0), (1.0, 0.0), (1.0, 10.0)):
        rate, penalty = options
        server, _, _ = run(F2A(sharpness=0.5, learning_rate=rate, penalty=penalty), rounds=4)
        found[options] = float(server.algorithm_state["sharpness"])
    assert found[0.0, 0.0] == 0.5
    assert found[1.0, 0.0] > 0.5  # a sharper ensemble likes samples better, and so does the generator's loss
    assert found[1.0, 10.0] < 0.01


@pytest.mark.parametrize("data", ["ring", "digits by class"])
def test_sums_say_what_single_answers_say(data):
    """3(e): R and R' alone, in float64, over several rounds, with and without classes."""
    found = []
    for summed in (False, True):
        gan, own = (None, None) if data == "ring" else (conditional_gan(), digits_data())
        found.append(run(UAGAN(summed=summed), gan=gan, data=own, rounds=4)[0].model.generator.state_dict())
    assert_states_equal(*found, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", ["MD-GAN, k=1", "UA-GAN, summed"])
def test_what_masks_can_hide_is_asked_of_all_alike(name):
    """Weights from the server could leave one client's answer for a sum: clients count their classes themselves."""
    tasks = []

    class Watch(SequentialExecutor):
        def run(self, given):
            tasks.extend(listed := list(given))
            yield from super().run(listed)

    run(FAMILY[name](num_samples=40), gan=conditional_gan(), data=digits_data(), executor=Watch(), rounds=2)
    assert tasks
    assert all(not task.own for task in tasks)


def test_logits_beyond_the_bound_are_cut_and_nothing_overflows():
    gan = ring_gan(optimizer=sgd).double()
    with torch.no_grad():
        list(gan.discriminator.parameters())[-1].fill_(500.0)
    server, _, _ = run(UAGAN(summed=True, max_logit=5.0), gan=gan, rounds=3)
    assert all(bool(torch.isfinite(own).all()) for own in server.model.generator.state_dict().values())
    assert abs(float(server.algorithm_state["shift"])) > 4.0


# ---------------------------------------------------------------------- 1(c): exchange


@pytest.mark.parametrize("clients", [2, 3, 7, 10])
def test_an_exchange_is_a_cycle_through_everybody(clients):
    moves = cycle(round=4, clients=range(clients), seed=3, every=5)
    assert sorted(moves) == sorted(moves.values()) == list(range(clients))
    assert all(own != other for own, other in moves.items())
    home, place = list(range(clients)), list(range(clients))
    for _ in range(clients):
        place = [moves[own] for own in place]
    assert place == home
    assert cycle(round=3, clients=range(clients), seed=3, every=5) == {}
    assert cycle(round=4, clients=range(1), seed=3, every=5) == {}


def test_discriminators_change_hands_and_stay_the_same():
    never, once = (
        run(MDGAN(exchange_every=every), sync=EXCHANGE, rounds=2, gan=ring_gan(optimizer=adam))[1] for every in (3, 2)
    )
    gan = ring_gan(optimizer=adam)
    before, after = (critics(own, gan) for own in (never, once))
    moves = cycle(round=1, clients=range(4), seed=0, every=2)
    for client, source in moves.items():
        assert_states_equal(after[client].state_dict(), before[source].state_dict())
    moments = [o.store.state_dict() for o in (never, once)]
    for client, source in moves.items():
        theirs = {n: v for n, v in moments[0][str(source)].items() if n.startswith("optimizer/")}
        assert theirs
        assert_states_equal({n: moments[1][str(client)][n] for n in theirs}, theirs)


def test_with_the_same_data_and_networks_an_exchange_changes_nothing():
    """Every client holds the same sixteen points, in one minibatch."""
    points = torch.randn(16, 2).repeat(4, 1)
    given = GivenIndices([range(16 * k, 16 * k + 16) for k in range(4)])
    found = []
    for every in (1, 100):
        gan = ring_gan(optimizer=sgd, penalties=[]).double()
        data = held(points, partition=given, num_clients=4, batch_size=16)
        options = {"gan": gan, "sync": EXCHANGE, "data": data, "rounds": 4}
        server, _, _ = run(MDGAN(num_batches=1, exchange_every=every), **options)
        found.append({**server.model.generator.state_dict()})
    assert_states_equal(*found, atol=1e-12, rtol=1e-10)


# ---------------------------------------------------------------------- 1(d): bytes


def test_bytes_are_counted_to_the_last_one():
    """3 b d numbers of 4 bytes per client and iteration: 94 080 for MNIST at b = 10, with two distinct batches."""
    torch.manual_seed(0)
    pictures, data = torch.rand(60, 1, 28, 28) * 2 - 1, {"partition": IID(), "num_clients": 3, "batch_size": 10}
    gan = GAN(MLPGenerator(4, (1, 28, 28), hidden=(8,)), MLPDiscriminator((1, 28, 28), hidden=(8,)))
    _, orchestrator, _ = run(
        MDGAN(num_batches=2, num_samples=10), gan=gan, data=held(pictures, **data), rounds=3, local_steps=1
    )
    ledger = orchestrator.ledger
    down, up = sum(ledger.bytes_down.values()), sum(ledger.bytes_up.values())
    assert (down, up) == (3 * 3 * 2 * 4 * 10 * 784, 3 * 3 * 4 * 10 * 784)
    assert (down + up) / ledger.client_runs == 94_080
    _, orchestrator, _ = run(UAGAN(num_samples=10), gan=gan, data=held(pictures, **data), rounds=1, local_steps=1)
    assert sum(orchestrator.ledger.bytes_up.values()) == 3 * 4 * 10 * 785
    assert sum(orchestrator.ledger.bytes_down.values()) == 3 * 4 * 10 * 784


def held(x, **options):
    """Return a data module of these samples."""
    samples = Samples(x, torch.zeros(len(x), dtype=torch.long))
    return FederatedDataModule(ItemsSource(samples, samples), **options)


# ---------------------------------------------------------------------- 1(e): BatchNorm of the generator


@pytest.mark.parametrize("num_batches", [1, 2])
def test_batches_are_generated_twice_and_counted_once(num_batches):
    torch.manual_seed(0)
    gan = GAN(
        DCGANGenerator(8, latent_dim=4, width=4, channels=1),
        DCGANDiscriminator(8, width=4, channels=1),
        generator_optimizer=sgd,
        discriminator_optimizer=sgd,
    ).double()
    import copy

    plain, algorithm = copy.deepcopy(gan).train(), MDGAN(num_batches=num_batches, num_samples=16)
    server, _, _ = run(algorithm, gan=gan, data=digits_data(num_clients=3), rounds=1)
    batches = algorithm.batches(server, 0)
    sent = generated(plain, batches)
    before = {name: own.clone() for name, own in plain.generator.named_buffers()}
    made = [plain.generator(own.z, own.labels) for own in batches]
    for own, other in zip(sent, made):
        torch.testing.assert_close(own, other.detach(), atol=1e-14, rtol=0)  # of its own statistics, both times
    assert any(not torch.equal(own, before[name]) for name, own in plain.generator.named_buffers())
    for name, own in server.model.generator.named_buffers():
        torch.testing.assert_close(own, dict(plain.generator.named_buffers())[name], atol=1e-12, rtol=1e-12)


# ---------------------------------------------------------------------- 1(g): the path over parameters


def test_md_gan_is_averaging_of_generators_with_a_server_that_steps():
    """k = 1, L = 1: delta = -gradient under SGD of rate 1, its mean is MD-GAN's dw, and the server's Adam steps on it.

    Both take the same latents, which the path over parameters draws on clients.
    """

    class SameLatents(GAN):
        """Draws what MD-GAN has sent in the same round."""

        inputs: list

        def draw(self, y, **options):
            from dataclasses import replace

            return replace(super().draw(y, **options), z=self.inputs[self.local_step])

    def unit(parameters):
        return torch.optim.SGD(parameters, lr=1.0)

    algorithm, options = MDGAN(num_batches=1, num_samples=16), {"rounds": 6, "local_steps": 1}
    uniform = WeightedMean("uniform")
    server, _, _ = run(algorithm, gan=ring_gan(optimizer=adam, penalties=[]).double(), aggregator=uniform, **options)
    torch.manual_seed(0)
    networks = MLPGenerator(4, (2,), hidden=(16,), output="linear"), MLPDiscriminator((2,), hidden=(16,))
    gan = SameLatents(*networks, generator_optimizer=unit, discriminator_optimizer=adam).double()
    gan.inputs = [algorithm.batches(server, round)[0].z for round in range(6)]
    from fedgan_lightning import FederatedOrchestrator, ServerModule

    other = FederatedOrchestrator(
        algorithm=FedGAN(), sync={"discriminator": "local"}, aggregator=uniform, executor=SequentialExecutor(),
        optimizer_state="reset", **options,
    )  # fmt: skip
    averaged = ServerModule(gan, optimizer=adam)
    quiet_trainer(other).fit(averaged, datamodule=ring_data())
    assert_states_equal(
        averaged.model.generator.state_dict(), server.model.generator.state_dict(), atol=1e-12, rtol=1e-9
    )


# ---------------------------------------------------------------------- executors, cohorts, resume


@pytest.mark.parametrize("name", ["MD-GAN, k=2", "UA-GAN", *map(slow, sorted({*FAMILY} - {"MD-GAN, k=2", "UA-GAN"}))])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"local_steps": None, "local_epochs": 1},
        {"sync": EXCHANGE, "clients": FractionOfClients(0.5), "rounds": 5},
    ],
    ids=["all", "ragged", "exchanged among some"],
)
def test_stacked_clients_are_each_alone(name, options):
    found = []
    for executor in (SequentialExecutor(), VectorizedExecutor(), VectorizedExecutor(chunk_size=2)):
        gan, data = ring_gan(optimizer=adam).double(), ring_data(partition=Dirichlet(0.5, min_samples=16))
        found.append(everything(run(FAMILY[name](), gan=gan, data=data, executor=executor, **options)))
    for other in found[1:]:
        assert_states_equal(other, found[0], atol=1e-10, rtol=1e-7)


@pytest.mark.parametrize("name", FAMILY)
def test_classes_of_clients_count_in_stacks_as_alone(name):
    found = []
    for executor in EXECUTORS.values():
        data = digits_data(batch_size=16)
        found.append(
            everything(run(FAMILY[name](num_samples=20), gan=conditional_gan(), data=data, executor=executor()))
        )
    assert_states_equal(*found, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("executor", ["vectorized", slow("sequential")])
@pytest.mark.parametrize("name", FAMILY)
def test_a_resumed_run_ends_with_the_same_bits(name, executor, tmp_path):
    from fedgan_lightning import FederatedOrchestrator, ServerModule

    options = {"clients": FractionOfClients(0.5), "sync": EXCHANGE, "local_steps": 2}
    whole = run(
        FAMILY[name](), gan=ring_gan(optimizer=adam), executor=EXECUTORS[executor](), **{**options, "rounds": 5}
    )
    _, _, trainer = run(
        FAMILY[name](), gan=ring_gan(optimizer=adam), executor=EXECUTORS[executor](), **{**options, "rounds": 2}
    )
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    again = FederatedOrchestrator(rounds=5, algorithm=FAMILY[name](), executor=EXECUTORS[executor](), **options)
    server, trainer = ServerModule(ring_gan(optimizer=adam, seed=7)), quiet_trainer(again)
    trainer.fit(server, datamodule=ring_data(), ckpt_path=tmp_path / "cut.ckpt")
    assert_states_equal(everything((server, again, trainer)), everything(whole))


def test_a_median_of_answers_withstands_one_that_lies():
    class Liar(SequentialExecutor):
        def run(self, tasks):
            import dataclasses

            for update in super().run(tasks):
                wild = {n: 1e4 * torch.ones_like(v) for n, v in update.extras.items()} if update.client_id == 0 else {}
                yield dataclasses.replace(update, extras={**update.extras, **wild})

    found = {}
    for aggregator in (WeightedMean("uniform"), CoordinateMedian()):
        gan = ring_gan(optimizer=sgd).double()
        start = start_of(gan)
        server, _, _ = run(MDGAN(num_batches=1), gan=gan, aggregator=aggregator, rounds=1, executor=Liar())
        found[type(aggregator).__name__] = max(float(own.abs().max()) for own in moved(server, start).values())
    assert found["WeightedMean"] > 1e3
    assert found["CoordinateMedian"] < 10


@pytest.mark.parametrize("make", [MDGAN, UAGAN, lambda: UAGAN(summed=True), F2U])
def test_a_robust_rule_is_refused_where_it_would_not_be_asked(make):
    with pytest.raises(ConfigurationError, match="combines clients' answers itself.* got CoordinateMedian"):
        run(make(), aggregator=CoordinateMedian())


@pytest.mark.parametrize("name", ["MD-GAN, k=1", "MD-GAN, k=2", "UA-GAN", "UA-GAN, summed"])
def test_one_that_lies_is_left_out_by_name_and_ends_nothing(name):
    class Liar(SequentialExecutor):
        def run(self, tasks):
            import dataclasses

            for update in super().run(tasks):
                wild = {n: torch.full_like(v, 1e18) for n, v in update.extras.items()} if update.client_id == 2 else {}
                yield dataclasses.replace(update, extras={**update.extras, **wild})

    rules = RoundRules(min_report_fraction=0.5)
    options = {"gan": ring_gan(optimizer=sgd), "executor": Liar(), "rules": rules, "validator": UpdateValidator()}
    server, orchestrator, _ = run(FAMILY[name](), rounds=3, **options)
    assert server.rounds_completed == 3
    assert orchestrator.ledger.events == {"rejected": 3}
    assert {own["client_id"] for own in orchestrator.ledger.incidents} == {2}
    assert all(float(own.detach().abs().max()) < 10 for own in server.model.generator.parameters())


def test_sums_are_those_of_a_cohort_s_own_weights():
    """With classes, and two of five clients a round, which hold other classes than the rest."""
    found = []
    for summed in (False, True):
        options = {"gan": conditional_gan(), "data": digits_data(), "clients": FractionOfClients(0.4), "rounds": 4}
        found.append(run(UAGAN(summed=summed), **options)[0].model.generator.state_dict())
    assert_states_equal(*found, atol=1e-12, rtol=1e-9)


def test_codes_of_feedback_keep_nothing_for_other_samples():
    """What a code loses of one batch's gradients is nothing of the next one's."""
    for codec in (TopK(share=0.2), PowerSGD(rank=1)):
        _, orchestrator, _ = run(MDGAN(), transforms=[codec])
        kept = {name for own in orchestrator.store.state_dict().values() for name in own}
        assert not any(name.startswith("transform/") for name in kept), kept
    plain, coded = (run(UAGAN(summed=True), transforms=own)[1].ledger.bytes_up for own in ([], [Int8()]))
    assert coded["odds_gradient"] < 0.3 * plain["odds_gradient"]


def test_classes_are_generated_as_clients_hold_them():
    data = digits_data(partition=Dirichlet(0.3, min_samples=16))
    data.setup()
    held = data.label_counts().sum(0) / data.label_counts().sum()
    algorithm = UAGAN(num_samples=20_000, labels="clients")
    server, _, _ = run(UAGAN(num_samples=16, labels="clients"), gan=conditional_gan(), data=data, rounds=1)
    drawn = algorithm.batches(server, 3)[0].labels
    share = torch.bincount(drawn, minlength=10).numpy() / len(drawn)
    assert np.abs(share - held).max() < 4 * np.sqrt(0.1 * 0.9 / len(drawn))


@pytest.mark.parametrize(
    "name, is_iid",
    [
        slow_case("MD-GAN, k=1", True),
        slow_case("MD-GAN, k=2", True),
        slow_case("UA-GAN", False),
        slow_case("F2U", False),
    ],
)
def test_it_learns_the_ring_s_size(name, is_iid):
    """Points of the ring lie at a radius of 1.41, those of the generator as it is built at .42.

    With two modes each at four clients MD-GAN ends at .35 and .79: the mean of divergences is not the mixture's.
    """

    def gentle(parameters):
        return torch.optim.Adam(parameters, lr=5e-3, betas=(0.0, 0.99))

    data = ring_data(partition=IID()) if is_iid else ring_data()
    options = {"gan": ring_gan(optimizer=gentle, penalties=[R1(0.1)]), "data": data, "executor": VectorizedExecutor()}
    server, _, _ = run(FAMILY[name](), rounds=300, local_steps=1, **options)
    assert float(server.sample(512).norm(dim=1).mean()) == pytest.approx(1.41, abs=0.2)


# ---------------------------------------------------------------------- what is refused before the first round


@pytest.mark.parametrize(
    "make, options, words",
    [
        (MDGAN, {"sync": {}}, "must have the generator at the server; got sync.generator: average"),
        (UAGAN, {"sync": {"generator": "server"}}, "must have the discriminator at clients; got sync.disc"),
        (MDGAN, {"rules": RoundRules(stale_updates="discount")}, "must drop late answers"),
        (lambda: MDGAN(num_samples=8), {}, "as many samples as a minibatch has; got num_samples=8 with .*16"),
        (
            lambda: UAGAN(per_class=True),
            {},
            "got per_class: true, and a generator without classes",
        ),
        (UAGAN, {"gan": ring_gan(loss=Hinge())}, "reads D / .* got Hinge. Set model.loss"),
        (MDGAN, {"gan": ring_gan(loss=RelativisticPairing())}, "must need no real samples"),
        (MDGAN, {"gan": ring_gan(g_steps=2)}, "one step of the generator after a round of clients; got g_steps=2"),
        (
            MDGAN,
            {"gan": ring_gan(generator_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))},
            "leave the generator's learning rate to the server",
        ),
        (lambda: MDGAN(labels="clients"), {}, "got labels: clients, and a generator without classes"),
        (UAGAN, {"gan": "uncounted"}, "must know how many labels .* got per_class: null, and data that does not count"),
        (
            MDGAN,
            {"schedules": {"learning_rate": StepRounds(values={0: 1.0, 4: 0.1})}},
            "is the server's; got federation.sched",
        ),
        (MDGAN, {"server": ServerModule(ring_gan(), optimizer=adam)}, "must have averaged parameters to step on"),
        (UAGAN, {"gan": "auxiliary"}, "must have such that classify nothing; got a discriminator with an auxiliary"),
    ],
)
def test_what_cannot_be_is_refused(make, options, words):
    options = dict(options)
    if options.get("gan") == "auxiliary":
        torch.manual_seed(0)
        discriminator = MLPDiscriminator((1, 8, 8), hidden=(16,), num_classes=10, conditioning="auxiliary")
        options["gan"] = GAN(MLPGenerator(4, (1, 8, 8), hidden=(16,), num_classes=10), discriminator)
        options["data"] = digits_data()
    if options.get("gan") == "uncounted":
        options |= {"gan": conditional_gan(), "data": digits_data()}
        options["data"].label_counts = lambda: np.zeros((5, 1))
    with pytest.raises(ConfigurationError, match=words):
        run(make(), **options)


def test_the_generator_s_gradient_is_clipped_as_its_clients_would():
    gan = ring_gan(optimizer=sgd, clip_gradient_norm=1e-3).double()
    start = start_of(gan)
    server, _, _ = run(UAGAN(), gan=gan, rounds=1)
    norm = torch.stack([own.square().sum() for own in moved(server, start).values()]).sum().sqrt()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


def test_f2u_goes_with_any_loss():
    server, _, _ = run(F2U(), gan=ring_gan(optimizer=sgd, loss=Hinge()), rounds=2)
    assert server.rounds_completed == 2
