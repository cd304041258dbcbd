"""Client-level privacy: sensitivity by brute force, the noise, and what a run tells."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan_lightning import ConfigurationError, SequentialExecutor, VectorizedExecutor
from fedgan_lightning.aggregators import WeightedMean
from fedgan_lightning.algorithms import FedGAN, FedProx
from fedgan_lightning.federation.entry_sums import EntrySums
from fedgan_lightning.federation.privacy_keeper import PrivacyKeeper, effective_noise
from fedgan_lightning.federation.ranks import Ranks
from fedgan_lightning.privacy import ClientLevelPrivacy
from fedgan_lightning.samplers import AllClients, AvailableClients, FractionOfClients, PoissonSampling, SelectedClients
from tests.conftest import assert_states_equal, federate, ring_data, ring_gan, sgd
from tests.privacy.parts import answer, chain, length, received
from tests.privacy.parts import served as served_settings
from tests.privacy.parts import settings as private_settings


def released(answers, by):
    """Return the sum over the divisor of what the server makes of these answers, without noise."""
    first = received(answer(), by)
    stages = by.stages_of({}, first.delta.layout, first.extras.layout)
    sums = EntrySums(by.rules(stages), aggregator=WeightedMean("uniform"), sizes=[10] * 5)
    for own in answers:
        sums.add(received(own, by))
    return sums.totals(Ranks())[0]


HOSTILE = {
    "ordinary": answer(9),
    "huge": answer(9, scale=1e9),
    "tiny": answer(9, scale=1e-9),
    "zero": answer(9, scale=0.0),
    "many records": answer(9, size=1000),
    "opposite": answer(1, scale=-50.0),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_one_client_moves_the_release_by_at_most_the_bound_over_the_divisor(kind):
    """Brute force over neighbours: one client more or less, whatever it sends."""
    by, others = chain(clip=0.7), [answer(seed, scale=3.0) for seed in range(4)]
    without, with_it = released(others, by), released([*others, HOSTILE[kind]], by)
    difference = {name: with_it[name].double() - without[name].double() for name in without}
    assert length(difference) <= 0.7 / 5.0 * (1 + 1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_passes_no_clip_and_is_refused(value):
    """FLIP PR#833, and Python's min(1, nan) = 1: a factor of NaN would be a free pass."""
    spoiled = answer(9)
    spoiled.delta.vectors[torch.float32][3] = value
    own = received(spoiled, chain(clip=0.7))
    assert not torch.isfinite(own.delta.vectors[torch.float32]).all(), "and the check of finite numbers comes next"
    data = ring_data()
    poison = _Poison(value)
    server, orchestrator, _ = federate(
        ring_gan(optimizer=sgd), data, executor=poison, **private_settings(noise_multiplier=0.0)
    )
    assert all(torch.isfinite(p).all() for p in server.model.parameters())
    assert orchestrator.ledger.events["rejected"] == 3


class _Poison(SequentialExecutor):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def run(self, tasks):
        for own in super().run(tasks):
            if own.client_id == 1:
                next(iter(own.delta.values())).flatten()[0] = self.value
            yield own


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), bound=st.floats(1e-3, 1e3), scale=st.floats(1e-3, 1e4), s=st.floats(0.1, 10))
def test_both_networks_are_clipped_together_with_their_scales(seed, bound, scale, s):
    """opacus#202: bounds per part add up to sqrt(sum C^2); one joint bound does not."""
    scales = {"generator": s}
    own = received(answer(seed, scale=scale), chain(clip=bound, scales=scales))
    before, after = length(answer(seed, scale=scale).delta, scales), length(own.delta, scales)
    assert after <= bound * (1 + 1e-6)
    assert after == pytest.approx(min(before, bound), rel=2e-6)
    factor = min(1.0, bound / before)
    for name, value in answer(seed, scale=scale).delta.items():
        torch.testing.assert_close(own.delta[name], value * factor, rtol=1e-5, atol=0.0)


