"""Client-level privacy of answers about samples: MD-GAN, whose generator learns from a noised sum of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fedgan_lightning import ConfigurationError, SequentialExecutor, VectorizedExecutor
from fedgan_lightning.algorithms import MDGAN, UAGAN
from fedgan_lightning.samplers import PoissonSampling
from tests.conftest import assert_states_equal, federate, ring_data, ring_gan, sgd
from tests.privacy.parts import settings as private_settings

SYNC = {"generator": "server", "discriminator": "local"}
EXECUTORS = [SequentialExecutor, VectorizedExecutor]


class Watched(MDGAN):
    """Keeps what the server learns from."""

    def __init__(self, **options):
        super().__init__(num_batches=1, num_samples=32, **options)
        self.seen = []

    def server_step(self, server, total):
        self.seen.append(total.extras["algorithm/feedback"].clone())
        super().server_step(server, total)


def run(algorithm=None, *, gan=None, executor=SequentialExecutor, clients=None, rounds=3, **privacy):
    algorithm = Watched() if algorithm is None else algorithm
    options = {**private_settings(**privacy), "sync": SYNC, "rounds": rounds}
    if clients is not None:
        options["clients"] = clients
    gan = ring_gan(optimizer=sgd).double() if gan is None else gan
    return (*federate(gan, ring_data(), algorithm=algorithm, executor=executor(), **options), algorithm)


def test_without_noise_and_with_a_wide_bound_it_is_plain_feedback():
    private, _, _, own = run(clip=1e6, noise_multiplier=0.0)
    options = {name: value for name, value in private_settings().items() if name != "privacy"}
    plain_algorithm = Watched()
    gan = ring_gan(optimizer=sgd).double()
    plain, _, _ = federate(gan, ring_data(), algorithm=plain_algorithm, sync=SYNC, **options)
    for mine, theirs in zip(own.seen, plain_algorithm.seen):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)
    assert_states_equal(private.model.state_dict(), plain.model.state_dict(), atol=1e-12)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_answer_is_cut_as_a_whole(executor):
    """Clients' answers are far longer than the bound: the mean of four of length C is no longer than C."""
    _, _, _, wide = run(clip=1e6, noise_multiplier=0.0)
    _, _, _, own = run(executor=executor, clip=1e-4, noise_multiplier=0.0)
    assert all(float(own.norm()) > 1e-3 for own in wide.seen)
    assert all(0.2e-4 < float(own.norm()) <= 1e-4 for own in own.seen)


def test_executors_agree():
    first, second = (run(executor=own, clip=1e-3)[0] for own in EXECUTORS)
    assert_states_equal(first.model.state_dict(), second.model.state_dict(), atol=1e-10)


def test_the_noise_has_the_deviation_that_is_promised():
    _, _, _, own = run(clip=1e-5, noise_multiplier=200.0, rounds=40, testing_seed=3)
    drawn = torch.stack(own.seen).flatten()
    assert float(drawn.std()) == pytest.approx(200.0 * 1e-5 / 4, rel=0.05)
    assert abs(float(drawn.mean())) < 4 * 200e-5 / 4 / len(drawn) ** 0.5


def test_a_cohort_of_nobody_is_noise_all_the_same():
    seldom = PoissonSampling(0.05, secret=True)
    _, orchestrator, _, own = run(clients=seldom, rounds=6, clip=1e-6, noise_multiplier=2.0)
    assert len(own.seen) == 6
    assert all(float(value.std()) == pytest.approx(2e-6 / (0.05 * 4), rel=0.4) for value in own.seen)
    assert orchestrator.keeper.ledger.of("client")[0].count == 6


def test_it_costs_what_updates_of_parameters_cost():
    facts = [run(rounds=5)[1].keeper.facts()["client"]]
    Path("privacy.json").unlink()  # another run in this directory would go on with its ledger
    options = {**private_settings(), "rounds": 5}
    facts.append(federate(ring_gan(optimizer=sgd), ring_data(), **options)[1].keeper.facts()["client"])
    assert facts[0]["epsilon"] == facts[1]["epsilon"]
    assert math.isfinite(facts[0]["epsilon"])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_sample_has_a_bound_of_its_own(executor):
    """|F_i| <= c / sqrt(b): of b samples each has at most c / b, whatever the discriminator says."""
    _, _, _, wide = run(clip=1e6, noise_multiplier=0.0, rounds=1, executor=executor)
    longest = float(wide.seen[0].flatten(1).norm(dim=1).max()) * 32
    c = longest / 10
    _, _, _, own = run(Watched(max_sample_norm=c), clip=1e6, noise_multiplier=0.0, rounds=1, executor=executor)
    norms = own.seen[0].flatten(1).norm(dim=1) * 32
    assert 0.3 * c < float(norms.max()) <= c * (1 + 1e-9)
    _, _, _, same = run(Watched(max_sample_norm=1e9), clip=1e6, noise_multiplier=0.0, rounds=1, executor=executor)
    torch.testing.assert_close(same.seen[0], wide.seen[0], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    ("algorithm", "says"),
    [
        (MDGAN(num_batches=2, num_samples=32), "what MDGAN sends would travel beside it"),
        (UAGAN(num_samples=32), "what UAGAN sends would travel beside it"),
        (UAGAN(num_samples=32, summed=True), "what UAGAN sends would travel beside it"),
    ],
)
def test_answers_that_are_no_sum_with_a_bound_are_refused(algorithm, says):
    with pytest.raises(ConfigurationError, match=says):
        run(algorithm)


def test_discriminators_that_go_round_are_refused():
    with pytest.raises(ConfigurationError, match="a network that clients hand on"):
        options = {**private_settings(), "sync": {"generator": "server", "discriminator": "exchange"}}
        federate(ring_gan(optimizer=sgd), ring_data(), algorithm=Watched(), **options)


def test_shares_of_noise_are_refused():
    from fedgan_lightning.federation.secure import SecureAggregation

    with pytest.raises(ConfigurationError, match="distributed noise covers parameter updates"):
        options = {**private_settings(noise="distributed"), "sync": SYNC, "secure": SecureAggregation(max_value=64.0)}
        federate(ring_gan(optimizer=sgd), ring_data(), algorithm=Watched(), **options)
