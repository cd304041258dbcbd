"""Rounds in virtual time: a clock says who arrives when, as a pure function of durations and seed.

A client is trained when its answer is due, from the networks that it was sent, so that nothing of a buffer is ever held
between rounds, and a resumed run is the same to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedgan_lightning.errors import CheckpointError, message
from fedgan_lightning.federation.arrivals import BufferedArrivals
from fedgan_lightning.federation.asynchronous import Asynchronous
from fedgan_lightning.protocol import ClientSampler, ClientTask, State
from fedgan_lightning.seeding import make_numpy_generator


@dataclass(frozen=True)
class Arrival:
    """An answer in virtual time.

    Attributes:
        client_id: Whose.
        version: Server steps when it got its networks.
        seconds: When it arrives.
    """

    client_id: int
    version: int
    seconds: float


@dataclass(frozen=True)
class Buffer:
    """A round in virtual time.

    Attributes:
        arrivals: Those that count, in the order in which they come.
        dropped: Those that were too old.
        at_work: By client the version that it works on when the buffer is full.
    """

    arrivals: tuple[Arrival, ...]
    dropped: int
    at_work: Mapping[int, int]

    @property
    def seconds(self) -> float:
        """When the buffer is full."""
        return max(own.seconds for own in self.arrivals)


def buffers(settings: Asynchronous, *, num_clients: int, seed: int) -> Iterator[Buffer]:
    """Yield the rounds of a federation, without end: who arrives, and with which version of the networks."""
    return _Clock(settings, num_clients=num_clients, seed=seed).rounds()


class _Clock:
    """The queue of those at work. Ties go to the smaller number."""

    def __init__(self, settings: Asynchronous, *, num_clients: int, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.queue: list[tuple[float, int]] = []
        self.versions: dict[int, int] = {}
        self.begun: dict[int, int] = {}  # the last version that each has worked on: twice it would be the same work
        self.tasks = dict.fromkeys(range(num_clients), 0)
        self.resting = [*range(num_clients)]
        self.draws = make_numpy_generator(seed, "at work")
        for _ in range(num_clients if settings.concurrency is None else settings.concurrency):
            self.go_on(version=0, now=0.0)

    def start(self, client_id: int, *, version: int, now: float) -> None:
        """Give a client the newest networks."""
        taken = self.settings.durations.seconds(client_id, number=self.tasks[client_id], seed=self.seed)
        self.tasks[client_id] += 1
        self.versions[client_id] = self.begun[client_id] = version
        heapq.heappush(self.queue, (now + taken, client_id))

    def done(self, client_id: int) -> None:
        """Take a client's answer: it rests."""
        self.versions.pop(client_id)
        self.resting.append(client_id)
        self.resting.sort()

    def go_on(self, *, version: int, now: float) -> bool:
        """Have somebody at rest start, who has not worked on this version; return whether there is anybody."""
        free = [client_id for client_id in self.resting if self.begun.get(client_id) != version]
        if not free:
            return False
        following = free[int(self.draws.integers(len(free)))]
        self.resting.remove(following)
        self.start(following, version=version, now=now)
        return True

    def rounds(self) -> Iterator[Buffer]:
        version = 0
        waiting: list[tuple[float, int]] = []  # done, but in the buffer already
        while True:
            for seconds, client_id in waiting:  # they come first, when the last buffer was full
                heapq.heappush(self.queue, (seconds, client_id))
            waiting, inside, dropped, idle = [], dict[int, Arrival](), 0, 0
            while len(inside) < self.settings.buffer_size:
                now, client_id = heapq.heappop(self.queue)
                if client_id in inside:
                    waiting.append((now, client_id))
                    continue
                started = self.versions[client_id]
                if self.settings.counts(version - started):
                    inside[client_id] = Arrival(client_id, started, now)
                else:
                    dropped += 1
                self.done(client_id)
                if len(inside) < self.settings.buffer_size:
                    idle += not self.go_on(version=version, now=now)  # nobody has newer networks to work on
                else:
                    idle += 1
            version += 1
            for _ in range(idle):
                self.go_on(version=version, now=now)
            waiting = [(max(now, seconds), client_id) for seconds, client_id in waiting]
            yield Buffer(tuple(inside.values()), dropped, dict(self.versions))


