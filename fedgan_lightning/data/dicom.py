"""DICOM files as pictures: rescaled, in a window, frame by frame."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgan_lightning.data.dicom_header import (
    GREY,
    PALETTE,
    PIXELS,
    SHAPE,
    VALUES,
    Facts,
    check_file,
    check_header,
    check_pixels,
    decoders,
    guarded,
    header_of,
)
from fedgan_lightning.data.levels import Levels, around, grey_levels, range_of
from fedgan_lightning.data.pictures import Stack, in_channels


def read_dicom(path: Path, *, channels: int, levels: Levels) -> Stack:
    """Return all frames of a file.

    Grey ones are rescaled; the user's range decides what is black and what white, then the first window in the file,
    then the lowest and the highest value in it. Colours are taken as they are.

    Args:
        path: The file.
        channels: 3 for colour, 1 for grey.
        levels: What the user says of the range.

    Raises:
        DataError: If it is no DICOM file with pixels, is too large, cannot be read, or needs a decoder that is not
            installed; or without ``pydicom``.
    """
    check_file(path)
    facts = check_header(path)
    header = guarded(path, lambda: header_of(path, [*SHAPE, *VALUES, *PALETTE, *PIXELS], pixels=True), "cut off")
    check_pixels(path, header, facts)
    decoded = "pixels that cannot be decoded here"
    frames = guarded(path, lambda: _decoded(header, facts), decoded, fix=decoders(header))
    if facts.photometric not in GREY:
        return Stack([in_channels(frame, channels) for frame in frames])
    pixels = guarded(path, lambda: _shown(header, frames, levels), "slope, intercept or values that are no numbers")
    if facts.photometric == "MONOCHROME1":
        pixels = [255 - frame for frame in pixels]
    return Stack([in_channels(frame, channels) for frame in pixels], is_scaled=True)


def _decoded(header: Any, facts: Facts) -> list[NDArray[Any]]:
    """Return frames as they are stored where they are grey, and as bytes (h, w, 3) where they are colours."""
    from pydicom.pixels import apply_color_lut

    plane = (facts.rows, facts.columns) + ((3,) if facts.samples == 3 else ())
    frames = list(np.asarray(header.pixel_array).reshape(facts.frames, *plane))
    if facts.photometric in GREY:
        return frames
    bits = facts.bits_stored
    if facts.photometric == "PALETTE COLOR":
        frames = [apply_color_lut(frame, header) for frame in frames]
        bits = frames[0].dtype.itemsize * 8
    return [frame.astype(np.uint8) if bits == 8 else grey_levels(frame, (0, 2.0**bits - 1)) for frame in frames]


def _shown(header: Any, frames: list[NDArray[Any]], levels: Levels) -> list[NDArray[np.uint8]]:
    """Return grey frames as bytes."""
    values = np.stack([_rescaled(header, frame, index) for index, frame in enumerate(frames)])
    if levels.window is not None:
        return [_windowed(frame, *levels.window, "LINEAR") for frame in values]
    windows = [_window(header, index) for index in range(len(values))]
    limits = levels.limits(values)
    if limits is None and None in windows:
        limits = range_of(values)
    if limits is not None:
        return [grey_levels(frame, limits) for frame in values]
    return [_windowed(frame, *window) for frame, window in zip(values, windows) if window is not None]


def _rescaled(header: Any, frame: NDArray[Any], index: int) -> NDArray[np.float32]:
    """Return the measured values of a frame."""
    from pydicom.pixels import apply_modality_lut

    slope, intercept = 1.0, 0.0
    for place in _places(header, index, "PixelValueTransformationSequence"):
        if place.get("RescaleSlope") is not None or place.get("RescaleIntercept") is not None:
            slope = (_numbers(place.get("RescaleSlope")) or [slope])[0]
            intercept = (_numbers(place.get("RescaleIntercept")) or [intercept])[0]
            break
    else:
        if "ModalityLUTSequence" in header:
            return np.asarray(apply_modality_lut(frame, header), dtype=np.float32)
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        raise ValueError
    return (frame.astype(np.float64) * slope + intercept).astype(np.float32)


def _window(header: Any, index: int) -> tuple[float, float, str] | None:
    """Return centre, width and function of a frame's first window of any width; ``None`` where there is none."""
    for place in _places(header, index, "FrameVOILUTSequence"):
        try:
            pairs = list(zip(_numbers(place.get("WindowCenter")), _numbers(place.get("WindowWidth"))))
        except (TypeError, ValueError):  # what is no number is no window
            continue
        for centre, width in pairs:
            if math.isfinite(centre) and math.isfinite(width) and width > 0:
                return centre, width, str(place.get("VOILUTFunction") or "LINEAR").strip().upper()
    return None


def _windowed(values: NDArray[np.float32], centre: float, width: float, function: str) -> NDArray[np.uint8]:
    """Return values in a window, as the standard says (PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        exponent = np.clip(-4 * (values.astype(np.float64) - centre) / width, -700, 700)
        return grey_levels(1 / (1 + np.exp(exponent)), (0.0, 1.0))
    if function == "LINEAR_EXACT" or width < 1:  # LINEAR is defined from a width of 1
        return grey_levels(values, around(centre, width))
    return grey_levels(values, around(centre - 0.5, width - 1))


def _places(header: Any, index: int, sequence: str) -> Iterator[Any]:
    """Yield where a frame's entries may stand: its own functional group, the shared one, the header."""
    for name, position in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups = header.get(name) or ()
        if position < len(groups) and (items := groups[position].get(sequence)):
            yield items[0]
    yield header


def _numbers(value: Any) -> list[float]:
    """Return the numbers of an entry: none, one or several."""
    values = list(value) if hasattr(value, "__len__") and not isinstance(value, (str, bytes)) else [value]
    return [float(own) for own in values if own not in (None, "")]
