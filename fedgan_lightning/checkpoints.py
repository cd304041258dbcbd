"""Checkpoints: written in one piece or not at all, read without executing code."""

from __future__ import annotations

import logging
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from fedgan_lightning.errors import CheckpointError, ClientError, ConfigurationError, UpdateError, message
from fedgan_lightning.files import link, replacing
from fedgan_lightning.options import checked

logger = logging.getLogger("fedgan_lightning")


#: Key of a checkpoint: a folder, and names of files in it that belong to the checkpoint and never change.
FILES = "files"


def folder_beside(path: str | Path) -> Path:
    """Return where the files of a checkpoint lie."""
    return Path(f"{path}.files")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves beside the target and renames, on the same disk; loads with ``weights_only=True`` always.

    Files that belong to a checkpoint get a second name in a folder beside it: those of the checkpoint before are there
    already, and what has not changed is neither read nor written again.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint; a process killed at any instant leaves the old one or the new one, with its files."""
        target, files = Path(path), checkpoint.get(FILES, {"folder": "", "names": []})
        beside, names = folder_beside(target), set(files["names"])
        if names:
            beside.mkdir(parents=True, exist_ok=True)
        there = {own.name for own in beside.iterdir()} if beside.is_dir() else set()
        for name in names - there:
            link(Path(files["folder"]) / name, beside / name)
        with replacing(target) as file:
            torch.save(checkpoint, file)
        for name in there - names:  # of the checkpoint before
            (beside / name).unlink(missing_ok=True)
        for stale in target.parent.glob(f".{target.name}.*.partial"):
            stale.unlink(missing_ok=True)  # left by a process that was killed

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and its files."""
        super().remove_checkpoint(path)
        shutil.rmtree(folder_beside(path), ignore_errors=True)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """Read a checkpoint.

        Raises:
            CheckpointError: If it is missing, damaged, or holds anything but tensors and plain values.
        """
        return read_checkpoint(path, map_location=map_location)


def read_checkpoint(path: str | Path, *, map_location: Any = "cpu") -> Any:
    """Return the contents of a checkpoint file, executing nothing in it; errors as :class:`AtomicCheckpointIO`."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            message(
                "a checkpoint holds tensors and plain values only",
                received=f"{path} with something else ({str(error).splitlines()[0]})",
                fix="use a checkpoint that this program wrote, from a source you trust",
            )
        ) from error
    except OSError as error:
        why = {FileNotFoundError: "not there", IsADirectoryError: "a folder"}.get(type(error), error.strerror)
        raise CheckpointError(
            message(
                "a checkpoint is a file",
                received=f"{path}, which is {why}",
                fix="check the path; a run keeps best.ckpt and last.ckpt in its folder checkpoints",
            )
        ) from error
    except (EOFError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            message(
                "a checkpoint can be read",
                received=f"{path} ({type(error).__name__}: {str(error).splitlines()[0]})",
                fix="resume from another checkpoint: the file is damaged",
            )
        ) from error


class _InRunDirectory(ModelCheckpoint):
    """Keeps its file in ``checkpoints`` of the run directory."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = self.dirpath or str(Path(trainer.default_root_dir) / "checkpoints")
        with warnings.catch_warnings():  # a directory that is not empty belongs to the run that is resumed
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with warnings.catch_warnings():  # a checkpoint may be evaluated from another run directory
            warnings.filterwarnings("ignore", message="The dirpath has changed")
            super().load_state_dict(state_dict)


class LastCheckpoint(_InRunDirectory):
    """Keeps ``checkpoints/last.ckpt``, to resume from with ``--ckpt_path last``.

    Args:
        every_n_rounds: Rounds between saves. A run that finishes, is stopped, or loses a client saves its last round
        too.
    """

    @checked("checkpoint", every_n_rounds="[1, inf)")
    def __init__(self, *, every_n_rounds: int = 1) -> None:
        super().__init__(
            filename="last",
            save_top_k=1,
            every_n_epochs=every_n_rounds,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, (ClientError, UpdateError)):  # raised before the server steps: its state is whole
            self._save_last_round(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._save_last_round(trainer)

    def _save_last_round(self, trainer: L.Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step and trainer.global_step > 0:
            trainer.save_checkpoint(Path(self.dirpath or ".") / "last.ckpt")


class BestCheckpoint(_InRunDirectory):
    """Keeps ``checkpoints/best.ckpt``: generators degrade late in training.

    Args:
        monitor: Metric to watch; ``None`` keeps no best checkpoint.
        mode: Whether lower (``min``) or higher (``max``) is better.
    """

    @checked("best")
    def __init__(self, *, monitor: str | None = "fid", mode: Literal["min", "max"] = "min") -> None:
        super().__init__(
            monitor=monitor,
            mode=mode,
            filename="best",
            save_top_k=1 if monitor else 0,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a metric that nobody measures, now that the untrained generator has been scored.

        Where nothing is measured, or metrics had to be left out, as in a deployment, there is no best checkpoint.
        """
        histories = histories_of(trainer)
        known = sorted({name for history in histories for entry in history for name in entry} - {"rounds"})
        left_out = [name for item in trainer.callbacks for name in getattr(item, "left_out", [])]  # type: ignore[attr-defined]
        if self.monitor is not None and self.monitor not in known and (left_out or not known):
            why = f"left out: {', '.join(left_out)}" if left_out else "nothing is measured"
            logger.warning(f"no best checkpoint: {self.monitor} is not measured here ({why})")
        elif self.monitor is not None and self.monitor not in known:
            raise ConfigurationError(
                message(
                    "best.monitor names a metric of the evaluation",
                    received=self.monitor,
                    fix=f"choose from {', '.join(known)}, or set null to keep no best checkpoint",
                )
            )
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        latest = [history[-1] for history in histories_of(trainer)]
        scored = any(own["rounds"] == trainer.global_step and self.monitor in own for own in latest)
        if scored and self.monitor in trainer.callback_metrics:  # a value of an earlier round is none of this one
            super().on_train_epoch_end(trainer, pl_module)


def histories_of(trainer: L.Trainer) -> list[list[dict[str, float]]]:
    """Return the histories of all callbacks that keep one."""
    return [item.history for item in trainer.callbacks if getattr(item, "history", None)]  # type: ignore[attr-defined]
