"""The command line: a LightningCLI whose ``fit`` runs a federation.

Groups: ``model`` (a LightningModule), ``data``, ``federation``, ``server``, ``evaluation``, ``pictures``,
``inspection``, ``checkpoint``, ``best`` and Lightning's own ``trainer``.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

import fedgan_lightning
from fedgan_lightning.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, read_checkpoint
from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.errors import CheckpointError, ConfigurationError, FedGANError, message
from fedgan_lightning.evaluation.callback import Evaluation
from fedgan_lightning.federation.executors.auto import PlannedExecutor
from fedgan_lightning.federation.orchestrator import FederatedOrchestrator
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.gan import networks, priors
from fedgan_lightning.recorder import RunRecorder, check_run_directory, listed
from fedgan_lightning.visuals import pictures
from fedgan_lightning.visuals.inspection import Inspection
from fedgan_lightning.visuals.progress import RoundProgressBar
from fedgan_lightning.visuals.samples import SamplePictures
from fedgan_lightning.visuals.tensorboard import TensorBoardLayout

#: What is in memory can be written without its module path in a configuration: every public name, and these.
SHORT_NAMES = (networks, priors, *(getattr(fedgan_lightning, name) for name in fedgan_lightning.__all__))
#: Settings that a resumed run may change.
MAY_CHANGE = ("rounds",)


HELP = "Fix: see --help, or --print_config for all settings."
#: Lines in which jsonargparse recounts every alternative it tried.
RECOUNTED = re.compile(
    r"Does not validate against|^Subtypes:|^Errors:?$|<class 'NoneType'>|^Given value type:|NestedArg|not accessible"
)


class OneLineParser(LightningArgumentParser):
    """Reports a bad argument in one line and without the usage text; takes no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise ConfigurationError(f"{one_line(str(message))}. {HELP}") from ex


def one_line(text: str) -> str:
    """Return what matters of a parser's report in one line."""
    lines = [line.replace(HELP, "").strip(" -.:\t") for line in text.splitlines()]
    kept = [line for line in lines if line and not RECOUNTED.search(line)]
    return "; ".join(dict.fromkeys(kept))


class FederatedTrainer(L.Trainer):
    """Lightning's Trainer with the commands that are not training."""

    def site(self, model: L.LightningModule, datamodule: FederatedDataModule) -> None:
        """Nothing: a site of a deployment asks for what is built, and does one task with it."""

    def partition(self, model: L.LightningModule, datamodule: FederatedDataModule) -> None:
        """Show who holds what before any training: a table, and partition.png in the run directory."""
        datamodule.prepare_data()
        datamodule.setup()
        counts = datamodule.label_counts()
        names = [str(name)[:12] for name in datamodule.class_names] or ["samples"]
        print("client  total  " + "  ".join(f"{name:>6}" for name in names))
        for client_id, row in enumerate(counts):
            print(f"{client_id:>6}  {row.sum():>5}  " + "  ".join(f"{count:>6}" for count in row))
        path = Path(self.default_root_dir) / "partition.png"
        if not path.exists():
            pictures.save(pictures.partition(counts, class_names=datamodule.class_names), path)
            print(f"wrote {path}")


