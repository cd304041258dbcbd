"""Folders of pictures: what lies in them, through links, and which of their folders are splits."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import NamedTuple

from fedgan_lightning.data.reading import reason
from fedgan_lightning.errors import DataError, message

#: What a folder of one of these names, in any letter case, holds.
ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def files_below(folder: Path, is_wanted: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield the files that are wanted, sorted by their paths; links are followed, and hidden files are none.

    Args:
        folder: Where to look; a link that leads back to a folder above itself is not followed.
        is_wanted: Says of a path that is no folder whether it is read.

    Raises:
        DataError: If a link leads nowhere, a folder cannot be listed, or something else than a file has such a name.
    """
    yield from sorted(_walk(folder, is_wanted, above=frozenset()))


def _walk(folder: Path, is_wanted: Callable[[Path], bool], *, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    try:
        facts = folder.stat()
        entries = sorted(name for name in os.listdir(folder) if is_shown(name))  # noqa: PTH208 - str sorts faster
    except OSError as error:
        raise DataError(
            message(
                "every folder must be listable", received=f"{folder} ({reason(error)})", fix="check who may read it"
            )
        ) from error
    here = (facts.st_dev, facts.st_ino)
    if here in above:
        return
    for name in entries:
        path = folder / name
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            yield from _walk(path, is_wanted, above=above | {here})
        elif is_wanted(path):
            if not stat.S_ISREG(mode):
                raise DataError(
                    message("what is named as a picture must be a file", received=path, fix="move it elsewhere")
                )
            yield path


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        raise DataError(
            message(
                "everything in a folder of pictures must be there, and every link must lead somewhere",
                received=f"{path} ({reason(error)})",
                fix="repair or remove it",
            )
        ) from error


def is_shown(name: str) -> bool:
    """Return whether a file or folder belongs to the data: not what systems keep beside it."""
    return not name.startswith(".") and name != "__MACOSX"


def folders_in(folder: Path) -> list[Path]:
    """Return the folders directly in a folder, through links, sorted by name."""
    return sorted(path for path in folder.iterdir() if is_shown(path.name) and path.is_dir())


def named(path: Path) -> str:
    """Return a folder's name in Unicode's normal form C: macOS keeps accents apart."""
    return unicodedata.normalize("NFC", path.name)


class Splits(NamedTuple):
    """The folders of the two splits; both ``None`` where the folder has no splits of its own."""

    train: Path | None
    test: Path | None
    unused: Path | None


def splits_of(root: Path, *, is_wanted: Callable[[Path], bool], classes: Container[str] = ()) -> Splits:
    """Return which folders of ``root`` are splits: ``train`` with ``test``, or with ``val`` where there is no test.

    Names are those of :data:`ROLES`, in any letter case. Where there are all three, ``val`` is not used. Where all
    names are listed as classes they are classes, and a folder without pictures is nothing.

    Args:
        root: The folder.
        is_wanted: Says of a path that is no folder whether it is read.
        classes: Names of classes, where they are known.

    Raises:
        DataError: If folders can be read in two ways: as splits, or as classes or clients.
    """
    found: dict[str, Path] = {}
    others: list[Path] = []
    folders = [path for path in folders_in(root) if next(_walk(path, is_wanted, above=frozenset()), None)]
    if all(named(path) in classes for path in folders):
        return Splits(None, None, None)
    for path in folders:
        role = ROLES.get(named(path).lower())
        if role is None:
            others.append(path)
        elif role in found:
            raise _two_readings(root, [found[role], path], "two folders for one split")
        else:
            found[role] = path
    if not found:
        return Splits(None, None, None)
    if others:
        raise _two_readings(root, [*found.values(), others[0]], "splits beside folders that are none")
    loose = [path for path in root.iterdir() if is_shown(path.name) and path.is_file() and is_wanted(path)]
    if loose:
        raise _two_readings(root, [*found.values(), loose[0]], "splits beside pictures in neither")
    held_out = found.get("test", found.get("val"))
    if "train" not in found or held_out is None:
        raise _two_readings(root, list(found.values()), "one split without the other")
    return Splits(found["train"], held_out, found.get("val") if "test" in found else None)


def refuse_splits_below(files: list[Path], base: Path, *, classes: Container[str] = ()) -> None:
    """Refuse pictures below a folder that is named as a split, where a class or a client was expected.

    Raises:
        DataError: If there is one.
    """
    seen: set[Path] = set()
    for file in files:
        for folder in file.relative_to(base).parents:
            if folder in seen or folder == Path():
                continue
            seen.add(folder)
            if named(folder) not in classes and named(folder).lower() in ROLES:
                raise _two_readings(base, [base / folder], "a split within a class or a client")


def _two_readings(root: Path, paths: list[Path], what: str) -> DataError:
    names = ", ".join(str(path.relative_to(root)) for path in paths)
    return DataError(
        message(
            "folders named train, val or test, or like that, must be splits: train with test or val, alone, and "
            "directly in data.source.root",
            received=f"{names} in {root}, splits or classes or clients ({what})",
            fix="move or rename folders, or set root to one of them; if they are classes, list all of these in "
            "data.source.class_names",
        )
    )
