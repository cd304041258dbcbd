"""The robust rules against their formulas written out in NumPy, and against clients that lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan_lightning.aggregators import (
    CoordinateMedian,
    GeometricMedian,
    Krum,
    NearestNeighborMixing,
    TrimmedMean,
    WeightedMean,
)
from fedgan_lightning.errors import ConfigurationError, UpdateError
from fedgan_lightning.protocol import ClientUpdate
from tests.conftest import finish


def updates(matrix) -> list[ClientUpdate]:
    """One client per row; the second half of a row travels in float64, and everything again as extras."""
    rows = torch.as_tensor(matrix, dtype=torch.float64)
    half = rows.shape[1] // 2
    found = []
    for k, row in enumerate(rows):
        delta = {"generator.w": row[:half].float(), "discriminator.w": row[half:]}
        found.append(ClientUpdate(k, k + 1, delta, {}, {"generator.m": row.clone()}))
    return found


def combined(aggregator, matrix) -> np.ndarray:
    result = finish(aggregator, updates(matrix))
    return torch.cat([result.delta["generator.w"].double(), result.delta["discriminator.w"]]).numpy()


def drawn(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_median_is_numpy_s(count):
    matrix = drawn(count)
    np.testing.assert_allclose(combined(CoordinateMedian(), matrix), np.median(matrix, axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("count", "share", "cut"), [(10, 0.1, 1), (10, 0.3, 3), (7, 0.2, 1), (5, 0.0, 0), (5, 0.1, 1), (2, 0.4, 0)]
)
def test_trimmed_mean_leaves_out_both_ends(count, share, cut):
    matrix = drawn(count)
    expected = np.sort(matrix, axis=0)[cut : count - cut].mean(0)
    np.testing.assert_allclose(combined(TrimmedMean(share), matrix), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["median", "trimmed", "krum", "geometric", "mixed"])
def test_a_client_in_the_middle_of_all_updates_cannot_send_any_moments_along(name):
    """Whoever sends the update that a rule likes best, and moments or statistics that it never looks at."""
    honest = updates(drawn(6))
    middle = {key: torch.stack([own.delta[key] for own in honest]).mean(0) for key in honest[0].delta}
    liar = ClientUpdate(6, 1, middle, {}, {"generator.m": torch.full_like(honest[0].extras["generator.m"], 1e30)})
    rules = {
        "median": CoordinateMedian(),
        "trimmed": TrimmedMean(0.2),
        "krum": Krum(num_bad=1),
        "geometric": GeometricMedian(),
        "mixed": NearestNeighborMixing(CoordinateMedian(), num_bad=1),
    }
    found = finish(rules[name], [*honest, liar]).extras["generator.m"]
    largest = torch.stack([own.extras["generator.m"] for own in honest]).max(0).values
    assert (found <= largest).all()


@pytest.mark.parametrize(("num_bad", "num_selected"), [(1, 1), (2, 1), (2, 4), (0, 2)])
def test_krum_selects_by_its_score(num_bad, num_selected):
    matrix, count = drawn(9), 9
    squares = ((matrix[:, None] - matrix[None]) ** 2).sum(-1)
    scores = [np.sort(np.delete(squares[i], i))[: count - num_bad - 2].sum() for i in range(count)]
    expected = matrix[np.argsort(scores)[:num_selected]].mean(0)
    found = combined(Krum(num_bad=num_bad, num_selected=num_selected), matrix)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_krum_says_how_many_updates_it_needs():
    with pytest.raises(UpdateError, match="Krum must have 7 updates a round; got 6"):
        finish(Krum(num_bad=2), updates(drawn(6)))
    assert Krum(num_bad=2).needed == 7


def test_geometric_median_has_the_least_sum_of_distances():
    from scipy.optimize import minimize

    matrix = drawn(7)

    def total(point):
        return np.linalg.norm(matrix - point, axis=1).sum()

    best = minimize(total, matrix.mean(0), method="BFGS").x
    found = combined(GeometricMedian(iterations=200), matrix)
    np.testing.assert_allclose(found, best, atol=2e-4)
    few = combined(GeometricMedian(iterations=1), matrix)
    assert np.linalg.norm(few - best) > np.linalg.norm(found - best)


def test_mixing_takes_the_mean_of_each_update_s_nearest():
    matrix, count, num_bad = drawn(9), 9, 2
    mixed = np.empty_like(matrix)
    for i, row in enumerate(matrix):
        order = np.argsort(((matrix - row) ** 2).sum(1))
        assert order[0] == i
        mixed[i] = matrix[order[: count - num_bad]].mean(0)
    for rule in (CoordinateMedian(), TrimmedMean(0.2), Krum(num_bad=2)):
        found = combined(NearestNeighborMixing(rule, num_bad=num_bad), matrix)
        np.testing.assert_allclose(found, combined(rule, mixed), atol=1e-6)


def test_mixing_keeps_what_a_minority_has_learned():
    """Of ten clients three hold a class of their own: the median of their updates is nothing, the mixed one is not."""
    matrix = np.zeros((10, 6))
    matrix[:3] = 1.0
    assert np.abs(combined(CoordinateMedian(), matrix)).max() == 0
    assert combined(NearestNeighborMixing(CoordinateMedian(), num_bad=2), matrix).min() > 0.1


def test_of_equal_updates_each_is_its_own_nearest():
    matrix = np.ones((5, 6))
    np.testing.assert_allclose(combined(NearestNeighborMixing(Krum(num_bad=1)), matrix), np.ones(6))


def test_mixing_says_how_many_updates_it_needs():
    assert NearestNeighborMixing(Krum(num_bad=2), num_bad=1).needed == 7
    assert NearestNeighborMixing(CoordinateMedian(), num_bad=3).needed == 7
    with pytest.raises(UpdateError, match="NearestNeighborMixing must have 7 updates a round; got 6"):
        finish(NearestNeighborMixing(CoordinateMedian(), num_bad=3), updates(drawn(6)))


ROBUST = {
    "median": CoordinateMedian(),
    "trimmed": TrimmedMean(0.2),
    "krum": Krum(num_bad=2),
    "multi-krum": Krum(num_bad=2, num_selected=5),
    "geometric": GeometricMedian(),
    "mixed median": NearestNeighborMixing(CoordinateMedian(), num_bad=2),
    "mixed krum": NearestNeighborMixing(Krum(num_bad=2), num_bad=2),
}


@pytest.mark.parametrize("name", ROBUST)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), size=st.sampled_from([10.0, 1e3, 1e6]))
def test_two_liars_of_ten_move_the_result_no_farther_than_honest_clients_lie_apart(name, seed, size):
    honest = drawn(10, seed)
    lying = honest.copy()
    lying[:2] = size * np.random.default_rng(seed + 1).normal(size=(2, 6))
    distance = np.linalg.norm(combined(ROBUST[name], lying) - honest[2:].mean(0))
    assert distance <= 1.5 * np.linalg.norm(honest - honest.mean(0), axis=1).max()
    assert np.linalg.norm(combined(WeightedMean("uniform"), lying) - honest[2:].mean(0)) > distance or size < 100


def test_a_claimed_number_of_examples_buys_no_influence():
    matrix = drawn(7)
    for aggregator in ROBUST.values():
        plain = finish(aggregator, updates(matrix))
        claimed = [ClientUpdate(u.client_id, 10**9, u.delta, {}, u.extras) for u in updates(matrix)[:1]]
        other = finish(aggregator, [*claimed, *updates(matrix)[1:]])
        torch.testing.assert_close(plain.delta["discriminator.w"], other.delta["discriminator.w"])


def test_settings_that_cannot_work_are_refused():
    for make in (
        lambda: TrimmedMean(0.5),
        lambda: TrimmedMean(-0.1),
        lambda: Krum(num_bad=-1),
        lambda: Krum(num_selected=0),
        lambda: GeometricMedian(iterations=0),
        lambda: GeometricMedian(smoothing=0.0),
        lambda: NearestNeighborMixing(WeightedMean()),
        lambda: NearestNeighborMixing(Krum(), num_bad=-1),
    ):
        with pytest.raises(ConfigurationError, match="must .*; got "):
            make()
