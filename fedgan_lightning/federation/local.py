"""The reference trainer of clients: one at a time, with a quiet per-round Trainer.

Whoever runs clients in this way, in one process or on a machine of their own, uses :class:`LocalTrainer`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor

from fedgan_lightning import states
from fedgan_lightning.errors import ClientError, RoundInterrupted
from fedgan_lightning.federation import optimizer_state
from fedgan_lightning.federation.client_callbacks import ClientCallbacks
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.client_data import datamodule_of
from fedgan_lightning.federation.client_log import SILENT, ClientLogger, SilentLogger
from fedgan_lightning.federation.client_progress import counts, own_clock, plateaus, restore_plateaus
from fedgan_lightning.federation.client_update import Visit, client_updates
from fedgan_lightning.federation.constants import Constants
from fedgan_lightning.federation.kept_attributes import KeptAttributes
from fedgan_lightning.federation.preparation import client_copy, is_foreign, own_hook, validates, without_validation
from fedgan_lightning.federation.round_schedules import set_hyperparameters
from fedgan_lightning.federation.round_trainer import Fit, RoundTrainer, TrainerClock, batch_length, schedulers_of
from fedgan_lightning.federation.starting_point import StartingPoint
from fedgan_lightning.federation.step_hooks import begin, check_has_trained
from fedgan_lightning.gan.module import GAN
from fedgan_lightning.hooks import ClientHook, StatisticsHook, offers
from fedgan_lightning.packing import plain
from fedgan_lightning.protocol import ClientTask, ClientUpdate
from fedgan_lightning.seeding import isolated_rng


class Attempt:
    """Context in which clients are run: whatever fails inside becomes an error that names them and the stage.

    Args:
        tasks: The tasks of the clients that are run together.
        context: Asked whether to stop.

    Attributes:
        stage: What is going on: ``load``, ``train``, ``update``.
    """

    def __init__(self, tasks: Sequence[ClientTask], context: ClientContext) -> None:
        self.tasks, self.context = list(tasks), context
        self.stage = "load"
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far, per client."""
        return (time.perf_counter() - self._started) / len(self.tasks)

    def go_on(self) -> None:
        """Return if nobody asks to stop.

        Raises:
            RoundInterrupted: If somebody does.
        """
        if self.context.stop_requested():
            raise RoundInterrupted("the user asked to stop")

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, SystemExit):  # Lightning's answer to SIGTERM
            raise RoundInterrupted("the process was asked to end") from error
        if isinstance(error, Exception) and not isinstance(error, RoundInterrupted):
            first = self.tasks[0]
            raise ClientError(
                client_id=first.client_id,
                round=first.round,
                stage=self.stage,
                cause=error,
                stacked_with=len(self.tasks) - 1,
            ) from error


