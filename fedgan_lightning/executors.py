"""Executors beside those at top level: measured ones, and clients that fail."""

from __future__ import annotations

from fedgan_lightning.federation.executors import (
    AutotunedExecutor,
    FaultyExecutor,
)
from fedgan_lightning.protocol import (
    Executor,
)
