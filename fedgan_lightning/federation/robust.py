"""Aggregators that a few bad clients cannot steer. They need all updates at once: memory grows with the cohort.

Every rule treats clients alike, whatever N_k they claim: a claim must not buy influence.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedgan_lightning.errors import UpdateError, message
from fedgan_lightning.federation.aggregation import check_layout, checked_states
from fedgan_lightning.options import checked
from fedgan_lightning.packing import Packed
from fedgan_lightning.protocol import Aggregate, Aggregator, ClientUpdate

#: Received updates: (client, N_k, parameter update, extras).
Collected = list[tuple[int, int, Packed, Packed]]


class RobustAggregator(Aggregator):
    """What the robust rules have in common: they collect, then combine, whatever the order of arrival."""

    additive: ClassVar[bool] = False

    def init(self) -> Collected:
        return []

    def accumulate(self, accumulator: Collected, update: ClientUpdate) -> Collected:
        delta, extras = checked_states(update)
        if accumulator:
            delta, extras = delta.beside(accumulator[0][2]), extras.beside(accumulator[0][3])
            for expected, received in ((accumulator[0][2], delta), (accumulator[0][3], extras)):
                check_layout(f"client {update.client_id}", expected=expected.layout, received=received.layout)
        return [*accumulator, (update.client_id, update.num_examples, delta, extras)]

    def merge(self, first: Collected, second: Collected) -> Collected:
        if not first:
            return second
        _, _, delta, extras = first[0]
        if second:
            for expected, received in ((delta, second[0][2]), (extras, second[0][3])):
                check_layout(f"client {second[0][0]}", expected=expected.layout, received=received.layout)
        return [*first, *((k, n, own.beside(delta), more.beside(extras)) for k, n, own, more in second)]

    def finalize(self, accumulator: Collected) -> Aggregate:
        collected = sorted(accumulator, key=lambda own: own[0])
        count, examples = len(collected), sum(own[1] for own in collected)
        if not collected:
            return Aggregate(delta={}, extras={}, num_clients=0, num_examples=0)
        if count < self.needed:
            raise UpdateError(
                message(
                    f"{type(self).__name__} must have {self.needed} updates a round",
                    received=count,
                    fix="lower num_bad, or ask more clients per round",
                )
            )
        deltas, beside = [own[2] for own in collected], [own[3] for own in collected]
        if deltas[0].layout.names:
            delta, extras = self.combine(deltas), self.combine_extras(beside)
        else:  # what comes up are answers about samples, which the rule is for, then
            delta, extras = deltas[0], self.combine(beside)
        return Aggregate(delta=delta, extras=extras, num_clients=count, num_examples=examples)

    @abstractmethod
    def combine(self, deltas: Sequence[Packed]) -> Packed:
        """Return the parameter update of the whole from at least ``needed``, in the order of clients."""

    def combine_extras(self, extras: Sequence[Packed]) -> Packed:
        """Return the extras of the whole: the median of every coordinate.

        A rule that picks or weighs clients by their parameter updates says nothing of the moments and statistics that
        come along: whoever sends an update like all others could send any of these.
        """
        return by_coordinate(extras, _median)


class CoordinateMedian(RobustAggregator):
    """The median of every coordinate; the mean of the middle two of an even number (Yin et al. 2018, definition 1).

    It withstands any minority. With clients that hold different classes it also forgets what only a minority holds.
    """

    def combine(self, deltas: Sequence[Packed]) -> Packed:
        return by_coordinate(deltas, _median)


class TrimmedMean(RobustAggregator):
    """The mean of every coordinate without its largest and smallest values (Yin et al. 2018, definition 2).

    Args:
        share: Share of the clients left out at either end, in [0, 1/2), rounded down, but to at least one of three or
            more.
    """

    @checked(share="[0, 0.5)")
    def __init__(self, share: float = 0.1) -> None:
        self.share = share

    def combine(self, deltas: Sequence[Packed]) -> Packed:
        count = len(deltas)
        fewest = 1 if self.share else 0  # a share that left out nobody would be a plain mean
        cut = min(max(fewest, int(self.share * count + 1e-9)), (count - 1) // 2)

        def trimmed(values: Tensor) -> Tensor:
            return values.sort(dim=0).values[cut : count - cut].mean(0)

        return by_coordinate(deltas, trimmed)

    def combine_extras(self, extras: Sequence[Packed]) -> Packed:
        return self.combine(extras)


class Krum(RobustAggregator):
    """The updates whose nearest others are nearest, averaged (Blanchard et al. 2017, section 4).

    Score of an update: the sum of squared distances to its n - f - 2 nearest others. ``num_selected`` = 1 is Krum,
    more is Multi-Krum.

    Args:
        num_bad: Bad clients f to withstand; a round needs n >= 2 f + 3 updates.
        num_selected: Updates with the lowest scores that are averaged, at most n - f of them.
    """

    @checked(num_bad="[0, inf)", num_selected="[1, inf)")
    def __init__(self, *, num_bad: int = 1, num_selected: int = 1) -> None:
        self.num_bad, self.num_selected = num_bad, num_selected
        self.needed = 2 * num_bad + 3

    def combine(self, deltas: Sequence[Packed]) -> Packed:
        count = len(deltas)
        squares = distances(deltas).square()
        nearest = squares.sort(dim=1).values[:, 1 : count - self.num_bad - 1]  # the first is the update itself
        best = nearest.sum(1).argsort(stable=True)[: min(self.num_selected, count - self.num_bad)]
        weights = torch.zeros(count, dtype=torch.float64)
        weights[best] = 1 / len(best)
        return weighted(deltas, weights)


class GeometricMedian(RobustAggregator):
    """The point with the least sum of distances to all updates, by Weiszfeld's iteration (Pillutla et al. 2022,
    algorithm 2).

    Args:
        iterations: Steps of the iteration.
        smoothing: Distances below this share of the median distance count as that share.
    """

    @checked(iterations="[1, inf)", smoothing="(0, inf)")
    def __init__(self, *, iterations: int = 20, smoothing: float = 1e-3) -> None:
        self.iterations, self.smoothing = iterations, smoothing

    def combine(self, deltas: Sequence[Packed]) -> Packed:
        weights = torch.full((len(deltas),), 1 / len(deltas), dtype=torch.float64)
        inner = inner_products(deltas)
        for _ in range(self.iterations):
            # |x_k - sum w x|^2 from inner products alone: the updates themselves are read once
            square = inner.diagonal() - 2 * inner @ weights + weights @ inner @ weights
            length = square.clamp_min(0).sqrt()
            floor = self.smoothing * float(length.median())
            if floor == 0 and float(length.max()) == 0:
                break  # all updates are the same
            inverse = 1 / length.clamp_min(max(floor, 1e-12))
            weights = inverse / inverse.sum()
        return weighted(deltas, weights)


class NearestNeighborMixing(RobustAggregator):
    """Another robust rule, applied to updates that are each the mean of their n - f nearest (Allouah et al. 2023,
    algorithm 2).

    Robust rules take what honest clients do differently for an attack. Mixing brings honest updates together first, so
    that Krum does not throw away what all but one have learned, nor a median what only a minority holds.

    Args:
        aggregator: The rule.
        num_bad: Bad clients f to withstand; a round needs n >= 2 f + 1 updates, or as many as the rule.
    """

    @checked(num_bad="[0, inf)")
    def __init__(self, aggregator: RobustAggregator, *, num_bad: int = 1) -> None:
        self.aggregator, self.num_bad = aggregator, num_bad
        self.needed = max(2 * num_bad + 1, aggregator.needed)

    def combine(self, deltas: Sequence[Packed]) -> Packed:
        count = len(deltas)
        own = distances(deltas).fill_diagonal_(-1.0)  # an update is its own nearest, whoever has sent the same
        nearest = own.argsort(dim=1, stable=True)[:, : count - self.num_bad]
        weights = torch.zeros_like(own).scatter_(1, nearest, 1 / (count - self.num_bad))
        return self.aggregator.combine([weighted(deltas, row) for row in weights])

    def combine_extras(self, extras: Sequence[Packed]) -> Packed:
        return self.aggregator.combine_extras(extras)


def by_coordinate(states: Sequence[Packed], rule: Callable[[Tensor], Tensor]) -> Packed:
    """Return ``rule`` applied to every vector of the states stacked, (n, length) -> (length,), in float64."""
    layout, states = states[0].layout, [own.beside(states[0]) for own in states]
    vectors = {
        dtype: rule(torch.stack([own.vectors[dtype] for own in states]).double()).to(dtype) for dtype in layout.lengths
    }
    return Packed(layout, vectors)


def weighted(states: Sequence[Packed], weights: Tensor) -> Packed:
    """Return the sum of the states with these weights (n,)."""
    layout, vectors = states[0].layout, {}
    for dtype in layout.lengths:
        total = torch.zeros_like(states[0].vectors[dtype], dtype=torch.float64)
        for own, weight in zip(states, weights.tolist()):
            if weight:
                total.add_(own.vectors[dtype], alpha=weight)
        vectors[dtype] = total.to(dtype)
    return Packed(layout, vectors)


def inner_products(states: Sequence[Packed]) -> Tensor:
    """Return the inner products (n, n) of all pairs, float64."""
    found = torch.zeros(len(states), len(states), dtype=torch.float64)
    for dtype in states[0].layout.lengths:
        rows = torch.stack([own.vectors[dtype] for own in states]).double().cpu()
        found += rows @ rows.T
    return found


def distances(states: Sequence[Packed]) -> Tensor:
    """Return the distances (n, n) between all pairs, float64."""
    squares = torch.zeros(len(states), len(states), dtype=torch.float64)
    for dtype in states[0].layout.lengths:
        rows = torch.stack([own.vectors[dtype] for own in states]).double().cpu()
        squares += torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    return squares.sqrt()


def _median(values: Tensor) -> Tensor:
    ordered, count = values.sort(dim=0).values, len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
