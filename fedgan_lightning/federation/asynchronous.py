"""Buffered asynchronous aggregation: the server steps when K updates are in, whatever the age of each.

In simulation a virtual clock says who arrives when: a pure function of durations and seed, so that a client is trained
when its answer is due, from the networks that it was sent; nothing of a buffer is ever held between rounds.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.durations import Durations, LogNormalDurations
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import ClientSampler, ClientTask, ClientUpdate, State
from fedgan_lightning.seeding import make_numpy_generator


class Asynchronous:
    """A round is K = ``buffer_size`` arrivals, of which the server adds (1 / K) sum_i s(tau_i) delta_i.

    tau_i is the number of server steps since client i got its networks. Whoever is done gets the newest networks at
    once, and is at most once in a buffer. The sum is divided by K, and not by the sum of s; where the aggregator weighs
    clients by N_i, by their sum. Moments and buffers of networks are values, and are averaged without s. The server's
    learning rate is that of ``server.optimizer``.

    Source: Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba 2022, algorithm 1 (FedBuff); with ``toward: model`` and
    ``buffer_size: 1`` Xie, Koyejo, Gupta 2019, algorithm 1 (FedAsync): w <- w + alpha s(tau) (w_i - w).

    Args:
        buffer_size: Arrivals K of a round; all clients make it synchronous.
        concurrency: Clients at work at the same time; ``None`` for all. Others are drawn evenly from those at rest.
        staleness: s(tau): ``constant`` 1, ``polynomial`` (1 + tau)^-exponent, or ``hinge``: 1 up to ``hinge`` and
            1 / (exponent (tau - hinge) + 1) above.
        exponent: a, above 0.
        hinge: b, at least 0.
        most_stale: Largest tau that counts; older updates are dropped. ``None`` for no bound.
        toward: What a late update means: ``update`` adds what the client has changed, ``model`` moves toward its
            networks.
        durations: Virtual seconds that clients take, in simulation; default log-normal over clients.
    """

    @checked(
        "federation.rules.asynchronous",
        buffer_size="[1, inf)",
        concurrency="[1, inf)",
        exponent="(0, inf)",
        hinge="[0, inf)",
        most_stale="[0, inf)",
    )
    def __init__(
        self,
        *,
        buffer_size: int = 10,
        concurrency: int | None = None,
        staleness: Literal["constant", "polynomial", "hinge"] = "polynomial",
        exponent: float = 0.5,
        hinge: int = 4,
        most_stale: int | None = None,
        toward: Literal["update", "model"] = "update",
        durations: Durations | None = None,
    ) -> None:
        self.buffer_size, self.concurrency = buffer_size, concurrency
        self.staleness, self.exponent, self.hinge, self.most_stale = staleness, float(exponent), hinge, most_stale
        self.toward = toward
        self.durations = durations if durations is not None else LogNormalDurations()

    def check(self, *, num_clients: int, sampler: ClientSampler, chooses: bool) -> None:
        """Refuse settings that do not go with a federation.

        Args:
            num_clients: Clients of the federation.
            sampler: The federation's.
            chooses: Whether it is one that chooses among clients.

        Raises:
            ConfigurationError: If they do not.
        """
        at_work = num_clients if self.concurrency is None else self.concurrency
        wrong = [
            (chooses, "clients must be left to the clock", f"federation.clients={type(sampler).__name__}",
             "set federation.clients to AllClients, and asynchronous.concurrency"),
            (at_work > num_clients, f"concurrency must be at most {num_clients}, all clients", f"{at_work}",
             "lower it, or set it to null"),
            (self.buffer_size > at_work, f"buffer_size must be at most {at_work}, the clients at work",
             f"{self.buffer_size}", "lower it, or raise concurrency"),
        ]  # fmt: skip
        for is_wrong, rule, received, fix in wrong:
            if is_wrong:
                raise ConfigurationError(message(f"asynchronous: {rule}", received=received, fix=fix))
        self.durations.check(num_clients=num_clients)

    def discount(self, tau: int) -> float:
        """Return s(tau)."""
        if self.staleness == "polynomial":
            return float((1 + tau) ** -self.exponent)
        if self.staleness == "hinge":
            return 1.0 if tau <= self.hinge else 1.0 / (self.exponent * (tau - self.hinge) + 1.0)
        return 1.0

    def counts(self, tau: int) -> bool:
        """Whether an update of this age counts."""
        return self.most_stale is None or tau <= self.most_stale


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


class AsynchronousRun:
    """What a run with a virtual clock remembers: the networks of every version that somebody works on.

    Args:
        settings: The settings.
        num_clients: Clients of the federation.
        seed: The federation's.
    """

    def __init__(self, settings: Asynchronous, *, num_clients: int, seed: int) -> None:
        self.settings = settings
        self.tasks: dict[int, ClientTask] = {}
        self.given: dict[int, ClientTask] = {}
        self._rounds = buffers(settings, num_clients=num_clients, seed=seed)
        self._known: list[Buffer] = []

    @classmethod
    def of(cls, rules: Any, *, num_clients: int, seed: int) -> AsynchronousRun | None:
        """Return what a run with these rules remembers; ``None`` where its rounds wait for all."""
        own = rules.asynchronous
        return None if own is None else cls(own, num_clients=num_clients, seed=seed)

    def buffer(self, round: int) -> Buffer:
        """Return who arrives in a round."""
        while len(self._known) <= round:
            self._known.append(next(self._rounds))
        return self._known[round]

    def begin(self, task: ClientTask) -> None:
        """Begin a round: remember what all clients get that start now, and what those of the round were given."""
        self.tasks[task.round], here = task, self.buffer(task.round)
        needed = {task.round, *here.at_work.values(), *(own.version for own in here.arrivals)}
        self.tasks = {version: own for version, own in self.tasks.items() if version in needed}
        self.given = {own.client_id: self.tasks[own.version] for own in here.arrivals}

    def receiving(self, checks_of: Callable[[ClientTask], Any], round: int) -> dict[str, Any]:
        """Return what a receiver must know of those who answer in a round: checks by client, and what age makes of it.

        Args:
            checks_of: Returns the checks of what answers a task.
            round: The round.
        """
        checks = {client_id: checks_of(task) for client_id, task in self.given.items()}
        return {"of_clients": checks, "aged": partial(self.counted, round=round)}

    def counted(self, update: ClientUpdate, *, round: int) -> ClientUpdate:
        """Return an update with the parameters' share that its age leaves it."""
        assert update.round is not None
        factor, delta = self.settings.discount(round - update.round), update.delta
        if self.settings.toward == "model" and update.round != round:
            delta = _toward(delta, then=self.tasks[update.round].state, now=self.tasks[round].state)
        if factor == 1.0 and delta is update.delta:
            return update
        return dataclasses.replace(update, delta={name: factor * value for name, value in delta.items()})

    def gauges(self) -> dict[str, float]:
        """Return what a dashboard shows of the round that has begun last."""
        round = max(self.tasks)
        own = self.buffer(round)
        ages = [round - arrival.version for arrival in own.arrivals]
        return {
            "staleness/mean": sum(ages) / len(ages),
            "staleness/max": float(max(ages)),
            "staleness/dropped": float(own.dropped),
            "staleness/virtual_seconds": own.seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the networks of all versions that somebody works on, as clients were given them."""
        fields = [own.name for own in dataclasses.fields(ClientTask)]
        plain = {v: {name: getattr(task, name) for name in fields} for v, task in self.tasks.items()}
        return {str(v): {**own, "state": dict(own["state"]), "own": {}} for v, own in plain.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from these."""
        found = {int(v): {**own, "schedule_positions": tuple(own["schedule_positions"])} for v, own in state.items()}
        self.tasks = {version: ClientTask(**own) for version, own in found.items()}


class ArrivingClients(ClientSampler):
    """Chooses those whose answers arrive in a round.

    Args:
        run: The run.
    """

    def __init__(self, run: AsynchronousRun) -> None:
        self.run = run

    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        return tuple(sorted(own.client_id for own in self.run.buffer(round).arrivals))

    def population(self, *, num_clients: int, round: int) -> tuple[int, ...]:
        return self.sample(num_clients=num_clients, round=round, seed=0)


def _toward(delta: State, *, then: State, now: State) -> dict[str, Tensor]:
    """Return w_i - w: what the client has changed, and how far the server has moved meanwhile."""
    return {name: value + (then[name] - now[name]).to(value) for name, value in delta.items()}