class FederatedCLI(LightningCLI):
    """Builds everything from the settings, and hands the model to the server."""

    #: Whether the user asked to continue a run, whatever there is of it.
    resuming = False

    def __init__(self, *args: Any, prepare: Callable[[FederatedCLI], None] | None = None, **kwargs: Any) -> None:
        self.prepare = prepare  # before the rest, which builds everything and runs the command
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "site": {"model", "datamodule"},
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "weights_only"},
            "test": {"model", "dataloaders", "datamodule", "weights_only"},
            "predict": {"model", "dataloaders", "datamodule", "return_predictions", "weights_only"},
            "partition": {"model", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/run", help="Directory of the run.")
        parser.add_argument(
            "--num_threads",
            type=int | None,
            default=None,
            help="CPU threads; null lets the executor choose for the clients, and takes one for everything else.",
        )
        parser.add_lightning_class_args(FederatedOrchestrator, "federation")
        parser.add_class_arguments(ServerModule, "server", skip={"model"}, instantiate=False)
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(SamplePictures, "pictures")
        parser.add_lightning_class_args(Inspection, "inspection")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(BestCheckpoint, "best")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "federation.seed", compute_fn=int)
        parser.link_arguments("federation.rounds", "trainer.max_steps")

    def _parse_ckpt_path(self) -> None:
        """Nothing: the settings of a run are in its config.yaml, and no checkpoint overrides them."""

    def before_instantiate_classes(self) -> None:
        """Refuse an occupied run directory before anything is read or built."""
        settings = self.config[self.subcommand]
        torch.set_num_threads(settings.num_threads or 1)
        if self.subcommand == "fit":
            self.resuming = settings.ckpt_path is not None
            check_run_directory(settings.run_dir, resuming=self.resuming)
            if settings.trainer.max_epochs not in (-1, None):
                raise ConfigurationError(
                    message(
                        "an epoch is a round, and federation.rounds counts them",
                        received=f"trainer.max_epochs={settings.trainer.max_epochs}",
                        fix="set federation.rounds",
                    )
                )
        if "ckpt_path" in settings:
            settings.ckpt_path = resolve_checkpoint(
                settings.ckpt_path,
                settings.run_dir,
                is_new=self.subcommand == "fit" or self.prepare is not None,  # who prepares may bring the weights
            )

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # the parser recounts what it tried; what a constructor said is the cause
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, FedGANError):
                cause = cause.__cause__
            raise cause or error from None
        server = self._get(self.config_init, "server")
        self.model = ServerModule(self.model, optimizer=server.optimizer, scheduler=server.scheduler)
        if self.prepare is not None:
            self.prepare(self)

    @property
    def orchestrator(self) -> FederatedOrchestrator:
        """The orchestrator of the run."""
        orchestrator: FederatedOrchestrator = self._get(self.config_init, "federation")
        return orchestrator

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        settings = self.config[self.subcommand]
        config = self._get(self.config_init, "trainer")
        run_dir, plain = settings.run_dir, self.plain_settings
        orchestrator = self.orchestrator
        if isinstance(orchestrator.executor, PlannedExecutor) and orchestrator.executor.num_threads is None:
            orchestrator.executor.num_threads = settings.num_threads
        orchestrator.settings = {
            group: {name: value for name, value in plain[group].items() if name not in MAY_CHANGE}
            for group in ("model", "data", "federation", "server")
        }
        layout = TensorBoardLayout()
        layout.hyperparameters = dict(
            flatten({name: plain[name] for name in ("model", "data", "federation", "server")})
        )
        text = self._parser(self.subcommand).dump(settings, skip_none=False, skip_link_targets=True)
        recorder = RunRecorder(config=without_command(text), seed=int(settings.seed_everything), resuming=self.resuming)
        callbacks = [*listed(config.get("callbacks")), layout, recorder]
        if config.get("enable_progress_bar") is not False:
            callbacks.append(RoundProgressBar())
        plugins = [*listed(config.get("plugins")), AtomicCheckpointIO()]
        logger = config.get("logger")
        if logger in (None, True):
            found = self.subcommand == "fit" and settings.ckpt_path is not None
            purge = read_checkpoint(settings.ckpt_path)["global_step"] + 1 if found else None
            logger = TensorBoardLogger(run_dir, name="", version="", default_hp_metric=False, purge_step=purge)
        return super().instantiate_trainer(
            **kwargs, callbacks=callbacks, plugins=plugins, logger=False if self.subcommand != "fit" else logger
        )

    @cached_property
    def plain_settings(self) -> dict[str, Any]:
        """The settings as plain values."""
        text = self._parser(self.subcommand).dump(
            self.config[self.subcommand], skip_none=False, skip_link_targets=False, format="json"
        )
        plain: dict[str, Any] = json.loads(text)
        return plain

    def after_fit(self) -> None:
        """Say what came out; leave with the customary code where a signal ended the run."""
        history = self._get(self.config_init, "evaluation").history
        values = ", ".join(f"{name} {value:.4g}" for name, value in (history[-1] if history else {}).items())
        if self.trainer.is_global_zero:
            print(f"{self.trainer.default_root_dir}: {values}")
        number, rounds = self.orchestrator.stop_signal, self.trainer.global_step
        if rounds < self.orchestrator.rounds and self.trainer.is_global_zero:
            by = f" by {signal.Signals(number).name}" if number is not None else ""
            print(
                f"stopped{by} after {rounds} complete rounds of {self.orchestrator.rounds}; "
                f"continue with: --ckpt_path last --run_dir {self.trainer.default_root_dir}"
            )
        if number is not None:
            raise SystemExit(128 + number)


