"""What is read of a DICOM file, and when it is refused.

Of a header that is read which describes pixels, and the identifier of a patient, a study or a series where the user
asks for it; the caller makes a number of it. Errors say nothing that a header holds: pydicom's own
are not passed on, nor written to a log.
"""

from __future__ import annotations

import logging
import math
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from fedgan_lightning.data.levels import MAX_BYTES, MAX_VALUES
from fedgan_lightning.errors import DataError, message

T = TypeVar("T")
#: Endings of files that are read as DICOM; such files have many names without an ending, too.
EXTENSIONS = {".dcm", ".dicom", ".ima"}
#: Where every file has its mark.
MARK, PLACE = b"DICM", 128
#: Whose identifier can be asked for.
IDENTIFIERS = {"patient": "PatientID", "study": "StudyInstanceUID", "series": "SeriesInstanceUID"}
Whose = Literal["patient", "study", "series"]
SHAPE = [
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PlanarConfiguration",
    "PhotometricInterpretation",
]
VALUES = [
    "RescaleSlope",
    "RescaleIntercept",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]
PALETTE = [
    f"{kind}{color}PaletteColorLookupTable{part}"
    for color in ("Red", "Green", "Blue")
    for kind, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
]
PIXELS = ["PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"]
#: What to do about a file that is broken.
AGAIN = "remove the file, or save it again"
GREY, COLOUR = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def has_mark(path: Path) -> bool:
    """Return whether a file says that it is DICOM."""
    try:
        with path.open("rb") as file:
            return file.read(PLACE + len(MARK))[PLACE:] == MARK
    except OSError:
        return False


def identifier(path: Path, whose: Whose) -> str:
    """Return the identifier of the patient, the study or the series that a file is of; never to be written anywhere.

    Raises:
        DataError: If it cannot be read, or there is none.
    """
    check_file(path)
    name = IDENTIFIERS[whose]
    found = guarded(path, lambda: header_of(path, [name]).get(name), "a header that cannot be read")
    text = "" if found is None else str(found).strip()
    if not text:
        raise DataError(
            message(
                f"every file must say of which {whose} it is, where data.source.group is {whose}",
                received=f"{path} without {name}",
                fix="set group to file or null, with the partition Natural by folder, or add it",
            )
        )
    return text


# ---------------------------------------------------------------------- what is read


class Facts(NamedTuple):
    """What a header says of the pixels, checked."""

    rows: int
    columns: int
    samples: int
    frames: int
    bits_allocated: int
    bits_stored: int
    photometric: str

    @property
    def num_values(self) -> int:
        return self.rows * self.columns * self.samples * self.frames


def header_of(path: Path, names: list[str], *, pixels: bool = False) -> Any:
    """Return these entries of a header, and nothing else of it."""
    import pydicom

    return pydicom.dcmread(path, stop_before_pixels=not pixels, specific_tags=names)


def check_file(path: Path) -> None:
    """Refuse what is no DICOM file of bounded size, before anything parses it."""
    try:
        import pydicom  # noqa: F401 - whether it is there
    except ImportError:
        raise DataError(
            message(
                "DICOM files must have the package pydicom to be read",
                received=str(path),
                fix="install it (pip install 'fedgan-lightning[dicom]'), or move these files elsewhere",
            )
        ) from None
    size = guarded(path, lambda: path.stat().st_size, "a file that cannot be opened")
    if not size:
        raise unreadable(path, "an empty file")
    if size > MAX_BYTES:
        raise unreadable(path, f"{size} bytes, more than {MAX_BYTES}")
    if not has_mark(path):
        raise unreadable(path, "no DICOM file, without the mark DICM at byte 128")
    if not guarded(path, lambda: _is_bounded(path), "a header that cannot be read"):
        raise unreadable(path, f"more than {MAX_BYTES} bytes when it is inflated")


def _is_bounded(path: Path) -> bool:
    """Return whether a file, inflated where it is deflated as a whole, is small enough; pydicom inflates any."""
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    meta = read_file_meta_info(path)
    if meta.TransferSyntaxUID != DeflatedExplicitVRLittleEndian:
        return True
    inflater, found = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(PLACE + len(MARK) + 12 + meta.FileMetaInformationGroupLength)
        waiting = file.read()
        while waiting and not inflater.eof and found <= MAX_BYTES:
            found += len(inflater.decompress(waiting, 2**24))
            waiting = inflater.unconsumed_tail
    return found <= MAX_BYTES


