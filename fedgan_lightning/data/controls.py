"""Plain data modules for controls: one client's data, or all clients' together, for an ordinary Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L

from fedgan_lightning.data.samples import BatchStream, ClientSamples


class PlainDataModule(L.LightningDataModule):
    """A data module for a plain Trainer: ``num_steps`` minibatches as one epoch, and the next ones as the next.

    Arguments as :class:`BatchStream`.
    """

    def __init__(self, data: ClientSamples, **stream: Any) -> None:
        super().__init__()
        self.data, self.stream = data, stream

    def train_dataloader(self) -> _Epochs:
        return _Epochs(self)


class _Epochs:
    """Minibatches of the epoch that a plain Trainer is in: it asks for its loader once, and iterates every epoch."""

    def __init__(self, module: PlainDataModule) -> None:
        self.module = module

    def __len__(self) -> int:
        return int(self.module.stream["num_steps"])

    def __iter__(self) -> Iterator[Any]:
        trainer = self.module.trainer
        epoch = 0 if trainer is None else trainer.current_epoch
        return iter(BatchStream(self.module.data, first_step=epoch * len(self), **self.module.stream))