def resolve_checkpoint(ckpt_path: str | None, run_dir: str, *, is_new: bool) -> str | None:
    """Return the checkpoint to start from, or ``None`` for a run that begins.

    Args:
        ckpt_path: A file, or the run directory's own ``last`` or ``best``. Without it a run begins, and other commands
            take the best one, or else the last.
        run_dir: The run directory.
        is_new: Whether there may be none yet.

    Raises:
        CheckpointError: If the file is missing, damaged, or no checkpoint of this program.
    """
    if ckpt_path is None:
        if is_new:
            return None
        folder = Path(run_dir) / "checkpoints"
        ckpt_path = "best" if (folder / "best.ckpt").exists() else "last"
        print(f"checkpoint: {folder / ckpt_path}.ckpt")
    if ckpt_path in ("last", "best"):
        path = Path(run_dir) / "checkpoints" / f"{ckpt_path}.ckpt"
        if ckpt_path == "last" and is_new and not path.exists():
            print(f"{path} does not exist yet: the run begins anew")  # killed before its first round was complete
            return None
        ckpt_path = str(path)
    contents = read_checkpoint(ckpt_path)
    if not isinstance(contents, dict) or "FederatedOrchestrator" not in contents.get("callbacks", {}):
        raise CheckpointError(
            message(
                "a federation resumes from a checkpoint of a federation",
                received=f"{ckpt_path} without an orchestrator's state",
                fix="use checkpoints/last.ckpt of the run",
            )
        )
    return ckpt_path


def without_command(text: str) -> str:
    """Drop what belongs to one command and not to the run: the checkpoint it resumed from."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("ckpt_path:")) + "\n"


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as ``{"a.b": value}``; class paths by their last part, lists as text."""
    if isinstance(settings, dict):
        found: dict[str, Any] = {}
        for name, value in settings.items():
            if name == "class_path":
                found[prefix.rstrip(".") or name] = str(value).rsplit(".", 1)[-1]
            else:
                found |= flatten(value, prefix if name == "init_args" else f"{prefix}{name}.")
        return found
    return {prefix.rstrip("."): settings if isinstance(settings, (int, float, str, bool)) else str(settings)}


#: Warnings about Lightning's own code, or about an outer loop of one step per epoch, which is what a round is.
NOISE = (
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*is smaller than the logging interval.*",
    ".*args parameter is intended to run from within Python.*",
)


def built(arguments: Sequence[str]) -> FederatedCLI:
    """Return everything that these options describe, and run nothing."""
    return run(["site", *arguments])


def run(arguments: list[str] | None = None, *, prepare: Callable[[FederatedCLI], None] | None = None) -> FederatedCLI:
    """Run the command line.

    Args:
        arguments: Command and options; default those of the process.
        prepare: Called when everything is built, before the command runs.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    own = logging.getLogger("fedgan_lightning")
    own.setLevel(logging.INFO)
    if not own.handlers:
        own.addHandler(logging.StreamHandler())
    for pattern in NOISE:
        warnings.filterwarnings("ignore", message=pattern)
    return FederatedCLI(
        prepare=prepare,
        model_class=L.LightningModule,
        datamodule_class=FederatedDataModule,
        subclass_mode_model=True,
        trainer_class=FederatedTrainer,
        trainer_defaults={
            "max_epochs": -1,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
        },
        save_config_callback=None,
        seed_everything_default=0,
        parser_class=OneLineParser,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=arguments,
    )
