"""Transforms of updates between client and aggregator, and what one is written against."""

from __future__ import annotations

from fedgan_lightning.federation.transforms import (
    ClipUpdates,
    PrivateUpdates,
    SignCompression,
)
from fedgan_lightning.protocol import (
    UpdateEntry,
    UpdateTransform,
)
