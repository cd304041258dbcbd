"""The command line: a LightningCLI whose ``fit`` runs a federation.

Groups: ``model`` (a LightningModule), ``data``, ``federation``, ``server``, ``evaluation``, ``pictures``,
``inspection``, ``checkpoint``, ``best`` and Lightning's own ``trainer``.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from fedgan_lightning.assembly import (
    TRAINER_DEFAULTS,
    RunSettings,
    begun,
    check_epochs,
    trainer_parts,
    with_client_options,
)
from fedgan_lightning.checkpoints import BestCheckpoint, LastCheckpoint
from fedgan_lightning.claim import check_writable
from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.errors import ConfigurationError, FedGANError, message
from fedgan_lightning.evaluation.callback import Evaluation
from fedgan_lightning.federation.checks import CLIENT_TRAINER, check_precision, checked_client_trainer
from fedgan_lightning.federation.orchestrator import FederatedOrchestrator
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.files import expanded
from fedgan_lightning.hooks import completed_rounds, is_finished
from fedgan_lightning.parser import OneLineParser, OwnDataParser, where_data_class_is_named
from fedgan_lightning.protocol import FederatedData
from fedgan_lightning.run_directory import MAY_CHANGE, to_judge
from fedgan_lightning.visuals import pictures
from fedgan_lightning.visuals.inspection import Inspection
from fedgan_lightning.visuals.samples import SamplePictures


class FederatedTrainer(L.Trainer):
    """Lightning's Trainer with the commands that are not training."""

    def site(self, model: L.LightningModule, datamodule: L.LightningDataModule) -> None:
        """Nothing: a site of a deployment asks for what is built, and does one task with it."""

    def audit(
        self,
        model: L.LightningModule,
        dataloaders: Any = None,
        datamodule: Any = None,
        *,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        client: int = 0,
        clip: float = 1.0,
        noise_multiplier: float = 1.0,
    ) -> None:
        """Test a checkpoint, attack it, and write audit.json and inversion.png into the run directory.

        Args:
            model: The server.
            dataloaders: None: the data have them.
            datamodule: The federation's data.
            ckpt_path: The checkpoint; default the best, or else the last.
            weights_only: As Lightning reads a checkpoint.
            client: Client whose samples are reconstructed from steps of its discriminator.
            clip: Largest norm of an update in the views that are clipped.
            noise_multiplier: Standard deviation of the noise in the view that is noised, over clip.
        """
        from fedgan_lightning.auditing import prepare_audit, write_audit
        from fedgan_lightning.dp.audits.views import Protection

        protection = Protection(clip=clip, noise_multiplier=noise_multiplier)
        prepare_audit(self, datamodule, client=client)
        self.test(model, ckpt_path=ckpt_path, datamodule=datamodule, verbose=False)
        if self.is_global_zero:
            write_audit(self, model, datamodule, client=client, protection=protection)

    def partition(self, model: L.LightningModule, datamodule: Any) -> None:
        """Show who holds what before any training: a table, and partition.png in the run directory."""
        datamodule.prepare_data()
        datamodule.setup("fit")
        class_names = tuple(getattr(datamodule, "class_names", ()))
        if hasattr(datamodule, "label_counts"):
            counts = datamodule.label_counts()
        else:
            counts = np.array([[datamodule.num_examples(k)] for k in range(datamodule.num_clients)])
        names = [str(name)[:12] for name in class_names] or ["samples"]
        print("client  total  " + "  ".join(f"{name:>6}" for name in names))
        for client_id, row in enumerate(counts):
            print(f"{client_id:>6}  {row.sum():>5}  " + "  ".join(f"{count:>6}" for count in row))
        path = Path(self.default_root_dir) / "partition.png"
        if not path.exists():
            pictures.save(pictures.partition(counts, class_names=class_names), path)
            print(f"wrote {path}")


#: Commands that need the settings: methods of the Trainer, and arguments of theirs that are no options.
SUBCOMMANDS: dict[str, set[str]] = {
    "site": {"model", "datamodule"},
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
    "validate": {"model", "dataloaders", "datamodule", "weights_only"},
    "test": {"model", "dataloaders", "datamodule", "weights_only"},
    "predict": {"model", "dataloaders", "datamodule", "return_predictions", "weights_only"},
    "partition": {"model", "datamodule"},
    "audit": {"model", "dataloaders", "datamodule", "weights_only"},
}


