"""The log of a run for programs: one line of JSON for every try of a round, with what came of each client.

Lines are appended and nothing is kept in memory. A process that is killed leaves half a line at most, the last; a run
that is resumed cuts off what its checkpoint does not know: its log is that of a run that was never interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedgan_lightning.files import replacing, to_json

#: Name of the file in a run directory.
NAME = "rounds.jsonl"


class RoundLog:
    """Appends to a file of JSON lines.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def cut(self, rounds: int) -> None:
        """Keep what is said of the first ``rounds`` rounds, and of no others."""
        if not self.path.exists():
            return
        with replacing(self.path) as file:
            for entry in entries(self.path):
                if entry["round"] < rounds:
                    file.write(_line(entry))

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line; it survives the process, and the machine once :meth:`sync` has returned."""
        with self.path.open("ab") as file:
            file.write(_line(entry))

    def sync(self) -> None:
        """Return when what was written is on the disk: a checkpoint that counts on it may be written then."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def entries(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a round log, one at a time, up to the first line that is not whole; none without a file."""
    if not Path(path).exists():
        return
    with Path(path).open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                return
            if not isinstance(entry, dict) or not {"round", "clients"} <= entry.keys():
                return
            yield entry


def _line(entry: Mapping[str, Any]) -> bytes:
    return to_json(entry, separators=(",", ":")).encode() + b"\n"