def keeper_of(data=None, *, sampler=None, rounds=5, **options):
    chosen = {"clip": 0.3, "noise_multiplier": 1.5, "delta": 1e-4, **options}
    federation = type("Federation", (), {})()
    federation.privacy, federation.rounds = ClientLevelPrivacy(**chosen), rounds
    federation.clients = sampler if sampler is not None else AllClients()
    federation.algorithm = FedGAN()
    federation.schedules, federation.local_steps, federation.ranks = {}, 2, Ranks()
    return PrivacyKeeper(federation, ring_gan(), data if data is not None else ring_data())


def test_noise_has_the_variance_that_is_promised_and_comes_once():
    """flower#1892: wrong by sqrt(n), and drawn twice."""
    by = keeper_of()
    names = {"discriminator.w": torch.zeros(100_000), "generator.w": torch.zeros(50_000)}
    found = _noised(by, names)
    std = 1.5 * 0.3 / 4
    for own in found.values():
        assert float(own.std()) == pytest.approx(std, rel=0.01)
        assert float((own / own.std()).pow(4).mean()) == pytest.approx(3.0, abs=0.1)
        assert abs(float(own.mean())) < 4 * std / len(own) ** 0.5


def test_scales_scale_the_noise():
    found = _noised(
        keeper_of(scales={"generator": 3.0}), {"d.w": torch.zeros(50_000), "generator.w": torch.zeros(50_000)}
    )
    assert float(found["generator.w"].std() / found["d.w"].std()) == pytest.approx(3.0, rel=0.03)


def _noised(by, delta):
    from fedgan_lightning.protocol import Aggregate

    by.begin_round(0)
    return by.noised(Aggregate(delta, {}, 0, 0)).delta


def test_noise_does_not_follow_from_the_seed():
    """flower#7225: noise of a seeded generator can be drawn again by everybody who has the settings."""
    runs = [federate(ring_gan(optimizer=sgd), ring_data(), **private_settings(testing_seed=None))[0] for _ in range(2)]
    first, second = (own.model.state_dict() for own in runs)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_testing_seed_makes_a_run_repeatable_and_says_so():
    runs = [federate(ring_gan(optimizer=sgd), ring_data(), **private_settings()) for _ in range(2)]
    assert_states_equal(*(own.model.state_dict() for own, _, _ in runs))
    facts = runs[0][1].keeper.facts()
    assert facts["note"].startswith("NOT PRIVATE")
    assert facts["client"]["words"][0].startswith("NOT PRIVATE (seeded noise)")
    assert "NOT PRIVATE" in Path("privacy.json").read_text()


def test_secret_cohorts_have_the_right_sizes_and_cannot_be_predicted():
    """plato#182: a sampler that another replaced; opacus#813: fixed sizes counted as Poisson."""
    by = keeper_of(ring_data(num_clients=40, num_samples=1280), sampler=PoissonSampling(0.3, secret=True))
    sizes = np.array([len(by.begin_round(0)) for _ in range(2000)])
    assert sizes.mean() == pytest.approx(12, abs=0.4)
    assert sizes.var() == pytest.approx(40 * 0.3 * 0.7, rel=0.15)
    fixed = keeper_of(
        ring_data(num_clients=40, num_samples=1280), sampler=FractionOfClients(0.25, secret=True), accountant="rdp"
    )
    assert {len(set(fixed.begin_round(0))) for _ in range(20)} == {10}


def test_the_event_follows_from_the_class_of_the_sampler():
    data = ring_data(num_clients=40, num_samples=1280)
    trace = Path("trace.csv")
    trace.write_text("client,first_round,last_round\n" + "".join(f"{k},0,9\n" for k in range(40)))
    kinds = {
        "poisson": {"sampler": PoissonSampling(0.3, secret=True)},
        "fixed_size": {"sampler": FractionOfClients(0.3, secret=True), "accountant": "rdp"},
        "all": {"sampler": AllClients()},
        "all ": {"sampler": SelectedClients([0, 1, 2])},
        "all  ": {"sampler": AvailableClients(str(trace)), "most_rounds": 2, "expected_clients": 10},
    }
    for kind, options in kinds.items():
        by = keeper_of(data, **options)
        assert by.guarantees(planned=True)[0].release.sampling == kind.strip()

    class Mine(PoissonSampling):
        def sample(self, *, num_clients, round, seed):
            return (0,)

    with pytest.raises(ConfigurationError, match="the accountant has no bound for Mine; got Mine. "):
        keeper_of(data, sampler=Mine(0.3, secret=True))
    with pytest.raises(ConfigurationError, match="amplification by sampling needs a secret cohort"):
        keeper_of(data, sampler=PoissonSampling(0.3))


