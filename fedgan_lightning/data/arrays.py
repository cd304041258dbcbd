"""Arrays in .npz files of users: every member is read without pickles, and named where it is not what it should be."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgan_lightning.data.reading import reason
from fedgan_lightning.errors import DataError, message


class Arrays:
    """The arrays of an .npz file.

    Args:
        path: The file.
        wanted: Arrays that it must have.
        option: Where it was named, for errors.
        layout: What such a file is called, for errors.

    Raises:
        DataError: If it cannot be read as such, or an array is missing.
    """

    def __init__(self, path: Path, *, wanted: Sequence[str], option: str, layout: str) -> None:
        self.path = path
        try:
            if not zipfile.is_zipfile(path):  # numpy takes single arrays, and pickles, by the same name
                path.open("rb").close()
                raise ValueError("not an .npz file, or cut off")
            with np.load(path, allow_pickle=False) as found:
                self.names: list[str] = list(found.files)
        except Exception as error:  # broken archives raise anything
            raise DataError(
                message(layout, received=f"{path} ({reason(error)})", fix=f"set {option} to the whole file")
            ) from error
        missing = sorted(set(wanted) - set(self.names))
        if missing:
            raise DataError(message(layout, received=f"no arrays {missing} in {path}", fix="rename them"))

    def __getitem__(self, name: str) -> NDArray[Any]:
        try:
            with warnings.catch_warnings(), np.load(self.path, allow_pickle=False) as found:
                warnings.simplefilter("ignore")  # of old headers
                return np.asarray(found[name])
        except Exception as error:  # broken members raise anything
            raise self.unfit(name, "must be an array that can be read without unpickling", reason(error)) from error

    def labels(self, name: str) -> NDArray[np.int64]:
        """Return class numbers (n,) from an array of shape (n,) or (n, 1).

        Raises:
            DataError: If they are none: text, fractions, NaN, negative, or several for one sample.
        """
        return class_numbers(self[name], unfit=lambda rule, received: self.unfit(name, rule, received))

    def pixels(self, name: str) -> NDArray[np.uint8]:
        """Return pictures (n, h, w) or (n, h, w, c), uint8.

        Raises:
            DataError: If they are none.
        """
        values = self[name]
        if values.dtype != np.uint8 or values.ndim not in (3, 4):
            raise self.unfit(
                name,
                "holds images, uint8 of shape (n, h, w) or (n, h, w, c)",
                f"{values.dtype} of shape {values.shape}",
            )
        if 0 in values.shape:
            raise self.unfit(name, "must hold at least one image", f"shape {values.shape}")
        if values.ndim == 4 and values.shape[3] > 4 and values.shape[1] <= 4:
            raise self.unfit(name, "must have its channels last, (n, h, w, c)", f"shape {values.shape}")
        return values

    def columns(self, prefix: str, *, length: int, known: Mapping[str, object] | set[str]) -> dict[str, NDArray[Any]]:
        """Return the other arrays of that prefix with one value for each of ``length`` samples, without the prefix.

        Raises:
            DataError: If one is longer or shorter.
        """
        found = {}
        for name in self.names:
            if not name.startswith(prefix) or name in known:
                continue
            values = self[name]
            if values.ndim == 2 and values.shape[1] == 1:
                values = values[:, 0]
            if values.ndim != 1:
                continue  # masks, means: nothing that divides samples
            if len(values) != length:
                raise self.unfit(name, f"must have a value for each of {length} samples", f"{len(values)} values")
            found[name.removeprefix(prefix)] = values
        return found

    def unfit(self, name: str, rule: str, received: str) -> DataError:
        """Return the error that a member is not what it should be."""
        return DataError(
            message(f"array {name} of {self.path} {rule}", received=received, fix="repair it, and save the file anew")
        )


def class_numbers(values: NDArray[Any], *, unfit: Callable[[str, str], DataError]) -> NDArray[np.int64]:
    """Return class numbers (n,) from an array of shape (n,) or (n, 1).

    Args:
        values: The array.
        unfit: Makes the error from the rule, and what was received.

    Raises:
        DataError: If they are none: text, fractions, NaN, negative, or several for one sample.
    """
    if values.ndim == 2 and values.shape[1] > 1:
        raise unfit("must hold single labels, of shape (n,) or (n, 1)", f"multi-label {values.shape}")
    if values.ndim not in (1, 2):
        raise unfit("must hold single labels, of shape (n,) or (n, 1)", f"shape {values.shape}")
    flat = values.reshape(-1)
    rule = "must hold whole numbers of classes, from 0"
    if flat.dtype.kind not in "buif":
        raise unfit(rule, f"{flat.dtype}{_first(flat, flat == flat)}")
    whole = np.isfinite(flat) & (flat >= 0) & (flat == np.floor(flat)) & (flat < 2**31)
    if not whole.all():
        raise unfit(rule, f"{int((~whole).sum())} of {len(flat)} others{_first(flat, ~whole)}")
    return flat.astype(np.int64)


def _first(values: NDArray[Any], bad: NDArray[np.bool_]) -> str:
    place = int(np.argmax(bad))
    return f", {values[place]!s} at position {place}" if len(values) else ""
