"""Time series from CSV files, cut into profiles of equal length: a day of hours, a week of days."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources.base import Source, Split
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_numpy_generator

SEASONS = ("winter", "spring", "summer", "autumn")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = tuple(str(month) for month in range(1, 13))
#: Quantiles that a variable's scale maps to -1 and 1: single outliers do not set it.
SCALE = (0.005, 0.995)


class CSVProfiles(Source):
    """Profiles of the numeric columns of a CSV file: each is ``length`` consecutive rows of one column.

    The class is a property of the date on which a profile begins. Columns ``variable``, ``season``, ``month`` and
    ``weekday`` allow natural partitions. Every variable is scaled by quantiles of its own training profiles, which is
    what a client that holds the variable knows itself.

    Args:
        path: The file, with a header.
        variables: Columns to take; default all but the date.
        date: Column of the date, ISO 8601.
        length: Rows of a profile; the file begins with the first row of one.
        label: The class: ``season``, ``month``, ``weekday``, or none.
        test_fraction: Share of the profiles of every variable that is held out, in (0, 1).

    Raises:
        DataError: If the file is missing, or has not these columns or numbers.
    """

    @checked(length="[1, inf)", test_fraction="(0, 1)")
    def __init__(
        self,
        path: str,
        *,
        variables: Sequence[str] | None = None,
        date: str = "date",
        length: int = 24,
        label: Literal["season", "month", "weekday"] | None = "season",
        test_fraction: float = 0.1,
    ) -> None:
        self.path, self.date, self.length, self.label = Path(path), date, length, label
        self.variables, self.test_fraction = None if variables is None else list(variables), test_fraction
        self.sample_shape = (1, length)
        names = {"season": SEASONS, "month": MONTHS, "weekday": WEEKDAYS, None: ()}
        self.class_names = names[label]

    def load(self, split: Split) -> Samples:
        names, dates, values = self._read()
        count = len(values) // self.length
        if count < 2:
            raise DataError(
                message(
                    f"a file holds two profiles of {self.length} rows or more",
                    received=f"{len(values)} rows in {self.path}",
                    fix="lower data.source.length",
                )
            )
        begins = [dates[place * self.length] for place in range(count)]
        facts = {
            "season": np.array([begin.month % 12 // 3 for begin in begins]),
            "month": np.array([begin.month - 1 for begin in begins]),
            "weekday": np.array([begin.weekday() for begin in begins]),
        }
        order = make_numpy_generator(0, "profiles split").permutation(count)
        cut = max(1, round(count * self.test_fraction))
        train, test = np.sort(order[cut:]), np.sort(order[:cut])
        chosen = train if split == "train" else test
        parts: list[NDArray[np.float64]] = []
        for column in values.T:
            profiles = column[: count * self.length].reshape(count, self.length)
            low, high = np.quantile(profiles[train], SCALE)
            if low == high:  # rare events: all between these quantiles is one value
                low, high = profiles[train].min(), profiles[train].max()
            if low == high:
                raise DataError(
                    message(
                        "a variable varies",
                        received=f"{names[len(parts)]} of {self.path}, which is {low:g} throughout",
                        fix="leave its column out",
                    )
                )
            parts.append(2 * (profiles[chosen] - low) / (high - low) - 1)
        x = torch.from_numpy(np.stack(parts)).float().reshape(-1, 1, self.length)
        columns: dict[str, NDArray] = {name: np.tile(fact[chosen], len(names)) for name, fact in facts.items()}
        columns["variable"] = np.repeat(np.array(names), len(chosen))
        y = None if self.label is None else torch.from_numpy(columns[self.label]).long()
        return Samples(x=x, y=y, columns=columns)

    def _read(self) -> tuple[list[str], list[datetime.datetime], NDArray[np.float64]]:
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        except OSError as error:
            raise DataError(
                message("data.source.path is a CSV file", received=f"{self.path} ({error})", fix="check the path")
            ) from error
        header = list(rows[0]) if rows else []
        names = self.variables or [name for name in header if name != self.date]
        missing = [name for name in (self.date, *names) if name not in header]
        if missing or not names:
            raise DataError(
                message(
                    f"{self.path} has the columns {', '.join([self.date, *names])}",
                    received=f"{', '.join(header) or 'no header'}",
                    fix="set data.source.date and data.source.variables",
                )
            )
        try:
            dates = [datetime.datetime.fromisoformat(row[self.date]) for row in rows]
            values = np.array([[float(row[name]) for name in names] for row in rows])
        except (TypeError, ValueError) as error:
            raise DataError(
                message(
                    "dates are ISO 8601, and values are numbers",
                    received=f"{self.path} ({error})",
                    fix="repair or leave out the rows",
                )
            ) from error
        return names, dates, values
