"""Entries that are not the aggregator's business: summed with weights that the server knows, the largest, collected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from fedgan_lightning.federation.aggregation import Sums
from fedgan_lightning.federation.ranks import Ranks
from fedgan_lightning.packing import Layout, Packed
from fedgan_lightning.protocol import Aggregator, ClientUpdate, State, UpdateEntry, UpdateSum

Answer = TypeVar("Answer", ClientUpdate, UpdateSum)


class EntrySums:
    """Adds up entries with the rule ``sum`` in float64, takes the largest under ``max``, keeps those to ``collect``.

    Args:
        entries: All entries of an update by name.
        aggregator: Says what N_k examples weigh; robust rules treat all clients alike.
        sizes: N_k of all clients of the federation, in their order; looked at only where something is summed.
    """

    def __init__(self, entries: Mapping[str, UpdateEntry], *, aggregator: Aggregator, sizes: Iterable[int]) -> None:
        self.whole = _one_rule_for_all(entries)
        summed = {name: entry for name, entry in entries.items() if entry.rule == "sum"}
        self.summed = {n: own for n, own in summed.items() if self.whole is None or own.group != "delta"}
        self._delta, self._delta_entries = Sums(), {n: own for n, own in summed.items() if n not in self.summed}
        self.maxima = {name for name, entry in entries.items() if entry.rule == "max"}
        self.collected = {name for name, entry in entries.items() if entry.rule == "collect"}
        additive = aggregator.additive
        self._weight: Callable[[int, int], float] = aggregator.weight_of if additive else lambda client_id, size: 1.0
        self._population = sum(self._weight(k, size) for k, size in enumerate(sizes)) if summed else 1.0
        self._sums: dict[str, Tensor] = {}
        self._arrived = {"one": 0.0, "population": 0.0}
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._largest: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.whole or self.summed or self.maxima or self.collected)

    def add(self, update: ClientUpdate) -> None:
        """Take this object's entries of an update that counts."""
        share = self._weight(update.client_id, update.num_examples) / self._population
        weights = {"one": update.discount, "population": update.discount * share}
        if self.whole is not None:  # in one vector: entry by entry takes ten times as long
            self._delta.add(Packed.of(update.delta), weight=weights[self.whole.weight])
        wanted = {*self.summed, *self.maxima, *self.collected}
        values = {n: state[n] for state in (update.delta, update.extras) for n in wanted if n in state}
        for name, entry in self.summed.items():
            self._add(name, values[name], weights[entry.weight])
        for kind, weight in weights.items():
            self._arrived[kind] += weight
        self._largest = _larger(self._largest, {name: values[name].detach().cpu() for name in self.maxima})
        if self.collected:
            self._kept[update.client_id] = {name: values[name].detach().cpu() for name in sorted(self.collected)}

    def add_sum(self, total: UpdateSum) -> None:
        """Take the same from the means of several updates, whose weights are the aggregator's."""
        share = sum(self._weight(own.client_id, own.num_examples) for own in total.clients) / self._population
        weights = {"population": share, "one": float(len(total.clients))}
        if self.whole is not None:
            self._delta.add(Packed.of(total.delta), weight=weights[self.whole.weight])
        for name, entry in self.summed.items():
            self._add(name, {**total.delta, **total.extras}[name], weights[entry.weight])
        for kind, weight in weights.items():
            self._arrived[kind] += weight

    def _add(self, name: str, value: Tensor, weight: float) -> None:
        if name in self._sums:
            known = self._sums[name]
            known.add_(value.detach().to(known.device), alpha=weight)
        else:
            self._sums[name] = value.detach().double() * weight

    def rest_of(self, answer: Answer) -> Answer:
        """Return an answer with those entries alone that are the aggregator's."""
        if not self:
            return answer
        delta = self._rest(answer.delta) if self.whole is None else Packed.of({})
        return dataclasses.replace(answer, delta=delta, extras=self._rest(answer.extras))

    def _rest(self, state: State) -> State:
        others = {n: v for n, v in state.items() if n not in {*self.summed, *self.maxima, *self.collected}}
        return state if len(others) == len(state) else Packed.of(others)

    def totals(self, ranks: Ranks) -> tuple[dict[str, Tensor], dict[int, State]]:
        """Return the sums by name, and what was collected by client, over all ranks."""
        if not self:
            return {}, {}
        arrived = {kind: sum(own[kind] for own in ranks.exchange(self._arrived)) for kind in self._arrived}
        found = self._of_delta(ranks, arrived)
        for name, entry in self.summed.items():
            empty = torch.zeros(entry.shape, dtype=torch.float64)
            total = ranks.sum_(self._sums.get(name, empty))
            found[name] = (total / _divisor(entry, arrived)).to(entry.dtype)
        for own in ranks.exchange_states({ranks.rank: self._largest}).values() if self.maxima else ():
            self._largest = _larger(self._largest, own)
        found |= self._largest
        return found, dict(ranks.exchange_states(self._kept)) if self.collected else {}

    def _of_delta(self, ranks: Ranks, arrived: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the sums of parameter updates, where all have one rule."""
        if self.whole is None:
            return {}
        names, own = tuple(self._delta_entries), self._delta_entries.values()
        made = Layout(names, tuple(entry.shape for entry in own), tuple(entry.dtype for entry in own))
        sums = Sums(self._delta.layout if self._delta.layout is not None else made)
        for dtype, length in sums.layout.lengths.items():  # type: ignore[union-attr]
            sums.vectors[dtype] = ranks.sum_(self._delta.vectors.get(dtype, torch.zeros(length, dtype=torch.float64)))
        return dict(sums.mean(_divisor(self.whole, arrived)))


def _divisor(entry: UpdateEntry, arrived: Mapping[str, float]) -> float:
    """Return what a sum is divided by; 1 where nothing came."""
    return (arrived[entry.weight] if entry.denominator == "arrived" else entry.denominator) or 1.0


def _one_rule_for_all(entries: Mapping[str, UpdateEntry]) -> UpdateEntry | None:
    """Return one of the parameter updates, if all are summed in one way."""
    delta = [entry for entry in entries.values() if entry.group == "delta"]
    ways = {(entry.rule, entry.weight, entry.denominator) for entry in delta}
    return delta[0] if len(ways) == 1 and delta[0].rule == "sum" else None


def _larger(first: State, second: State) -> dict[str, Tensor]:
    """Return the larger of two values of every entry; that of one where the other has none."""
    return {**first, **{n: torch.maximum(first[n], own) if n in first else own for n, own in second.items()}}
