"""Compression of updates to one bit per number, with error feedback."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import State, UpdateEntry, UpdateTransform

SIGNS, SCALE, RESIDUAL = "/signs", "/scale", "residual/"
#: Place values of the bits of a byte.
BITS = (1, 2, 4, 8, 16, 32, 64, 128)


class SignCompression(UpdateTransform):
    """Sends sign(v + e) and mean |v + e| for every vector v of an update, and keeps e+ = v + e - decoded.

    A number takes one bit in place of 32; each entry adds a scale of four or eight bytes. With error feedback what one
    round loses the next one brings. Source: Karimireddy, Rebjock, Stich, Jaggi 2019, algorithm 2 (EF-signSGD).

    Args:
        error_feedback: Whether e is kept on the client; without it every round starts from e = 0.
    """

    @checked()
    def __init__(self, *, error_feedback: bool = True) -> None:
        self.error_feedback = error_feedback

    def check(self, *, is_secure: bool) -> None:
        if is_secure:
            raise ConfigurationError(
                message(
                    "secure aggregation adds masked numbers, so codes must be linear",
                    received="SignCompression under federation.secure",
                    fix="take one of the two out",
                )
            )

    def schema(self, entries: Mapping[str, UpdateEntry]) -> dict[str, UpdateEntry]:
        found: dict[str, UpdateEntry] = {}
        for name, entry in entries.items():
            if not _is_coded(entry):
                found[name] = entry
                continue
            size = math.prod(entry.shape)
            found[f"{name}{SIGNS}"] = dataclasses.replace(
                entry, shape=(-(-size // 8),), dtype=torch.uint8, kind="value", bound=None
            )
            found[f"{name}{SCALE}"] = dataclasses.replace(entry, shape=(), kind="value")
        return found

    def client_state(self, entries: Mapping[str, UpdateEntry]) -> State:
        if not self.error_feedback:
            return {}
        return {
            f"{RESIDUAL}{name}": torch.zeros(entry.shape, dtype=entry.dtype)
            for name, entry in entries.items()
            if _is_coded(entry)
        }

    def client(
        self,
        update: State,
        *,
        entries: Mapping[str, UpdateEntry],
        private: State,
        hyperparameters: Mapping[str, float],
    ) -> tuple[State, State]:
        coded: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for name, value in update.items():
            if not _is_coded(entries[name]):
                coded[name] = value
                continue
            residual = private.get(f"{RESIDUAL}{name}")
            wanted = value if residual is None else value + residual.to(value)
            scale = wanted.abs().mean() if wanted.numel() else wanted.new_zeros(())
            coded[f"{name}{SIGNS}"], coded[f"{name}{SCALE}"] = _packed(wanted), scale
            if self.error_feedback:
                kept[f"{RESIDUAL}{name}"] = wanted - _decoded(coded, name, entries[name])
        return coded, kept

    def decode(
        self, update: State, *, entries: Mapping[str, UpdateEntry], hyperparameters: Mapping[str, float]
    ) -> State:
        known = {name for name, entry in entries.items() if _is_coded(entry)}
        codes = {f"{name}{part}" for name in known for part in (SIGNS, SCALE)}
        found = {name: value for name, value in update.items() if name not in codes}
        return {**{name: _decoded(update, name, entries[name]) for name in entries if name in known}, **found}


def _is_coded(entry: UpdateEntry) -> bool:
    return entry.kind == "vector" and entry.dtype.is_floating_point


def _packed(values: Tensor) -> Tensor:
    """Return the signs of all numbers, eight in a byte; zero counts as positive."""
    bits = (values.detach().flatten() >= 0).to(torch.uint8)
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (padded * torch.tensor(BITS, dtype=torch.uint8, device=bits.device)).sum(1).to(torch.uint8)


def _decoded(update: State, name: str, entry: UpdateEntry) -> Tensor:
    codes, scale = update[f"{name}{SIGNS}"], update[f"{name}{SCALE}"]
    places = torch.tensor(BITS, dtype=torch.uint8, device=codes.device)
    bits = (codes.unsqueeze(1) & places).ne(0).flatten()[: math.prod(entry.shape)]
    return torch.where(bits, scale, -scale).reshape(entry.shape)
