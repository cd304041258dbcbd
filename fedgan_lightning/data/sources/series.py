"""Time series from CSV files, cut into profiles of equal length: a day of hours, a week of days."""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from unicodedata import normalize

import numpy as np
import torch
from numpy.typing import NDArray

from fedgan_lightning.data.dates import Date, Grid, on_grid, parsed
from fedgan_lightning.data.reading import check_encoding, user_path
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources.base import Source, Split, hold_out
from fedgan_lightning.data.tables import Table, check_delimiter
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.options import checked

logger = logging.getLogger("fedgan_lightning")

SEASONS = ("winter", "spring", "summer", "autumn")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = tuple(str(month) for month in range(1, 13))
#: Quantiles that a variable's scale maps to -1 and 1: single outliers do not set it.
SCALE = (0.005, 0.995)


#: How tables spell a value that is missing.
MISSING = ("", "na", "n/a", "nan", "null", "none", "?", "-")


class Profiles(NamedTuple):
    """Whole profiles of a file: ``values`` (count, length, variables), and the date on which each begins."""

    names: list[str]
    begins: list[datetime.datetime]
    values: NDArray[np.float64]


class CSVProfiles(Source):
    """Profiles of the numeric columns of a CSV file: each is ``length`` consecutive points of time of one column.

    Dates rise by one constant step (or by calendar months), so that the n-th value of every profile is of the same
    hour of its day, if profiles are days; they are read as they are written, without regard to offsets from UTC. The
    first row begins the first profile; rows after the last whole profile are left out.

    The class is a property of the date on which a profile begins, or the variable itself: networks that are told which
    it is need not find out, where every client holds another one. Columns ``variable``, ``season``, ``month`` and
    ``weekday`` allow natural partitions. Every variable is scaled by quantiles of its own training profiles, which is
    what a client that holds the variable knows itself.

    Args:
        path: The file, with a header.
        variables: Columns to take; default all but the date.
        date: Column of the date, ISO 8601.
        length: Points of time in a profile.
        label: The class: ``season``, ``month``, ``weekday``, ``variable`` (of those listed in ``variables``), or none.
        test_fraction: Share of the profiles of every variable that is held out, in (0, 1).
        irregular: What becomes of dates that do not rise by one step, and of values that are missing: ``refuse`` names
            the first; ``drop`` leaves out the profiles in which they lie, for all variables, and says how many, and
            every other profile begins where it would without them; ``consecutive`` takes rows as they follow each
            other, such as days on which a market was open, and refuses missing values.
        encoding: Encoding of the file.
        delimiter: What separates fields.

    Raises:
        DataError: If the file is missing, or has not these columns, dates or numbers.
    """

    @checked(length="[1, inf)", test_fraction="(0, 1)")
    def __init__(
        self,
        path: str,
        *,
        variables: Sequence[str] | None = None,
        date: str = "date",
        length: int = 24,
        label: Literal["season", "month", "weekday", "variable"] | None = "season",
        test_fraction: float = 0.1,
        irregular: Literal["refuse", "drop", "consecutive"] = "refuse",
        encoding: str = "utf-8",
        delimiter: str = ",",
    ) -> None:
        if label == "variable" and variables is None:
            raise DataError(
                message(
                    "the variables that are classes must be listed",
                    received="data.source.label=variable with data.source.variables=null",
                    fix="list them in data.source.variables",
                )
            )
        classes = {
            "season": SEASONS,
            "month": MONTHS,
            "weekday": WEEKDAYS,
            "variable": tuple(variables or ()),
            None: (),
        }
        check_encoding(encoding, option="data.source.encoding")
        self.path, self.date, self.length, self.label = user_path(path), date, length, label
        self.variables, self.test_fraction = None if variables is None else list(variables), test_fraction
        self.irregular, self.encoding = irregular, encoding
        self.delimiter = check_delimiter(delimiter, option="data.source.delimiter")
        self.sample_shape = (1, length)
        self.class_names = classes[label]
        self._told: set[Path] = set()

    def load(self, split: Split) -> Samples:
        names, begins, values = self._profiles()
        facts = {
            "season": np.array([begin.month % 12 // 3 for begin in begins]),
            "month": np.array([begin.month - 1 for begin in begins]),
            "weekday": np.array([begin.weekday() for begin in begins]),
        }
        what = f"profiles in {self.path}"
        train, test = hold_out(len(begins), self.test_fraction, name="profiles split", what=what)
        chosen = train if split == "train" else test
        parts: list[NDArray[np.float32]] = []
        for profiles in np.moveaxis(values, 2, 0):
            low, high = np.quantile(profiles[train], SCALE)
            if low == high:  # rare events: all between these quantiles is one value
                low, high = profiles[train].min(), profiles[train].max()
            with np.errstate(over="ignore"):
                scaled = (2 * (profiles - low) / (high - low) - 1).astype(np.float32) if low < high else None
            if scaled is None or not np.isfinite(scaled).all():
                raise DataError(
                    message(
                        "a variable must vary, within what numbers can tell",
                        received=f"{names[len(parts)]} of {self.path}, from {profiles.min():g} to {profiles.max():g}",
                        fix="leave its column out, or repair its values",
                    )
                )
            parts.append(scaled[chosen])
        x = torch.from_numpy(np.stack(parts)).reshape(-1, 1, self.length)
        columns: dict[str, NDArray] = {name: np.tile(fact[chosen], len(names)) for name, fact in facts.items()}
        columns["variable"] = np.repeat(np.array(names), len(chosen))
        numbers = {**columns, "variable": np.repeat(np.arange(len(names)), len(chosen))}
        y = None if self.label is None else torch.from_numpy(numbers[self.label]).long()
        return Samples(x=x, y=y, columns=columns)

    def _profiles(self) -> Profiles:
        """Return the whole profiles of the file; the others are refused or left out."""
        names, dates, values = self._read()
        if self.irregular == "consecutive":
            grid = Grid(np.arange(len(dates)), np.zeros(len(dates), bool))
        else:
            grid = on_grid(dates, path=self.path, strict=self.irregular == "refuse")
        numbers = grid.places // self.length
        found, counts = np.unique(numbers, return_counts=True)
        _, distinct = np.unique(np.unique(grid.places) // self.length, return_counts=True)
        spoiled = np.unique(numbers[grid.between | ~np.isfinite(values).all(1)])
        kept = found[(counts == self.length) & (distinct == self.length) & ~np.isin(found, spoiled)]
        total = (int(grid.places.max(initial=-1)) + 1) // self.length
        if len(kept) < total and self.path not in self._told:
            self._told.add(self.path)  # both splits read the file
            first = int(np.argmax(np.append(kept != np.arange(len(kept)), True)))
            line = dates[int(np.argmax(numbers >= first))].line
            logger.info(
                f"{total - len(kept)} of {total} profiles in {self.path} are left out, the first in or before line "
                f"{line}: rows or values of theirs are missing, or there twice"
            )
        if len(kept) < 2:
            raise DataError(
                message(
                    f"a file must hold two profiles of {self.length} rows or more",
                    received=f"{len(values)} rows in {self.path}" + (f", {len(kept)} whole profiles" if total else ""),
                    fix="check the file, or lower data.source.length",
                )
            )
        rows = np.flatnonzero(np.isin(numbers, kept))
        rows = rows[np.argsort(grid.places[rows], kind="stable")]
        begins = [dates[row].when for row in rows[:: self.length]]
        return Profiles(names, begins, values[rows].reshape(len(kept), self.length, len(names)))

    def _read(self) -> tuple[list[str], list[Date], NDArray[np.float64]]:
        table = Table(self.path, option="data.source.path", encoding=self.encoding, delimiter=self.delimiter)
        names = self.variables or [name for name in table.header if name != normalize("NFC", self.date)]
        if "" in names:
            raise DataError(
                message(
                    f"every column of {self.path} must have a name",
                    received=f"{len(names)} columns, {names.count('')} without",
                    fix="list those to take in data.source.variables",
                )
            )
        (date,) = table.positions([self.date], named_by=["data.source.date"])
        places = table.positions(names, named_by=["data.source.variables"])
        if not places:
            raise DataError(
                message(
                    f"{self.path} must have columns beside the date", received="none", fix="check data.source.delimiter"
                )
            )
        dates: list[Date] = []
        values: list[list[float]] = []
        for line, row in table:
            found = parsed(row[date], line=line)
            if found is None:
                raise table.unfit("a date in ISO 8601, 2024-12-31 23:00", row[date], line=line, column=self.date)
            dates.append(found)
            values.append([self._value(row[place], table, line, name) for place, name in zip(places, names)])
        return names, dates, np.array(values, dtype=np.float64).reshape(-1, len(names))

    def _value(self, text: str, table: Table, line: int, column: str) -> float:
        """Return a number; NaN for a missing one, where profiles with such are left out."""
        if self.irregular == "drop" and text.strip().lower() in MISSING:
            return math.nan
        return table.number(text, line=line, column=column)
