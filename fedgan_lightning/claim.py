"""One process writes a run directory: whoever fits claims it first, and a second one is refused.

The claim is a lock of the operating system on a file in the directory. It ends with the process, however that ends: a
run that was killed leaves the file behind, and its continuation takes it over.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.files import expanded

logger = logging.getLogger("fedgan_lightning")

#: Name of the file in a run directory.
NAME = ".claim"
#: What a file system says that has no locks.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
#: By these launchers tell a process that it is not the first of its run, which holds the claim for all.
NUMBERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


@contextmanager
def claimed(run_dir: str | Path) -> Iterator[None]:
    """Hold a run directory for the body; make it before, and remove it afterwards where nothing came into it.

    Raises:
        ConfigurationError: If another process holds it, or it cannot be written.
    """
    if not _is_first(os.environ):
        yield
        return
    root = expanded(run_dir)
    with _folder(root):
        try:
            held = _locked(root / NAME)
        except OSError as error:
            raise _unwritable(root, error) from error
        try:
            yield
        finally:
            try:
                with suppress(OSError):
                    (root / NAME).unlink()
            finally:
                os.close(held)


@contextmanager
def _folder(root: Path) -> Iterator[None]:
    """Make a folder for the body; remove afterwards what was made and is still empty."""
    made: list[Path] = []
    try:
        try:
            made = [folder for folder in (root, *root.parents) if not folder.exists()]
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(root, error) from error
        yield
    finally:
        _remove_empty(made)


def _unwritable(root: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        message(
            "a run directory must be a folder that can be written",
            received=f"{root} ({error.strerror or error})",
            fix="choose another --run_dir, or who may write there",
        )
    )


def check_writable(run_dir: str | Path) -> None:
    """Refuse a run directory that cannot be written, before a command works for what it will write there.

    Raises:
        ConfigurationError: If it cannot.
    """
    root = expanded(run_dir)
    with _folder(root):
        try:
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as error:
            raise _unwritable(root, error) from error


def check_unclaimed(run_dir: str | Path) -> None:
    """Refuse a run directory that another process holds, before anything is started for a run in it.

    Raises:
        ConfigurationError: If one does, or it cannot be written.
    """
    with claimed(run_dir):
        pass


def _is_first(environment: Mapping[str, str]) -> bool:
    numbers = (environment.get(name, "") for name in NUMBERS)
    return all(number in ("", "0") for number in numbers)


def _locked(path: Path) -> int:
    """Return a descriptor that holds the lock.

    Raises:
        ConfigurationError: If another process has it.
        OSError: If the file cannot be written.
    """
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(held, path)
            if path.exists() and path.stat().st_ino == os.fstat(held).st_ino:
                os.ftruncate(held, 0)
                os.write(held, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)  # its owner removed it just now: this is a file that nobody else will find


def _lock(held: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(held, 200, 0).decode(errors="replace") or "another process"
        raise ConfigurationError(
            message(
                "a run directory must be written by one process",
                received=f"{path.parent}, which {owner} writes",
                fix="wait until it has ended, or choose another --run_dir",
            )
        ) from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        logger.warning(f"{path.parent} lies on a disk without locks: see that no second run writes it")


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