def check_header(path: Path) -> Facts:
    """Return what a header says of the pixels, before any are read.

    Raises:
        DataError: If that is not enough, or too much, or nothing here decodes them.
    """
    what = "a header that cannot be read"
    header = guarded(path, lambda: header_of(path, [*SHAPE, *VALUES]), what)
    facts = guarded(path, lambda: _facts(path, header), what)
    if not guarded(path, lambda: _is_decodable(header), what):
        syntax = header.file_meta.TransferSyntaxUID
        raise unreadable(path, f"compressed as {_name(syntax)}", fix=decoders(header))
    return facts


def _facts(path: Path, header: Any) -> Facts:
    """Return what a header says of the pixels.

    Raises:
        DataError: If that is not enough, or too much.
    """
    needed = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PhotometricInterpretation")
    lacking = [name for name in needed if header.get(name) in (None, "")]
    if lacking:
        raise unreadable(path, f"no picture, without {', '.join(lacking)}", fix="move the file elsewhere")
    photometric = str(header.PhotometricInterpretation).strip().upper()
    if photometric not in (*GREY, *COLOUR, "PALETTE COLOR"):
        raise unreadable(path, "colours of a kind that is not read", fix="save it in RGB, or remove it")
    facts = Facts(
        rows=int(header.Rows),
        columns=int(header.Columns),
        samples=int(header.SamplesPerPixel),
        frames=int(header.get("NumberOfFrames") or 1),
        bits_allocated=int(header.BitsAllocated),
        bits_stored=int(header.get("BitsStored") or header.BitsAllocated),
        photometric=photometric,
    )
    if facts.samples != (3 if photometric in COLOUR else 1):
        raise unreadable(path, f"{facts.samples} values a pixel in {photometric}")
    if min(facts.rows, facts.columns, facts.frames) < 1 or facts.num_values > MAX_VALUES:
        raise unreadable(
            path,
            f"{facts.frames} frames of {facts.columns} x {facts.rows} pixels, where 1 to {MAX_VALUES} values can be "
            "read",
        )
    return facts


def check_pixels(path: Path, header: Any, facts: Facts) -> None:
    """Refuse a file without pixels, with fewer than its header promises, or of which it says too little."""
    found = next((header[name] for name in PIXELS[:3] if name in header), None)
    if found is None or not found.value:
        raise unreadable(path, "no pixels", fix="move the file elsewhere")
    needed = ("BitsStored", "PixelRepresentation") if found.keyword == "PixelData" else ()
    if lacking := [name for name in needed if header.get(name) is None]:
        raise unreadable(path, f"pixels without {', '.join(lacking)}")
    if header.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    halved = facts.photometric == "YBR_FULL_422"
    expected = math.ceil(facts.num_values * facts.bits_allocated / 8 * (2 / 3 if halved else 1))
    if len(found.value) < expected:
        raise unreadable(path, f"cut off: {len(found.value)} of {expected} bytes of pixels")


def _is_decodable(header: Any) -> bool:
    from pydicom.pixels import get_decoder

    syntax = header.file_meta.TransferSyntaxUID
    try:
        return not syntax.is_encapsulated or bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _name(syntax: Any) -> str:
    """Return a transfer syntax in words; a private one may say who made it."""
    return str(syntax.name) if not syntax.is_private and syntax.name != str(syntax) else "an unknown transfer syntax"


def decoders(header: Any) -> str:
    """Return what to install to decode a transfer syntax, or what to do where nothing does."""
    from pydicom import uid

    syntax = header.file_meta.TransferSyntaxUID
    if syntax in (*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes):
        return "install a decoder (pip install pylibjpeg pylibjpeg-libjpeg), or save it uncompressed"
    if syntax in (*uid.JPEG2000TransferSyntaxes, *uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K):
        return "install a decoder (pip install pylibjpeg pylibjpeg-openjpeg), or save it uncompressed"
    return "save it uncompressed, or remove it" if syntax.is_encapsulated else AGAIN


# ---------------------------------------------------------------------- what is said


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what pydicom warns of out of logs: it may quote a header."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def guarded(path: Path, work: Callable[[], T], what: str, *, fix: str = AGAIN) -> T:
    """Do what may fail in pydicom, and say so in words that are not pydicom's.

    The error is raised where pydicom's is over: it is not its context, which tracebacks print.

    Raises:
        DataError: If it fails.
    """
    try:
        with _quiet():
            return work()
    except DataError:
        raise
    except Exception as error:  # broken bytes raise anything
        kind = type(error).__name__
    raise unreadable(path, f"{what}, {kind}", fix=fix)


def unreadable(path: Path, what: str, *, fix: str = AGAIN) -> DataError:
    """Return the error that a file cannot be read, for a reason in our words."""
    return DataError(
        message("every DICOM file must hold pictures that can be read", received=f"{path} ({what})", fix=fix)
    )
