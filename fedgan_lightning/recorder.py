"""The run directory: its settings, its partition, ``rounds.jsonl`` and ``summary.json``."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.dp.statement import facts_of
from fedgan_lightning.evaluation.callback import Evaluation
from fedgan_lightning.federation.orchestrator import FederatedOrchestrator
from fedgan_lightning.federation.report import RoundReport
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.files import replacing, to_json, write_json, write_text
from fedgan_lightning.hooks import completed_rounds, is_finished
from fedgan_lightning.jsonl import NAME, RoundLog
from fedgan_lightning.model_card import CARD, card
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import Executor
from fedgan_lightning.provenance import provenance
from fedgan_lightning.run_directory import check_run_directory


class RunRecorder(L.Callback):
    """Writes ``config.yaml``, ``partition.npz``, ``rounds.jsonl``, ``summary.json`` and ``model_card.md`` into the run
    directory, and what its clients share, such as ``vocabulary.json``.

    Args:
        config: The complete settings as YAML, as the command line knows them; ``None`` writes no ``config.yaml``.
        seed: Root seed, for the summary.
        resuming: Whether the run directory may already hold this run.
    """

    @checked(seed="[0, inf)")
    def __init__(self, *, config: str | None = None, seed: int | None = None, resuming: bool = False) -> None:
        self.config, self.seed, self.resuming = config, seed, resuming
        self._wall_seconds, self._started = 0.0, time.perf_counter()
        self._has_begun = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._has_begun, self._wall_seconds = False, 0.0
            check_run_directory(trainer.default_root_dir, resuming=self.resuming)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()
        if trainer.is_global_zero:
            _round_log(trainer).cut(completed_rounds(trainer))

    def on_attempt_end(self, trainer: L.Trainer, server: L.LightningModule, report: RoundReport) -> None:
        """Write down who was asked, and what came of it."""
        if trainer.is_global_zero:
            _round_log(trainer).append(report.plain())

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            _round_log(trainer).sync()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Every callback has checked what it checks: from the first round on the directory belongs to this run."""
        self._has_begun = True
        root = Path(trainer.default_root_dir)
        is_new = completed_rounds(trainer) == 0  # perhaps after a first attempt that was killed
        if not trainer.is_global_zero or ((root / "partition.npz").exists() and not is_new):
            return
        root.mkdir(parents=True, exist_ok=True)
        if self.config is not None and (is_new or not (root / "config.yaml").exists()):
            write_text(root / "config.yaml", self.config)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, FederatedDataModule):
            for name, value in data.state_dict().items():
                write_text(root / f"{name}.json", to_json(value))
        if isinstance(data, FederatedDataModule) and data.has_client_samples:
            arrays: dict[str, Any] = {f"client_{k:05d}": indices for k, indices in enumerate(data.indices)}
            with replacing(root / "partition.npz") as file:
                np.savez_compressed(file, **arrays)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        evaluation = _find(trainer, Evaluation)
        if (
            evaluation is not None
            and evaluation.history
            and evaluation.history[-1]["rounds"] == completed_rounds(trainer)
        ):
            self.write(trainer, status="running")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stopped = _find(trainer, FederatedOrchestrator) is not None and not is_finished(trainer)
        self.write(trainer, status="stopped" if stopped else "finished")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._has_begun and trainer.state.fn == "fit":  # what was refused before changes no earlier run's account
            self.write(trainer, status=f"failed: {type(exception).__name__}: {exception}")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        evaluation = _find(trainer, Evaluation)
        if evaluation is not None and trainer.is_global_zero:
            root = Path(trainer.default_root_dir)
            found = {**evaluation.facts, **evaluation.latest}
            write_json(root / "test.json", found)
            if (root / "summary.json").exists() and _is_of(trainer.ckpt_path, root):
                summary = json.loads((root / "summary.json").read_text(encoding="utf-8"))
                write_json(root / "summary.json", {**summary, "test": found})

    def write(self, trainer: L.Trainer, *, status: str) -> None:
        """Write ``summary.json``."""
        if not trainer.is_global_zero:
            return
        orchestrator, evaluation = _find(trainer, FederatedOrchestrator), _find(trainer, Evaluation)
        history = evaluation.history if evaluation is not None else []
        metrics = evaluation.metrics or [] if evaluation is not None else []
        larger = {name for metric in metrics for name in metric.larger_is_better}
        summary: dict[str, Any] = {
            "status": status,
            "rounds": completed_rounds(trainer),
            "seed": self.seed,
            "wall_seconds": round(self._elapsed(), 3),
            "final": history[-1] if history else {},
            "best": best_values(history, larger_is_better=larger),
            "evaluation": evaluation.facts if evaluation is not None else {},
            **({} if orchestrator is None else orchestrator.ledger.summary()),
            "privacy": facts_of(None if orchestrator is None else orchestrator.keeper),
            "executor": {} if orchestrator is None else _executor(orchestrator.executor),
            **provenance(trainer.strategy.root_device),
            "history": history,
        }
        root = Path(trainer.default_root_dir)
        write_json(root / "summary.json", summary)
        if status != "running":
            model = pl_module.model if isinstance(pl_module := trainer.lightning_module, ServerModule) else pl_module
            write_text(root / CARD, card(summary, model=model, data=getattr(trainer, "datamodule", None)))

    def _elapsed(self) -> float:
        return self._wall_seconds + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {"wall_seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._wall_seconds = float(state_dict["wall_seconds"])


def best_values(history: list[dict[str, float]], *, larger_is_better: Collection[str]) -> dict[str, dict[str, float]]:
    """Return, for every metric, its best finite value and the round that gave it."""
    best: dict[str, dict[str, float]] = {}
    for entry in history:
        for name, value in entry.items():
            if name == "rounds" or not math.isfinite(value):
                continue
            sign = -1 if name.removesuffix("_raw") in larger_is_better else 1
            if name not in best or sign * value < sign * best[name]["value"]:
                best[name] = {"value": value, "rounds": entry["rounds"]}
    return best


def listed(value: Any) -> list[Any]:
    """Return several, one or no callbacks or plugins as a list: Lightning's Trainer takes either form."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_of(ckpt_path: Any, root: Path) -> bool:
    """Whether what was evaluated is this run's: a checkpoint in its directory, or the module in memory."""
    return not ckpt_path or Path(ckpt_path).resolve().is_relative_to(root.resolve())


def _round_log(trainer: L.Trainer) -> RoundLog:
    return RoundLog(Path(trainer.default_root_dir) / NAME)


def _find(trainer: L.Trainer, kind: type) -> Any:
    return next((item for item in trainer.callbacks if isinstance(item, kind)), None)  # type: ignore[attr-defined]


def _executor(executor: Executor) -> dict[str, Any]:
    """Return which executor ran, and what it chose."""
    return {"name": type(executor).__name__, **executor.facts()}
