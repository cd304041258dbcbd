"""How long clients take in virtual time: fixed, drawn, or from a trace. Nobody sleeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from fedgan_lightning.data.tables import Table
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_numpy_generator

#: Columns of a trace.
COLUMNS = ("client", "seconds")


class Durations(ABC):
    """Virtual seconds from a task to its answer, as a pure function of (seed, client, number of the task)."""

    def check(self, *, num_clients: int) -> None:  # noqa: B027 - most know every client
        """Refuse a federation whose clients are not all known, by a ConfigurationError."""

    @abstractmethod
    def seconds(self, client_id: int, *, number: int, seed: int) -> float:
        """Return how long the client's ``number``-th task takes, above 0."""


class FixedDurations(Durations):
    """Every client always takes as long.

    Args:
        by_client: Virtual seconds of every client, each above 0.
    """

    @checked(by_client="(0, inf)")
    def __init__(self, *, by_client: Sequence[float]) -> None:
        self.by_client = [float(own) for own in by_client]

    def check(self, *, num_clients: int) -> None:
        _check_count(len(self.by_client), num_clients, what="numbers of FixedDurations.by_client")

    def seconds(self, client_id: int, *, number: int, seed: int) -> float:
        return self.by_client[client_id]


class LogNormalDurations(Durations):
    """A client's speed is drawn once, and every task's time around it: median e^(spread n_k + jitter n_ki), n normal.

    Args:
        median: Virtual seconds of the median client, above 0.
        spread: Standard deviation of the logarithm over clients, at least 0.
        jitter: The same over the tasks of one client, at least 0.
    """

    @checked(median="(0, inf)", spread="[0, 10]", jitter="[0, 10]")
    def __init__(self, *, median: float = 1.0, spread: float = 0.5, jitter: float = 0.0) -> None:
        self.median, self.spread, self.jitter = float(median), float(spread), float(jitter)

    def seconds(self, client_id: int, *, number: int, seed: int) -> float:
        speed = make_numpy_generator(seed, "speed", client_id).standard_normal()
        wobble = make_numpy_generator(seed, "duration", client_id, number).standard_normal()
        return float(self.median * math.exp(self.spread * speed + self.jitter * wobble))


class TraceDurations(Durations):
    """Times from a table with the columns ``client`` and ``seconds``; a client's rows come round again.

    Args:
        path: A CSV file.

    Raises:
        DataError: If the file cannot be read as such.
    """

    @checked()
    def __init__(self, *, path: str) -> None:
        table = Table(path, option="TraceDurations.path")
        client, seconds = table.positions(COLUMNS)
        self.path = path
        self._known: dict[int, list[float]] = {}
        for line, row in table:
            taken = table.number(row[seconds], line=line, column="seconds")
            if taken <= 0:
                raise table.unfit("above 0", row[seconds], line=line, column="seconds")
            self._known.setdefault(table.whole(row[client], line=line, column="client"), []).append(taken)

    def check(self, *, num_clients: int) -> None:
        known = sum(client_id in self._known for client_id in range(num_clients))
        _check_count(known, num_clients, what=f"clients in {self.path}")

    def seconds(self, client_id: int, *, number: int, seed: int) -> float:
        own = self._known[client_id]
        return own[number % len(own)]


def _check_count(known: int, num_clients: int, *, what: str) -> None:
    if known != num_clients:
        raise ConfigurationError(
            message(
                f"{what} must be those of all {num_clients} clients",
                received=f"{known}",
                fix="give one for every client, or use LogNormalDurations",
            )
        )
