"""What every run has beside what it learns: claim, checkpoint to go on from, recorder, logger, progress, threads.

The command line and :class:`~fedgan_lightning.api.Federation` are built by the same two functions, so that runs behave
alike however they are started.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from fedgan_lightning.checkpoints import AtomicCheckpointIO, read_checkpoint, rounds_in
from fedgan_lightning.claim import claimed
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.checks import CLIENT_TRAINER
from fedgan_lightning.federation.drift import ClientDrift
from fedgan_lightning.federation.executors.auto import AdaptiveExecutor
from fedgan_lightning.federation.orchestrator import FederatedOrchestrator
from fedgan_lightning.recorder import RunRecorder, listed
from fedgan_lightning.run_directory import check_run_directory, to_continue
from fedgan_lightning.visuals.progress import RoundProgressBar
from fedgan_lightning.visuals.tensorboard import TensorBoardLayout

#: What a Trainer of a federation is given where the user says nothing else.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class RunSettings:
    """What a run is called, and where it goes on from.

    Attributes:
        run_dir: Its directory.
        seed: Root seed, for the summary.
        resuming: Whether the user asked to continue a run, whatever there is of it.
        ckpt_path: The checkpoint to go on from, if there is one.
        num_threads: CPU threads of the clients; ``None`` lets the executor choose.
        config: The complete settings as YAML, where there are any.
        hyperparameters: Settings by name, for TensorBoard.
    """

    run_dir: str
    seed: int
    resuming: bool = False
    ckpt_path: str | None = None
    num_threads: int | None = None
    config: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


def check_epochs(options: Mapping[str, Any]) -> None:
    """Refuse options of a Trainer that count what the rounds count.

    Raises:
        ConfigurationError: If there are any.
    """
    for name in ("max_epochs", "max_steps"):
        if options.get(name) not in (-1, None):
            raise ConfigurationError(
                message(
                    "federation.rounds alone must count the epochs, each of which is a round",
                    received=f"trainer.{name}={options[name]}",
                    fix="set federation.rounds",
                )
            )


def with_client_options(
    options: Mapping[str, Any], of_clients: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the server's Trainer, and those of clients': what the server has no use for is theirs.

    Args:
        options: What the user says of the Trainer.
        of_clients: What the user says of clients' Trainers; it counts.
    """
    theirs = {name: options[name] for name in CLIENT_TRAINER if name in options and name != "detect_anomaly"}
    servers = {name: value for name, value in options.items() if name not in theirs}
    return servers, {**theirs, **(of_clients or {})}


@contextmanager
def begun(
    run_dir: str, ckpt_path: str | Path | None, *, first_save: int = 1, config: str | None = None
) -> Iterator[str | None]:
    """Hold a run directory for the body, and yield the checkpoint that the run goes on from, or ``None``.

    Args:
        run_dir: The run directory.
        ckpt_path: What the user asks to continue: a file, ``last`` or ``best``; ``None`` begins a new run.
        first_save: Rounds until the first checkpoint.
        config: The settings as ``config.yaml`` has them.

    Raises:
        ConfigurationError: If the directory is another process's, or holds another run.
        CheckpointError: If the checkpoint cannot be continued.
    """
    with claimed(run_dir):
        check_run_directory(run_dir, resuming=ckpt_path is not None)
        yield None if ckpt_path is None else to_continue(ckpt_path, run_dir, first_save=first_save, config=config)


def trainer_parts(
    run: RunSettings, *, orchestrator: FederatedOrchestrator, options: Mapping[str, Any], is_fit: bool
) -> dict[str, Any]:
    """Return ``callbacks``, ``plugins`` and ``logger`` of the server's Trainer: the user's, and those of every run.

    Args:
        run: What the run is called.
        orchestrator: The run's; its executor learns how many threads there are.
        options: The Trainer's other options, as the user gave them.
        is_fit: Whether the run trains; what only looks at a run writes no events.
    """
    executor = orchestrator.executor
    if isinstance(executor, AdaptiveExecutor) and executor.num_threads is None:
        executor.num_threads = run.num_threads
    layout = TensorBoardLayout()
    layout.hyperparameters = dict(run.hyperparameters)
    recorder = RunRecorder(config=run.config, seed=run.seed, resuming=run.resuming)
    callbacks = [*listed(options.get("callbacks")), layout, recorder, ClientDrift()]
    if options.get("enable_progress_bar") is not False:
        callbacks.append(RoundProgressBar())
    return {
        "callbacks": callbacks,
        "plugins": [*listed(options.get("plugins")), AtomicCheckpointIO()],
        "logger": _logger(run, options.get("logger")) if is_fit else False,
    }


def _logger(run: RunSettings, given: Any) -> Any:
    """Return the run's logger: by default TensorBoard's, without events that a checkpoint does not know."""
    if given not in (None, True):
        return given
    purge = None if run.ckpt_path is None else rounds_in(read_checkpoint(run.ckpt_path)) + 1
    return TensorBoardLogger(run.run_dir, name="", version="", default_hp_metric=False, purge_step=purge)
