"""Clipping of updates on the client: what an honest client sends is no longer than a bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from fedgan_lightning import states
from fedgan_lightning.federation import namespaces
from fedgan_lightning.options import checked
from fedgan_lightning.packing import Packed
from fedgan_lightning.protocol import State, UpdateEntry
from fedgan_lightning.states import network_of
from fedgan_lightning.update_transform import RoundFacts, UpdateTransform


class ClipUpdates(UpdateTransform):
    """v <- v min(1, C / |v|) for the vectors of an update: parameter updates, and an algorithm's such as controls.

    Statistics and moments are no vectors, and pass as they are. What enters is clipped, so codes of whole vectors stand
    behind it: what they lose, or scale (``RandomSparse`` by d / k), and what error feedback adds, comes on top, and a
    bound of the server must leave room for it. Behind ``TopK`` or ``RandomSparse`` their values are clipped. The server
    takes clients at their word: against those who do not clip there is ``federation.validator.max_norm``. Source:
    McMahan, Ramage, Talwar, Zhang 2018, algorithm 1, FlatClip (``joint``) and PerLayerClip with networks as layers
    (``network``).

    Args:
        max_norm: Bound C on the Euclidean norm, > 0.
        over: ``joint`` clips all vectors by one norm, ``network`` each network's by its own.
    """

    @checked(max_norm="(0, inf)")
    def __init__(self, *, max_norm: float, over: Literal["joint", "network"] = "joint") -> None:
        self.max_norm, self.over = float(max_norm), over

    def changes(self, entries: Mapping[str, UpdateEntry]) -> bool:
        """Whether there are vectors, and none of which a code has left no numbers to clip."""
        vectors = [name for name, entry in entries.items() if entry.kind == "vector"]
        codes = [name for name, entry in entries.items() if entry.kind == "code" and _is_of_vector(name, entry)]
        whole = {name.rpartition("/")[0] for name in codes}
        return bool(vectors) and all(any(own.startswith(f"{name}/") for own in vectors) for name in whole)

    def client(
        self,
        update: State,
        *,
        entries: Mapping[str, UpdateEntry],
        private: State,
        facts: RoundFacts,
    ) -> tuple[State, State]:
        parts: dict[str, list[str]] = {}
        for name in update:
            if entries[name].kind == "vector":
                parts.setdefault("" if self.over == "joint" else network_of(name), []).append(name)
        clipped = dict(update)
        for names in parts.values():
            vectors = Packed.of({name: update[name] for name in names}).vectors.values()
            norm = states.norm(vectors, dtype=torch.float64)
            factor = float(self.max_norm / norm) if float(norm) > self.max_norm else 1.0
            if factor < 1.0:
                clipped |= {name: update[name] * factor for name in names}
        return clipped, private


def _is_of_vector(name: str, entry: UpdateEntry) -> bool:
    """Whether a code stands for a vector: statistics and moments have codes, too."""
    return entry.group == "delta" or name.startswith(namespaces.ALGORITHM)
