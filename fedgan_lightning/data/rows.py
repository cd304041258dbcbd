"""Arrays that stay in their file: rows of an .npy or .safetensors file, read when they are asked for.

Files are read, not mapped: a mapping takes address space and, page by page, resident memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgan_lightning.data.reading import reason
from fedgan_lightning.errors import DataError, message

#: Dtypes in the header of a .safetensors file.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
#: Longest header of a .safetensors file, as its own library has it.
LONGEST_HEADER = 100_000_000
#: Rows that a hash looks at.
LOOKED_AT = 8


@dataclass(frozen=True)
class RowsOnDisk:
    """An array of n rows in a file; of a tensor it has what a data set asks for.

    Attributes:
        path: The file.
        start: Bytes before its first row.
        dtype: Its dtype.
        row_shape: Shape of a row in the file.
        count: Rows in the file.
        positions: Those of them that belong to it; default all.
        channels_last: Whether rows are pictures (h, w, c), which are handed out channels first.
    """

    path: Path
    start: int
    dtype: torch.dtype
    row_shape: tuple[int, ...]
    count: int
    positions: Tensor | None = None
    channels_last: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return len(self) * self.row_bytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array, as it is handed out."""
        row = (self.row_shape[-1], *self.row_shape[:-1]) if self.channels_last else self.row_shape
        return (len(self), *row)

    def __len__(self) -> int:
        return self.count if self.positions is None else len(self.positions)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def is_floating_point(self) -> bool:
        """Return whether it holds fractions."""
        return self.dtype.is_floating_point

    def subset(self, kept: Tensor) -> RowsOnDisk:
        """Return the rows at these positions, unread."""
        return replace(self, positions=kept if self.positions is None else self.positions[kept])

    def whole(self) -> Tensor:
        """Return all rows of the file in memory."""
        numbers = np.fromfile(self.path, dtype=np.uint8, count=self.count * self.row_bytes, offset=self.start)
        found = self._shaped(torch.from_numpy(numbers))
        return found if self.positions is None else found[self.positions]

    def __getitem__(self, index: Any) -> Tensor:
        """Return a row, or the rows at these positions.

        Raises:
            DataError: If they cannot be read, or are no finite numbers; names file and row.
        """
        one = not isinstance(index, Tensor)
        places = torch.tensor([index]) if one else index
        rows = (places if self.positions is None else self.positions[places]).tolist()
        read = np.empty((len(rows), self.row_bytes), dtype=np.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                for into, row in zip(read, rows):
                    file.seek(self.start + row * self.row_bytes)
                    if file.readinto(into.data) != self.row_bytes:
                        raise OSError(f"the file ends before row {row}")
        except OSError as error:
            raise self._unfit(reason(error)) from error
        found = self._shaped(torch.from_numpy(read).flatten())
        if self.is_floating_point() and not torch.isfinite(found).all():
            bad = (~torch.isfinite(found)).flatten(1).any(1).int().argmax()
            raise self._unfit(f"NaN or infinity in row {rows[int(bad)]}")
        return found[0] if one else found

    def _shaped(self, numbers: Tensor) -> Tensor:
        found = numbers.view(self.dtype).view(-1, *self.row_shape)
        return found.movedim(-1, 1).contiguous() if self.channels_last else found

    def look(self) -> bytes:
        """Return a few rows, and what the array is, for a hash."""
        some = torch.linspace(0, len(self) - 1, min(LOOKED_AT, len(self))).long().unique()
        read = self[some].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{self.shape} {self.dtype} {self.path.stat().st_size}".encode() + read

    def _unfit(self, received: str) -> DataError:
        rule = f"rows of {self.path} must be finite numbers that can be read"
        return DataError(message(rule, received=received, fix="repair the file"))


def stored_arrays(path: Path) -> dict[str, RowsOnDisk]:
    """Return the arrays of a .safetensors file by name, or the one of an .npy file as ``x``.

    Raises:
        DataError: If the file cannot be read as such.
    """
    try:
        found = dict(_of_safetensors(path) if path.suffix == ".safetensors" else _of_npy(path))
        size = path.stat().st_size
        for name, rows in found.items():
            if rows.start + rows.count * rows.row_bytes > size:
                raise ValueError(f"array {name} goes on beyond the end of the file")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            message(
                "an array file must be a whole .npy, .npz or .safetensors file of plain numbers",
                received=f"{path} ({reason(error)})",
                fix="save it anew, with numpy.save or safetensors",
            )
        ) from error
    return found


def _of_npy(path: Path) -> Iterator[tuple[str, RowsOnDisk]]:
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
        start = file.tell()
    if is_fortran and len(shape) > 1:
        raise ValueError("an array in Fortran order, whose rows lie apart: numpy.ascontiguousarray puts them together")
    if dtype.hasobject or not dtype.isnative or dtype.kind not in "buif":
        raise ValueError(f"an array of dtype {dtype}")
    yield "x", _rows(path, start, torch.from_numpy(np.empty(0, dtype)).dtype, shape)


def _of_safetensors(path: Path) -> Iterator[tuple[str, RowsOnDisk]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise ValueError("a header that is too long")
        header = json.loads(file.read(length))
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        begin, end = facts["data_offsets"]
        rows = _rows(path, 8 + length + begin, DTYPES[facts["dtype"]], facts["shape"])
        if end - begin != rows.nbytes or begin < 0:
            raise ValueError(f"array {name} of {end - begin} bytes, not {rows.nbytes}")
        yield name, rows


def _rows(path: Path, start: int, dtype: torch.dtype, shape: Any) -> RowsOnDisk:
    if not shape or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"an array of shape {tuple(shape)}")
    return RowsOnDisk(path, start, dtype, tuple(shape[1:]), int(shape[0]))
