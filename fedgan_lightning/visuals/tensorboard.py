"""TensorBoard: a layout that groups the curves, and hyper-parameters beside the final metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from fedgan_lightning.evaluation.callback import Evaluation
from fedgan_lightning.hooks import completed_rounds
from fedgan_lightning.visuals import pictures

LAYOUT = {
    "Training": {
        "losses": ["Multiline", ["train/loss_d", "train/loss_g"]],
        "discriminator": ["Multiline", ["train/d_real", "train/d_fake"]],
        "update norms": ["Multiline", ["update_norm/.*"]],
        "cosine between clients' updates": ["Multiline", ["drift/.*"]],
    },
    "Quality": {
        "Fréchet distance": ["Multiline", ["^fid$", "^fid_raw$"]],
        "classes": ["Multiline", ["^classes$", "^class_accuracy$", "^class_distance$"]],
        "modes": ["Multiline", ["^modes$", "^high_quality$", "^mode_divergence$", "^mode_spread$"]],
        "distance": ["Multiline", ["^sliced_wasserstein$"]],
        "completed pictures, PSNR": ["Multiline", ["^completion_psnr$"]],
        "completed pictures, Fréchet distance": ["Multiline", ["^completion_fid$"]],
    },
    "Clients": {
        "discriminator loss": ["Multiline", ["client/.*/loss_d"]],
        "generator loss": ["Multiline", ["client/.*/loss_g"]],
        "answered (1) or not (0)": ["Multiline", ["client/.*/answered"]],
        "seconds of work": ["Multiline", ["clients?/.*seconds.*"]],
        "seconds from task to answer": ["Multiline", ["clients?/.*round_trip.*"]],
        "bytes to each client in a round": ["Multiline", ["clients?/.*bytes_down.*"]],
        "bytes from each client in a round": ["Multiline", ["clients?/.*bytes_up.*"]],
    },
    "Rounds": {
        "clients asked, and what came of them": [
            "Multiline",
            ["^round/asked$", "^round/clients$", "^round/failed$", "^round/rejected$", "^round/late$"],
        ],
        "sites connected": ["Multiline", ["^sites/connected$"]],
        "seconds": ["Multiline", ["^round/seconds$"]],
        "tries that were abandoned": ["Multiline", ["^round/abandoned$"]],
    },
    "Cost": {
        "bytes since the start": ["Multiline", ["bytes/.*"]],
        "client steps per second": ["Multiline", ["round/client_steps_per_second"]],
    },
}


def writers(trainer: L.Trainer) -> list[Any]:
    """Return the SummaryWriters of the Trainer's TensorBoard loggers."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def publish(trainer: L.Trainer, picture: pictures.Picture, *, name: str, tag: str, step: int | None = None) -> None:
    """Write a picture into the run directory and to TensorBoard, at ``step`` or this round; on the first rank only."""
    if not trainer.is_global_zero:
        return
    pictures.save(picture, Path(trainer.default_root_dir) / name)
    for writer in writers(trainer):
        writer.add_image(tag, picture, completed_rounds(trainer) if step is None else step, dataformats="HWC")


class TensorBoardLayout(L.Callback):
    """Writes the layout once, and the hyper-parameters with the best values at the end.

    Attributes:
        hyperparameters: Settings to show, flat; filled in by the command line.
    """

    def __init__(self) -> None:
        self.hyperparameters: dict[str, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for writer in writers(trainer):
            writer.add_custom_scalars(LAYOUT)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        history = [item.history[-1] for item in trainer.callbacks if isinstance(item, Evaluation) and item.history]  # type: ignore[attr-defined]
        final = {f"hp/{name}": value for entry in history for name, value in entry.items() if name != "rounds"}
        if not self.hyperparameters or not final:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):  # values beside settings are an idea of TensorBoard's
                logger.log_hyperparams(self.hyperparameters, final)
            else:
                logger.log_hyperparams(self.hyperparameters)
