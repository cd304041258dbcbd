"""Arrays in files of users: .npy, .npz and .safetensors, read as needed where they are large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgan_lightning.data.arrays import Arrays, class_numbers
from fedgan_lightning.data.reading import reason, user_path
from fedgan_lightning.data.rows import RowsOnDisk, stored_arrays
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources.base import Source, Split, hold_out
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.options import checked


class ArrayFile(Source):
    """Samples in an .npy, .npz or .safetensors file, whose first dimension counts them.

    uint8 arrays (n, h, w), (n, h, w, c) or (n, c, h, w) are pictures, floating-point ones measurements of any shape.
    What is larger than ``memory_limit`` in an .npy or .safetensors file stays there: minibatches are read when they are
    needed, in the order that they have in memory. Other arrays of n values in the same file become columns for a
    natural partition.

    Args:
        path: The file.
        x: Name of the array of samples; an .npy file has but one.
        y: Name of the array of labels, or an .npy file of them; default the array ``y``, where there is one.
        columns: Further natural columns by name: .npy files of n values each.
        test: A file of held-out samples in the same layout; default a share of this one.
        test_fraction: Share of the samples that are held out where there is no ``test``.
        class_names: Names of the classes; default their numbers.
        memory_limit: Most bytes of samples to read into memory.

    Raises:
        DataError: If a file is missing or does not hold what it should.
    """

    @checked(test_fraction="(0, 1)", memory_limit="[0, inf)")
    def __init__(
        self,
        path: str,
        *,
        x: str = "x",
        y: str | None = None,
        columns: Mapping[str, str] | None = None,
        test: str | None = None,
        test_fraction: float = 0.1,
        class_names: tuple[str, ...] | None = None,
        memory_limit: int = 1 << 30,
    ) -> None:
        self.path, self.x, self.y, self.columns = user_path(path), x, y, dict(columns or {})
        self.test = None if test is None else user_path(test)
        self.test_fraction, self.memory_limit = test_fraction, memory_limit
        found = self._open(self.path)
        self.sample_shape = tuple(found.x.shape[1:])
        highest = -1 if found.y is None else int(found.y.max())
        self.class_names = tuple(class_names or ()) or tuple(str(label) for label in range(highest + 1))

    def load(self, split: Split) -> Samples:
        if self.test is not None:
            return self._read(self._open(self.path if split == "train" else self.test))
        found = self._open(self.path)
        train, test = hold_out(len(found.x), self.test_fraction, name="array file", what=f"samples of {self.path.name}")
        return self._read(found.subset(torch.from_numpy(train if split == "train" else test)))

    def _read(self, found: Samples) -> Samples:
        """Return samples that are few enough in memory."""
        rows: Any = found.x
        if not isinstance(rows, RowsOnDisk) or rows.count * rows.row_bytes > self.memory_limit:
            return found
        return replace(found, x=rows.whole())

    def _open(self, path: Path) -> Samples:
        """Return the samples of a file; those that can stay in it do."""
        arrays: Any = _Archive(path) if path.suffix == ".npz" else _Stored(path)
        name = next(iter(arrays.names)) if path.suffix == ".npy" else self.x
        x = arrays.samples(name)
        count, labels = len(x), None
        if self.y is not None or ("y" in arrays.names and name != "y"):
            labels = torch.from_numpy(self._labels(arrays, self.y or "y", count))
        used = {name, self.y or "y"}
        columns = {own: arrays.values(own) for own in arrays.names if own not in used and arrays.shape(own) == (count,)}
        for own, file in self.columns.items():
            columns[own] = _values(user_path(file), count)
        return Samples(x=x, y=labels, columns=columns)

    def _labels(self, arrays: Any, name: str, count: int) -> NDArray[np.int64]:
        if name not in arrays.names and name.endswith(".npy"):
            path = user_path(name)
            return class_numbers(_values(path, count), unfit=lambda rule, got: _unfit(f"{path} {rule}", got))
        values = class_numbers(
            arrays.values(name), unfit=lambda rule, got: _unfit(f"array {name} of {arrays.path} {rule}", got)
        )
        if len(values) != count:
            raise _unfit(f"array {name} of {arrays.path} must have a label for each of {count} samples", len(values))
        return values


class _Archive:
    """The arrays of an .npz file, which are read whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays = Arrays(path, wanted=(), option="data.source.path", layout="an .npz file of arrays")
        self.names = self.arrays.names
        self._read: dict[str, NDArray[Any]] = {}

    def samples(self, name: str) -> Tensor:
        if name not in self.names:
            raise _unfit(f"{self.path} must hold the array {name} of samples", f"arrays {sorted(self.names)}")
        values = self.values(name)
        shaped = _checked(
            RowsOnDisk(self.path, 0, _dtype(values, self.path), tuple(values.shape[1:]), len(values)), name
        )
        pixels = torch.from_numpy(values).view(-1, *shaped.row_shape)
        return pixels.movedim(-1, 1).contiguous() if shaped.channels_last else pixels

    def values(self, name: str) -> NDArray[Any]:
        if name not in self._read:
            self._read[name] = self.arrays[name]
        return self._read[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values(name).shape)


