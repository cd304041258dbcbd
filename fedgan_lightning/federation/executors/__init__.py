"""Who runs the clients."""

from fedgan_lightning.federation.executors.auto import AutoExecutor
from fedgan_lightning.federation.executors.sequential import SequentialExecutor
from fedgan_lightning.federation.executors.vectorized import VectorizedExecutor

__all__ = ["AutoExecutor", "SequentialExecutor", "VectorizedExecutor"]
