"""What a run remembers of those at work: what each client was given, and what its answer counts as."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fedgan_lightning.federation.asynchronous import Asynchronous
from fedgan_lightning.protocol import ClientSampler, ClientTask, ClientUpdate, State


class Arrivals:
    """Rounds that wait for all: every client has the task of the round, and what it answers counts as it is.

    Attributes:
        tasks: By version, the rounds before it, what the clients got that started on it, as far as it is needed.
        sizes: By version the bytes of that as they were sent, by network.
        exact: The server's own networks of the newest version.
        newest: The newest version.
    """

    #: Whether answers count that were given networks of earlier rounds.
    of_any_age: ClassVar[bool] = False

    def __init__(self) -> None:
        self.tasks: dict[int, ClientTask] = {}
        self.sizes: dict[int, Mapping[str, int]] = {}
        self.exact: State = {}
        self.newest = 0

    def begin(self, task: ClientTask, *, exact: State, sizes: Mapping[str, int]) -> None:
        """Begin a round, whose newest networks are those of ``task``.

        Args:
            task: What clients get that start now.
            exact: The server's own networks, which a code on their way down may have changed.
            sizes: Bytes of the task by network, as they are sent.
        """
        self.tasks, self.sizes, self.exact, self.newest = {task.round: task}, {task.round: sizes}, exact, task.round

    def version(self, client_id: int) -> int:
        """Return what a client was given last."""
        return self.newest

    def given(self, client_id: int) -> ClientTask:
        """Return the task of all clients that were given the same networks as this one."""
        return self.tasks[self.version(client_id)]

    def bytes_of(self, client_id: int) -> Mapping[str, int]:
        """Return the size of what a client was given, by network."""
        return self.sizes[self.version(client_id)]

    def sampler(self, given: ClientSampler) -> ClientSampler:
        """Return who chooses the clients of a round, where the user has ``given`` one."""
        return given

    def starting(self, is_usable: Callable[[int], bool], *, attempt: int) -> tuple[tuple[int, ...], int] | None:
        """Return who begins in an attempt of a round, and how many answers end it; ``None`` where a sampler says so.

        Args:
            is_usable: Whether a client may be asked.
            attempt: Tries of the round before.

        Raises:
            QuorumError: If fewer clients are left than a round needs.
        """
        return None

    def checks(self, checks_of: Callable[[ClientTask], Any]) -> Callable[[int], Any]:
        """Return what gives the checks of a client's answer; ``None`` for those of the round.

        Args:
            checks_of: Returns the checks of what answers a task.
        """
        return lambda client_id: None

    def counted(self, update: ClientUpdate, *, round: int) -> ClientUpdate | None:
        """Return an update as it counts; ``None`` of one that is too old."""
        return update

    def answered(self, client_id: int, *, counts: bool) -> list[int]:
        """Return who starts now, after an answer of a client.

        Args:
            client_id: Who has answered, or will not.
            counts: Whether its update does.
        """
        return []

    @property
    def at_work(self) -> Collection[int]:
        """Clients that go on working when a round is over."""
        return ()

    def holds(self, client_id: int) -> bool:
        """Whether the round has an update of this client already, so that another answer of it has to wait."""
        return False

    @property
    def may_answer(self) -> bool:
        """Whether an answer that counts in this round may still come of those at work."""
        return any(not self.holds(client_id) for client_id in self.at_work)

    def gauges(self) -> dict[str, float]:
        """Return what a dashboard shows of the round that has begun last."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know; nothing unless overridden."""
        return {}

    def check_continued(self, state: Mapping[str, Any], *, rounds: int) -> None:
        """Refuse a state that no run can go on from; none unless overridden.

        Args:
            state: What the ``state_dict`` of the run before returned.
            rounds: Rounds that are complete.

        Raises:
            CheckpointError: If it is one.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; nothing unless overridden."""


class BufferedArrivals(Arrivals):
    """Rounds of K arrivals, whatever the age of each.

    Args:
        settings: The settings.
    """

    of_any_age = True

    def __init__(self, settings: Asynchronous) -> None:
        super().__init__()
        self.settings = settings

    def add(self, task: ClientTask, *, exact: State, sizes: Mapping[str, int], needed: Collection[int]) -> None:
        """Remember a version, and forget those that nobody needs."""
        self.tasks[task.round], self.sizes[task.round] = task, sizes
        for version in {*self.tasks} - {*needed}:
            del self.tasks[version], self.sizes[version]
        self.exact, self.newest = exact, task.round

    def counted(self, update: ClientUpdate, *, round: int) -> ClientUpdate | None:
        """Return an update with the parameters' share that its age leaves it; ``None`` of one that is too old."""
        assert update.round is not None
        age, delta = round - update.round, update.delta
        if not self.settings.counts(age):
            return None
        factor, then = self.settings.discount(age), self.tasks[update.round].state
        if self.settings.toward == "model" and then is not self.exact:
            delta = _toward(delta, then=then, now=self.exact)
        if factor == 1.0 and delta is update.delta:
            return update
        return dataclasses.replace(update, delta={name: factor * value for name, value in delta.items()})

    @staticmethod
    def ages(ages: Sequence[int], *, dropped: int) -> dict[str, float]:
        """Return the tags of ages."""
        mean, largest = (sum(ages) / len(ages), max(ages)) if ages else (0.0, 0)
        return {"staleness/mean": mean, "staleness/max": float(largest), "staleness/dropped": float(dropped)}


def _toward(delta: State, *, then: State, now: State) -> dict[str, Tensor]:
    """Return w_i - w: what the client has changed, and how far the server has moved meanwhile."""
    return {name: value + (then[name] - now[name]).to(value) for name, value in delta.items()}
