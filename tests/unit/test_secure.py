"""Secure aggregation without its wire: numbers as summands, what is refused, a round of which only a sum is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan_lightning import FederatedOrchestrator, RoundRules, SecureAggregation, SequentialExecutor, UpdateValidator
from fedgan_lightning.aggregators import CoordinateMedian, GeometricMedian, Krum, TrimmedMean, WeightedMean
from fedgan_lightning.callbacks import HeldAbsentGap
from fedgan_lightning.errors import ConfigurationError, UpdateError
from fedgan_lightning.evaluation.per_class import ClientDistances
from fedgan_lightning.federation.secure import Ring, Summand, sizes_of
from fedgan_lightning.protocol import ClientFailure, ClientReport, ClientUpdate, UpdateSum
from tests.conftest import assert_states_equal, digits_data, federate, finish, ring_data, ring_gan

SQUARE, FIRST, COUNT = (f"optimizer/0/g.w/{name}" for name in ("exp_avg_sq", "exp_avg", "step"))

# ---------------------------------------------------------------------- numbers


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from([(32, 1), (64, 1), (64, 2)]), st.floats(1e-3, 1e6))
def test_a_number_comes_back_to_half_a_step(seed, kind, bound):
    ring = Ring(kind[0], bound, words=kind[1])
    values = np.random.default_rng(seed).uniform(-bound, bound, 20)
    values[:2] = bound, -bound
    step = ring.step / 2**48 if ring.words == 2 else ring.step
    numbers = ring.encode(values)
    assert (numbers.dtype, numbers.size) == (np.dtype(f"uint{ring.bits}"), 20 * ring.words)
    # float64 itself ends at 2^-53 of the bound
    assert np.abs(ring.decode(numbers) - values).max() <= step / 2 + bound * 2.0**-52


def states_of(client_id: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(client_id)
    normal = torch.randn(3, 5, generator=generator)
    return {
        "delta": {"g.w": 0.1 * normal, "g.b": 1e-4 * normal[0].double()},
        "extras": {
            "g.running_mean": 100 * normal[1],
            "g.running_var": normal[2].double() ** 2,
            FIRST: 1e-6 * normal,
            SQUARE: 1e-15 * normal**2,
            COUNT: torch.tensor(float(10_000 + client_id)),
        },
        "metrics": {"loss_d": torch.tensor(1.5 + client_id, dtype=torch.float64)},
    }


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 5_000), min_size=3, max_size=6), st.integers(0, 2))
def test_the_sum_is_the_weighted_mean_to_the_bound_that_is_stated(sizes, lost):
    """With the weight of clients that are lost in the shares, and not in the sum."""
    secure, total = SecureAggregation(), sum(sizes)
    kept = range(len(sizes) - lost)
    share = sum(sizes[k] for k in kept) / total
    groups = ("delta", "extras", "metrics")
    summands = [Summand.of(states_of(k), shares=dict.fromkeys(groups, sizes[k] / total), secure=secure) for k in kept]
    found = summands[0]
    for own in summands[1:]:
        found = found.plus(own.narrow, own.wide)
    means = found.means(dict.fromkeys(groups, share), secure=secure)
    for group, state in states_of(0).items():
        for name, like in state.items():
            exact = sum(sizes[k] * states_of(k)[group][name].double() for k in kept) / sum(sizes[k] for k in kept)
            bound = secure.error_bound(group, name, num_clients=len(kept), share=share)
            rounding = torch.finfo(like.dtype).eps * float(exact.abs().max())
            assert means[group][name].dtype == like.dtype
            assert float((means[group][name].double() - exact).abs().max()) <= bound + rounding, name


def test_steps_follow_the_bounds():
    tight, loose = SecureAggregation(max_update=1.0, max_value=16.0), SecureAggregation()
    assert tight.error_bound("delta", num_clients=4) == 4 * 2.0**-30 / 2
    assert loose.error_bound("delta", num_clients=4) == 4 * tight.error_bound("delta", num_clients=4)
    assert loose.error_bound("extras", num_clients=4, share=0.5) == 4 * 1024 * 2.0**-62
    assert tight.error_bound("extras", num_clients=2) == 16 * 2.0**-62
    assert loose.error_bound("extras", SQUARE, num_clients=2) == 1024 * 2.0**-110
    assert sizes_of(Summand.of(states_of(0), shares={}.fromkeys(states_of(0), 1.0), secure=loose).layouts) == (
        20,
        5 + 5 + 15 + 30 + 1 + 1,
    )


@pytest.mark.parametrize(
    "group, name, value, reason",
    [
        ("delta", "g.w", math.nan, "got NaN or infinity in delta 'g.w'. Lower the client's learning rate"),
        ("delta", "g.b", -math.inf, "got NaN or infinity in delta 'g.b'"),
        ("delta", "g.w", 4.5, "at most 4 in absolute value .* got 4.5 in 'g.w'. Raise .*secure.max_update"),
        ("extras", "g.running_var", 1e4, "got 1e\\+04 in 'g.running_var'. Raise .*secure.max_value"),
        ("metrics", "loss_d", math.nan, "NaN or infinity in metrics 'loss_d'"),
    ],
)
def test_what_a_sum_would_hide_is_refused_before_it(group, name, value, reason):
    states = states_of(1)
    states[group][name].view(-1)[0] = value
    with pytest.raises(UpdateError, match=reason):
        Summand.of(states, shares=dict.fromkeys(states, 0.25), secure=SecureAggregation())
    if math.isfinite(value):
        wide = SecureAggregation(max_update=8.0, max_value=2.0**20)
        Summand.of(states, shares=dict.fromkeys(states, 0.25), secure=wide)


def test_a_sum_of_numbers_that_are_still_masked_is_refused():
    states = states_of(1)
    found = Summand.of(states, shares=dict.fromkeys(states, 1.0), secure=SecureAggregation())
    generator = np.random.default_rng(0)
    masked = found.plus(
        generator.integers(0, 2**32, found.narrow.size, dtype=np.uint32),
        generator.integers(0, 2**64, found.wide.size, dtype=np.uint64),
    )
    with pytest.raises(UpdateError, match="out of range: masks do not cancel"):
        masked.means(dict.fromkeys(states, 1.0), secure=SecureAggregation())


# ---------------------------------------------------------------------- what it cannot go with


@pytest.mark.parametrize(
    "option, reason",
    [
        ({"threshold": 0.5}, "secure.threshold .* in \\(0.5, 1\\]; got 0.5"),
        ({"threshold": 1.1}, "secure.threshold"),
        ({"max_update": 0.0}, "secure.max_update .* above 0; got 0.0"),
        ({"max_value": math.inf}, "secure.max_value .* finite number above 0; got inf"),
    ],
)
def test_settings_out_of_range_are_refused(option, reason):
    with pytest.raises(ConfigurationError, match=reason):
        SecureAggregation(**option)


def test_the_threshold_is_always_more_than_half_and_three():
    assert [SecureAggregation().needed(n) for n in (3, 4, 5, 10)] == [3, 3, 3, 6]
    assert [SecureAggregation(threshold=0.51).needed(n) for n in (3, 4, 10, 100)] == [3, 3, 6, 51]
    assert SecureAggregation(threshold=1.0).needed(7) == 7


@pytest.mark.parametrize(
    "federation, reason",
    [
        ({"aggregator": Krum(num_bad=1)}, "got Krum, which needs single updates. Use WeightedMean"),
        ({"aggregator": CoordinateMedian()}, "got CoordinateMedian"),
        ({"aggregator": TrimmedMean(0.2)}, "got TrimmedMean"),
        ({"aggregator": GeometricMedian()}, "got GeometricMedian"),
        ({"validator": UpdateValidator(max_norm=1.0)}, "got a validator of updates. Take it out"),
        (
            {"rules": RoundRules(stale_updates="discount")},
            "got rules.stale_updates=discount. Set rules.stale_updates to drop",
        ),
        ({"rules": RoundRules(over_selection=1.5)}, "got rules.over_selection=1.5"),
    ],
)
def test_what_needs_single_updates_is_refused_in_the_constructor(federation, reason):
    with pytest.raises(ConfigurationError, match=f"everything must work with sums alone; {reason}"):
        FederatedOrchestrator(secure=SecureAggregation(), **federation)


def test_a_simulation_and_a_cohort_of_two_are_refused():
    with pytest.raises(
        ConfigurationError,
        match="hides sites from their server; got federation.secure in a simulation",
    ):
        federate(ring_gan(), ring_data(), rounds=1, secure=SecureAggregation())
    with pytest.raises(ConfigurationError, match="must hide a client among at least 2 others; got a cohort of 2"):
        federate(ring_gan(), ring_data(num_clients=2), rounds=1, secure=SecureAggregation(), executor=Summing())


def test_metrics_and_callbacks_that_look_at_single_clients_are_refused():
    data = digits_data()
    data.has_client_sums = False
    with pytest.raises(ConfigurationError, match="ClientDistances must have sums of features client by client"):
        ClientDistances().prepare(data, device=torch.device("cpu"))
    with pytest.raises(ConfigurationError, match="HeldAbsentGap must see single updates"):
        federate(ring_gan(), ring_data(), HeldAbsentGap(), rounds=1, secure=SecureAggregation(), executor=Summing())


# ---------------------------------------------------------------------- a round of which only a sum is known


class Summing(SequentialExecutor):
    """Trains clients one after the other, and tells of their updates the mean alone; the first may be lost."""

    concurrent, sums_only = True, True

    def __init__(self, *, weighting: str = "examples", loses_first: bool = False, claims: int = 0) -> None:
        super().__init__()
        self.aggregator, self.loses_first, self.claims = WeightedMean(weighting), loses_first, claims

    def run(self, tasks):
        updates = [answer for answer in super().run(tasks) if isinstance(answer, ClientUpdate)]
        if self.loses_first:
            lost, *updates = updates
            yield ClientFailure(lost.client_id, lost.round, stage="reply", cause="its site is not connected")
        found, total = finish(self.aggregator, updates), sum(own.num_examples for own in updates)
        losses = {n for n in updates[0].metrics if n not in ("steps", "images", "seconds")}
        means = {n: sum(own.num_examples * own.metrics[n] for own in updates) / total for n in losses}
        members = tuple(
            ClientReport(
                own.client_id + self.claims,
                "answered",
                own.num_examples,
                {n: v for n, v in own.metrics.items() if n not in losses},
                bytes_up={"generator": 8},
            )
            for own in updates
        )
        yield UpdateSum(updates[0].round, members, found.delta, found.extras, means)


class Recorded:
    def __init__(self):
        self.metrics = []

    def on_round_end(self, trainer, server, info, metrics):
        self.metrics.append(metrics)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_federation_of_sums_is_the_federation(weighting):
    import lightning as L

    class Recording(Recorded, L.Callback):
        pass

    options = {"rounds": 2, "local_steps": 3, "aggregator": WeightedMean(weighting)}
    secure = {"executor": Summing(weighting=weighting), "secure": SecureAggregation()}
    plain_metrics, sum_metrics = Recording(), Recording()
    plain, _, _ = federate(ring_gan(), ring_data(), plain_metrics, **options)
    summed, orchestrator, _ = federate(
        ring_gan(),
        ring_data(),
        sum_metrics,
        **secure,
        **options,
    )
    assert_states_equal(summed.state_dict(), plain.state_dict(), atol=1e-6)
    mine, theirs = sum_metrics.metrics[-1], plain_metrics.metrics[-1]
    assert mine["train/loss_d"] == pytest.approx(theirs["train/loss_d"], rel=1e-5)
    assert mine["round/clients"] == 4
    known = {"answered", "bytes_down", "bytes_up", "seconds"}
    assert {n for n in mine if n.startswith("client/")} == {f"client/{k:03d}/{n}" for k in range(4) for n in known}
    assert orchestrator.ledger.client_steps == 2 * 4 * 3
    assert orchestrator.ledger.bytes_up == {"generator": 2 * 4 * 8}


def test_clients_that_are_not_in_the_sum_are_named_and_their_round_may_count():
    rules = RoundRules(min_report_fraction=0.75)
    _, orchestrator, _ = federate(
        ring_gan(), ring_data(), rounds=1, executor=Summing(loses_first=True), rules=rules, secure=SecureAggregation()
    )
    (incident,) = orchestrator.ledger.incidents
    assert (incident["client_id"], incident["kind"]) == (0, "failed")
    assert orchestrator.ledger.client_runs == 3


def test_a_sum_of_clients_that_were_not_asked_ends_the_run():
    with pytest.raises(UpdateError, match=r"a sum of clients \[1, 2, 3, 4\] of round 0"):
        federate(ring_gan(), ring_data(), rounds=1, executor=Summing(claims=1), secure=SecureAggregation())


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_sum_and_single_updates_go_into_one_aggregate(weighting):
    aggregator = WeightedMean(weighting)
    updates = [ClientUpdate(k, 10 * k + 1, states_of(k)["delta"], {}, states_of(k)["extras"]) for k in range(4)]
    part = finish(aggregator, updates[:3])
    members = tuple(ClientReport(own.client_id, "answered", own.num_examples) for own in updates[:3])
    accumulator = aggregator.accumulate(aggregator.init(), updates[3])
    accumulator = aggregator.accumulate_sum(accumulator, UpdateSum(0, members, part.delta, part.extras, {}))
    found, expected = aggregator.finalize(accumulator), finish(aggregator, updates)
    assert (found.num_clients, found.num_examples) == (expected.num_clients, expected.num_examples)
    assert_states_equal(dict(found.delta), dict(expected.delta), rtol=1e-5, atol=1e-9)
    assert_states_equal(dict(found.extras), dict(expected.extras), rtol=1e-5, atol=1e-22)
