"""Tables in text files: a header, and rows whose line numbers are known to every error."""

from __future__ import annotations

import csv
import io
import math
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedgan_lightning.data.reading import check_encoding, quoted, read_text, user_path
from fedgan_lightning.errors import DataError, message

#: Separators that are looked for where a header has one field.
SEPARATORS = (";", "\t", "|", ",", "::")


def check_delimiter(delimiter: str, *, option: str) -> str:
    r"""Return the one character that separates fields; ``\t``, as a shell leaves it, is a tab.

    Raises:
        DataError: If it cannot separate fields.
    """
    found = "\t" if delimiter == r"\t" else delimiter
    if len(found) != 1 or found in '"\r\n\0\ufeff':
        raise DataError(
            message(f"{option} must be one character", received=quoted(delimiter), fix=r"set , or ; or | or \t, say")
        )
    return found


class Table:
    """A table in a text file: the first line is the header, and blank lines are none.

    Lines before the header that begin with ``#`` are comments. Text is in Unicode's normal form C, so that what was
    typed on different systems compares equal.

    Args:
        path: The file.
        option: Where it was named, for errors; ``encoding`` and ``delimiter`` are options beside it.
        encoding: Its encoding.
        delimiter: What separates fields.

    Raises:
        DataError: If the file cannot be read or has no header.
    """

    def __init__(self, path: str | Path, *, option: str, encoding: str = "utf-8", delimiter: str = ",") -> None:
        self.path, self.option = user_path(path), option
        group = option.rpartition(".")[0]
        self._beside = f"{group}." if group else ""
        check_encoding(encoding, option=f"{self._beside}encoding")
        self._delimiter = check_delimiter(delimiter, option=f"{self._beside}delimiter")
        text = read_text(self.path, option=option, what="a CSV file", encoding=encoding)
        self._lines = io.StringIO(unicodedata.normalize("NFC", text), newline="")
        self._before = 0
        start = 0
        for line in iter(self._lines.readline, ""):
            if line.strip(" \t\r\n" + self._delimiter) and not line.startswith("#"):
                break
            self._before += 1
            start = self._lines.tell()
        self._lines.seek(start)
        self._rows = self._parsed()
        _, fields = next(self._rows, (0, []))
        self.header = [name.strip() for name in fields]

    def positions(self, wanted: Sequence[str], *, named_by: Sequence[str] = ()) -> list[int]:
        """Return where columns are.

        Args:
            wanted: Their names.
            named_by: The options that name columns; none where a file of this kind always has these.

        Raises:
            DataError: If one is missing, or there twice.
        """
        names = [unicodedata.normalize("NFC", name) for name in wanted]
        rule = f"{self.path} must have the columns {', '.join(names)}"
        missing = [name for name in names if name not in self.header]
        if missing:
            received = ", ".join(name or "(no name)" for name in self.header) or "no header"
            if self._before:
                received += f" (after {self._before} blank or # lines)"
            raise DataError(message(rule, received=quoted(received)[1:-1], fix=self._remedy(missing, named_by)))
        twice = sorted({name for name in names if self.header.count(name) > 1})
        if twice:
            raise DataError(
                message(f"{rule}, each once", received=f"{twice[0]} more than once", fix="rename one of them")
            )
        return [self.header.index(name) for name in names]

    def _remedy(self, missing: list[str], named_by: Sequence[str]) -> str:
        """Say what helps where columns are missing."""
        if len(self.header) == 1 and len(missing) > 0 and self.header[0]:
            found = next((mark for mark in SEPARATORS if mark in self.header[0] and mark != self._delimiter), None)
            fix = "the file has no header, or another separator: give it a header line"
            if found and len(found) == 1:
                return f"{fix}, and set {self._beside}delimiter: {found!r}"
            return f"{fix}, and separate fields by one character"
        options = f"set {' and '.join(named_by)} to the file's own names" if named_by else "rename the file's own"
        return f"{options}: {', '.join(missing)} is missing"

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """Yield line number and fields of every row; once.

        Raises:
            DataError: If a row has another number of fields than the header, or quotes that do not close.
        """
        for line, fields in self._rows:
            if len(fields) != len(self.header):
                raise DataError(
                    message(
                        f"every row of {self.path} must have as many fields as the header, {len(self.header)}",
                        received=f"{len(fields)} in line {line}",
                        fix="repair the line; a field with the separator in it stands in double quotes",
                    )
                )
            yield line, fields

    def _parsed(self) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(self._lines, delimiter=self._delimiter, skipinitialspace=True, strict=True)
        line = self._before + 1
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    message(
                        "a CSV file must have quotes that close, and fields of an ordinary length",
                        received=f"{self.path}, line {line} ({error})",
                        fix='repair the line; a quote within quotes is written ""',
                    )
                ) from error
            if fields is None:
                return
            if any(field.strip() for field in fields):
                yield line, fields
            line = self._before + reader.line_num + 1

    def number(self, text: str, *, line: int, column: str) -> float:
        """Return a field as a finite number.

        Raises:
            DataError: If it is none.
        """
        try:
            value = float(text) if "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.unfit("a finite number, written 1234.5", text, line=line, column=column)
        return value

    def whole(self, text: str, *, line: int, column: str) -> int:
        """Return a field as a whole number that is not negative.

        Raises:
            DataError: If it is none.
        """
        if not text.strip().isdecimal() or len(text) > 18:
            raise self.unfit("a whole number from 0", text, line=line, column=column)
        return int(text)

    def unfit(self, what: str, text: str, *, line: int, column: str) -> DataError:
        """Return the error that a field is not what its column holds."""
        return DataError(
            message(
                f"every value of {column} in {self.path} must be {what}",
                received=f"{quoted(text) if text.strip() else 'an empty field'} in line {line}",
                fix="repair or leave out the row",
            )
        )
