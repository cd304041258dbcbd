"""Which measured values are black and which are white: a window, percentiles, or the range of the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgan_lightning.errors import ConfigurationError, message

#: Most values of one file that are held in memory: a volume of 512 x 512 x 2048.
MAX_VALUES = 2**29
#: Most bytes of one file.
MAX_BYTES = 4 * MAX_VALUES
#: The values of black and of white.
Limits = tuple[float, float]
#: What pictures of 16 bits a channel can hold.
FULL_RANGE = (0.0, 65_535.0)


@dataclass(frozen=True)
class Levels:
    """What a user says of the range of values; with neither, the format decides.

    Attributes:
        window: Centre and width.
        percentiles: The lower and the upper, of the values of one file.

    Raises:
        ConfigurationError: If both are given, or one of them is no range.
    """

    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.percentiles is not None:
            raise ConfigurationError(
                message(
                    "data.source.window and data.source.percentiles must not be given together",
                    received=f"window {list(self.window)} and percentiles {list(self.percentiles)}",
                    fix="set one of them",
                )
            )
        if self.window is not None and self.window[1] <= 0:
            raise ConfigurationError(
                message(
                    "data.source.window must be a centre and a width above 0",
                    received=list(self.window),
                    fix="write [40, 400], say",
                )
            )
        if self.percentiles is not None and self.percentiles[0] >= self.percentiles[1]:
            raise ConfigurationError(
                message(
                    "data.source.percentiles must be a lower and a higher one",
                    received=list(self.percentiles),
                    fix="write [1, 99], say",
                )
            )

    @property
    def is_given(self) -> bool:
        """Whether the user says anything."""
        return self.window is not None or self.percentiles is not None

    def limits(self, values: NDArray[Any]) -> Limits | None:
        """Return the values of black and of white in a file of these values; ``None`` where the format decides."""
        if self.window is not None:
            return around(*self.window)
        if self.percentiles is None:
            return None
        finite = values[np.isfinite(values)]
        if not finite.size:
            return 0.0, 0.0
        low, high = np.percentile(finite, self.percentiles)
        return float(low), float(high)


def around(centre: float, width: float) -> Limits:
    """Return the ends of a window."""
    return centre - width / 2, centre + width / 2


def range_of(values: NDArray[Any]) -> Limits:
    """Return the lowest and the highest value that are finite; zeros where none is."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def grey_levels(values: NDArray[Any], limits: Limits) -> NDArray[np.uint8]:
    """Return values as bytes: black at the lower limit and below, white at the upper one and above.

    What is not a number is black. Limits that are equal part the values: what lies above them is white.
    """
    low, high = limits
    if high <= low:
        return np.where(values > low, 255, 0).astype(np.uint8)
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.clip(np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0), 0, 255)).astype(np.uint8)