def test_nobody_takes_part_more_often_than_the_cap_and_that_is_what_is_charged():
    by = keeper_of(most_rounds=2, expected_clients=4, rounds=9)
    for round in range(4):
        by.begin_round(round)
        cohort = by.admitted((0, 1) if round < 3 else (0, 1, 2), round)
        assert cohort == ((0, 1) if round < 2 else () if round == 2 else (2,))
    assert sum(own.count for own in by.ledger.of("client")) == 2
    assert by.guarantees(planned=True)[0].release.count == 2


def test_empty_cohorts_are_charged_and_noised_and_the_server_steps():
    """opacus#161: an empty sample that is skipped tells that it was empty."""
    own = private_settings(testing_seed=3)
    before = ring_gan(optimizer=sgd).state_dict()
    server, orchestrator, _ = federate(
        ring_gan(optimizer=sgd), ring_data(), **own, clients=PoissonSampling(1e-9, secret=True)
    )
    assert sum(o.count for o in orchestrator.keeper.ledger.of("client")) == 3
    assert server.rounds_completed == 3
    after = server.model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before if "weight" in name)


def test_numbers_of_records_change_no_bit():
    """FL4Health PR#10: a denominator of samples."""
    few, many = (ring_data(num_samples=n, batch_size=8) for n in (64, 640))
    for data in (few, many):
        data.train_samples.x[:] = 0.5  # so that nothing but N_k differs
    results = [federate(ring_gan(optimizer=sgd), data, **private_settings(), seed=0)[0] for data in (few, many)]
    assert_states_equal(*(own.model.state_dict() for own in results))


def test_without_noise_and_bound_it_is_the_uniform_mean():
    """Augenstein et al. 2020 with S infinite and z = 0: methods.md section 5(a)."""
    plain = {"aggregator": WeightedMean("uniform"), "optimizer_state": "reset", "local_steps": 1, "rounds": 3}
    reference = federate(ring_gan(optimizer=sgd), ring_data(), **plain)[0]
    private = federate(ring_gan(optimizer=sgd), ring_data(), **private_settings(clip=1e9, noise_multiplier=0.0))[0]
    assert_states_equal(private.model.state_dict(), reference.model.state_dict())


def test_the_bound_holds_after_all_local_steps():
    """APPFL#349: a clip of every step's gradient bounds no sum of K steps."""
    own = {**private_settings(clip=0.01, noise_multiplier=0.0), "local_steps": 20, "rounds": 1}
    data = ring_data()
    before = ring_gan(optimizer=sgd).state_dict()
    server, _, _ = federate(ring_gan(optimizer=sgd), data, **own)
    moved = {n: v - before[n] for n, v in server.model.state_dict().items() if n.startswith(("gen", "disc"))}
    assert 0.001 < length(moved) <= 0.01 * (1 + 1e-5)


@pytest.mark.parametrize("start", [0.1, 0.9, 1.1, 10.0])
def test_the_bound_finds_the_median_of_the_norms(start):
    """Flower's rule for the fraction that is not clipped, fed the fraction that is, runs to 0 or to infinity."""
    privacy = ClientLevelPrivacy(clip=start, noise_multiplier=1.0, delta=1e-3, clipping="adaptive")
    drawn, clip = np.random.default_rng(0), start
    for _ in range(400):
        below = float((np.exp(0.3 * drawn.standard_normal(200)) <= clip).mean())
        clip = privacy.next_clip(clip, below)
    assert clip == pytest.approx(1.0, abs=0.1)


def test_the_noise_of_the_count_is_paid_for_by_that_of_the_updates():
    """opacus#757: for z >= 2 sigma_b the square root is of a negative number."""
    privacy = ClientLevelPrivacy(clip=1.0, noise_multiplier=1.0, delta=1e-3, clipping="adaptive")
    assert privacy.split_noise(1.0, 100.0)[0] == pytest.approx(1.005038, abs=1e-6)
    with pytest.raises(ConfigurationError, match="more than half the noise multiplier; got count_noise=0.5 with z=1"):
        ClientLevelPrivacy(clip=1.0, noise_multiplier=1.0, clipping="adaptive", count_noise=0.5).split_noise(1.0, 100.0)


