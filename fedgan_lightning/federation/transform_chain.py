"""The chain of transforms between a client and the aggregator, for one update at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.errors import UpdateError
from fedgan_lightning.federation import namespaces
from fedgan_lightning.packing import Layout, Packed
from fedgan_lightning.protocol import Aggregate, Aggregator, ClientUpdate, State, UpdateEntry, UpdateTransform

Entries = Mapping[str, UpdateEntry]


class TransformChain:
    """Applies transforms in order on a client, and undoes them in reverse on the server.

    Args:
        transforms: The transforms.
    """

    def __init__(self, transforms: Sequence[UpdateTransform] = ()) -> None:
        self.transforms = tuple(transforms)
        self._stages: dict[tuple[Layout, Layout], list[Entries]] = {}

    def __len__(self) -> int:
        return len(self.transforms)

    def __iter__(self) -> Iterator[UpdateTransform]:
        return iter(self.transforms)

    def check(self, *, aggregator: Aggregator, is_secure: bool) -> None:
        """Refuse transforms that cannot go with each other, or with the federation.

        Raises:
            ConfigurationError: If there are such.
        """
        for index, transform in enumerate(self.transforms):
            others = self.transforms[:index] + self.transforms[index + 1 :]
            transform.check(aggregator=aggregator, is_secure=is_secure, others=others)

    def entries(self, of_algorithm: Entries, delta: Layout, extras: Layout) -> dict[str, UpdateEntry]:
        """Return what is known of the entries of an update before any transform.

        Args:
            of_algorithm: The algorithm's own entries, by its names.
            delta: Layout of parameter updates.
            extras: Layout of everything else.
        """
        found = {
            name: UpdateEntry(shape, dtype, group="delta", kind="vector")
            for name, shape, dtype in zip(delta.names, delta.shapes, delta.dtypes)
        }
        found |= {
            name: UpdateEntry(shape, dtype) for name, shape, dtype in zip(extras.names, extras.shapes, extras.dtypes)
        }
        return {**found, **namespaces.under(namespaces.ALGORITHM, of_algorithm)}

    def stages(self, entries: Entries) -> list[Entries]:
        """Return the entries that enter each transform, and those that leave the last one."""
        found = [entries]
        for transform in self.transforms:
            found.append(transform.schema(found[-1]))
        return found

    def rules(self, entries: Entries) -> dict[str, UpdateEntry]:
        """Return the entries with the rules that transforms give them: those of the last transform that knows them."""
        found = dict(entries)
        for stage in self.stages(entries):
            found |= {name: entry for name, entry in stage.items() if name in entries}
        return found

    def client_state(self, entries: Entries) -> dict[str, Tensor]:
        """Return what the transforms keep of a client that has no state yet."""
        found: dict[str, Tensor] = {}
        for index, (transform, entering) in enumerate(zip(self.transforms, self.stages(entries))):
            found |= namespaces.under(namespaces.of_transform(index), transform.client_state(entering))
        return found

    def sent(
        self, update: ClientUpdate, private: State, of_algorithm: Entries
    ) -> tuple[ClientUpdate, ClientUpdate, dict[str, Tensor]]:
        """Return an update as it is sent, as the server decodes it, and the transforms' private state after that."""
        stages = self._stages_of(update, of_algorithm)
        values: State = {**update.delta, **update.extras}
        kept: dict[str, Tensor] = {}
        for index, (transform, entering) in enumerate(zip(self.transforms, stages)):
            prefix = namespaces.of_transform(index)
            values, state = transform.client(values, entries=entering, private=namespaces.inside(prefix, private))
            kept |= namespaces.under(prefix, state)
        sent = _grouped(update, values, stages[-1]) if self.transforms else update
        return sent, self._decoded(sent, stages), kept

    def decoded(self, who: str, update: ClientUpdate, entries: Entries) -> ClientUpdate:
        """Return what a client sent as the aggregator wants it.

        Args:
            who: The sender, in words.
            update: What came.
            entries: What is known of the entries of an update before any transform.

        Raises:
            UpdateError: If an encoded entry is missing, or is no finite tensor of its shape and dtype.
        """
        if not self.transforms:
            return update
        stages = self.stages(entries)
        came: dict[str, Any] = {**update.delta, **update.extras}
        for name, entry in stages[-1].items():
            if entries.get(name) != entry:
                _check(who, name, came.get(name), entry)
        return self._decoded(update, stages)

    def total(self, total: Aggregate) -> Aggregate:
        """Return the total of a round as the server steps on it."""
        for transform in reversed(self.transforms):
            total = transform.total(total)
        return total

    def _decoded(self, update: ClientUpdate, stages: Sequence[Entries]) -> ClientUpdate:
        if not self.transforms:
            return update
        values: State = {**update.delta, **update.extras}
        for transform, entering in reversed(list(zip(self.transforms, stages))):
            values = transform.decode(values, entries=entering)
        return _grouped(update, values, stages[0])

    def _stages_of(self, update: ClientUpdate, of_algorithm: Entries) -> list[Entries]:
        """Return the stages of an update of this layout, made once."""
        key = (Packed.of(update.delta).layout, Packed.of(update.extras).layout)
        if key not in self._stages:
            self._stages[key] = self.stages(self.entries(of_algorithm, *key))
        return self._stages[key]


def _grouped(update: ClientUpdate, values: State, entries: Entries) -> ClientUpdate:
    """Return an update with these values; what nobody knows goes among the extras, where it is refused."""
    delta = {name: value for name, value in values.items() if name in entries and entries[name].group == "delta"}
    extras = {name: value for name, value in values.items() if name not in delta}
    return dataclasses.replace(update, delta=Packed.of(delta), extras=Packed.of(extras))


def _check(who: str, name: str, value: object, entry: UpdateEntry) -> None:
    """Refuse what is no plain tensor of an entry's shape and dtype, with finite numbers within its bound.

    Raises:
        UpdateError: If it is not.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise UpdateError(f"{who}: {name} is missing, or is no plain tensor")
    if tuple(value.shape) != entry.shape or value.dtype != entry.dtype:
        raise UpdateError(
            f"{who}: {name} is {value.dtype} of shape {list(value.shape)}, not {entry.dtype} of {list(entry.shape)}"
        )
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise UpdateError(f"{who}: {name} is not finite")
    if entry.bound is not None and value.numel() and float(value.abs().max()) > entry.bound:
        raise UpdateError(f"{who}: {name} reaches {float(value.abs().max()):.4g}, beyond {entry.bound:.4g}")