class LocalTrainer:
    """Trains one client at a time on one resident copy of the module.

    Nothing passes from one client to the next: neither parameters, buffers, gradients and optimizer state, nor plain
    attributes of the module. What a client keeps of the latter is the user's to name.

    Args:
        context: Module, data, policy, algorithm and store.
    """

    def __init__(self, context: ClientContext) -> None:
        self.context = context
        self.module = client_copy(context.model, context.policy, context.prepared)
        if own_hook(self.module, "validation_step") and not validates(context.data):
            without_validation(self.module)
        self.clock = optimizer_state.ScheduleClock()
        self.trainer = RoundTrainer(context.trainer_options)
        self.start = StartingPoint.of(self.module, context.policy)
        self.attributes = KeptAttributes(self.module, context.attributes)
        self.callbacks = ClientCallbacks(context.callbacks, self.module)
        self.constants = Constants(self.module, context.policy)
        self._is_foreign = is_foreign(self.module)
        self._counts_rounds = offers(self.module, ClientHook)  # such a check takes as long as a small layer
        self.reports = offers(self.module, StatisticsHook)
        self._log = None if context.logs is None or not self._is_foreign else ClientLogger(context.logs)

    def run(self, task: ClientTask) -> ClientUpdate:
        """Return the client's update.

        Raises:
            ClientError: If anything fails on the client, with the original error as cause.
            RoundInterrupted: If the user asks to stop.
        """
        with Attempt([task], self.context) as attempt:
            visit = Visit([task], self.context, is_stacked=False)
            self._load(visit)
            callback = _InTrainer(self, visit, attempt)
            attempt.stage = "train"
            visit.fit = lambda: self._fit(visit, callback)
            with isolated_rng(task.seed, device=self.context.device):
                if self._counts_rounds:
                    self.module.on_client_round_start(visit.infos[0])  # type: ignore[operator]
                self.context.algorithm.work(visit)
            check_has_trained(self.context.algorithm, bool(callback.metrics))
            attempt.go_on()
            attempt.stage = "update"
            self.constants.check()
            metrics = plain({**callback.metrics, "seconds": attempt.seconds})
            ((update, private),) = client_updates(visit, [metrics])
            own = {**self.attributes.private(), **self.callbacks.private(), **plateaus(callback.schedulers)}
            if not isinstance(self.module, GAN):  # whose schedules the server derives
                own |= counts(visit, callback.optimizer_steps, callback.positions)
            self.context.store.write(task.client_id, {**private, **own} if own else private)
            return update

    def close(self) -> None:
        """End what the client has begun."""
        if self._log is not None:
            self._log.close()

    def _load(self, visit: Visit) -> None:
        """Put the module where this client starts."""
        visit.module = self.module
        if not isinstance(self.module, GAN):
            own_clock(visit)
        self.attributes.load(visit.stored)
        self.callbacks.reset(visit.stored)
        states.load_entries(self.module, visit.module_state(self.start.initial))
        set_hyperparameters(self.module, visit.tasks[0].hyperparameters)
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name in self.start.passing:
                    buffer.copy_(self.start.passing[name])
        self.module.zero_grad(set_to_none=True)

    def _fit(self, visit: Visit, callback: _InTrainer) -> None:
        (task,), (info,), data = visit.tasks, visit.infos, self.context.data
        fit = Fit(
            batches=data.client_batches(task.client_id, first_step=info.first_step, num_steps=info.num_steps),
            callback=callback,
            clock=visit.clock,
            validation=validation_batches(data, task.client_id, self.module),
            callbacks=self.callbacks.callbacks,
            logger=self._logger(task, visit.clock),
            datamodule=None if isinstance(self.module, GAN) else datamodule_of(data, task.client_id),
        )
        trainer = self.trainer.fit(self.module, fit)
        done = {"images": callback.num_images, "steps": info.num_steps, "optimizer_steps": callback.optimizer_steps}
        callback.metrics = {**trainer.callback_metrics, **callback.metrics, **done}

    def _logger(self, task: ClientTask, clock: TrainerClock) -> Logger:
        if self._log is None:
            return SILENT
        if task.client_id >= self.context.num_logged:
            return SilentLogger(self._log.folder / f"client_{task.client_id:03d}")
        self._log.begin(task.client_id, round=task.round, step=clock.global_step)
        return self._log


class _InTrainer(L.Callback):
    """A visit inside its Trainer: restore moments, count images, read the module's statistics, end with the epoch."""

    def __init__(self, owner: LocalTrainer, visit: Visit, attempt: Attempt) -> None:
        self.owner, self.visit, self.attempt = owner, visit, attempt
        self.num_images = 0
        self.optimizer_steps = 0
        self.schedulers: list[Any] = []
        self.positions: list[float] = []
        self.metrics: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.owner.callbacks.load(self.visit.stored)  # after the callbacks themselves have been set up

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        begin(self.visit, trainer, self.owner.clock)
        restore_plateaus(schedulers_of(trainer), self.visit.stored)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.attempt.go_on()
        self.num_images += batch_length(batch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True  # the next round is another fit

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.optimizer_steps = trainer.global_step - self.visit.clock.global_step
        self.schedulers = schedulers_of(trainer)
        if self.owner.reports:
            found: Mapping[str, Tensor] = pl_module.round_statistics()  # type: ignore[operator]
            self.metrics |= found
        positions = self.owner.clock.positions(self.schedulers)
        self.positions = list(positions.values())
        self.metrics |= positions


def validation_batches(data: Any, client_id: int, module: L.LightningModule) -> Any:
    """Return the minibatches of a client's held-out share; ``None`` without one, or without ``validation_step``."""
    if not validates(data) or not (own_hook(module, "validation_step") or isinstance(module, GAN)):
        return None
    return data.client_validation_batches(client_id)
