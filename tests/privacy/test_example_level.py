"""Example-level privacy: gradients of single records against a loop, minibatches, what the generator sees."""

from __future__ import annotations

import itertools

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedgan_lightning import GAN, SequentialExecutor, VectorizedExecutor
from fedgan_lightning.data.poisson import NOBODY, PoissonClients
from fedgan_lightning.dp.randomness import SecretStream, new_key
from fedgan_lightning.gan.draws import Draws
from fedgan_lightning.gan.steps import split_heads
from fedgan_lightning.losses import R1, GradientPenalty, Hinge, LeastSquares, NonSaturating
from fedgan_lightning.networks import DCGANDiscriminator, DCGANGenerator, MLPDiscriminator, MLPGenerator
from fedgan_lightning.privacy import ExampleLevelPrivacy
from tests.conftest import assert_states_equal, federate, ring_data
from tests.privacy.parts import private_gan

CLIP = 0.7


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def mlp(conditioning="none", **options):
    classes = 0 if conditioning == "none" else 3
    generator = MLPGenerator(4, (1, 4, 4), hidden=(8,), num_classes=classes)
    discriminator = MLPDiscriminator((1, 4, 4), hidden=(16, 8), num_classes=classes, conditioning=conditioning)
    return GAN(generator, discriminator, fake_labels="all", **options)


def dcgan(norm, channels=1, **options):
    generator = DCGANGenerator(latent_dim=4, image_size=8, channels=channels, width=4)
    discriminator = DCGANDiscriminator(image_size=8, channels=channels, width=4, norm=norm)
    return GAN(generator, discriminator, **options)


def privacy(**options):
    return ExampleLevelPrivacy(clip=CLIP, batch_size=8, noise_multiplier=0.0, **options)


def inputs(gan, count=8, seed=0):
    torch.manual_seed(seed)
    x, y = torch.randn(count, *gan.sample_shape), torch.randint(0, max(gan.num_classes, 1), (count,))
    draws = Draws(z=torch.randn(count, 4), y=y, mix=torch.rand(count))
    return x, y, torch.randn_like(x), draws


def looped(gan, x, y, fake, draws):
    """Return the clipped sum by the plain way: one backward pass for every record."""
    total = None
    for i in range(len(x)):
        gan.discriminator.zero_grad()
        one = slice(i, i + 1)
        logits, classes = split_heads(gan.discriminate(x[one], y[one], None))
        loss = gan.loss.discriminator(logits, torch.zeros_like(logits))
        if classes is not None:
            loss = loss + gan.auxiliary_weight * cross_entropy(classes, y[one])
        for penalty in gan.penalties:
            mix = draws.mix[one] if penalty.needs_mix else None
            critic = lambda samples, labels=y[one]: split_heads(gan.discriminate(samples, labels, None))[0]  # noqa: E731
            loss = loss + penalty(critic, x[one], fake[one], mix)
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in gan.discriminator.named_parameters()}
        norm = torch.cat([value.flatten() for value in gradient.values()]).norm()
        cut = {name: value * min(1.0, float(CLIP / norm)) for name, value in gradient.items()}
        total = cut if total is None else {name: total[name] + cut[name] for name in cut}
    return total


def sums(gan, x, y, fake, draws, present=None):
    present = torch.ones(x.shape[: gan.label_dims], dtype=torch.bool) if present is None else present
    return gan.clipped_sums(x, y, present, fake, draws, gan.due_penalties())


