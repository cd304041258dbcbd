"""Which sites a folder of keys knows, and which were expelled."""

from __future__ import annotations

from pathlib import Path

#: Folder, beside the keys, of those of sites that were expelled.
EXPELLED = "expelled"


def numbers_in(folder: Path) -> list[int]:
    """Return the numbers of the sites whose public keys, ``siteN.pub``, lie in a folder, in ascending order."""
    names = (path.stem.removeprefix("site") for path in folder.glob("site*.pub"))
    return sorted(int(name) for name in names if name.isdecimal())


def expelled(folder: Path) -> list[Path]:
    """Return the public keys of sites that were expelled."""
    return [folder / EXPELLED / f"site{number}.pub" for number in numbers_in(folder / EXPELLED)]


def expelled_from(folder: Path) -> list[int]:
    """Return the numbers of sites that were expelled, and have not been given another key since."""
    return [number for number in numbers_in(folder / EXPELLED) if number not in numbers_in(folder)]
