"""The short way in from Python: one object that builds server, orchestrator, callbacks and Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from fedgan_lightning.assembly import (
    TRAINER_DEFAULTS,
    RunSettings,
    begun,
    check_epochs,
    trainer_parts,
    with_client_options,
)
from fedgan_lightning.checkpoints import BestCheckpoint, LastCheckpoint
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.callback import Evaluation
from fedgan_lightning.federation.checks import check_precision
from fedgan_lightning.federation.orchestrator import FederatedOrchestrator
from fedgan_lightning.federation.personal import client_module
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.federation.threads import threads
from fedgan_lightning.files import expanded
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import FederatedData
from fedgan_lightning.run_directory import to_judge
from fedgan_lightning.visuals.inspection import Inspection
from fedgan_lightning.visuals.samples import SamplePictures


class Federation:
    """A federation ready to run, with evaluation, pictures, checkpoints, TensorBoard and a run directory.

    Args:
        model: A LightningModule that keeps its state in parameters and buffers; metrics and pictures need a
            ``sample`` method on it.
        data: The clients' data.
        rounds: Rounds to complete.
        run_dir: Directory of the run; it must not hold another. ``~`` is the home folder.
        server_optimizer: Makes the server's optimizer; default federated averaging.
        evaluation: What to measure; default what suits the data.
        pictures: What to draw; default a picture every 10 rounds.
        inspection: What the full evaluation shows; default latent walks and nearest neighbours.
        checkpoint: How often the last checkpoint is kept; default after every round.
        best: Which checkpoint is the best; default by ``fid`` where it is measured.
        num_threads: CPU threads; ``None`` lets the executor choose for the clients, and takes one for everything else
            while the run lasts.
        trainer: Further arguments of the server's ``L.Trainer``: accelerator, callbacks, ...
        **federation: Further arguments of :class:`FederatedOrchestrator`: local_steps, sync, optimizer_state, seed, ...
            The seed decides what clients draw; the weights of ``model`` were drawn when it was built, by torch's own
            generator: call ``L.seed_everything`` before.
    """

    @checked(rounds="[1, inf)", num_threads="[1, inf)")
    def __init__(
        self,
        model: L.LightningModule,
        data: L.LightningDataModule | FederatedData,
        *,
        rounds: int = 50,
        run_dir: str | Path = "runs/run",
        server_optimizer: Any = None,
        evaluation: Evaluation | None = None,
        pictures: SamplePictures | None = None,
        inspection: Inspection | None = None,
        checkpoint: LastCheckpoint | None = None,
        best: BestCheckpoint | None = None,
        num_threads: int | None = None,
        trainer: dict[str, Any] | None = None,
        **federation: Any,
    ) -> None:
        self.data: Any = data
        self.run_dir = str(expanded(run_dir))
        self.server = (
            ServerModule(model) if server_optimizer is None else ServerModule(model, optimizer=server_optimizer)
        )
        self._options, client_trainer = with_client_options(trainer or {}, federation.pop("client_trainer", None))
        self.orchestrator = FederatedOrchestrator(rounds=rounds, client_trainer=client_trainer, **federation)
        self.evaluation = evaluation if evaluation is not None else Evaluation()
        self.pictures = pictures if pictures is not None else SamplePictures()
        self.inspection = inspection if inspection is not None else Inspection()
        self.checkpoint = checkpoint if checkpoint is not None else LastCheckpoint()
        self.best = best if best is not None else BestCheckpoint()
        self.num_threads = num_threads
        check_precision(self._options.get("precision"))
        if "default_root_dir" in self._options:
            raise ConfigurationError(
                message(
                    "the directory of a run must be given as run_dir",
                    received=f"trainer={{'default_root_dir': {str(self._options['default_root_dir'])!r}}}",
                    fix="set run_dir",
                )
            )
        check_epochs(self._options)

    def fit(self, *, ckpt_path: str | Path | None = None, accept_changes: bool = False) -> dict[str, float]:
        """Run the rounds; return the last values of all metrics.

        Args:
            ckpt_path: Checkpoint of this run to continue from: a file, ``last`` or ``best``. Without, a new run begins,
                from the weights that ``model`` has now.
            accept_changes: Whether a continued run may differ in rules, validator, aggregator and clients; what differs
                is recorded in ``summary.json``.
        """
        self.orchestrator.accept_changes = accept_changes
        first_save = self.checkpoint.every_n_rounds
        with begun(self.run_dir, ckpt_path, first_save=first_save) as found, threads(self.num_threads or 1):
            trainer = self._make_trainer(resuming=ckpt_path is not None, ckpt_path=found, is_fit=True)
            trainer.fit(self.server, datamodule=self.data, ckpt_path=found)
        return dict(self.evaluation.history[-1]) if self.evaluation.history else {}

    def test(self, *, ckpt_path: str | Path | None = None) -> dict[str, float]:
        """Evaluate the global generator as it is in memory, or as a checkpoint has it; return all metrics' values.

        Args:
            ckpt_path: A file, or the run's own ``last`` or ``best``.
        """
        found = None if ckpt_path is None else to_judge(ckpt_path, self.run_dir)
        with threads(self.num_threads or 1):
            self._make_trainer(is_fit=False).test(self.server, self.data, ckpt_path=found, verbose=False)
        return dict(self.evaluation.latest)

    def client_module(self, client_id: int) -> L.LightningModule:
        """Return a copy of the global module in which all that a client keeps is that client's.

        Args:
            client_id: The client.

        Raises:
            ConfigurationError: If it keeps nothing: nothing is local, or it has not trained.
        """
        return client_module(self.orchestrator, self.server, client_id)

    @property
    def summary_path(self) -> Path:
        """Where ``fit`` writes its summary."""
        return Path(self.run_dir) / "summary.json"

    def _make_trainer(self, *, is_fit: bool, resuming: bool = False, ckpt_path: str | None = None) -> L.Trainer:
        run = RunSettings(
            run_dir=self.run_dir,
            seed=self.orchestrator.seed,
            resuming=resuming,
            ckpt_path=ckpt_path,
            num_threads=self.num_threads,
        )
        parts = trainer_parts(run, orchestrator=self.orchestrator, options=self._options, is_fit=is_fit)
        own = [self.orchestrator, self.evaluation, self.pictures, self.inspection]
        parts["callbacks"] = [*own, *parts["callbacks"], self.checkpoint, self.best]
        return L.Trainer(**{**TRAINER_DEFAULTS, "default_root_dir": self.run_dir, **self._options, **parts})
