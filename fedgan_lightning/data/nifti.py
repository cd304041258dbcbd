"""NIfTI volumes as pictures: slices along an axis of the array, or along an anatomical one.

Of a header that is read which describes the numbers and their place in space; texts and extensions in it are not.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedgan_lightning.data.levels import MAX_BYTES, MAX_VALUES, Levels, grey_levels, range_of
from fedgan_lightning.data.pictures import Stack, in_channels
from fedgan_lightning.data.reading import reason
from fedgan_lightning.errors import DataError, message

#: Endings of files that are read as volumes.
EXTENSIONS = (".nii", ".nii.gz")
Axis = Literal[0, 1, 2, "sagittal", "coronal", "axial"]
#: Positions of the anatomical axes in an array whose axes run to the right, to the front and up.
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
#: Bytes of the two kinds of headers; each begins with its own length.
HEADER, HEADER_2 = 348, 540
#: Farthest place where the numbers may begin: extensions lie before them.
MAX_OFFSET = 2**26


def read_nifti(path: Path, *, channels: int, levels: Levels, axis: Axis) -> Stack:
    """Return all slices of a volume, scaled with one range.

    Args:
        path: The file, ``.nii`` or ``.nii.gz``.
        channels: 3 for colour, 1 for grey.
        levels: What is black and what white; with neither it is the lowest and the highest value of the volume.
        axis: The axis of the stored array that slices are numbered along, or an anatomical one: then the volume is
            turned to it, and slices stand upright, the patient's right on the left.

    Raises:
        DataError: If it is no volume in three dimensions, is too large, or cannot be read; or without ``nibabel``.
    """
    try:
        import nibabel
    except ImportError:
        raise DataError(
            message(
                "NIfTI files must have the package nibabel to be read",
                received=str(path),
                fix="install it (pip install 'fedgan-lightning[nifti]'), or move these files elsewhere",
            )
        ) from None
    try:
        header = _header(path, nibabel)
        volume = _volume(path, header, nibabel)
        if isinstance(axis, str):
            volume = _turned(volume, header, nibabel)
    except DataError:
        raise
    except Exception as error:  # broken headers and archives raise anything
        raise _unreadable(path, reason(error)) from error
    limits = levels.limits(volume) or range_of(volume)
    slices = np.moveaxis(volume, PLANES[axis] if isinstance(axis, str) else axis, 0)
    if isinstance(axis, str):
        slices = slices[:, ::-1, ::-1].transpose(0, 2, 1)
    return Stack([in_channels(grey_levels(own, limits), channels) for own in slices], is_scaled=True)


def _header(path: Path, nibabel: Any) -> Any:
    """Return a header that describes a volume of bounded size; extensions, which may hold others' headers, are left."""
    size = path.stat().st_size
    if not size:
        raise _unreadable(path, "an empty file")
    if size > MAX_BYTES:
        raise _unreadable(path, f"{size} bytes, more than {MAX_BYTES}")
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        block = file.read(HEADER_2)
    kinds = {HEADER: nibabel.Nifti1Header, HEADER_2: nibabel.Nifti2Header}
    found = next((length for length in kinds if length in _lengths(block)), None)
    if found is None or len(block) < found:
        raise _unreadable(path, "no NIfTI file, or cut off in its header")
    header = kinds[found](block[:found], check=False)
    if bytes(header["magic"])[:2] != b"n+":
        raise _unreadable(path, "a header whose numbers lie in another file")
    shape, kind = header.get_data_shape(), header.get_data_dtype()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise _unreadable(
            path, f"{len(shape)} dimensions, {' x '.join(map(str, shape))}", fix="save each volume in a file of its own"
        )
    if kind.kind not in "iuf":
        raise _unreadable(path, f"values that are no plain numbers, {header.get_value_label('datatype')}")
    num_values = int(np.prod([int(length) for length in shape], dtype=object)) if shape else 0
    if not 0 < num_values <= MAX_VALUES or min(shape) < 1:
        raise _unreadable(path, f"{' x '.join(map(str, shape)) or 'no'} values, where 1 to {MAX_VALUES} can be read")
    offset = header.get_data_offset()
    if not found <= offset <= MAX_OFFSET:
        raise _unreadable(path, f"values that begin at byte {offset}")
    if path.suffix.lower() != ".gz" and size < offset + num_values * kind.itemsize:
        raise _unreadable(path, f"cut off: {size} of {offset + num_values * kind.itemsize} bytes")
    return header


def _lengths(block: bytes) -> set[int]:
    return {int.from_bytes(block[:4], order) for order in ("little", "big")}


def _volume(path: Path, header: Any, nibabel: Any) -> NDArray[np.float32]:
    """Return the values with slope and intercept, in three dimensions."""
    with np.errstate(all="ignore"):
        values = np.asarray(nibabel.arrayproxy.ArrayProxy(str(path), header), dtype=np.float32)
    return values.reshape((*values.shape, 1, 1)[:3])


def _turned(volume: NDArray[np.float32], header: Any, nibabel: Any) -> NDArray[np.float32]:
    """Return a volume whose axes run to the patient's right, to the front and up."""
    turn = nibabel.io_orientation(header.get_best_affine())
    return np.asarray(nibabel.apply_orientation(volume, turn))


def _unreadable(path: Path, what: str, *, fix: str = "remove the file, or save it again") -> DataError:
    return DataError(
        message("every NIfTI file must hold one volume that can be read", received=f"{path} ({what})", fix=fix)
    )
