"""The quiet Trainer that trains clients for a round, in Lightning's public form or, where it is known, a faster one."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor

from fedgan_lightning.federation.client_log import SILENT, SilentLogger
from fedgan_lightning.federation.sampling import round_half_up
from fedgan_lightning.protocol import ClientTask, RoundInfo

logger = logging.getLogger("fedgan_lightning")

#: Trainer, loops and module form reference cycles; without a collection now and then memory grows.
FITS_PER_COLLECTION = 16
#: Versions of Lightning, first to before, with which the fast form was tested.
TESTED_LIGHTNING = ((2, 6), (2, 7))
#: Set to ``public``, this environment variable has clients trained in the public form.
FORM = "FEDGAN_ROUND_TRAINER"
#: Steps between two entries of a client's log, at most; Lightning's own default.
LOG_EVERY = 50


@dataclass(frozen=True)
class TrainerClock:
    """Where a client's Trainer stands when a round begins: a round is an epoch of a run that goes on.

    Attributes:
        round: Rounds before: ``current_epoch``.
        rounds: Rounds of the whole run: ``max_epochs``.
        minibatches: Minibatches before.
        global_step: Steps of optimizers before.
        max_steps: Steps of an optimizer in the whole run, one for every minibatch, or for every group of them that
            gradients are accumulated over.
        stepped: Minibatches before after which an optimizer stepped, as loggers count them.
    """

    round: int = 0
    rounds: int = 1
    minibatches: int = 0
    global_step: int = 0
    max_steps: int = -1
    stepped: int = 0

    def set(self, trainer: Any) -> None:
        """Let a Trainer with fresh loops go on from here."""
        loop = trainer.fit_loop.epoch_loop
        epochs, steps = trainer.fit_loop.epoch_progress, loop.automatic_optimization.optim_progress.optimizer.step
        for tracker in (epochs.total, epochs.current):
            tracker.ready = tracker.started = tracker.processed = tracker.completed = self.round
        total = loop.batch_progress.total
        total.ready = total.started = total.processed = total.completed = self.minibatches
        for tracker in (steps.total, loop.manual_optimization.optim_step_progress.total):
            tracker.ready = tracker.completed = self.global_step
        loop.on_load_checkpoint({"_batches_that_stepped": self.stepped})


def clock_of(task: ClientTask, info: RoundInfo, *, planned: int, options: Mapping[str, Any]) -> TrainerClock:
    """Return where a client's Trainer stands when it begins a task.

    Args:
        task: The task.
        info: Position and number of its minibatches.
        planned: Minibatches of the whole run.
        options: The client Trainer's; gradients may be accumulated.
    """
    every, rounds = int(options.get("accumulate_grad_batches", 1)), max(task.rounds, task.round + 1)
    by_round = -(-info.num_steps // every)
    is_even = planned == info.num_steps * rounds
    return TrainerClock(
        round=task.round,
        rounds=rounds,
        minibatches=info.first_step,
        global_step=round_half_up(info.first_step * task.stepping),
        max_steps=by_round * rounds if is_even else -(-planned // every),
        stepped=by_round * task.round if is_even else info.first_step // every,
    )


@dataclass(frozen=True)
class Fit:
    """What a client is trained with.

    Attributes:
        batches: Minibatches of the round.
        callback: Sees the client through the round.
        clock: Where the Trainer stands.
        validation: Minibatches of the client's held-out share; ``None`` for no validation.
        callbacks: The user's callbacks on clients.
        logger: Where the client writes.
        datamodule: What the module finds as ``trainer.datamodule``.
    """

    batches: Any
    callback: L.Callback
    clock: TrainerClock = field(default_factory=TrainerClock)
    validation: Any = None
    callbacks: Sequence[L.Callback] = ()
    logger: Logger = SILENT
    datamodule: Any = None


class RoundTrainer:
    """Fits a module on one round's minibatches, with no checkpoint and no progress bar.

    The reference is a fresh ``L.Trainer`` for every fit. The fast form, which keeps one, is used instead where
    Lightning's version is one that it was tested with.

    Args:
        options: Accelerator, devices, precision, and what the user asks for on clients.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self._fast: Any = None
        self._is_public = not is_fast_form_known()
        self._fits = 0

    def fit(self, module: L.LightningModule, fit: Fit) -> L.Trainer:
        """Train for one epoch; return the Trainer, for its metrics.

        An error leaves a Trainer in the middle, so the next call makes a new one.
        """
        try:
            with quiet_lightning():
                trainer = self._trainer(fit)
                trainer.fit(module, train_dataloaders=fit.batches, val_dataloaders=fit.validation)
        except BaseException:
            self._fast = None
            raise
        self._fits += 1
        if self._fits % FITS_PER_COLLECTION == 0:
            gc.collect(1)  # the young generations only: a full collection takes as long as dozens of steps
        return trainer

    def preview(self, clock: TrainerClock, datamodule: Any) -> ClientTrainer:
        """Return a Trainer that is never started, for what a module asks of one before the first round."""
        with quiet_lightning():
            trainer = client_trainer(self.options)
        trainer.begin(Fit(batches=(), callback=L.Callback(), clock=clock, datamodule=datamodule))
        return trainer

    def _trainer(self, fit: Fit) -> L.Trainer:
        """Return a Trainer for one fit."""
        callbacks = [*fit.callbacks, fit.callback]
        if not self._is_public:
            try:
                if self._fast is None:
                    from fedgan_lightning.federation.fast_trainer import FastTrainer

                    self._fast = FastTrainer(self._made, device_of(self.options))
                found: ClientTrainer = self._fast.renewed(callbacks)
                found.begin(fit)
                return found
            except (ImportError, AttributeError, TypeError) as error:
                self._is_public = True
                logger.warning(f"clients train with Lightning's public Trainer: the fast form cannot be made ({error})")
        found = self._made(callbacks=callbacks)
        found.begin(fit)
        return found

    def _made(self, **further: Any) -> ClientTrainer:
        return client_trainer(self.options, **further)


