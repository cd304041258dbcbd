"""Who runs the clients."""

from fedgan_lightning.federation.executors.sequential import SequentialExecutor
from fedgan_lightning.federation.executors.vectorized import VectorizedExecutor

__all__ = ["SequentialExecutor", "VectorizedExecutor"]