CASES = {
    **{
        f"{conditioning}, {'+'.join(type(p).__name__ for p in penalties)}": mlp(
            conditioning, penalties=penalties, loss=loss, privacy=privacy(chunk_size=3)
        )
        for (conditioning, penalties), loss in zip(
            itertools.product(("none", "projection", "auxiliary"), ([], [R1(1.0)], [GradientPenalty(10.0)])),
            itertools.cycle([NonSaturating(), Hinge(), LeastSquares()]),
        )
    },
    "dcgan": dcgan("none", channels=3, penalties=[R1(1.0)], privacy=privacy()),
    "dcgan, group": dcgan("group", privacy=privacy()),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_single_records_are_those_of_a_loop(case):
    gan = CASES[case].double()
    expected, found = looped(gan, *inputs(gan)), sums(gan, *inputs(gan))
    assert_states_equal(found, expected, atol=1e-12)


@pytest.mark.parametrize("conditioning", ["none", "projection", "auxiliary"])
def test_two_passes_are_the_exact_sum(conditioning):
    """opacus#664: clipping in two passes that ignored the bound."""
    gan = mlp(conditioning, privacy=privacy(clipping="two_pass")).double()
    assert_states_equal(sums(gan, *inputs(gan)), looped(gan, *inputs(gan)), atol=1e-12)


@pytest.mark.parametrize("clipping, penalties", [("exact", [R1(1.0)]), ("two_pass", [])])
def test_stacked_clients_have_the_sums_that_each_has_alone(clipping, penalties):
    alone = [mlp("projection", penalties=penalties, privacy=privacy(clipping=clipping)).double() for _ in range(2)]
    stack = VectorizedStack(alone)
    rows = [inputs(gan, seed=k) for k, gan in enumerate(alone)]
    x, y, fake = (torch.stack(own) for own in zip(*(row[:3] for row in rows)))
    draws = Draws(*(torch.stack([getattr(row[3], name) for row in rows]) for name in ("z", "y", "mix")))
    found = sums(stack, x, y, fake, draws)
    for k, gan in enumerate(alone):
        assert_states_equal({n: v[k] for n, v in found.items()}, sums(gan, *rows[k]), atol=1e-12)


def VectorizedStack(gans):
    """Return the stack of several GANs, with their parameters in it."""
    from fedgan_lightning.gan.stacked import StackedGAN

    stack = StackedGAN(gans[0])
    stack._first_steps = [0] * len(gans)
    for name, parameter in stack.named_parameters():
        parameter.data = torch.stack([dict(gan.named_parameters())[name].data for gan in gans])
    return stack


@pytest.mark.parametrize("clipping", ["exact", "two_pass"])
def test_a_record_more_or_less_moves_the_sum_by_at_most_the_bound(clipping):
    """tensorflow/privacy#620: microbatches double the sensitivity."""
    gan = mlp("projection", privacy=privacy(clipping=clipping)).double()
    x, y, fake, draws = inputs(gan)
    x[3] *= 1e4
    whole = sums(gan, x, y, fake, draws)
    kept = torch.arange(8) != 3
    rest = sums(gan, x[kept], y[kept], fake[kept], Draws(draws.z[kept], draws.y[kept], draws.mix[kept]))
    assert torch.cat([(whole[n] - rest[n]).flatten() for n in whole]).norm() <= CLIP * (1 + 1e-9)


def test_rows_that_fill_up_count_for_nothing_and_an_empty_sample_gives_zero():
    gan = mlp(penalties=[R1(1.0)], privacy=privacy()).double()
    x, y, fake, draws = inputs(gan)
    present = torch.tensor([True] * 5 + [False] * 3)
    cut = Draws(draws.z[:5], draws.y[:5], draws.mix[:5])
    assert_states_equal(sums(gan, x, y, fake, draws, present), sums(gan, x[:5], y[:5], fake[:5], cut), atol=1e-14)
    nobody = sums(gan, x, y, fake, draws, torch.zeros(8, dtype=torch.bool))
    assert all(not value.any() for value in nobody.values())


def test_a_record_whose_gradient_is_no_number_counts_for_nothing():
    gan = mlp(privacy=privacy()).double()
    x, y, fake, draws = inputs(gan)
    x[2] = torch.nan
    found = sums(gan, x, y, fake, draws)
    assert all(torch.isfinite(value).all() for value in found.values())


def test_the_step_is_the_sum_and_noise_over_the_public_size():
    """jax_privacy#383: noise of a sum on a mean; opacus#571: a size that depends on the data."""
    gan = private_gan(noise_multiplier=2.0).double()
    gan.begin_private_round([(0, 0)])
    stds = []
    for step in range(200):
        gan._noise_streams = [SecretStream(new_key(step))]
        x, y = torch.zeros(8, 2), torch.full((8,), NOBODY)
        gan._backward = lambda optimizer, loss: gan.discriminator.zero_grad()
        gan.backward_privately(None, x, y)
        stds.append(torch.cat([p.grad.flatten() for p in gan.discriminator.parameters()]))
    assert float(torch.stack(stds).std()) == pytest.approx(2.0 * 0.5 / 8, rel=0.03)


def test_the_generator_sees_no_record():
    """Whatever the records are, with the discriminator fixed no bit of the generator's step differs."""
    gradients = []
    for value in (0.0, 1e3):
        gan = private_gan().double()
        torch.manual_seed(3)
        gan._backward_generator(_Optimizer(gan.generator), torch.full((8, 2), value), torch.zeros(8, dtype=torch.int64))
        gradients.append({n: p.grad for n, p in gan.generator.named_parameters()})
    assert_states_equal(*gradients)


class _Optimizer:
    def __init__(self, network):
        self.param_groups = [{"params": list(network.parameters())}]

    def zero_grad(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None


@pytest.fixture
def _loose(monkeypatch):
    monkeypatch.setattr(GAN, "manual_backward", lambda self, loss, inputs: loss.backward(inputs=inputs))


test_the_generator_sees_no_record = pytest.mark.usefixtures("_loose")(test_the_generator_sees_no_record)


# ---------------------------------------------------------------------- minibatches


def test_minibatches_are_poisson_samples_of_every_record_alike():
    """plato#182: a loader that replaced the sampler; opacus#80: shuffled minibatches counted as Poisson."""
    data = ring_data(num_clients=2, num_samples=400)
    own = PoissonClients(data, ExampleLevelPrivacy(batch_size=10, noise_multiplier=1.0, capacity=200), draws=2)
    count = data.num_examples(0)
    sizes, seen = [], np.zeros(count)
    known = {tuple(row.tolist()): k for k, row in enumerate(data.client_samples(0).take(torch.arange(count))[0])}
    for x, y in own.client_batches(0, first_step=0, num_steps=500):
        assert x.shape == (400, 2)
        for part, labels in zip(x.chunk(2), y.chunk(2)):
            sizes.append(int((labels != NOBODY).sum()))
            assert (labels[: sizes[-1]] != NOBODY).all(), "records come first"
            for row in part[: sizes[-1]]:
                seen[known[tuple(row.tolist())]] += 1
    assert np.mean(sizes) == pytest.approx(10, abs=0.4)
    assert np.var(sizes) == pytest.approx(10 * (1 - 10 / count), rel=0.15)
    assert seen.std() == pytest.approx((1000 * 10 / count * (1 - 10 / count)) ** 0.5, rel=0.3)


def test_minibatches_do_not_follow_from_the_seed():
    data = ring_data(num_clients=2, num_samples=400)
    own = PoissonClients(data, ExampleLevelPrivacy(batch_size=10, noise_multiplier=1.0))
    first, second = (next(iter(own.client_batches(0, first_step=0, num_steps=1)))[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_what_is_too_much_is_cut_at_random_and_accounted_for():
    data = ring_data(num_clients=2, num_samples=400)
    options = ExampleLevelPrivacy(batch_size=100, noise_multiplier=1.0, capacity=50)
    for _, y in PoissonClients(data, options).client_batches(0, first_step=0, num_steps=5):
        assert len(y) == 50
        assert (y != NOBODY).all()
    release = options.release(200, noise_multiplier=1.0)
    assert (release.sampling, release.most, release.population) == ("truncated_poisson", 50, 200)
    assert (
        ExampleLevelPrivacy(batch_size=100, noise_multiplier=1.0, capacity=200)
        .release(200, noise_multiplier=1.0)
        .sampling
        == "poisson"
    )


# ---------------------------------------------------------------------- in a federation


@pytest.mark.parametrize("options", [{}, {"clipping": "two_pass"}, {"noise_multiplier": 0.0}])
def test_stacked_and_sequential_clients_learn_the_same(options, tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    found = []
    for executor in (SequentialExecutor(), VectorizedExecutor()):
        folder = tmp_path / type(executor).__name__
        folder.mkdir()
        monkeypatch.chdir(folder)
        gan = private_gan(**options)
        server, orchestrator, _ = federate(
            gan, ring_data(), executor=executor, rounds=2, local_steps=3, optimizer_state="reset"
        )
        found.append((server.model.state_dict(), orchestrator.keeper.ledger.releases))
    assert_states_equal(found[0][0], found[1][0], atol=2e-6)
    assert found[0][1] == found[1][1]


def test_the_client_that_pays_most_counts_and_steps_are_counted():
    torch.set_default_dtype(torch.float32)
    data = ring_data(num_clients=4, num_samples=640)
    data.indices[0] = data.indices[0][:40]
    gan = private_gan()
    gan.d_steps = 2
    _, orchestrator, _ = federate(gan, data, rounds=3, local_steps=5, optimizer_state="reset")
    (guarantee,) = orchestrator.keeper.guarantees()
    assert guarantee.release.count == 3 * 5 * 2
    assert guarantee.release.rate == pytest.approx(8 / 40)
    assert guarantee.population == 40
    assert orchestrator.keeper.metrics()["privacy/epsilon_example"] == pytest.approx(guarantee.epsilon)


def test_only_what_holds_no_record_is_logged():
    torch.set_default_dtype(torch.float32)
    seen = []

    class Listener(L.Callback):
        def on_client_end(self, trainer, server, update):
            seen.append(set(update.metrics))

    federate(private_gan(), ring_data(), Listener(), rounds=1, local_steps=2, optimizer_state="reset")
    assert {name for own in seen for name in own} & {"d_real", "loss_d", "penalty"} == set()
    assert {"d_fake", "loss_g"} <= seen[0]


def test_a_budget_of_records_ends_the_run():
    torch.set_default_dtype(torch.float32)
    gan = private_gan(budget=1.5, accountant="rdp")
    server, orchestrator, _ = federate(gan, ring_data(), rounds=50, local_steps=5, optimizer_state="reset")
    assert 0 < server.rounds_completed < 50
    assert orchestrator.keeper.guarantees()[0].epsilon <= 1.5


def test_rules_of_rounds_hold_for_private_records_and_reserves_are_charged():
    """Over-selection, strikes and filled-up cohorts are the server's business; records are hidden whoever is asked."""
    from fedgan_lightning import RoundRules
    from fedgan_lightning.samplers import FractionOfClients

    torch.set_default_dtype(torch.float32)
    _, orchestrator, _ = federate(
        private_gan(),
        ring_data(),
        rounds=2,
        local_steps=2,
        optimizer_state="reset",
        clients=FractionOfClients(0.5),
        rules=RoundRules(over_selection=1.5),
    )
    assert orchestrator.runner.selection.select(5, 0).reserves, "one of four stands by"
    assert sum(orchestrator.keeper.ledger.counts["steps"].values()) == (2 + 1) * 3 * 2  # three were or might be asked