class FederatedCLI(LightningCLI):
    """Builds everything from the settings, and hands the model to the server."""

    #: Whether the user asked to continue a run, whatever there is of it.
    resuming = False

    def __init__(
        self,
        *args: Any,
        command: str | None = None,
        prepare: Callable[[FederatedCLI], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.command, self.prepare = command, prepare  # before the rest, which builds everything and runs the command
        with ExitStack() as self._held:
            super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # a static method there
        """Return the command that was given, or all: each has a parser of its own, and seven take half a second."""
        return {own: skipped for own, skipped in SUBCOMMANDS.items() if self.command in (own, None)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/run", help="Directory of the run.")
        parser.add_argument(
            "--num_threads",
            type=int | None,
            default=None,
            help="CPU threads; null lets the executor choose for the clients, and takes one for everything else.",
        )
        parser.add_argument(
            "--accept_changes",
            type=bool,
            default=False,
            help="Whether a continued run may differ in rules, validator, aggregator, clients and secure of federation "
            "and, between machines, have more clients; what differs is recorded.",
        )
        parser.add_lightning_class_args(FederatedOrchestrator, "federation")
        parser.add_class_arguments(ServerModule, "server", skip={"model"}, instantiate=False)
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(SamplePictures, "pictures")
        parser.add_lightning_class_args(Inspection, "inspection")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_lightning_class_args(BestCheckpoint, "best")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        if not self.subclass_mode_data:  # a class of the user's is given the seed where its clients' data are read
            parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "federation.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Nothing: the settings of a run are in its config.yaml, and no checkpoint overrides them."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read all settings; from here on the run directory is one absolute path, whoever reads or writes it."""
        super().parse_arguments(parser, args)
        settings = self.config[self.config.subcommand]
        check_numbers(seed=settings.seed_everything, num_threads=settings.num_threads)
        settings.run_dir = settings.trainer.default_root_dir = str(expanded(settings.run_dir))
        check_precision(settings.trainer.precision)

    def before_instantiate_classes(self) -> None:
        """Claim the run directory, and refuse an occupied one, before anything is read or built."""
        settings = self.config[self.subcommand]
        torch.set_num_threads(settings.num_threads or 1)
        if self.subcommand == "fit":
            self.resuming = settings.ckpt_path is not None
            check_epochs(settings.trainer)
            options = {"first_save": settings.checkpoint.every_n_rounds, "config": self.config_text}
            settings.ckpt_path = self._held.enter_context(begun(settings.run_dir, settings.ckpt_path, **options))
        if self.subcommand in ("test", "predict", "partition", "audit"):
            check_writable(settings.run_dir)
        if (
            self.subcommand != "fit"
            and "ckpt_path" in settings
            and (settings.ckpt_path is not None or self.prepare is None)
        ):
            settings.ckpt_path = to_judge(settings.ckpt_path, settings.run_dir)  # who prepares may bring the weights

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # the parser recounts what it tried; what a constructor said is the cause
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, FedGANError):
                cause = cause.__cause__
            raise cause or error from None
        if not isinstance(self.datamodule, FederatedData):
            seed = int(self.config[self.subcommand].seed_everything)
            self.datamodule = FederatedDataModule.from_datamodule(self.datamodule, seed=seed)
        self.orchestrator.accept_changes = bool(self.config[self.subcommand].accept_changes)
        server = self._get(self.config_init, "server")
        self.model = ServerModule(self.model, optimizer=server.optimizer, scheduler=server.scheduler)
        if self.prepare is not None:
            self.prepare(self)

    @property
    def orchestrator(self) -> FederatedOrchestrator:
        """The orchestrator of the run."""
        orchestrator: FederatedOrchestrator = self._get(self.config_init, "federation")
        return orchestrator

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation of the run."""
        evaluation: Evaluation = self._get(self.config_init, "evaluation")
        return evaluation

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        settings = self.config[self.subcommand]
        config = self._get(self.config_init, "trainer")
        plain, orchestrator = self.plain_settings, self.orchestrator
        orchestrator.settings = {
            group: {name: value for name, value in plain[group].items() if name not in MAY_CHANGE}
            for group in ("model", "data", "federation", "server")
        }
        is_fit = self.subcommand == "fit"
        run = RunSettings(
            run_dir=settings.run_dir,
            seed=int(settings.seed_everything),
            resuming=self.resuming,
            ckpt_path=settings.ckpt_path if is_fit else None,
            num_threads=settings.num_threads,
            config=self.config_text,
            hyperparameters=flatten({name: plain[name] for name in ("model", "data", "federation", "server")}),
        )
        servers, theirs = with_client_options(config, orchestrator.client_trainer)
        orchestrator.client_trainer = checked_client_trainer(theirs)
        orchestrator.settings["federation"]["client_trainer"] = dict(orchestrator.client_trainer)
        parts = trainer_parts(run, orchestrator=orchestrator, options=servers, is_fit=is_fit)
        parts |= {name: CLIENT_TRAINER[name] for name in dict(config) if name not in servers}
        try:
            return super().instantiate_trainer(**kwargs, **parts)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:  # Lightning's own words
            if isinstance(error, FedGANError):
                raise
            raise ConfigurationError(
                message(
                    "the settings below trainer: must make a Trainer",
                    received=" ".join(str(error).split()).rstrip("."),
                    fix="correct that setting",
                )
            ) from error

    @cached_property
    def config_text(self) -> str:
        """The settings of the run as ``config.yaml`` has them: without what belongs to one command."""
        settings = self.config[self.subcommand]
        return without_command(self._parser(self.subcommand).dump(settings, skip_none=False, skip_link_targets=True))

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
        number, rounds = self.orchestrator.signals.number, completed_rounds(self.trainer)
        if rounds < self.orchestrator.rounds and self.trainer.is_global_zero:
            of, by = f"{rounds} complete rounds of {self.orchestrator.rounds}", ""
            if number is not None:
                by = f" by {signal.Signals(number).name}"
            go_on = f"continue with: --ckpt_path last --run_dir {self.trainer.default_root_dir}"
            spent = number is None and is_finished(self.trainer)
            print(f"finished after {of}: the privacy budget is spent" if spent else f"stopped{by} after {of}; {go_on}")
        if number is not None:
            raise SystemExit(128 + number)


def check_numbers(*, seed: Any, num_threads: int | None) -> None:
    """Refuse seeds that some generator does not take, and threads that there are not.

    Raises:
        ConfigurationError: If it is so.
    """
    if isinstance(seed, bool) or not 0 <= int(seed) < 2**32:
        raise ConfigurationError(
            message("seed_everything must be a whole number from 0 to 4294967295", received=seed, fix="write one")
        )
    if num_threads is not None and num_threads < 1:
        raise ConfigurationError(
            message(
                "num_threads must be at least 1", received=num_threads, fix="raise it, or set null to have it chosen"
            )
        )


def without_command(text: str) -> str:
    """Drop what belongs to one command and not to the run: the checkpoint it resumed from, and that it may change."""
    kept = (line for line in text.splitlines() if not line.startswith("ckpt_path:"))
    return "\n".join(line.replace("accept_changes: true", "accept_changes: false") for line in kept) + "\n"


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
    ".*defined a `validation_step` but have no `val_dataloader`.*",  # which we say once
)


def built(arguments: Sequence[str]) -> FederatedCLI:
    """Return everything that these options describe, and run nothing.

    Raises:
        ConfigurationError: If the data are of a class of the user's: sites have to share a source.
    """
    cli = run(["site", *arguments])
    if cli.subclass_mode_data:
        raise ConfigurationError(
            message(
                "data of a deployment must come from a source",
                received=f"a {type(cli.datamodule).__name__} of your own",
                fix="write a Source, and set data.source",
            )
        )
    return cli


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
    arguments = sys.argv[1:] if arguments is None else arguments
    named = where_data_class_is_named(arguments)
    return FederatedCLI(
        command=next((own for own in arguments[:1] if own in SUBCOMMANDS), None),
        prepare=prepare,
        model_class=L.LightningModule,
        datamodule_class=L.LightningDataModule if named else FederatedDataModule,
        subclass_mode_data=named is not None,
        subclass_mode_model=True,
        trainer_class=FederatedTrainer,
        trainer_defaults=dict(TRAINER_DEFAULTS),
        save_config_callback=None,
        seed_everything_default=0,
        parser_class=OwnDataParser if named == "option" else OneLineParser,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=arguments,
    )
