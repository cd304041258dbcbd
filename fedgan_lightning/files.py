"""Files that are complete or not there, and where things that can be made again are kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yield a file beside ``path``, on the same disk; it takes its place when the body ends, and only then.

    A process that is killed at any instant leaves the old file or the new one, and perhaps a partial one whose name
    begins with a dot and ends with ``.partial``.

    Args:
        path: The file.
        mode: Who may read and write it, before the process's own mask; 0o600 for secrets, from the first byte on.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # of another process with this number: it would keep its own mode
    with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


def link(source: Path, target: Path) -> None:
    """Give a file that never changes a second name, or a copy where the disk cannot; whole, or not at all."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    partial.replace(target)


def write_text(path: str | Path, text: str) -> None:
    """Write a file in one piece or not at all."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def cache_folder(chosen: str | None) -> Path:
    """Return the folder for what can be made again: ``chosen``, ``$FEDGAN_CACHE``, or one in the user's cache."""
    return Path(chosen or os.environ.get("FEDGAN_CACHE") or Path.home() / ".cache" / "fedgan_lightning")
