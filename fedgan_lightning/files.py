"""Files that are complete or not there, paths as people write them, and a place for what can be made again."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fedgan_lightning.errors import ConfigurationError, message

logger = logging.getLogger("fedgan_lightning")

Made = TypeVar("Made")

#: Nothing is ever there, and nothing can be written there.
NOWHERE = Path(os.devnull) / "fedgan_lightning"


def expanded(path: str | Path) -> Path:
    """Return a path as an absolute one, with ``~`` and ``~user`` as the shell reads them: the same for every reader.

    Raises:
        ConfigurationError: If nobody knows the home folder or the working directory, or the name cannot be one.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ConfigurationError(message("a path must have a name", received=repr(text), fix="write one"))
    try:
        return Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise ConfigurationError(
            message(
                "a path must be one that can be found", received=f"{text} ({error})", fix="write it in full, from / on"
            )
        ) from error


@contextmanager
def replacing(path: str | Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yield a file beside ``path``, on the same disk; it takes its place when the body ends, and only then.

    A process that is killed at any instant leaves the old file or the new one, and perhaps a partial one whose name
    begins with a dot and ends with ``.partial``; an error, such as a full disk, leaves the old file alone.

    Args:
        path: The file.
        mode: Who may read and write it, before the process's own mask; 0o600 for secrets, from the first byte on.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # of another process with this number: it would keep its own mode
    try:
        with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of a write: that it was to this file
            error.filename = str(target)
        raise


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


def write_json(path: str | Path, value: Any) -> None:
    """Write nested plain values in one piece; see :func:`to_json`."""
    write_text(path, to_json(value, indent=2))


def to_json(value: Any, **options: Any) -> str:
    """Return nested plain values as JSON that every program reads: NaN and infinity, which JSON lacks, are ``null``."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(own) for own in value]
    return value


# ---------------------------------------------------------------------- what can be made again


def cache_folder(chosen: str | None) -> Path:
    """Return the folder for what can be made again: ``chosen``, ``$FEDGAN_CACHE``, or one in the user's cache.

    It never fails: where nobody knows a home folder, it is one that is never there. Whoever reads and writes in it
    goes on without, as :func:`remembered` does.
    """
    folder = chosen or os.environ.get("FEDGAN_CACHE") or "~/.cache/fedgan_lightning"
    try:
        return expanded(folder)
    except ConfigurationError:
        return NOWHERE


def remembered(
    path: Path, *, read: Callable[[Path], Made], make: Callable[[], Made], write: Callable[[Made, BinaryIO], None]
) -> Made:
    """Return what a cache holds, or make it and keep it.

    A cache is never a reason to stop: what cannot be read is made again, and where nothing can be written, or read,
    the run goes on without and says so once.

    Args:
        path: File of the cache.
        read: Reads it; may raise whatever damaged files make it raise.
        make: Makes the value.
        write: Writes it.
    """
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        _go_without(path.parent, error)
    except Exception as error:  # whatever a damaged file makes a reader say
        logger.warning(f"{path} is damaged and made again ({type(error).__name__})")
    made = make()
    try:
        with replacing(path) as file:
            write(made, file)
    except (OSError, RuntimeError) as error:  # torch says by the latter that a disk is full
        _go_without(path.parent, error)
    return made


#: Folders of which it was said that they cannot be used.
_unusable: set[Path] = set()


def _go_without(folder: Path, error: Exception) -> None:
    if folder not in _unusable:
        _unusable.add(folder)
        why = (
            "no home folder is known" if folder == NOWHERE else f"{folder}: {getattr(error, 'strerror', None) or error}"
        )
        logger.warning(f"no cache ({why}): what it would keep is made again in every run. $FEDGAN_CACHE names another")
