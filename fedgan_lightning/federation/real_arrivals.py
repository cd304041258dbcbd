"""Rounds in real time: clients work on machines of their own, and their answers come when they come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from fedgan_lightning.errors import QuorumError, message
from fedgan_lightning.federation.arrivals import Arrivals, BufferedArrivals
from fedgan_lightning.federation.asynchronous import Asynchronous
from fedgan_lightning.federation.virtual_clock import VirtualArrivals
from fedgan_lightning.protocol import ClientTask, ClientUpdate, State
from fedgan_lightning.seeding import make_numpy_generator


class RealArrivals(BufferedArrivals):
    """Arrivals as they are. A client that is done gets the newest networks at once, unless it has worked on them.

    A client is at most once in a buffer: what comes of it meanwhile waits where it is. After a restart of the server
    nobody is at work; what clients keep is what the last update of theirs that counted has left them.

    Args:
        settings: The settings.
        num_clients: Clients of the federation.
        seed: The federation's.

    Attributes:
        inside: Clients of the buffer.
    """

    def __init__(self, settings: Asynchronous, *, num_clients: int, seed: int) -> None:
        super().__init__(settings)
        self.num_clients, self.seed = num_clients, seed
        self.inside: set[int] = set()
        self._versions: dict[int, int] = {}  # of those at work
        self._checks: dict[int, Any] = {}  # by version
        self._begun: dict[int, int] = {}  # the last version that each has worked on: twice it would be the same work
        self._usable: Callable[[int], bool] = lambda client_id: True
        self._draws = self._dropped = 0
        self._ages: list[int] = []

    def begin(self, task: ClientTask, *, exact: State, sizes: Mapping[str, int]) -> None:
        self._draws = self._dropped = 0
        self.inside, self._ages = set(), []
        self.add(task, exact=exact, sizes=sizes, needed={task.round, *self._versions.values()})

    def version(self, client_id: int) -> int:
        return self._versions.get(client_id, self.newest)

    def checks(self, checks_of: Callable[[ClientTask], Any]) -> Callable[[int], Any]:
        known = {version: own for version, own in self._checks.items() if version in self.tasks}
        known.setdefault(self.newest, checks_of(self.tasks[self.newest]))  # now: they know when the version began
        self._checks = known
        return lambda client_id: known.get(self._versions.get(client_id, -1))

    @property
    def at_work(self) -> Collection[int]:
        return self._versions.keys()

    def holds(self, client_id: int) -> bool:
        return client_id in self.inside

    def starting(self, is_usable: Callable[[int], bool], *, attempt: int) -> tuple[tuple[int, ...], int]:
        """Return who gets the newest networks; after a try whoever was in its buffer works again, with other draws."""
        self._usable = is_usable
        if attempt:
            self._versions, self._begun, self.inside, self._ages = {}, {}, set(), []
        self._versions = {k: version for k, version in self._versions.items() if is_usable(k)}
        left = sum(map(is_usable, range(self.num_clients)))
        if left < self.settings.buffer_size:
            fix = "look at the reasons in the log, or lower rules.asynchronous.buffer_size"
            rule = f"at least {self.settings.buffer_size} clients must be left to fill a buffer"
            raise QuorumError(message(rule, received=left, fix=fix))
        at_work = self.num_clients if self.settings.concurrency is None else self.settings.concurrency
        found: list[int] = []
        while len(self._versions) < at_work and (following := self._next()) is not None:
            found.append(following)
        return tuple(sorted(found)), self.settings.buffer_size

    def answered(self, client_id: int, *, counts: bool) -> list[int]:
        """Return who starts now: somebody at rest who has not worked on the newest networks."""
        version = self._versions.pop(client_id, None)
        if version is None:
            return []
        if counts:
            self.inside.add(client_id)
            self._ages.append(self.newest - version)
        if len(self.inside) >= self.settings.buffer_size:
            return []  # the next networks are about to be there
        following = self._next()
        return [] if following is None else [following]

    def counted(self, update: ClientUpdate, *, round: int) -> ClientUpdate | None:
        found = super().counted(update, round=round)
        self._dropped += found is None
        return found

    def gauges(self) -> dict[str, float]:
        return self.ages(self._ages, dropped=self._dropped)

    def _next(self) -> int | None:
        """Have somebody at rest start; return who, ``None`` if there is nobody."""
        free = [k for k in range(self.num_clients) if k not in self._versions and self._begun.get(k) != self.newest]
        free = [k for k in free if self._usable(k)]
        if not free:
            return None
        self._draws += 1
        chosen = free[int(make_numpy_generator(self.seed, "at work", self.newest, self._draws).integers(len(free)))]
        self._versions[chosen] = self._begun[chosen] = self.newest
        return chosen


def arrivals_of(federation: Any, *, num_clients: int) -> Arrivals:
    """Return what a run remembers of those at work.

    Args:
        federation: The orchestrator, with its rules, executor and seed.
        num_clients: Clients of the federation.
    """
    settings = federation.rules.asynchronous
    if settings is None:
        return Arrivals()
    kind = RealArrivals if federation.executor.in_real_time else VirtualArrivals
    return kind(settings, num_clients=num_clients, seed=federation.seed)
