"""Who runs the clients."""

from fedgan_lightning.federation.executors.auto import AutoExecutor
from fedgan_lightning.federation.executors.autotune import AutotunedExecutor
from fedgan_lightning.federation.executors.faulty import FaultyExecutor
from fedgan_lightning.federation.executors.sequential import SequentialExecutor
from fedgan_lightning.federation.executors.vectorized import VectorizedExecutor

__all__ = ["AutoExecutor", "AutotunedExecutor", "FaultyExecutor", "SequentialExecutor", "VectorizedExecutor"]
