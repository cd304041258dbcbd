"""Callbacks of the server's Trainer beside those at top level."""

from __future__ import annotations

from fedgan_lightning.checkpoints import (
    AtomicCheckpointIO,
)
from fedgan_lightning.evaluation.class_gap import (
    HeldAbsentGap,
)
from fedgan_lightning.federation.drift import (
    ClientDrift,
)
from fedgan_lightning.federation.server_average import (
    ServerAverage,
)
from fedgan_lightning.visuals.completion import (
    CompletionPictures,
)
from fedgan_lightning.visuals.inspection import (
    Inspection,
)
from fedgan_lightning.visuals.recommendations import (
    Recommendations,
)
