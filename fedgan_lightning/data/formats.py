"""The files of a folder of pictures: which are read, by name or by mark, and what is in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedgan_lightning.data import dicom, dicom_header, nifti, pictures
from fedgan_lightning.data.folders import is_shown
from fedgan_lightning.data.levels import Levels
from fedgan_lightning.errors import DataError, message

Kind = Literal["picture", "dicom", "nifti"]
Group = Literal["file", "series", "study", "patient"]
#: Endings in words, for errors.
ENDINGS = " ".join(sorted({*pictures.EXTENSIONS, *dicom_header.EXTENSIONS, *nifti.EXTENSIONS}))
#: What systems write beside DICOM files: a list of them, itself DICOM and no picture.
LISTING = "dicomdir"


def kind_of(path: Path) -> Kind | None:
    """Return what a file is read as; ``None`` where it is no picture.

    Names decide, in any letter case. A file without an ending, or with one of digits as identifiers have, is DICOM
    where it has the mark of it.
    """
    suffix = path.suffix.lower()
    if path.name.lower().endswith(nifti.EXTENSIONS):
        return "nifti"
    if suffix in pictures.EXTENSIONS:
        return "picture"
    is_dicom = suffix in dicom_header.EXTENSIONS or (
        _has_no_ending(path) and path.is_file() and dicom_header.has_mark(path)
    )
    return "dicom" if is_dicom else None


def is_picture(path: Path) -> bool:
    """Return whether a file is read."""
    return kind_of(path) is not None


def _has_no_ending(path: Path) -> bool:
    return path.name.lower() != LISTING and (path.suffix in ("", ".") or path.suffix[1:].isdigit())


def refuse_unmarked(files: Sequence[Path]) -> None:
    """Refuse files without an ending that are no DICOM beside such that are: they may be cut off or empty.

    Args:
        files: Those that are read.

    Raises:
        DataError: If there is one.
    """
    for folder in dict.fromkeys(path.parent for path in files if _has_no_ending(path)):
        for path in sorted(folder.iterdir()):
            if is_shown(path.name) and _has_no_ending(path) and path.is_file() and not dicom_header.has_mark(path):
                what = "without the mark DICM at byte 128" if path.stat().st_size else "an empty file"
                raise DataError(
                    message(
                        "where files without an ending are DICOM, all in the folder must be",
                        received=f"{path} ({what})",
                        fix="remove it or move it elsewhere",
                    )
                )


def numbers_of(files: Sequence[Path], group: Group) -> NDArray[np.int64]:
    """Return for each file the number of its group, in the order of the first file of each, from 0.

    Identifiers of headers are compared here, and end here.

    Args:
        files: The files.
        group: What a group is: a file by itself, or a series, a study or a patient of DICOM files.

    Raises:
        DataError: If a file does not say of which it is.
    """
    if group == "file":
        return np.arange(len(files))
    known: dict[str, int] = {}
    numbers = []
    for path in files:
        if kind_of(path) != "dicom":
            raise DataError(
                message(
                    f"every file must be DICOM where data.source.group is {group}",
                    received=path,
                    fix="set group to file or null, or move other files elsewhere",
                )
            )
        numbers.append(known.setdefault(dicom_header.identifier(path, group), len(known)))
    return np.array(numbers, dtype=np.int64)


class Found(NamedTuple):
    """What was taken from one file.

    Attributes:
        pictures: Each (channels, h, w), uint8.
        num_in_file: How many there are in the file.
        is_scaled: Whether the user's range of values has a meaning for them.
    """

    pictures: list[Tensor]
    num_in_file: int
    is_scaled: bool


@dataclass(frozen=True)
class Reading:
    """How files are read, and which of their pictures are taken.

    Attributes:
        channels: 3 for colour, 1 for grey.
        levels: What is black and what white in measured values.
        axis: Along which slices of volumes are numbered.
        slice_range: First picture of several in a file, and the one after the last, as Python counts.
        slice_step: Every n-th of these is taken.
        skip_empty: Whether pictures of one grey level or colour are left out.
    """

    channels: int
    levels: Levels
    axis: nifti.Axis = 2
    slice_range: tuple[int, int] | None = None
    slice_step: int = 1
    skip_empty: bool = False

    def read(self, path: Path) -> Found:
        """Return the pictures of a file.

        Raises:
            DataError: If it cannot be read, or holds none in the range of slices.
        """
        kind = kind_of(path)
        if kind == "nifti":
            stack = nifti.read_nifti(path, channels=self.channels, levels=self.levels, axis=self.axis)
        elif kind == "dicom":
            stack = dicom.read_dicom(path, channels=self.channels, levels=self.levels)
        else:
            stack = pictures.read_pages(path, channels=self.channels, levels=self.levels)
        count = len(stack.pictures)
        chosen = stack.pictures
        if count > 1:
            first, end = self.slice_range or (None, None)
            chosen = chosen[first : end : self.slice_step]
        if not chosen:
            raise DataError(
                message(
                    "data.source.slice_range must leave pictures in every file with several",
                    received=f"{list(self.slice_range or ())} of {count} in {path}",
                    fix="widen it; numbers below 0 count from the end",
                )
            )
        if self.skip_empty:
            chosen = [own for own in chosen if bool((own != own[:, :1, :1]).any())]
        return Found(chosen, count, stack.is_scaled)

    def refuse_unused(self, found: Sequence[Found], files: Sequence[Path]) -> None:
        """Refuse options that mean nothing for what was found.

        Raises:
            DataError: If one was given.
        """
        slices = self.slice_range is not None or self.slice_step > 1
        unused = {
            "window or percentiles": (
                self.levels.is_given and not any(own.is_scaled for own in found),
                "grey DICOM, NIfTI, or grey pictures of 16 bits",
            ),
            "axis": (self.axis != 2 and not any(kind_of(path) == "nifti" for path in files), "NIfTI"),
            "slice_range or slice_step": (
                slices and all(own.num_in_file == 1 for own in found),
                "files with several pictures",
            ),
        }
        for option, (is_unused, wanted) in unused.items():
            if is_unused:
                raise DataError(
                    message(
                        f"data.source.{option} must have what it is for: {wanted}",
                        received=f"{len(files)} files without, such as {files[0]}",
                        fix="leave the option out",
                    )
                )
