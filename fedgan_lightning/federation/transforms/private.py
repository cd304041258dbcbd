"""The clipped update of a client under client-level privacy, and the noise on the sum of all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgan_lightning import states
from fedgan_lightning.federation import namespaces
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import Aggregate, State, UpdateEntry
from fedgan_lightning.states import network_of
from fedgan_lightning.update_transform import RoundFacts, UpdateTransform

#: Hyper-parameter of the task that says the round's bound C.
CLIP = "algorithm.privacy_clip"
#: Entry by which a client says whether its update was below the bound: 1/2 if it was, -1/2 if not.
BELOW = "clipping/below"
#: What a clipped update stays below the bound by, so that rounding to float32 does not bring it above.
MARGIN = 1.0 - 2.0**-20


class PrivateUpdates(UpdateTransform):
    """v <- v min(1, C / |v / s|) on the client, and again on the server, where a client may have left it out.

    Made by :class:`~fedgan_lightning.federation.client_privacy.ClientLevelPrivacy`, which has the sources; it is the
    first of a chain, so that codes come after it and are undone before the second clip.

    Args:
        clip: The bound C where the task says none.
        scales: Scale s by network, 1 where none is given.
        divisor: What a sum is divided by.
        covered: Names of entries that are cut, and noised, together with parameter updates.
        counts: Whether clients say who was below the bound, as adaptive clipping needs.
        noised: From a total to the total with noise; ``None`` where somebody else adds it.
    """

    @checked(clip="(0, inf)", scales="(0, inf)", divisor="(0, inf)")
    def __init__(
        self,
        *,
        clip: float,
        scales: dict[str, float] | None = None,
        divisor: float,
        covered: Sequence[str] = (),
        counts: bool = False,
        noised: Callable[[Aggregate], Aggregate] | None = None,
    ) -> None:
        self.clip, self.scales, self.divisor, self.noised = float(clip), dict(scales or {}), float(divisor), noised
        self.covered, self.counts = frozenset(covered), counts

    def schema(self, entries: Mapping[str, UpdateEntry]) -> dict[str, UpdateEntry]:
        """Return the same entries; updates are added, all clients alike, and divided by a number that is fixed."""
        changed = {"rule": "sum", "weight": "one", "denominator": self.divisor}
        return {
            name: dataclasses.replace(entry, **changed) if self._covers(name, entry) else entry  # type: ignore[arg-type]
            for name, entry in entries.items()
        }

    def own_entries(self) -> Mapping[str, UpdateEntry]:
        rule: dict[str, Any] = {"rule": "sum", "weight": "one", "denominator": self.divisor, "bound": 0.5}
        return {BELOW: UpdateEntry((), torch.float32, **rule)} if self.counts else {}

    def client(
        self,
        update: State,
        *,
        entries: Mapping[str, UpdateEntry],
        private: State,
        facts: RoundFacts,
    ) -> tuple[State, State]:
        bound, norm = facts.hyperparameters.get(CLIP, self.clip), self.norm(update, entries)
        found = self._clipped(update, entries, bound=bound, norm=norm)
        below = f"{namespaces.ALGORITHM}{BELOW}"
        if below in update:
            found = {**found, below: torch.full_like(update[below], 0.5 if norm <= bound else -0.5)}
        return found, private

    def decode(self, update: State, *, entries: Mapping[str, UpdateEntry], facts: RoundFacts) -> State:
        bound = facts.hyperparameters.get(CLIP, self.clip)
        found = self._clipped(update, entries, bound=bound, norm=self.norm(update, entries))
        below = f"{namespaces.ALGORITHM}{BELOW}"
        if below in update:
            found = {**found, below: update[below].clamp(-0.5, 0.5)}
        return found

    def total(self, total: Aggregate) -> Aggregate:
        return total if self.noised is None else self.noised(total)

    def norm(self, update: State, entries: Mapping[str, UpdateEntry]) -> float:
        """Return |v / s| over all that is covered together; NaN or infinity where a number is none."""
        names = [name for name in update if name in entries and self._covers(name, entries[name])]
        values = [update[name].detach() for name in names]
        lengths = torch.stack([own.double() for own in torch._foreach_norm(values)])  # one call for all, which counts
        if self.scales:
            lengths = lengths / torch.tensor([self.scale(name) for name in names], device=lengths.device)
        norm = float(torch.linalg.vector_norm(lengths))
        if norm < math.inf or not all(bool(torch.isfinite(own).all()) for own in values):
            return norm
        scaled = (own.double() / self.scale(name) for name, own in zip(names, values))  # squares that are no float32
        return float(states.norm(scaled, dtype=torch.float64))

    def _covers(self, name: str, entry: UpdateEntry) -> bool:
        return entry.group == "delta" or name in self.covered

    def scale(self, name: str) -> float:
        """Return the scale of an entry's network."""
        return self.scales.get(network_of(name), 1.0)

    def _clipped(self, update: State, entries: Mapping[str, UpdateEntry], *, bound: float, norm: float) -> State:
        """Return the update, cut; one that is not finite stays what it is, and is refused where finite ones are not."""
        if norm <= bound or not norm < math.inf:
            return update
        names = [name for name in update if name in entries and self._covers(name, entries[name])]
        cut = torch._foreach_mul([update[name].detach() for name in names], bound / norm * MARGIN)
        return {**update, **dict(zip(names, cut))}


def with_noise(state: State, *, stds: Mapping[str, float], normals: Callable[[int], Any]) -> dict[str, Tensor]:
    """Return tensors with independent normal numbers added, in the order of their names.

    Args:
        state: The tensors.
        stds: Standard deviation by name.
        normals: From a count to so many standard normal numbers.
    """
    found: dict[str, Tensor] = {}
    for name in sorted(state):
        value = state[name]
        drawn = torch.from_numpy(np.asarray(normals(value.numel()))).reshape(value.shape).to(value.device)
        found[name] = (value.double() + stds[name] * drawn).to(value.dtype)
    return {name: found[name] for name in state}
