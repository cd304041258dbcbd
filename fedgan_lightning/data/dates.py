"""Dates of the rows of a table, and where they lie on a grid of one step."""

from __future__ import annotations

import calendar
import datetime
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedgan_lightning.errors import DataError, message

#: Steps of at least so many microseconds may be months, which are not equally long.
MONTH = 28 * 24 * 3600 * 10**6
#: What helps where single rows do not fit.
REPAIR = "repair the rows, or set data.source.irregular: drop to leave out the profiles in which such rows lie"


class Date(NamedTuple):
    """A date as it is written, without its offset from UTC; and the line it stands in."""

    when: datetime.datetime
    line: int
    has_offset: bool


class Grid(NamedTuple):
    """Where dates lie: ``places`` from the first one on, in steps, and whether one lies between two steps."""

    places: NDArray[np.int64]
    between: NDArray[np.bool_]


def parsed(text: str, *, line: int) -> Date | None:
    """Return the date in a field; ``None`` if it is not ISO 8601."""
    written = text.strip()
    if written.endswith(("Z", "z")):  # Python 3.10 does not read it
        written = f"{written[:-1]}+00:00"
    try:
        found = datetime.datetime.fromisoformat(written)
    except ValueError:
        return None
    return Date(found.replace(tzinfo=None), line, found.tzinfo is not None)


def on_grid(dates: list[Date], *, path: Path, strict: bool) -> Grid:
    """Return where dates lie on the grid that the first of them and the commonest step make.

    Args:
        dates: One for every row.
        path: The file, for errors.
        strict: Whether every date has to be one step after the one above.

    Raises:
        DataError: If it has to and is not, if dates do not rise, or if only some have an offset from UTC.
    """
    for above, date in itertools.pairwise(dates):
        if above.has_offset != date.has_offset:
            what = "one of them with an offset from UTC"
            raise _irregular("all dates have an offset, or none", path, what, above, date, fix="write them alike")
    ticks = np.array([date.when for date in dates], dtype="datetime64[us]").astype(np.int64)
    if len(dates) < 2:
        return Grid(np.zeros(len(dates), np.int64), np.zeros(len(dates), bool))
    step = _commonest(np.diff(ticks))
    between = np.zeros(len(dates), bool)
    name = str(datetime.timedelta(microseconds=step))
    if step >= MONTH:
        fits = _on_one_day(dates)
        if sum(fits) > len(dates) / 2:
            between = ~np.array(fits)
            ticks = np.array([12 * date.when.year + date.when.month for date in dates], dtype=np.int64)
            step = _commonest(np.diff(ticks))
            name = f"{step} month(s)"
    if step <= 0:
        what = "as most rows, which lack the time of day" if step == 0 else "as most rows"
        raise _irregular("dates rise", path, what, dates[0], dates[1], fix="write the time of day, or sort the rows")
    offsets = ticks - ticks[0]
    places, between = offsets // step, between | (offsets % step != 0)
    steps = np.diff(places)
    wrong = (steps != 1) | between[1:] if strict else places[1:] < 0
    if wrong.any():
        place = int(np.argmax(wrong))
        raise _irregular(
            f"dates rise by one step, {name}",
            path,
            _what(int(steps[place]), bool(between[place + 1])),
            dates[place],
            dates[place + 1],
            fix=REPAIR if strict else "sort the rows",
        )
    return Grid(places, between)


def _commonest(steps: NDArray[np.int64]) -> int:
    values, counts = np.unique(steps, return_counts=True)
    return int(values[np.argmax(counts)])


def _on_one_day(dates: Sequence[Date]) -> list[bool]:
    """Return which dates are on the day of the month, and at the time, that most are.

    A month without that day has its last one: a series on the 31st, or the 30th, has a row at the end of February.
    """
    last = [calendar.monthrange(date.when.year, date.when.month)[1] for date in dates]
    found: list[list[bool]] = []
    for usual in sorted({(date.when.day, date.when.time()) for date in dates}, reverse=True):
        found.append([(d.when.day, d.when.time()) == (min(usual[0], end), usual[1]) for d, end in zip(dates, last)])
    return max(found, key=sum)


def _what(steps: int, is_between: bool) -> str:
    if is_between:
        return "between two steps"
    if steps == 0:
        return "the same date twice"
    return f"{steps - 1} missing between them" if steps > 0 else "the second before the first"


def _irregular(rule: str, path: Path, what: str, above: Date, date: Date, *, fix: str) -> DataError:
    received = f"{above.when} in line {above.line} and {date.when} in line {date.line} of {path}, {what}"
    return DataError(message(rule, received=received, fix=fix))
