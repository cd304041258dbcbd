"""How a user's picture is opened, everywhere: upright, without transparency, 8 bits a channel, named where broken."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgan_lightning.data.reading import reason
from fedgan_lightning.errors import DataError, message

#: Endings of files that are read as pictures; of an animation it is the first frame.
EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
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


def read_picture(path: Path, *, channels: int, background: int = WHITE) -> Tensor:
    """Return a picture (channels, h, w), uint8, as a person sees it.

    It is turned upright, where EXIF says how; transparent pictures are laid over one colour.

    Args:
        path: The file.
        channels: 3 for colour, 1 for grey.
        background: The grey level, or white or black, that shows through where the picture is transparent.

    Raises:
        DataError: If it cannot be read, or has more than 8 bits a channel.
    """
    if channels not in (1, 3):
        raise DataError(
            message(
                "pictures must be read with 1 or 3 channels", received=f"{channels} for {path}", fix="use such a model"
            )
        )
    try:
        with warnings.catch_warnings():  # of Pillow, without the file's name: what it can read is a picture
            warnings.simplefilter("ignore")
            picture = _loaded(path)
            if picture.mode[0] not in "IF":
                pixels = np.array(_composed(picture, background).convert("RGB" if channels == 3 else "L"))
    except Exception as error:  # decoders raise whatever broken bytes make them
        raise DataError(
            message(
                "every picture must be readable",
                received=f"{path} ({_reason(path, error)})",
                fix="remove the file, or save it again as PNG",
            )
        ) from error
    if picture.mode[0] in "IF":  # Pillow would cut them off at 255: X-rays all white
        raise DataError(
            message(
                "pictures must have 8 bits a channel",
                received=f"{path} of mode {picture.mode}",
                fix="rescale the folder's pictures, with one window for all, before they are read",
            )
        )
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1).contiguous()


def _loaded(path: Path) -> Any:
    """Return the first frame, decoded and upright."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
        try:
            method = UPRIGHT.get(picture.getexif().get(ORIENTATION))
        except Exception:  # EXIF that cannot be read is no orientation, and readers of it raise anything
            method = None
        return picture.copy() if method is None else picture.transpose(Image.Transpose[method])


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
