"""Checkpoints: written in one piece or not at all, read without executing code."""

from __future__ import annotations

import logging
import math
import pickle
import shutil
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from fedgan_lightning.errors import CheckpointError, ClientError, ConfigurationError, UpdateError, message
from fedgan_lightning.files import expanded, link, replacing
from fedgan_lightning.hooks import completed_rounds
from fedgan_lightning.options import checked

logger = logging.getLogger("fedgan_lightning")

#: What Lightning continues a run with, beside networks and callbacks.
WHOLE = ("global_step", "epoch", "loops", "optimizer_states", "lr_schedulers", "pytorch-lightning_version")


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
        try:
            with replacing(target) as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's word for a disk that is full
            raise CheckpointError(
                message(
                    "a checkpoint must be writable",
                    received=f"{target} ({_first_line(error)})",
                    fix="make room on the disk, then go on with --ckpt_path last",
                )
            ) from error
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
    path = expanded(path)
    _check_is_file(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_pickled(path):
            raise _damaged(path, "not the file of a checkpoint") from error
        raise CheckpointError(
            message(
                "a checkpoint must hold tensors and plain values only",
                received=f"{path} with something else ({_first_line(error)})",
                fix="use a checkpoint that this program wrote, from a source you trust",
            )
        ) from error
    except Exception as error:  # torch says a dozen things of files that are cut off, garbled or of another program
        raise _damaged(path, f"{type(error).__name__}: {_first_line(error)}") from error


def check_federation(contents: Any, path: str | Path, *, whole: bool) -> None:
    """Refuse what is no checkpoint of a federation.

    Args:
        contents: What was read.
        path: From where.
        whole: Whether there must be all that a run is continued with, and not its networks alone.

    Raises:
        CheckpointError: If it is not.
    """
    callbacks = contents.get("callbacks") if isinstance(contents, dict) else None
    state = callbacks.get("FederatedOrchestrator") if isinstance(callbacks, dict) else None
    if isinstance(state, dict) and "identity" in state and isinstance(contents.get("state_dict"), dict):
        missing = [name for name in WHOLE if name not in contents]
        if not (whole and missing):
            return
        raise CheckpointError(
            message(
                "a run must be continued from a whole checkpoint",
                received=f"{path} without {', '.join(missing)}",
                fix="use checkpoints/last.ckpt of the run; one that was saved with its weights alone can be tested",
            )
        )
    raise CheckpointError(
        message(
            "a federation must resume from a checkpoint of a federation",
            received=f"{path} without an orchestrator's state",
            fix="use checkpoints/last.ckpt of the run",
        )
    )


def _check_is_file(path: Path) -> None:
    """Refuse what is no regular file, or cannot be opened, and one without a byte in it."""
    try:
        kind = path.stat().st_mode
        why = None if stat.S_ISREG(kind) else "a folder" if stat.S_ISDIR(kind) else "no regular file"
        if why is None:
            with path.open("rb") as file:
                why = None if file.read(1) else "empty"
    except FileNotFoundError:
        why = "not there"
    except OSError as error:
        why = error.strerror or str(error)
    if why is not None:
        raise CheckpointError(
            message(
                "a checkpoint must be a file",
                received=f"{path}, which is {why}",
                fix="check the path; a run keeps best.ckpt and last.ckpt in its folder checkpoints",
            )
        )


def _is_pickled(path: Path) -> bool:
    """Whether a file begins as those do that torch writes: as a zip archive, or as a pickle."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no more is known")


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        message(
            "a checkpoint must be readable",
            received=f"{path} ({why})",
            fix="resume from another checkpoint: the file is damaged, or another program's",
        )
    )


class _InRunDirectory(ModelCheckpoint):
    """Keeps its file in ``checkpoints`` of the run directory."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        if stage == "fit":
            self._forget()
        with warnings.catch_warnings():  # a directory that is not empty belongs to the run that is resumed
            warnings.filterwarnings("ignore", message="(?s)Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def _forget(self) -> None:
        """Know nothing of an earlier run of the same object; a checkpoint to continue from is read afterwards."""
        self.best_k_models, self.kth_best_model_path = {}, ""
        self.best_model_score = self.current_score = None
        self.best_model_path = self.last_model_path = ""
        self._last_global_step_saved = 0

    @property
    def state_key(self) -> str:
        """One whatever the settings: Lightning would begin anew, silently, where a monitor has changed."""
        return type(self).__qualname__

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: what lies in the run directory counts, and not what it was called when it was written."""


class LastCheckpoint(_InRunDirectory):
    """Keeps ``checkpoints/last.ckpt``, to resume from with ``--ckpt_path last``.

    Args:
        every_n_rounds: Rounds between saves. A run that finishes, is stopped, or loses a client saves its last round
        too.
    """

    @checked("checkpoint", every_n_rounds="[1, inf)")
    def __init__(self, *, every_n_rounds: int = 1) -> None:
        self.every_n_rounds = every_n_rounds
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
        if self._last_global_step_saved != completed_rounds(trainer) and completed_rounds(trainer) > 0:
            trainer.save_checkpoint(Path(self.dirpath or ".") / "last.ckpt")


class BestCheckpoint(_InRunDirectory):
    """Keeps ``checkpoints/best.ckpt``: generators degrade late in training.

    A run that is continued goes on ranking where it was; it refuses another metric or mode, by which the file it has
    would not be the best. Values that are not finite are never the best.

    Args:
        monitor: Metric to watch; ``auto`` watches ``fid`` where it is measured, and nothing where it is not; ``None``
            keeps no best checkpoint.
        mode: Whether lower (``min``) or higher (``max``) is better.
    """

    @checked("best")
    def __init__(self, *, monitor: str | None = "auto", mode: Literal["min", "max"] = "min") -> None:
        self.is_automatic = monitor == "auto"
        super().__init__(
            monitor="fid" if self.is_automatic else monitor,
            mode=mode,
            filename="best",
            save_top_k=1 if monitor else 0,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mode": self.mode}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on ranking by what the best checkpoint scored.

        Raises:
            CheckpointError: If it was ranked by something else.
        """
        if trainer.state.fn != "fit":
            return
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            return
        before, now = (state["monitor"], state["mode"]), (self.monitor, self.mode)
        if before != now and not (self.is_automatic and state["best_model_score"] is None):
            raise CheckpointError(
                message(
                    "a continued run must keep its best checkpoint by the same best.monitor and best.mode",
                    received=f"{now[0]}, {now[1]} for a run that went by {before[0]}, {before[1]}",
                    fix=f"set best.monitor to {before[0] or 'null'} and best.mode to {before[1]}, or start a new run",
                )
            )
        path, score = str(Path(self.dirpath or ".") / "best.ckpt"), state["best_model_score"]
        if score is not None and Path(path).exists():
            self.best_model_path = self.kth_best_model_path = path
            self.best_k_models, self.best_model_score, self.kth_value = {path: score}, score, score

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a metric that nobody measures, now that the untrained generator has been scored.

        Where nothing is measured, or metrics had to be left out, as in a deployment, there is no best checkpoint.
        """
        histories = histories_of(trainer)
        known = sorted({name for history in histories for entry in history for name in entry} - {"rounds"})
        others = [name for item in trainer.callbacks for name in getattr(item, "waiting", [])]  # type: ignore[attr-defined]
        left_out = [name for item in trainer.callbacks for name in getattr(item, "left_out", [])] + others  # type: ignore[attr-defined]
        if self.monitor is not None and self.monitor not in known and (left_out or not known):
            why = f"left out: {', '.join(left_out)}" if left_out else "nothing is measured"
            logger.warning(f"no best checkpoint: {self.monitor} is not measured here ({why})")
        elif self.monitor not in known and self.is_automatic:
            logger.info(f"no best checkpoint: {self.monitor} is not measured here")
        elif self.monitor is not None and self.monitor not in known:
            raise ConfigurationError(
                message(
                    "best.monitor must name a metric of the evaluation",
                    received=self.monitor,
                    fix=f"choose from {', '.join(known)}, or set null to keep no best checkpoint",
                )
            )
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        latest = [history[-1] for history in histories_of(trainer)]
        scored = [
            own[self.monitor] for own in latest if own["rounds"] == completed_rounds(trainer) and self.monitor in own
        ]
        if scored and math.isfinite(scored[0]) and self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)


def rounds_in(checkpoint: Mapping[str, Any]) -> int:
    """Return the rounds that the federation in a checkpoint has completed."""
    return int(checkpoint.get("rounds_completed", 0))


def histories_of(trainer: L.Trainer) -> list[list[dict[str, float]]]:
    """Return the histories of all callbacks that keep one."""
    return [item.history for item in trainer.callbacks if getattr(item, "history", None)]  # type: ignore[attr-defined]