class VirtualArrivals(BufferedArrivals):
    """Arrivals by a virtual clock.

    Args:
        settings: The settings.
        num_clients: Clients of the federation.
        seed: The federation's.
    """

    def __init__(self, settings: Asynchronous, *, num_clients: int, seed: int) -> None:
        super().__init__(settings)
        self._given: dict[int, int] = {}
        self._rounds = buffers(settings, num_clients=num_clients, seed=seed)
        self._known: list[Buffer] = []
        self._said: list[str] = []  # by round a digest of all buffers up to it

    def buffer(self, round: int) -> Buffer:
        """Return who arrives in a round."""
        while len(self._known) <= round:
            self._known.append(next(self._rounds))
            own = [(own.client_id, own.version, f"{own.seconds:.9g}") for own in self._known[-1].arrivals]
            self._said.append(hashlib.sha256(repr((self._said[-1:], own)).encode()).hexdigest())
        return self._known[round]

    def begin(self, task: ClientTask, *, exact: State, sizes: Mapping[str, int]) -> None:
        """Begin a round: remember what all clients get that start now, and what those of the round were given."""
        here = self.buffer(task.round)
        needed = {task.round, *here.at_work.values(), *(own.version for own in here.arrivals)}
        self.add(task, exact=exact, sizes=sizes, needed=needed)
        self._given = {own.client_id: own.version for own in here.arrivals}

    def version(self, client_id: int) -> int:
        return self._given.get(client_id, self.newest)

    def sampler(self, given: ClientSampler) -> ClientSampler:
        return ArrivingClients(self)

    def checks(self, checks_of: Callable[[ClientTask], Any]) -> Callable[[int], Any]:
        found = {client_id: checks_of(self.tasks[version]) for client_id, version in self._given.items()}
        return lambda client_id: found.get(client_id)

    def gauges(self) -> dict[str, float]:
        own = self.buffer(self.newest)
        ages = [self.newest - arrival.version for arrival in own.arrivals]
        return {**self.ages(ages, dropped=own.dropped), "staleness/virtual_seconds": own.seconds}

    def state_dict(self) -> dict[str, Any]:
        """Return the networks of all versions that somebody works on, and what the clock has said so far."""
        fields = [own.name for own in dataclasses.fields(ClientTask)]
        plain = {version: {name: getattr(task, name) for name in fields} for version, task in self.tasks.items()}
        for version, own in plain.items():
            own.update(own={}, coded=None, state=dict(own["state"]), sizes=dict(self.sizes[version]))
        return {
            "versions": {str(version): own for version, own in plain.items()},
            "newest": self.newest,
            "clock": self._digest(self.newest),
        }

    def check_continued(self, state: Mapping[str, Any], *, rounds: int) -> None:
        if rounds and "clock" not in state:
            raise CheckpointError(
                message(
                    "a run by a virtual clock must go on from a checkpoint of one",
                    received="one of rounds that wait for all, or of a deployment",
                    fix="restore federation.rules.asynchronous, or go on where it was run",
                )
            )
        if rounds and self._digest(state["newest"]) != state["clock"]:
            raise CheckpointError(
                message(
                    "a run by a virtual clock must go on by the same one, which says who works on what",
                    received="other durations, buffers, concurrency or most_stale than in the checkpoint",
                    fix="restore federation.rules.asynchronous, or start a new run in another directory",
                )
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        versions = {int(version): dict(own) for version, own in state.get("versions", {}).items()}
        self.sizes = {version: own.pop("sizes") for version, own in versions.items()}
        self.tasks = {
            version: ClientTask(**{**own, "schedule_positions": tuple(own["schedule_positions"])})
            for version, own in versions.items()
        }

    def _digest(self, round: int) -> str:
        """Return what is the same of two clocks that say the same of all rounds up to this one."""
        self.buffer(round)
        return self._said[round]


class ArrivingClients(ClientSampler):
    """Chooses those whose answers arrive in a round.

    Args:
        run: The run.
    """

    def __init__(self, run: VirtualArrivals) -> None:
        self.run = run

    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        return tuple(sorted(own.client_id for own in self.run.buffer(round).arrivals))

    def population(self, *, num_clients: int, round: int) -> tuple[int, ...]:
        return self.sample(num_clients=num_clients, round=round, seed=0)