class _Stored:
    """The arrays of an .npy or .safetensors file, which stay there."""

    def __init__(self, path: Path) -> None:
        if path.suffix not in (".npy", ".safetensors"):
            raise _unfit("data.source.path must end in .npy, .npz or .safetensors", path)
        self.path, self.arrays = path, stored_arrays(path)
        self.names = list(self.arrays)

    def samples(self, name: str) -> Any:
        if name not in self.arrays:
            raise _unfit(f"{self.path} must hold the array {name} of samples", f"arrays {sorted(self.names)}")
        return _checked(self.arrays[name], name)

    def values(self, name: str) -> NDArray[Any]:
        if name not in self.arrays:
            raise _unfit(f"{self.path} must hold the array {name}", f"arrays {sorted(self.names)}")
        found: NDArray[Any] = self.arrays[name].whole().numpy()
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape


def _checked(rows: RowsOnDisk, name: str) -> RowsOnDisk:
    """Return an array of samples as it is handed out: pictures channels first.

    Raises:
        DataError: If it holds neither pictures nor measurements.
    """
    shape, is_bytes = rows.row_shape, rows.dtype == torch.uint8
    is_picture = is_bytes and (len(shape) == 2 or (len(shape) == 3 and min(shape[0], shape[2]) <= 4))
    if not rows.count or 0 in shape or not (is_picture or (rows.dtype.is_floating_point and shape)):
        raise _unfit(
            f"array {name} of {rows.path} must hold pictures, uint8 of shape (n, h, w), (n, h, w, c) or (n, c, h, w), "
            "or floating-point numbers of shape (n, ...)",
            f"{rows.dtype} of shape {(rows.count, *shape)}",
        )
    if is_picture and len(shape) == 2:
        return replace(rows, row_shape=(1, *shape))
    return replace(rows, channels_last=is_picture and shape[2] <= 4)


def _dtype(values: NDArray[Any], path: Path) -> torch.dtype:
    try:
        return torch.from_numpy(values[:0]).dtype
    except TypeError as error:
        raise _unfit(f"arrays of {path} must hold numbers", f"dtype {values.dtype}") from error


def _values(path: Path, count: int) -> NDArray[Any]:
    """Return the values in an .npy file, one for each sample."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unfit("a column must be an .npy file that can be read", f"{path} ({reason(error)})") from error
    if not isinstance(values, np.ndarray) or values.shape not in ((count,), (count, 1)):
        raise _unfit(f"{path} must hold a value for each of {count} samples", f"shape {getattr(values, 'shape', None)}")
    return values.reshape(-1)


def _unfit(rule: str, received: object) -> DataError:
    return DataError(message(rule, received=received, fix="check the file, and the source's options"))
