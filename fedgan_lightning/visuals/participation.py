"""Who was asked in which round, and what came of it: a run's round log as numbers for a report. Needs no torch."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedgan_lightning.jsonl import entries

#: What can become of a client in a round; where several rounds share a column, the last of these counts.
OUTCOMES = ("not asked", "answered", "unneeded", "late", "rejected", "failed")
#: Above this many clients there is no row for each.
MOST_ROWS = 64
#: Most columns of the matrix.
MOST_COLUMNS = 240


@dataclass
class Totals:
    """One client over all rounds.

    Attributes:
        outcomes: How often each came of it; asked is their sum but for late answers.
        bytes_down: What was sent to it.
        bytes_up: What it sent.
        seconds: Sum of the seconds of its work, and of how many answers.
        round_trip: The same from task to answer.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: tuple[float, int] = (0.0, 0)
    round_trip: tuple[float, int] = (0.0, 0)

    @property
    def asked(self) -> int:
        """How often it was asked: a late answer is one to a query that counts as failed already."""
        return sum(count for outcome, count in self.outcomes.items() if outcome != "late")

    @property
    def troubles(self) -> int:
        """How often it did not answer, or not as it should."""
        return sum(self.outcomes[outcome] for outcome in ("failed", "rejected", "late"))

    def add(self, client: Mapping[str, Any]) -> None:
        """Count one more."""
        self.outcomes[client["outcome"]] += 1
        self.bytes_down += int(client["bytes_down"])
        self.bytes_up += int(client["bytes_up"])
        for name in ("seconds", "round_trip"):
            if client.get(name) is not None:
                total, count = getattr(self, name)
                setattr(self, name, (total + float(client[name]), count + 1))


class Participation:
    """A run's round log, summed up; it grows with rounds and clients, and not with their product above 64 clients.

    Attributes:
        seconds: Wall time of every round, over all its tries.
        abandoned: Tries that did not count.
        counts: For every outcome how many clients it came of, by round, over all tries.
        slowest: Seconds from task to answer of the last client to answer, by round: where these are not known, of its
            work. Rounds that nobody answered are left out.
        median: The same of the median client.
        clients: Totals by client.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.abandoned = 0
        self.counts: dict[str, list[int]] = {outcome: [] for outcome in OUTCOMES[1:]}
        self.slowest: dict[int, float] = {}
        self.median: dict[int, float] = {}
        self.clients: dict[int, Totals] = {}
        self._cells: dict[int, bytearray] = {}

    @classmethod
    def read(cls, path: str | Path) -> Participation:
        """Return what a round log amounts to; nothing without one."""
        found = cls()
        for entry in entries(path):
            found._add(entry)
        return found

    def _add(self, entry: Mapping[str, Any]) -> None:
        round = int(entry["round"])
        while len(self.seconds) <= round:
            self.seconds.append(0.0)
            for counts in self.counts.values():
                counts.append(0)
        self.seconds[round] += float(entry["seconds"] or 0.0)
        self.abandoned += not entry["counted"]
        took = []
        for client in entry["clients"]:
            client_id, outcome = int(client["client_id"]), str(client["outcome"])
            self.counts[outcome][round] += 1
            self.clients.setdefault(client_id, Totals()).add(client)
            self._mark(client_id, round - 1 if outcome == "late" else round, outcome)
            own = client.get("round_trip", client.get("seconds"))
            if outcome == "answered" and own is not None:
                took.append(float(own))
        if took:
            self.slowest[round], self.median[round] = max(took), statistics.median(took)

    def _mark(self, client_id: int, round: int, outcome: str) -> None:
        if len(self.clients) > MOST_ROWS:
            self._cells = {}
            return
        row = self._cells.setdefault(client_id, bytearray())
        row.extend(bytes(max(0, round + 1 - len(row))))
        row[round] = OUTCOMES.index(outcome)

    def rows(self) -> dict[int, list[int]]:
        """Return by client the place in ``OUTCOMES`` of every column; none where there are more than 64 clients."""
        count = len(self.seconds)
        width = self.rounds_per_column
        padded = {k: bytes(row) + bytes(count - len(row)) for k, row in sorted(self._cells.items())}
        return {k: [max(row[start : start + width]) for start in range(0, count, width)] for k, row in padded.items()}

    @property
    def rounds_per_column(self) -> int:
        """Rounds that share a column."""
        return max(1, -(-len(self.seconds) // MOST_COLUMNS))
