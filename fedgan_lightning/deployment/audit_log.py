"""A site's own record of what it was asked and what it answered: JSON lines that nobody else writes or sees."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Name of the file in a site's folder; older ones end with .1, .2, ...
NAME = "audit.jsonl"
#: A file that has become so long is kept as .1, and so many are kept.
MOST_BYTES, MOST_FILES = 10 << 20, 5
#: Letters of a reason.
MOST_LETTERS = 1000


class AuditLog:
    """Appends to the record of a site; several processes may do so at the same time.

    Args:
        folder: Of the site.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME

    def write(self, what: str, outcome: str, *, reason: str = "", **facts: Any) -> None:
        """Write one line; a refusal goes to standard error, too, where whoever runs the site looks first.

        Args:
            what: What was asked.
            outcome: ``answered``, ``refused`` or ``failed``.
            reason: Why it was refused, or failed.
            facts: What else is to be known.
        """
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        entry = {"time": now, "what": what, "outcome": outcome, **facts}
        if reason:
            entry["reason"] = " ".join(reason.split())[:MOST_LETTERS]
            print(f"{now} {outcome}: {what} ({entry['reason']})", file=sys.stderr, flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rotate()
        line = json.dumps(_plain(entry), allow_nan=False).encode() + b"\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line)  # in one piece, so lines of two processes never mix
        finally:
            os.close(file)

    def _rotate(self) -> None:
        try:
            if self.path.stat().st_size < MOST_BYTES:
                return
            for number in range(MOST_FILES - 1, 0, -1):
                older = self.path.with_name(f"{NAME}.{number}")
                if older.exists():
                    older.replace(self.path.with_name(f"{NAME}.{number + 1}"))
            self.path.replace(self.path.with_name(f"{NAME}.1"))
        except FileNotFoundError:  # the first line, or another process has moved it
            return


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(own) for own in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)
