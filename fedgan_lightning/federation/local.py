"""The reference trainer of clients: one at a time, with a quiet per-round Trainer.

Whoever runs clients in this way, in one process or on a machine of their own, uses :class:`LocalTrainer`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fedgan_lightning import states
from fedgan_lightning.errors import ClientError, RoundInterrupted
from fedgan_lightning.federation import optimizer_state
from fedgan_lightning.federation.client_update import ClientContext, StartingPoint, Visit, client_updates
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.round_schedules import set_hyperparameters
from fedgan_lightning.federation.round_trainer import RoundTrainer, batch_length, schedulers_of
from fedgan_lightning.federation.step_hooks import begin, check_has_trained
from fedgan_lightning.hooks import ClientHook, StatisticsHook
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

    Parameters, buffers, gradients and optimizer state never pass from one client to the next. Plain Python attributes
    that a foreign module changes while training do: keep such state in buffers.

    Args:
        context: Module, data, policy, algorithm and store.
    """

    def __init__(self, context: ClientContext) -> None:
        self.context = context
        self.module = client_copy(context.model, context.policy)
        self.clock = optimizer_state.ScheduleClock()
        self.trainer = RoundTrainer(context.trainer_options)
        self.start = StartingPoint.of(self.module, context.policy)
        self._counts_rounds = isinstance(self.module, ClientHook)  # such a check takes as long as a small layer
        self.reports = isinstance(self.module, StatisticsHook)

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
            metrics = plain({**callback.metrics, "seconds": attempt.seconds})
            ((update, private),) = client_updates(visit, [metrics])
            self.context.store.write(task.client_id, private)
            return update

    def _load(self, visit: Visit) -> None:
        """Put the module where this client starts."""
        visit.module = self.module
        states.load_entries(self.module, visit.module_state(self.start.initial))
        set_hyperparameters(self.module, visit.tasks[0].hyperparameters)
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name in self.start.passing:
                    buffer.copy_(self.start.passing[name])
        self.module.zero_grad(set_to_none=True)

    def _fit(self, visit: Visit, callback: _InTrainer) -> None:
        (task,), (info,) = visit.tasks, visit.infos
        batches = self.context.data.client_batches(task.client_id, first_step=info.first_step, num_steps=info.num_steps)
        trainer = self.trainer.fit(self.module, batches, callback=callback)
        counts = {"images": callback.num_images, "steps": info.num_steps}
        callback.metrics = {**trainer.callback_metrics, **callback.metrics, **counts}


class _InTrainer(L.Callback):
    """A visit inside its Trainer: restore moments, count images, read the module's statistics."""

    def __init__(self, owner: LocalTrainer, visit: Visit, attempt: Attempt) -> None:
        self.owner, self.visit, self.attempt = owner, visit, attempt
        self.num_images = 0
        self.metrics: dict[str, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        begin(self.visit, trainer, self.owner.clock)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.attempt.go_on()
        self.num_images += batch_length(batch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.owner.reports:
            found: Mapping[str, Tensor] = pl_module.round_statistics()  # type: ignore[operator]
            self.metrics |= found
        self.metrics |= self.owner.clock.positions(schedulers_of(trainer))


def client_copy(model: L.LightningModule, policy: Policy) -> L.LightningModule:
    """Return a copy of the global module as clients have it: without networks that live on the server only.

    Such a network is ``None`` on clients.
    """
    trainer = model._trainer
    model.trainer = None  # a copy of the module must not copy the server's Trainer
    try:
        copied = copy.deepcopy(model)
    finally:
        model.trainer = trainer
    for network in policy.server_networks:
        setattr(copied, network, None)
    return copied
