"""The chain of transforms between a client and the aggregator, for one update at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, UpdateError, message
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.schema import check_bound, check_tensor, is_believable
from fedgan_lightning.packing import Layout, Packed
from fedgan_lightning.protocol import Aggregate, ClientUpdate, State, UpdateEntry, UpdateSum
from fedgan_lightning.seeding import derive_seed
from fedgan_lightning.update_transform import RoundFacts, UpdateTransform

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

    def check(self, *, is_secure: bool) -> None:
        """Refuse transforms that cannot go with the federation.

        Raises:
            ConfigurationError: If there are such.
        """
        for transform in self.transforms:
            transform.check(is_secure=is_secure)

    def check_used(self, stages: Sequence[Entries], *, down: Entries) -> None:
        """Refuse a transform that has nothing to do, and error feedback that nobody would keep.

        Args:
            stages: Of the updates of the run.
            down: What the server sends to all clients, but for the algorithm's own entries.

        Raises:
            ConfigurationError: If there is one.
        """
        for index, (transform, entering) in enumerate(zip(self.transforms, stages)):
            who = f"{type(transform).__name__}, number {index + 1} of {len(self)}"
            downward, finds_up = transform.downward, transform.changes(entering)
            if not finds_up and (downward is None or downward is transform):
                rule = "every transform must find something of an update that no code has taken before it"
                fix = (
                    "leave it out, put it before the codes, have its section travel (moments: optimizer_state), or set "
                    "down: only for a code of what the server sends"
                )
                raise ConfigurationError(message(rule, received=f"{who}, which finds nothing it can take", fix=fix))
            if downward is not None:
                if not downward.changes(down):
                    rule = "down must find something that the server sends to all: networks, moments or statistics"
                    raise ConfigurationError(
                        message(rule, received=f"{who}, with down", fix="leave it out, or set down to false")
                    )
                down = downward.schema(down)
        self._check_feedback(stages)

    def _check_feedback(self, stages: Sequence[Entries]) -> None:
        """Refuse error feedback of a code of codes, where the one that made them keeps nothing.

        Raises:
            ConfigurationError: If there is such.
        """
        kept: set[str] = set()  # codes of which what is lost comes back
        for index, (transform, entering, leaving) in enumerate(zip(self.transforms, stages, stages[1:])):
            if not transform.is_code:
                kept = set()  # what it changes is meant, and what was made before is not what leaves it
            codes = [name for name in transform.coded(entering) if name not in stages[0]]
            forgotten = [name for name in codes if name not in kept and _is_of_many_rounds(name, stages[0])]
            if transform.error_feedback and forgotten:
                before = " and ".join(type(own).__name__ for own in self.transforms[:index])
                raise ConfigurationError(
                    message(
                        "error feedback of a code of codes must be kept by what has made them, right before it",
                        received=f"{type(transform).__name__}, number {index + 1} of {len(self)}, with error_feedback: "
                        f"true, behind {before}",
                        fix="set it to false here, or put the code that has made them right before it, with "
                        "error_feedback: true",
                    )
                )
            if transform.error_feedback:
                kept |= {*leaving} - {*entering}

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

    def own_entries(self) -> dict[str, UpdateEntry]:
        """Return the scalars that transforms have come up beside an update."""
        return {name: entry for transform in self.transforms for name, entry in transform.own_entries().items()}

    def stages(self, entries: Entries) -> list[Entries]:
        """Return the entries that enter each transform, and those that leave the last one."""
        found = [entries]
        for transform in self.transforms:
            found.append(transform.schema(found[-1]))
        return found

    def stages_of(self, of_algorithm: Entries, delta: Layout, extras: Layout) -> list[Entries]:
        """Return the stages of updates of these layouts, made once; arguments as in :meth:`entries`."""
        key = (delta, extras)
        if key not in self._stages:
            self._stages[key] = self.stages(self.entries(of_algorithm, delta, extras))
        return self._stages[key]

    def rules(self, stages: Sequence[Entries]) -> dict[str, UpdateEntry]:
        """Return the entries with the rules that transforms give them: those of the last transform that knows them."""
        entries = stages[0]
        return {name: entry for stage in stages for name, entry in stage.items() if name in entries}

    def client_state(self, entries: Entries) -> dict[str, Tensor]:
        """Return what the transforms keep of a client that has no state yet."""
        found: dict[str, Tensor] = {}
        for index, (transform, entering) in enumerate(zip(self.transforms, self.stages(entries))):
            found |= namespaces.under(namespaces.of_transform(index), transform.client_state(entering))
        return found

    def sent(
        self, update: ClientUpdate, private: State, of_algorithm: Entries, *, facts: RoundFacts
    ) -> tuple[ClientUpdate, dict[str, Tensor]]:
        """Return an update as it is sent, and the transforms' private state after that."""
        stages = self.stages_of(of_algorithm, *(Packed.of(part).layout for part in (update.delta, update.extras)))
        values: State = {**update.delta, **update.extras}
        entered, states = list[State](), list[State]()
        for index, (transform, entering) in enumerate(zip(self.transforms, stages)):
            own = namespaces.inside(namespaces.of_transform(index), private)
            draws = dataclasses.replace(facts, seed=derive_seed(facts.seed, "transform", index))
            entered.append(values)
            values, state = transform.client(values, entries=entering, private=own, facts=draws)
            states.append(state)
        kept: dict[str, Tensor] = {}
        arrived = values
        for index, transform in reversed(list(enumerate(self.transforms))):
            state, arrived = transform.settled(
                states[index], entered=entered[index], arrived=arrived, entries=stages[index], facts=facts
            )
            kept |= namespaces.under(namespaces.of_transform(index), state)
        return (_grouped(update, values, stages[-1]) if self.transforms else update), kept

    def received(
        self, update: ClientUpdate, of_algorithm: Entries, *, before: ClientUpdate, facts: RoundFacts
    ) -> ClientUpdate:
        """Return an update as the server decodes it; ``before`` is the update as it was formed."""
        stages = self.stages_of(of_algorithm, *(Packed.of(part).layout for part in (before.delta, before.extras)))
        return self._decoded(update, stages, facts)

    def decoded(self, who: str, update: ClientUpdate, stages: Sequence[Entries], *, facts: RoundFacts) -> ClientUpdate:
        """Return what a client sent as the aggregator wants it.

        Args:
            who: The sender, in words.
            update: What came.
            stages: What is known of the entries between transforms.
            facts: The round that it answers.

        Raises:
            UpdateError: If an encoded entry is missing, or is no finite tensor of its shape and dtype.
        """
        came: dict[str, Any] = {**update.delta, **update.extras}
        _check_codes(who, came, stages)
        return self._decoded(update, stages, facts, came=came)

    def decoded_sum(self, who: str, total: UpdateSum, stages: Sequence[Entries], *, facts: RoundFacts) -> UpdateSum:
        """Return the mean of several updates as the aggregator wants it; arguments and errors as :meth:`decoded`."""
        came: dict[str, Any] = {**total.delta, **total.extras}
        _check_codes(who, came, stages)
        values: State = came
        for transform, entering in reversed(list(zip(self.transforms, stages))):
            values = transform.decode_sum(values, entries=entering, facts=facts)
        delta, extras = _groups(values, stages[0])
        return total if values is came else dataclasses.replace(total, delta=delta, extras=extras)

    def broadcast(self, state: State, *, is_parameter: Callable[[str], bool], facts: RoundFacts) -> tuple[State, State]:
        """Return what the server sends in place of a state that all clients receive, and what they make of it."""
        sent, seen = state, state
        for transform in self.transforms:  # each has sections of its own, and what another has coded is none of them
            if transform.downward is None:
                continue
            coded, made = transform.broadcast(sent, is_parameter=is_parameter, facts=facts)
            changed = {name for name in sent if name not in coded}
            seen = {name: made[name] if name in changed else value for name, value in seen.items()}
            sent = coded
        return sent, seen

    def sent_layouts(self, stages: Sequence[Entries]) -> dict[str, Layout]:
        """Return the layouts of an update as it is sent, by group."""
        found = {}
        for group in ("delta", "extras"):
            own = {name: entry for name, entry in stages[-1].items() if entry.group == group}
            shapes, dtypes = (tuple(getattr(entry, part) for entry in own.values()) for part in ("shape", "dtype"))
            found[group] = Layout(tuple(own), shapes, dtypes)
        return found

    def total(self, total: Aggregate) -> Aggregate:
        """Return the total of a round as the server steps on it."""
        for transform in reversed(self.transforms):
            total = transform.total(total)
        return total

    def _decoded(
        self,
        update: ClientUpdate,
        stages: Sequence[Entries],
        facts: RoundFacts,
        *,
        came: State | None = None,
    ) -> ClientUpdate:
        if not self.transforms:
            return update
        came = {**update.delta, **update.extras} if came is None else came
        values: State = came
        for transform, entering in reversed(list(zip(self.transforms, stages))):
            values = transform.decode(values, entries=entering, facts=facts)
        return update if values is came else _grouped(update, values, stages[0])