def client_trainer(options: Mapping[str, Any], **further: Any) -> ClientTrainer:
    """Return a Trainer of clients with these options."""
    return ClientTrainer(
        **options,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **further,
    )


class ClientTrainer(L.Trainer):
    """A client's Trainer: its epochs are the rounds of a run that it does not end itself."""

    _logger: Logger = SILENT
    _max_steps = -1

    def begin(self, fit: Fit) -> None:
        """Stand where a client's round begins."""
        self._logger, self._max_steps = fit.logger, fit.clock.max_steps
        self.datamodule = fit.datamodule
        self.limit_val_batches = 0 if fit.validation is None else 1.0
        # Nothing is worked out for a logger that keeps nothing.
        self.log_every_n_steps = 0 if isinstance(fit.logger, SilentLogger) else min(LOG_EVERY, max(1, len(fit.batches)))
        self.fit_loop.max_epochs = fit.clock.rounds
        fit.clock.set(self)

    @property  # type: ignore[misc] # nobody sets it
    def logger(self) -> Any:
        """The client's logger."""
        return self._logger

    @property  # type: ignore[misc]
    def loggers(self) -> list[Any]:
        """The client's logger."""
        return [self._logger]

    @loggers.setter
    def loggers(self, loggers: Any) -> None:
        """Keep the client's."""

    @property
    def max_steps(self) -> int:
        """Steps of the whole run; the rounds end it, and not this number."""
        return self._max_steps

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Steps of the whole run."""
        return self._max_steps if self._max_steps >= 0 else super().estimated_stepping_batches


def is_fast_form_known() -> bool:
    """Whether the fast form is to be used: nobody asks for the public one, and Lightning's version was tested."""
    if os.environ.get(FORM) == "public":
        return False
    version = tuple(int(part) for part in L.__version__.split(".")[:2])
    first, last = TESTED_LIGHTNING
    if first <= version < last:
        return True
    logger.warning(f"clients train with Lightning's public Trainer: the fast form was not tested with {L.__version__}")
    return False


def device_of(options: Mapping[str, Any]) -> torch.device:
    """Return where a Trainer with these options trains: one device."""
    devices, kind = options.get("devices", 1), str(options.get("accelerator", "cpu"))
    return torch.device(kind, devices[0]) if isinstance(devices, list) else torch.device(kind)


def schedulers_of(trainer: L.Trainer) -> list[Any]:
    """Return the learning-rate schedulers of a Trainer."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def batch_length(batch: Any) -> int:
    """Return the number of samples in a batch of any nesting; 1 where it shows none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else ()
    for value in values:
        if isinstance(value, (Tensor, Mapping, Sequence)) and not isinstance(value, str):
            return batch_length(value)
    return len(values) if isinstance(values, Sequence) and values else 1


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's information lines for the body; warnings and errors still show."""
    logger = logging.getLogger("lightning.pytorch")
    items: list[Any] = [logger, logging.getLogger("lightning.fabric"), *logger.handlers]
    # Changing a level empties the cache of every logger, so those that are quiet already are left alone.
    levels = {item: item.level for item in items if item.level < logging.WARNING}
    for item in levels:
        item.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for item, level in levels.items():
            item.setLevel(level)
