"""What codecs have in common: which entries they encode, error feedback, and what the server decodes."""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation import namespaces
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import State, UpdateEntry
from fedgan_lightning.seeding import derive_seed
from fedgan_lightning.update_transform import RoundFacts, UpdateTransform

Section = Literal["updates", "moments", "buffers"]
Down: TypeAlias = bool | Literal["only"]
#: Codes of one entry: shape and dtype by the end of their names.
Forms: TypeAlias = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
RESIDUAL = "residual/"


class UpdateCodec(UpdateTransform):
    """Encodes the entries of an update one by one, on the client, and decodes them at the server.

    ``updates`` are parameter updates and an algorithm's vectors, such as controls and feedback; ``moments`` those of
    optimizers but for their step counts; ``buffers`` running statistics. What a section holds beside floating-point
    numbers passes as it is. With error feedback a client sends C(v + e) and keeps e+ = v + e - C(v + e), so that what
    it has sent and what it keeps add up to its updates; e+ is committed only if the update counts. A code of another
    one's codes may have error feedback where that one has: the first in the row keeps what all of them lose.

    Args:
        sections: What is encoded.
        error_feedback: Whether e is kept. It is for updates alone: values are no sums over rounds.
        down: Whether what the server sends of these sections, parameters among the updates, has the same code; with
            ``only`` updates have not. An algorithm's own entries, such as controls or samples, go down as they are.
    """

    #: Sections whose numbers survive this code: squares stay squares, values keep their size.
    allowed: ClassVar[tuple[Section, ...]] = ("updates",)
    #: Whether codes of several clients add up to the code of the sum.
    is_linear: bool = False
    is_code = True
    #: Codes that are numbers of the entry, which a transform after this one may code again, or clip.
    numbers: ClassVar[tuple[str, ...]] = ()

    @checked()
    def __init__(
        self, *, sections: Sequence[Section] = ("updates",), error_feedback: bool = False, down: Down = False
    ) -> None:
        self.sections, self.error_feedback, self.down = tuple(sections), error_feedback, down
        wrong = [own for own in self.sections if own not in self.allowed]
        if wrong or not self.sections:
            raise ConfigurationError(
                message(
                    f"sections of {type(self).__name__} must be some of {', '.join(self.allowed)}",
                    received=wrong[0] if wrong else "none",
                    fix="leave it out: such numbers would not stay what they are",
                )
            )

    def check(self, *, is_secure: bool) -> None:
        if is_secure and not self.is_linear:
            raise ConfigurationError(
                message(
                    "secure aggregation adds masked numbers, so codes must be linear with what all clients share",
                    received=f"{type(self).__name__} under federation.secure",
                    fix="use RandomSparse(shared=true), or take one of the two out",
                )
            )

    # ------------------------------------------------------------------ one entry

    @abstractmethod
    def forms(self, entry: UpdateEntry) -> Forms:
        """Return the codes of an entry; none for one that passes as it is."""

    @abstractmethod
    def encode(self, value: Tensor, *, name: str, facts: RoundFacts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the codes of a number array.

        Args:
            value: What is encoded, as the entry has it.
            name: The entry's name.
            facts: The round; draws follow from its seed.
            state: What the client keeps of this entry, by the end of its name.
        """

    @abstractmethod
    def restore(self, codes: Mapping[str, Tensor], entry: UpdateEntry, *, name: str, facts: RoundFacts) -> Tensor:
        """Return what the codes stand for."""

    def kept(self, entry: UpdateEntry) -> dict[str, Tensor]:
        """Return what a client keeps of an entry beside its residual, before its first round."""
        return {}

    def next_state(self, codes: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a client keeps of an entry beside its residual, after a round."""
        return {}

    # ------------------------------------------------------------------ all entries

    def changes(self, entries: Mapping[str, UpdateEntry]) -> bool:
        return bool(self.coded(entries))

    def coded(self, entries: Mapping[str, UpdateEntry]) -> list[str]:
        return [name for name, entry in entries.items() if self._forms(name, entry, entries)]

    def schema(self, entries: Mapping[str, UpdateEntry]) -> dict[str, UpdateEntry]:
        found: dict[str, UpdateEntry] = {}
        for name, entry in entries.items():
            forms = self._forms(name, entry, entries)
            if not forms:
                found[name] = entry
            for part, (shape, dtype) in forms.items():
                kind: Literal["vector", "code"] = "vector" if part in self.numbers else "code"
                changed = {"shape": shape, "dtype": dtype, "kind": kind, "bound": None, "persists": False}
                found[f"{name}/{part}"] = dataclasses.replace(entry, **changed)  # type: ignore[arg-type]
        return found

    def client_state(self, entries: Mapping[str, UpdateEntry]) -> State:
        found: dict[str, Tensor] = {}
        for name, entry in entries.items():
            if self._forms(name, entry, entries):
                if self._feeds_back(name, entries):
                    found[f"{RESIDUAL}{name}"] = torch.zeros(entry.shape, dtype=entry.dtype)
                found |= {f"{part}/{name}": value for part, value in self._kept(entry).items()}
        return found

    def client(
        self, update: State, *, entries: Mapping[str, UpdateEntry], private: State, facts: RoundFacts
    ) -> tuple[State, State]:
        coded: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, value in update.items():
            if not self._forms(name, entries[name], entries):
                coded[name] = value
                continue
            residual = private.get(f"{RESIDUAL}{name}") if self._feeds_back(name, entries) else None
            wanted = value.detach() if residual is None else value.detach() + residual.to(value)
            mine = {p: private[f"{p}/{name}"] for p in self._kept(entries[name]) if f"{p}/{name}" in private}
            codes = self.encode(wanted, name=name, facts=facts, state=mine)
            if not bool(torch.isfinite(wanted).all()):  # a code must not hide what the server refuses
                codes = {
                    part: torch.full_like(c, torch.nan) if c.is_floating_point() else c for part, c in codes.items()
                }
            coded |= {f"{name}/{part}": own for part, own in codes.items()}
            if entries[name].persists:
                state |= {f"{part}/{name}": own for part, own in self.next_state(codes, mine).items()}
            if self._feeds_back(name, entries):
                state[f"{RESIDUAL}{name}"] = wanted  # less what arrives of it, which the codes after this one decide
        return coded, state

    def settled(
        self, state: State, *, entered: State, arrived: State, entries: Mapping[str, UpdateEntry], facts: RoundFacts
    ) -> tuple[State, State]:
        kept, came = dict(state), dict(entered)
        for name in entered:
            parts = self._forms(name, entries[name], entries)
            if not parts:
                came[name] = arrived[name]
            elif self._keeps_losses(name):
                codes = {part: arrived[f"{name}/{part}"] for part in parts}
                came[name] = self.restore(codes, entries[name], name=name, facts=facts)
                if f"{RESIDUAL}{name}" in kept:
                    kept[f"{RESIDUAL}{name}"] = kept[f"{RESIDUAL}{name}"] - came[name]
        return kept, came

    def decode(self, update: State, *, entries: Mapping[str, UpdateEntry], facts: RoundFacts) -> State:
        found, codes = {}, set()
        for name, entry in entries.items():
            parts = self._forms(name, entry, entries)
            codes |= {f"{name}/{part}" for part in parts}
            if parts and all(f"{name}/{part}" in update for part in parts):  # of moments a client may have none
                own = {part: update[f"{name}/{part}"] for part in parts}
                found[name] = self.restore(own, entry, name=name, facts=facts)
        return {**found, **{name: value for name, value in update.items() if name not in codes}}

    def decode_sum(self, mean: State, *, entries: Mapping[str, UpdateEntry], facts: RoundFacts) -> State:
        return self.decode(mean, entries=entries, facts=facts)  # of linear codes alone: others are refused

    def broadcast(self, state: State, *, is_parameter: Callable[[str], bool], facts: RoundFacts) -> tuple[State, State]:
        """Return what the server sends in place of a state, and what clients make of it: itself without ``down``.

        Args:
            state: What all clients receive.
            is_parameter: Whether a name is a parameter's.
            facts: The round, with the seed of the server's draws.
        """
        coder = self.downward
        if coder is None:
            return state, state
        entries = {name: UpdateEntry.of(value, is_vector=is_parameter(name)) for name, value in state.items()}
        sent, _ = coder.client(state, entries=entries, private={}, facts=facts)
        return sent, coder.decode(sent, entries=entries, facts=facts)

    @cached_property
    def downward(self) -> UpdateCodec | None:  # type: ignore[override] # None there
        if self.down != "only":
            return self if self.down else None
        found = copy.copy(self)
        found.down = True
        return found

    def takes(self, name: str, entry: UpdateEntry) -> bool:
        """Whether an entry is of its sections; none is of a code that is for what the server sends alone."""
        return self.down != "only" and section_of(name, entry) in self.sections

    def _forms(self, name: str, entry: UpdateEntry, entries: Mapping[str, UpdateEntry]) -> Forms:
        return self.forms(entry) if self.takes(name, entry) else {}

    def _kept(self, entry: UpdateEntry) -> dict[str, Tensor]:
        return self.kept(entry) if entry.persists else {}

    def _feeds_back(self, name: str, entries: Mapping[str, UpdateEntry]) -> bool:
        return self._keeps_losses(name) and entries[name].persists

    def _keeps_losses(self, name: str) -> bool:
        """Whether what this code takes of an entry is kept, by it or by the code that has made the entry."""
        return self.error_feedback and not name.startswith(namespaces.MOMENTS)


def section_of(name: str, entry: UpdateEntry) -> Section | None:
    """Return the section of an entry; ``None`` for integers, step counts, codes, and an algorithm's values."""
    if not entry.dtype.is_floating_point or not math.prod(entry.shape) or entry.kind == "code":
        return None
    if entry.kind == "vector":
        return "updates"
    if name.startswith(namespaces.MOMENTS):
        return "moments" if entry.shape else None
    return None if name.startswith(namespaces.ALGORITHM) else "buffers"


def draws(name: str, facts: RoundFacts, *, shared: bool = False) -> torch.Generator:
    """Return a CPU generator of an entry's draws in this round: the client's own, or the same for all clients."""
    seed = derive_seed(0, f"shared {name}", facts.round) if shared else derive_seed(facts.seed, f"code {name}")
    return torch.Generator().manual_seed(seed)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which entries of ``dtype`` are computed with: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def share_of(size: int, share: float) -> int:
    """Return how many of ``size`` numbers a share of them is: at least one."""
    return max(1, min(size, round(size * share)))
