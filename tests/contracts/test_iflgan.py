"""IFL-GAN: weights by hand, who keeps what, both executors, resume, claims, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan_lightning import (
    GAN,
    ConfigurationError,
    FederatedOrchestrator,
    RoundRules,
    SecureAggregation,
    SequentialExecutor,
    ServerModule,
    UpdateValidator,
    VectorizedExecutor,
)
from fedgan_lightning.aggregators import CoordinateMedian, WeightedMean
from fedgan_lightning.algorithms import IFLGAN, FedGAN
from fedgan_lightning.federation.discrepancy import LARGEST, WIDTHS, maximum_mean_discrepancy
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.schedules import StepRounds
from fedgan_lightning.transforms import ClipUpdates, Int8, TopK
from tests.conftest import adam, assert_states_equal, digits_data, federate, quiet_trainer, ring_data, ring_gan, sgd
from tests.foreign import SomebodysGAN
from tests.privacy.parts import private_gan
from tests.unit.test_secure import Summing

EXECUTORS = {
    "sequential": SequentialExecutor,
    "vectorized": VectorizedExecutor,
    "stacks of two": lambda: VectorizedExecutor(chunk_size=2),
}


class Telling(IFLGAN):
    """Clients say what they are told to say.

    Args:
        told: By client its discrepancy.
    """

    def __init__(self, told, **options):
        super().__init__(**options)
        self.told = told

    def _discrepancy(self, visit, row, module):
        return torch.tensor(self.told[visit.tasks[row].client_id], dtype=torch.float64)


class Noting(SequentialExecutor):
    """Notes tasks and updates."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def run(self, tasks):
        for task in tasks:
            for update in super().run([task]):
                self.seen.append((task, update))
                yield update


def labelled():
    """A pair for ten digits."""
    torch.manual_seed(0)
    shape = {"sample_shape": (1, 8, 8), "hidden": (16,), "num_classes": 10}
    return GAN(
        MLPGenerator(latent_dim=4, **shape),
        MLPDiscriminator(conditioning="projection", **shape),
        generator_optimizer=sgd,
        discriminator_optimizer=sgd,
    ).double()


def run(algorithm, executor=None, *, gan=None, data=None, **options):
    gan = ring_gan(optimizer=sgd).double() if gan is None else gan
    options = {"rounds": 3, "local_steps": 2, "aggregator": WeightedMean("uniform"), **options}
    executor = SequentialExecutor() if executor is None else executor
    return federate(gan, ring_data() if data is None else data, algorithm=algorithm, executor=executor, **options)


def everything(result):
    server, orchestrator, _ = result
    private = {f"{k} {n}": v for k, own in orchestrator.store.state_dict().items() for n, v in own.items()}
    return {**server.model.state_dict(), **server.algorithm_state, **server.moments, **private}


# ---------------------------------------------------------------------- the discrepancy


def by_loops(x, y):
    """The definition, pair by pair."""
    rows = [[float(own) for own in sample] for sample in [*x.tolist(), *y.tolist()]]
    n = len(x)

    def squared(i, j):
        return sum((a - b) ** 2 for a, b in zip(rows[i], rows[j]))

    inside = sorted(squared(i, j) for i in range(n) for j in range(n) if i != j)
    middle = inside[(len(inside) - 1) // 2]

    def kernel(i, j):
        return sum(math.exp(-squared(i, j) / (width * middle)) for width in WIDTHS) / len(WIDTHS)

    first, second = range(n), range(n, len(rows))
    means = [sum(kernel(i, j) for i in a for j in b) / (len(a) * len(b)) for a, b in ((first, first), (second, second))]
    between = sum(kernel(i, j) for i in first for j in second) / (len(first) * len(second))
    return math.sqrt(max(0.0, sum(means) - 2 * between))


def test_it_is_the_definition():
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1.0
    assert float(maximum_mean_discrepancy(x, y)) == pytest.approx(by_loops(x, y), abs=1e-9)


@given(seed=st.integers(0, 10_000), n=st.integers(2, 12), m=st.integers(2, 12), shift=st.floats(-50, 50))
@settings(max_examples=60)
def test_it_lies_between_nothing_and_the_largest(seed, n, m, shift):
    source = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 2, generator=source), torch.randn(m, 2, generator=source) + shift
    found = float(maximum_mean_discrepancy(x, y))
    assert 0.0 <= found <= LARGEST + 1e-9
    assert float(maximum_mean_discrepancy(x, x.flip(0))) == pytest.approx(0.0, abs=1e-6)


