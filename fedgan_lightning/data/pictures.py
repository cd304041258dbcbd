"""How a user's picture is opened, everywhere: upright, without transparency, as bytes, named where broken."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgan_lightning.data.levels import FULL_RANGE, MAX_VALUES, Levels, Limits, grey_levels
from fedgan_lightning.data.reading import reason
from fedgan_lightning.errors import DataError, message

#: Endings of files that are read as pictures; of an animation it is the first frame.
EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
#: What a TIFF says of a page: its kind, its bits, whether 0 is white, and whether its numbers have signs.
KIND, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 254, 258, 262, 339
#: Kinds of pages that are no pictures of their own: smaller copies, and masks.
COPY_OR_MASK = 0b101
#: What shows through where a picture is transparent.
WHITE, BLACK = 255, 0
#: EXIF's tag of the orientation, and what undoes each (names of ``PIL.Image.Transpose``).
ORIENTATION = 0x0112
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class Stack(NamedTuple):
    """The pictures of one file.

    Attributes:
        pictures: One or more (channels, h, w), uint8.
        is_scaled: Whether they hold measured values, of which the user's range says which are black and white.
    """

    pictures: list[Tensor]
    is_scaled: bool = False


def read_picture(path: Path, *, channels: int, background: int = WHITE) -> Tensor:
    """Return a picture (channels, h, w), uint8, as a person sees it; of several in a file it is the first.

    It is turned upright, where EXIF says how; transparent pictures are laid over one colour; 16 bits become 8.

    Args:
        path: The file.
        channels: 3 for colour, 1 for grey.
        background: The grey level, or white or black, that shows through where the picture is transparent.

    Raises:
        DataError: If it cannot be read, or has a range that is not known.
    """
    return _read(path, channels=channels, levels=Levels(), background=background, first_only=True).pictures[0]


def read_pages(path: Path, *, channels: int, levels: Levels) -> Stack:
    """Return all pages of a TIFF, or the picture of another file, as :func:`read_picture` does.

    Args:
        path: The file.
        channels: 3 for colour, 1 for grey.
        levels: What is black and what white in grey pictures of 16 bits, of 32 bits or of fractions.

    Raises:
        DataError: If one cannot be read, or has a range that is not known.
    """
    return _read(path, channels=channels, levels=levels, background=WHITE, first_only=False)


def _read(path: Path, *, channels: int, levels: Levels, background: int, first_only: bool) -> Stack:
    if channels not in (1, 3):
        raise DataError(
            message(
                "pictures must be read with 1 or 3 channels", received=f"{channels} for {path}", fix="use such a model"
            )
        )
    try:
        with warnings.catch_warnings():  # of Pillow, without the file's name: what it can read is a picture
            warnings.simplefilter("ignore")
            pages = _pages(path, first_only=first_only)
            measured = [np.array(page.picture).ravel() for page in pages if page.is_measured]
            limits = levels.limits(np.concatenate(measured)) if measured else None
            if limits is None and any(page.is_measured and page.full_range is None for page in pages):
                raise _without_range(path, pages, is_settable=not first_only)
            found = [_as_bytes(page, limits, channels=channels, background=background) for page in pages]
    except DataError:
        raise
    except Exception as error:  # decoders raise whatever broken bytes make them
        raise DataError(
            message(
                "every picture must be readable",
                received=f"{path} ({_reason(path, error)})",
                fix="remove the file, or save it again as PNG",
            )
        ) from error
    return Stack([in_channels(pixels, channels) for pixels in found], is_scaled=bool(measured))


def in_channels(pixels: NDArray[np.uint8], channels: int) -> Tensor:
    """Return (h, w) or (h, w, 3) bytes as a picture (channels, h, w)."""
    from PIL import Image

    if pixels.ndim == 3 and channels == 1:
        pixels = np.array(Image.fromarray(pixels).convert("L"))
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(np.ascontiguousarray(planes)).permute(2, 0, 1).expand(channels, -1, -1).contiguous()


class _Page(NamedTuple):
    """One picture of a file, decoded and upright.

    Attributes:
        picture: Pillow's.
        full_range: The lowest and the highest number that its type can hold; ``None`` of other types than 16 bits.
        is_negative: Whether 0 is white, which Pillow leaves as it is in pictures of more than 8 bits.
    """

    picture: Any
    full_range: Limits | None
    is_negative: bool

    @property
    def is_measured(self) -> bool:
        """Whether it is grey with more than 8 bits."""
        return str(self.picture.mode)[0] in "IF"


def _pages(path: Path, *, first_only: bool) -> list[_Page]:
    """Return the pictures of a file: all pages of a TIFF, and of anything else the first frame."""
    from PIL import Image

    found, num_values = [], 0
    with Image.open(path) as picture:
        for index in itertools.count():
            try:
                if index:
                    picture.seek(index)
            except EOFError:
                break
            except SyntaxError:  # masks may be of modes that Pillow does not know
                if not _is_copy(picture):
                    raise
            if index and _is_copy(picture):
                continue
            num_values += picture.width * picture.height
            if num_values > MAX_VALUES:
                raise ValueError(f"more than {MAX_VALUES} pixels in one file")
            is_negative = _tags(picture).get(PHOTOMETRIC) == 0
            found.append(_Page(_upright(picture), _full_range(picture), is_negative))
            if first_only or picture.format != "TIFF":
                break
    return found


def _tags(picture: Any) -> Any:
    return getattr(picture, "tag_v2", {})


def _is_copy(picture: Any) -> bool:
    """Whether a page is a smaller copy of another, or a mask."""
    return bool(_tags(picture).get(KIND, 0) & COPY_OR_MASK)


def _upright(picture: Any) -> Any:
    from PIL import Image

    picture.load()
    try:
        method = UPRIGHT.get(picture.getexif().get(ORIENTATION))
    except Exception:  # EXIF that cannot be read is no orientation, and readers of it raise anything
        method = None
    return picture.copy() if method is None else picture.transpose(Image.Transpose[method])


def _full_range(picture: Any) -> Limits | None:
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        return FULL_RANGE
    tags = _tags(picture)
    is_signed = tuple(tags.get(BITS, ())) == (16,) and tuple(tags.get(SAMPLE_FORMAT, ())) == (2,)
    return (-32_768.0, 32_767.0) if picture.mode == "I" and is_signed else None


def _as_bytes(page: _Page, limits: Limits | None, *, channels: int, background: int) -> NDArray[np.uint8]:
    """Return a page as bytes; Pillow would cut off more than 8 bits at 255: X-rays all white."""
    if not page.is_measured:
        return np.array(_composed(page.picture, background).convert("RGB" if channels == 3 else "L"))
    values = np.array(page.picture)
    pixels = grey_levels(values, limits or page.full_range or FULL_RANGE)
    if page.is_negative:
        pixels = 255 - pixels
    if isinstance(transparent := page.picture.info.get("transparency"), int):
        pixels[values == transparent] = background
    return pixels


def _without_range(path: Path, pages: list[_Page], *, is_settable: bool) -> DataError:
    modes = sorted({page.picture.mode for page in pages})
    option = "set data.source.window or data.source.percentiles, or " if is_settable else ""
    return DataError(
        message(
            "pictures must have 8 or 16 bits a channel, or a range that is given",
            received=f"{path} of mode {', '.join(modes)}",
            fix=f"{option}rescale the folder's pictures, with one window for all",
        )
    )


def _composed(picture: Any, background: int) -> Any:
    """Return a picture laid over one colour where it is transparent."""
    from PIL import Image

    palette = getattr(picture.palette, "mode", "")
    if "A" not in picture.mode.upper().replace("LAB", "") + palette and "transparency" not in picture.info:
        return picture
    below = Image.new("RGBA", picture.size, (background, background, background, 255))
    return Image.alpha_composite(below, picture.convert("RGBA"))


def _reason(path: Path, error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if path.is_file() and not path.stat().st_size:
        return "an empty file"
    return "no picture in a known format" if isinstance(error, UnidentifiedImageError) else reason(error)
