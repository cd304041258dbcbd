"""Image editing with any generator: projection, interpolation, directions."""

from __future__ import annotations

from fedgan_lightning.gan.editing import (
    Projection,
    direction,
    edited,
    interpolate,
    project,
)