def test_equal_samples_have_no_spread_and_an_end():
    assert float(maximum_mean_discrepancy(torch.ones(4, 2), torch.ones(4, 2))) == 0.0
    assert math.isfinite(float(maximum_mean_discrepancy(torch.ones(4, 2), torch.zeros(4, 2))))


# ---------------------------------------------------------------------- weights


def test_equal_discrepancies_are_federated_averaging():
    found = [run(own, rounds=3)[0].model.state_dict() for own in (Telling([0.5] * 4), FedGAN())]
    assert_states_equal(*found, atol=1e-12, rtol=0.0)


def moved(told, **options):
    """Return by client its update, and by how much the server moved."""
    executor = Noting()
    gan = ring_gan(optimizer=sgd).double()
    before = {name: value.detach().clone() for name, value in gan.named_parameters()}
    server, _, _ = run(Telling(told, **options), executor, gan=gan, rounds=1)
    change = {name: value.detach() - before[name] for name, value in server.model.named_parameters()}
    return {update.client_id: update.delta for _, update in executor.seen}, change


@pytest.mark.parametrize(
    "told, weights",
    [
        ([0.1, 0.1 + math.log(3.0), 0.5, 0.5], [math.exp(0.1), 3 * math.exp(0.1), math.exp(0.5), math.exp(0.5)]),
        ([0.0, 1.4, 0.0, 0.0], [1, 4, 1, 1]),  # a claim beyond the cap
    ],
)
def test_weights_are_the_softmax_up_to_the_cap(told, weights):
    """One discrepancy larger by log 3 than another: three times its weight, .75 and .25 of the two."""
    deltas, change = moved(told, max_ratio=4.0)
    for name, value in change.items():
        wanted = sum(w * deltas[k][name] for k, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0, 10.0, 7.3])
@pytest.mark.parametrize("claim", [0.0, 0.4, 1.0986122886681098, 1.1, LARGEST])
def test_no_credit_is_more_than_all(ratio, claim):
    """exp(log 3) / 3 is more than 1 in floating point, and no discount may be."""
    assert 0.0 < IFLGAN(max_ratio=ratio).credit({"discrepancy": torch.tensor(claim)}) <= 1.0


@pytest.mark.parametrize("threshold, keeps", [("mean", [1, 2, 3]), ("median", [1, 2])])
def test_a_claim_lifts_the_mean_and_not_the_median(threshold, keeps):
    algorithm = Telling([LARGEST, 0.1, 0.2, 0.3], threshold=threshold)
    server, _, _ = run(algorithm, rounds=1)
    below = [k for k, own in enumerate(algorithm.told) if own < float(server.algorithm_state["threshold"])]
    assert below == keeps


def test_small_minibatches_are_enough():
    data = ring_data(batch_size=1)
    server, _, _ = run(IFLGAN(num_samples=8), data=data, local_steps=1, rounds=2)
    assert 0.0 < float(server.algorithm_state["threshold"]) <= LARGEST


def test_a_ratio_of_one_is_the_aggregator_s_mean():
    deltas, change = moved([0.0, 1.0, 0.2, 1.4], max_ratio=1.0)
    for name, value in change.items():
        torch.testing.assert_close(value, sum(own[name] for own in deltas.values()) / 4, atol=1e-12, rtol=1e-9)


# ---------------------------------------------------------------------- who keeps what it had


