"""What every aggregator promises, and what a weighted mean is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan_lightning import RoundRules, SecureAggregation
from fedgan_lightning.errors import ConfigurationError, UpdateError
from fedgan_lightning.federation.aggregation import WeightedMean
from fedgan_lightning.federation.label_balance import DivergenceWeightedMean
from fedgan_lightning.federation.robust import (
    CoordinateMedian,
    GeometricMedian,
    Krum,
    NearestNeighborMixing,
    TrimmedMean,
)
from fedgan_lightning.protocol import Aggregator, ClientUpdate
from tests.conftest import finish

DIVERGENCE = DivergenceWeightedMean()
DIVERGENCE.prepare(SimpleNamespace(label_counts=lambda: np.random.default_rng(0).integers(1, 50, (64, 3))))
AGGREGATORS: dict[str, Aggregator] = {
    "divergence": DIVERGENCE,
    "examples": WeightedMean(),
    "uniform": WeightedMean("uniform"),
    "median": CoordinateMedian(),
    "trimmed": TrimmedMean(0.2),
    "krum": Krum(num_bad=0),
    "multi-krum": Krum(num_bad=0, num_selected=3),
    "geometric": GeometricMedian(),
    "mixing": NearestNeighborMixing(GeometricMedian(), num_bad=0),
}


def update(client_id: int, *, num_examples: int = 10, scale: float = 1.0, dtype=torch.float32) -> ClientUpdate:
    generator = torch.Generator().manual_seed(client_id)
    delta = {
        "generator.w": scale * torch.randn(3, 2, generator=generator).to(dtype),
        "discriminator.b": scale * torch.randn(4, generator=generator).to(torch.float64),
    }
    extras = {"generator.bn.running_mean": torch.randn(2, generator=generator)}
    return ClientUpdate(client_id=client_id, num_examples=num_examples, delta=delta, metrics={}, extras=extras)


def close(first, second, atol=1e-6):
    for name in first.delta:
        torch.testing.assert_close(first.delta[name], second.delta[name], atol=atol, rtol=1e-6)
    for name in first.extras:
        torch.testing.assert_close(first.extras[name], second.extras[name], atol=atol, rtol=1e-6)


def test_every_aggregator_is_covered():
    assert {type(aggregator) for aggregator in AGGREGATORS.values()} == set(instantiable(Aggregator))


def instantiable(kind: type) -> list[type]:
    own = [] if kind.__abstractmethods__ else [kind]
    return own + [found for child in kind.__subclasses__() for found in instantiable(child)]


@pytest.mark.parametrize("name", AGGREGATORS)
class TestContract:
    def test_order_does_not_matter(self, name):
        updates = [update(k, num_examples=k + 1) for k in range(6)]
        close(finish(AGGREGATORS[name], updates), finish(AGGREGATORS[name], updates[::-1]))

    def test_scaling_all_weights_changes_nothing(self, name):
        few = [update(k, num_examples=k + 1) for k in range(5)]
        many = [update(k, num_examples=7 * (k + 1)) for k in range(5)]
        close(finish(AGGREGATORS[name], few), finish(AGGREGATORS[name], many))

    def test_equal_updates_return_themselves_with_keys_and_dtypes(self, name):
        one = update(3)
        same = [ClientUpdate(k, k + 1, one.delta, {}, one.extras) for k in range(4)]
        result = finish(AGGREGATORS[name], same)
        close(result, one)
        assert result.delta["generator.w"].dtype == torch.float32
        assert result.delta["discriminator.b"].dtype == torch.float64
        assert (result.num_clients, result.num_examples) == (4, 10)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("field", ["delta", "extras"])
    def test_what_is_not_finite_is_refused_with_the_client(self, name, bad, field):
        poisoned = update(7)
        next(iter(getattr(poisoned, field).values())).view(-1)[0] = bad
        with pytest.raises(UpdateError, match="NaN or infinity in .* from client 7"):
            finish(AGGREGATORS[name], [update(1), update(2), poisoned])

    def test_updates_that_do_not_fit_are_refused_with_the_client(self, name):
        other = ClientUpdate(5, 10, {"generator.w": torch.zeros(3, 2)}, {}, {})
        with pytest.raises(UpdateError, match="client 5 differing in"):
            finish(AGGREGATORS[name], [update(1), other])
        first, second = (ClientUpdate(k, 10, {"w": torch.zeros(k)}, {}, {}) for k in (2, 3))
        with pytest.raises(UpdateError, match="shape .2,.*from client 3"):
            finish(AGGREGATORS[name], [first, second])
        with pytest.raises(UpdateError, match="at least one example; got 0 from client 2"):
            finish(AGGREGATORS[name], [ClientUpdate(2, 0, {}, {}, {})])

    def test_merge_equals_one_pass(self, name):
        aggregator = AGGREGATORS[name]
        if not aggregator.additive:
            pytest.skip("only additive aggregators merge")
        updates = [update(k, num_examples=k + 1) for k in range(6)]
        halves = []
        for part in (updates[:2], updates[2:]):
            accumulator = aggregator.init()
            for item in part:
                accumulator = aggregator.accumulate(accumulator, item)
            halves.append(accumulator)
        merged = aggregator.finalize(aggregator.merge(*halves))
        close(merged, finish(aggregator, updates))
        empty = aggregator.merge(aggregator.init(), aggregator.init())
        assert aggregator.finalize(empty).delta == {}

    def test_updates_are_left_as_they_were(self, name):
        updates = [update(k) for k in range(3)]
        copies = [update(k) for k in range(3)]
        finish(AGGREGATORS[name], updates)
        assert all(torch.equal(a.delta[n], b.delta[n]) for a, b in zip(updates, copies) for n in a.delta)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=8))
def test_weighted_mean_is_the_formula(sizes):
    updates = [update(k, num_examples=size) for k, size in enumerate(sizes)]
    result = finish(WeightedMean(), updates)
    for name in ("generator.w", "discriminator.b"):
        expected = sum(size * item.delta[name].double() for size, item in zip(sizes, updates)) / sum(sizes)
        torch.testing.assert_close(result.delta[name].double(), expected, atol=1e-6, rtol=1e-6)
    uniform = finish(WeightedMean("uniform"), updates)
    expected = sum(item.delta["generator.w"].double() for item in updates) / len(sizes)
    torch.testing.assert_close(uniform.delta["generator.w"].double(), expected, atol=1e-6, rtol=1e-6)


def test_memory_does_not_grow_with_the_number_of_clients():
    accumulator, sizes = WeightedMean().init(), []
    for client_id in range(50):
        accumulator = WeightedMean().accumulate(accumulator, update(client_id))
        sizes.append(
            sum(value.numel() for value in (*accumulator.delta.vectors.values(), *accumulator.extras.vectors.values()))
        )
    assert set(sizes) == {3 * 2 + 4 + 2}


class TestDivergence:
    """FeGAN's weights: clients [50, 50] and [100, 0] beside [.75, .25] have exponents .07192 and .14384."""

    @pytest.mark.parametrize("favour, first", [("divergent", 0.48203), ("typical", 0.51797)])
    def test_the_exact_case(self, favour, first):
        aggregator = DivergenceWeightedMean(favour=favour)
        aggregator.prepare(SimpleNamespace(label_counts=lambda: [[50, 50], [100, 0]]))
        own = [aggregator.weight_of(k, 100) for k in range(2)]
        assert own[0] / sum(own) == pytest.approx(first, abs=1e-5)
        if favour == "divergent":
            assert np.log(own) == pytest.approx([0.07192, 0.14384], abs=1e-5)

    def test_many_equal_clients_weigh_nearly_the_same(self):
        """With 42 workers of ten classes no ratio of weights is above 1.056."""
        aggregator = DivergenceWeightedMean()
        aggregator.prepare(SimpleNamespace(label_counts=lambda: np.eye(10)[np.arange(42) % 10] * 50))
        own = [aggregator.weight_of(k, 50) for k in range(42)]
        assert max(own) / min(own) < 1.057

    def test_updates_are_weighed_by_it(self):
        from fedgan_lightning.partitions import Dirichlet
        from tests.conftest import federate, ring_data, ring_gan, sgd

        found = []
        for aggregator in (DivergenceWeightedMean(), WeightedMean("uniform")):
            data = ring_data(partition=Dirichlet(0.5, min_samples=16))
            options = {"aggregator": aggregator, "rounds": 1, "local_steps": 2}
            server, _, _ = federate(ring_gan(optimizer=sgd), data, **options)
            found.append(server.model.state_dict())
        assert any(not torch.equal(found[0][name], value) for name, value in found[1].items())

    def test_masks_need_weights_that_clients_know(self):
        with pytest.raises(ConfigurationError, match="whose weights clients do not know"):
            SecureAggregation(max_update=1.0).check(
                aggregator=DivergenceWeightedMean(), rules=RoundRules(), validator=None
            )
