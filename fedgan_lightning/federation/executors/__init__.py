"""Who runs the clients."""

from fedgan_lightning.federation.executors.sequential import SequentialExecutor

__all__ = ["SequentialExecutor"]