@pytest.mark.parametrize("transforms", [[], [TopK(share=0.01)], [ClipUpdates(max_norm=0.05), Int8()]], ids=len)
@pytest.mark.parametrize("name", EXECUTORS)
def test_a_client_below_the_mean_goes_on_with_what_it_had_and_others_take_the_server_s(name, transforms):
    """To the bit, whatever becomes of its update on the way. Nobody moves in the second round."""
    seen = []

    class Watch(Telling):
        def answer(self, visit):
            for row, task in enumerate(visit.tasks):
                now = {n: (v[row] if visit.is_stacked else v).clone() for n, v in visit.parameters.items()}
                seen.append((task, now))
            return super().answer(visit)

    rates = {"learning_rate": StepRounds({0: 1.0, 1: 0.0})}
    run(
        Watch([0.2, 0.8, 0.7, 0.8]), EXECUTORS[name](), rounds=2, schedules=rates, transforms=transforms
    )  # the mean is .625
    ends = {(task.round, task.client_id): (task, own) for task, own in seen}
    for k in range(4):
        _, before = ends[0, k]
        task, after = ends[1, k]
        served = {n: v for n, v in task.state.items() if n in after}
        assert any(bool((before[n] != served[n]).any()) for n in after), "a positive control"
        wanted = before if k == 0 else served
        assert_states_equal(after, {n: wanted[n] for n in after}, atol=0.0, rtol=0.0)


# ---------------------------------------------------------------------- executors, resume


def test_executors_agree():
    found = [
        everything(run(IFLGAN(num_samples=16), own(), gan=ring_gan(optimizer=adam).double(), rounds=4))
        for own in EXECUTORS.values()
    ]
    for other in found[1:]:
        assert_states_equal(found[0], other, atol=1e-9, rtol=1e-7)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole = run(IFLGAN(num_samples=16), gan=ring_gan(optimizer=adam), rounds=5)
    _, _, trainer = run(IFLGAN(num_samples=16), gan=ring_gan(optimizer=adam), rounds=2)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    again = FederatedOrchestrator(
        rounds=5, local_steps=2, aggregator=WeightedMean("uniform"), algorithm=IFLGAN(num_samples=16),
        executor=SequentialExecutor(),
    )  # fmt: skip
    server, trainer = ServerModule(ring_gan(optimizer=adam, seed=7)), quiet_trainer(again)
    trainer.fit(server, datamodule=ring_data(), ckpt_path=tmp_path / "cut.ckpt")
    assert_states_equal(everything((server, again, trainer)), everything(whole))


def test_labelled_pictures_in_stacks_and_alone():
    found = [
        everything(run(IFLGAN(), own(), gan=labelled(), data=digits_data(), rounds=2))
        for own in (SequentialExecutor, VectorizedExecutor)
    ]
    assert_states_equal(*found, atol=1e-9, rtol=1e-6)
    assert 0.0 < float(found[0]["threshold"]) < LARGEST


# ---------------------------------------------------------------------- claims, and what is refused


@pytest.mark.parametrize("claim", [math.nan, math.inf, -3.0, 7.0])
def test_a_claim_that_cannot_be_is_refused_by_name(claim):
    class Liar(SequentialExecutor):
        def run(self, tasks):
            for update in super().run(tasks):
                if update.client_id == 1:
                    extras = {**update.extras, "algorithm/discrepancy": torch.tensor(claim, dtype=torch.float64)}
                    update = dataclasses.replace(update, extras=extras)
                yield update

    options = {"validator": UpdateValidator(), "rules": RoundRules(min_report_fraction=0.5)}
    server, orchestrator, _ = run(IFLGAN(num_samples=8), Liar(), **options)
    assert orchestrator.ledger.events.get("rejected", 0) == 3
    assert all(bool(value.isfinite().all()) for value in server.model.state_dict().values())


class Sampling(SomebodysGAN):
    """Samples in a way of its own."""

    def sample(self, n):
        return torch.zeros(n, 2)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: run(IFLGAN(), aggregator=CoordinateMedian()), "weighs clients; got CoordinateMedian"),
        (lambda: run(IFLGAN(), Summing(), secure=SecureAggregation(max_update=1.0)), "discrepancy"),
        (lambda: run(IFLGAN(), gan=private_gan()), "no privacy to keep: .*; got model.privacy"),
        (lambda: run(IFLGAN(), gan=SomebodysGAN()), "samples are compared with data"),
        (lambda: run(IFLGAN(), gan=Sampling()), r"without sample\(num_samples, \*, labels, generator, raw\)"),
        (lambda: IFLGAN(max_ratio=0.5), "max_ratio"),
        (lambda: IFLGAN(num_samples=1), "num_samples"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ConfigurationError, match=words):
        make()