def _is_of_many_rounds(code: str, before: Entries) -> bool:
    """Whether what a code stands for is about the same in every round."""
    name = code
    while name not in before and "/" in name:
        name = name.rpartition("/")[0]
    return name in before and before[name].persists


def _encoded(stages: Sequence[Entries]) -> Entries:
    """Return the entries that are sent in another form than they had before all transforms."""
    before = stages[0]
    return {
        name: entry for name, entry in stages[-1].items() if name not in before or _form(before[name]) != _form(entry)
    }


def _form(entry: UpdateEntry) -> tuple[Any, ...]:
    """Return what is looked at in an entry as it arrives: not how the server combines it."""
    return entry.shape, entry.dtype, entry.kind, entry.bound


def _check_codes(who: str, came: Mapping[str, Any], stages: Sequence[Entries]) -> None:
    """Refuse codes that are none.

    Raises:
        UpdateError: If one is missing, or no finite tensor of its shape and dtype.
    """
    for name, entry in _encoded(stages).items():
        if name not in came and name.startswith(namespaces.MOMENTS):
            continue  # a client has no moments of what its loss has not touched; the schema knows when that can be
        what = f"{who}: {name}"
        value = check_tensor(what, came.get(name), shape=entry.shape, dtype=entry.dtype)
        if not is_believable(value):
            raise UpdateError(f"{what} is not finite, or beyond what any network learns with")
        check_bound(what, value, entry.bound)


def _grouped(update: ClientUpdate, values: State, entries: Entries) -> ClientUpdate:
    """Return an update with these values; what nobody knows goes among the extras, where it is refused."""
    delta, extras = _groups(values, entries)
    return dataclasses.replace(update, delta=delta, extras=extras)


def _groups(values: State, entries: Entries) -> tuple[Packed, Packed]:
    delta = {name: value for name, value in values.items() if name in entries and entries[name].group == "delta"}
    return Packed.of(delta), Packed.of({name: value for name, value in values.items() if name not in delta})
