"""How a user's text file is opened: paths, encodings, and errors that say where in the file something is wrong."""

from __future__ import annotations

import codecs
from pathlib import Path

from fedgan_lightning.errors import DataError, message

#: Characters of a value that an error quotes.
QUOTED = 60
#: Byte order marks of encodings that other text never begins with; longer ones first.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def user_path(path: str | Path) -> Path:
    """Return a path as the user meant it: ``~`` is the home directory.

    Raises:
        DataError: If there is no such home, or the path holds a NUL byte.
    """
    if "\0" in str(path):
        raise DataError(message("a path must have no NUL byte in it", received=repr(str(path)), fix="correct the path"))
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(
            message("~ must stand for a home directory", received=f"{path} ({error})", fix="write the whole path")
        ) from error


def quoted(value: object) -> str:
    """Return a value for an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}... ({len(str(value))} characters)"


def reason(error: BaseException) -> str:
    """Return what an error of another library says, in one line and without the path it may repeat."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(f"{type(error).__name__}: {text}".split()) if text else type(error).__name__


def check_encoding(encoding: str, *, option: str) -> None:
    """Refuse an encoding that Python does not know.

    Raises:
        DataError: If it does not.
    """
    try:
        "".encode(encoding)
    except (LookupError, ValueError) as error:
        raise DataError(
            message(
                f"{option} must be an encoding that Python knows",
                received=quoted(encoding),
                fix="set utf-8, latin-1, cp1252 or utf-16, say",
            )
        ) from error


def read_text(path: Path, *, option: str, what: str, encoding: str = "utf-8", settable: bool = True) -> str:
    """Return the text of a file, without a byte order mark.

    Args:
        path: The file.
        option: Where it was named, for the error.
        what: What it should be, for the error.
        encoding: Its encoding.
        settable: Whether there is an option ``encoding`` beside the other.

    Raises:
        DataError: If it cannot be read, or is not in this encoding; byte and line are named.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            message(
                f"{option} must be {what} that can be read", received=f"{path} ({reason(error)})", fix="check the path"
            )
        ) from error
    rule, save = f"{option} must be {what} in {encoding}", "save it as UTF-8"
    beside = f", or set {option.rpartition('.')[0]}.encoding: " if settable else ""
    mark = next((name for bom, name in MARKS.items() if data.startswith(bom)), None)
    if mark and not codecs.lookup(encoding).name.startswith(mark):
        raise DataError(
            message(
                rule,
                received=f"{path}, which begins with the byte order mark of {mark}",
                fix=save + (f"{beside}{mark} (and delimiter, for tabs in a table)" if settable else ""),
            )
        )
    try:
        text = data.decode(encoding)
    except UnicodeError as error:
        raise DataError(
            message(
                rule,
                received=f"{path} with {_place(data, error, encoding)}",
                fix=save + (f"{beside}latin-1, cp1252 or what else it is in" if settable else ""),
            )
        ) from error
    if (nul := text.find("\0")) >= 0:
        raise DataError(
            message(
                rule,
                received=f"{path} with a NUL byte in line {text.count(chr(10), 0, nul) + 1}, as binary files have",
                fix="check the file" + (f"{beside}utf-16-le if it is that" if settable else ""),
            )
        )
    return text.removeprefix("\ufeff")


def _place(data: bytes, error: UnicodeError, encoding: str) -> str:
    """Say which byte cannot be decoded, and in which line."""
    if not isinstance(error, UnicodeDecodeError):
        return f"other bytes ({reason(error)})"
    before = data[: error.start].decode(encoding, errors="replace")
    line = before.count("\n") + 1
    return f"byte 0x{data[error.start]:02x} at offset {error.start}, line {line} ({error.reason})"
