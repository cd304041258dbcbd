"""The progress bar: rounds, and inside each round its clients."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm

from fedgan_lightning.hooks import completed_rounds, planned_rounds
from fedgan_lightning.protocol import ClientUpdate, RoundInfo

#: What the bar shows, in this order, where it exists.
SHOWN = (
    "privacy/epsilon",
    "privacy/epsilon_example",
    "fid",
    "modes",
    "high_quality",
    "sliced_wasserstein",
    "train/loss_d",
    "train/loss_g",
)


class RoundProgressBar(ProgressBar):
    """A bar over rounds with a bar over the clients of the round inside it."""

    def __init__(self) -> None:
        super().__init__()
        self._rounds: Any = None
        self._clients: Any = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._enabled:
            total = planned_rounds(trainer)
            options = {"file": sys.stdout, "dynamic_ncols": True}
            self._rounds = tqdm(desc="rounds", total=total, initial=completed_rounds(trainer), position=0, **options)
            self._clients = tqdm(desc="clients", leave=False, position=1, **options)

    def on_round_start(self, trainer: L.Trainer, server: Any, info: RoundInfo) -> None:
        """Start the inner bar."""
        if self._clients is not None:
            self._clients.reset(total=len(info.cohort))

    def on_client_end(self, trainer: L.Trainer, server: Any, update: ClientUpdate) -> None:
        """Advance the inner bar."""
        if self._clients is not None:
            self._clients.update()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._rounds is not None:
            values = trainer.callback_metrics
            shown = {
                name.removeprefix("train/").removeprefix("privacy/"): f"{float(values[name]):.3g}"
                for name in SHOWN
                if name in values
            }
            self._rounds.n = completed_rounds(trainer)
            self._rounds.set_postfix(shown)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        tqdm.write(" ".join(map(str, args)), file=sys.stdout)

    def _close(self) -> None:
        for bar in (self._clients, self._rounds):
            if bar is not None:
                bar.close()
        self._rounds = self._clients = None