def test_adaptive_clipping_moves_the_bound_in_a_run_by_what_clients_say():
    data = ring_data(num_clients=8, num_samples=640)
    own = private_settings(clip=1e-4, clipping="adaptive", noise_multiplier=0.0)
    _, orchestrator, _ = federate(ring_gan(optimizer=sgd), data, **own)
    assert orchestrator.keeper.clip == pytest.approx(1e-4 * math.exp(3 * 0.2 * 0.5), rel=1e-6), "all were clipped"
    _, again, _ = federate(ring_gan(optimizer=sgd), data, **{**own, "executor": VectorizedExecutor()})
    assert again.keeper.clip == orchestrator.keeper.clip


@pytest.mark.parametrize("make", [private_settings, served_settings])
def test_stacked_and_sequential_clients_release_the_same(make):
    first, second = (
        federate(ring_gan(optimizer=sgd), ring_data(), executor=executor, **make())[0]
        for executor in (SequentialExecutor(), VectorizedExecutor())
    )
    assert_states_equal(first.model.state_dict(), second.model.state_dict(), atol=1e-5)


def test_proximal_clients_may_be_private():
    _, orchestrator, _ = federate(ring_gan(optimizer=sgd), ring_data(), **private_settings(), algorithm=FedProx(mu=0.1))
    assert orchestrator.keeper.guarantees()[0].release.count == 3


def test_nothing_of_single_clients_is_told():
    seen = []

    class Curious(L.Callback):
        def on_round_start(self, trainer, server, info):
            seen.append(info.cohort)

        def on_client_end(self, trainer, server, update):
            seen.append(update)

        def on_attempt_end(self, trainer, server, report):
            assert report.plain()["clients"] == []
            assert report.metrics() == {}

    _, orchestrator, _ = federate(ring_gan(optimizer=sgd), ring_data(), Curious(), **private_settings())
    assert seen == [(), (), ()]
    assert set(orchestrator.keeper.metrics()) == {"privacy/epsilon"}


def test_a_budget_ends_the_run_before_the_round_that_would_exceed_it(caplog):
    by = private_settings(noise_multiplier=2.0, budget=6.0)
    server, orchestrator, _ = federate(ring_gan(optimizer=sgd), ring_data(), **{**by, "rounds": 50})
    spent = orchestrator.keeper.guarantees()[0].epsilon
    assert 0 < server.rounds_completed < 50
    assert spent <= 6.0
    assert "the budget is 6: training ends here" in caplog.text


def test_epsilon_is_calibrated_to_all_rounds():
    by = keeper_of(noise_multiplier=None, epsilon=8.0, rounds=20, accountant="rdp")
    assert by.guarantees(planned=True)[0].epsilon == pytest.approx(8.0, rel=1e-3)


def test_delta_below_one_over_the_clients():
    assert keeper_of(delta=None).delta == pytest.approx(4**-1.1)
    with pytest.raises(ConfigurationError, match="delta must be below one over the number of clients; got 0.5 with 4"):
        keeper_of(delta=0.5)


def test_few_clients_are_warned(caplog):
    keeper_of()
    assert "client-level privacy with 4 clients: below about 100" in caplog.text


def test_rounding_to_a_ring_lengthens_the_update_a_little():
    from fedgan_lightning import SecureAggregation

    z = effective_noise(1.0, clip=1.0, secure=SecureAggregation(max_update=4.0), numbers=1_000_000)
    assert z == pytest.approx(1 / (1 + 4.0 / 2**30 * 500), rel=1e-9)


def test_files_of_the_run_say_what_was_spent():
    federate(ring_gan(optimizer=sgd), ring_data(), **private_settings())
    (release,) = json.loads(Path("privacy.json").read_text())["releases"]
    assert release["count"] == 3
    assert release["clip"] == 0.1
    assert "key" not in Path("privacy.json").read_text()
