"""What happens on a client: load the task, train with a quiet per-round Trainer, form the update.

Whoever runs clients in this way, in one process or on a machine of their own, uses :class:`LocalTrainer`.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor

from fedgan_lightning import states
from fedgan_lightning.errors import ClientError, RoundInterrupted
from fedgan_lightning.federation import optimizer_state
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.store import ClientStore
from fedgan_lightning.protocol import (
    ClientHook,
    ClientTask,
    ClientUpdate,
    FederatedData,
    RoundInfo,
    State,
    StatisticsHook,
)
from fedgan_lightning.seeding import isolated_rng
from fedgan_lightning.states import Kind

#: Metrics under this prefix are the positions of learning-rate schedules; the orchestrator takes them out.
SCHEDULE = "schedule/"


def never() -> bool:
    """Return False: nobody asks to stop."""
    return False


@dataclass(frozen=True)
class ClientContext:
    """What an executor needs to run clients.

    Attributes:
        model: The global module, from which clients are copied; it is not changed.
        data: Minibatches by client.
        policy: What travels and what stays.
        store: Private state by client.
        trainer_options: Accelerator, devices and precision of per-round Trainers.
        stop_requested: Asked between minibatches; when true, the round is given up.
    """

    model: L.LightningModule
    data: FederatedData
    policy: Policy
    store: ClientStore
    trainer_options: Mapping[str, Any] = field(default_factory=dict)
    stop_requested: Callable[[], bool] = never


class LocalTrainer:
    """Trains one client at a time on one resident copy of the module.

    Parameters, buffers, gradients and optimizer state never pass from one client to the next. Plain Python attributes
    that a foreign module changes while training do: keep such state in buffers.

    Args:
        context: Module, data, policy and store.
    """

    def __init__(self, context: ClientContext) -> None:
        self.context = context
        self.module = client_copy(context.model, context.policy)
        self.clock = optimizer_state.ScheduleClock()
        self._trainer: L.Trainer | None = None
        self._external_callbacks: list[L.Callback] = []
        state = self.module.state_dict()
        policy = context.policy
        stays = {*policy.private, *policy.names(Kind.COUNTER, sync="average")}
        #: What a client starts from where neither the server nor its own past says otherwise.
        self.initial = {name: state[name].detach().clone() for name in stays}
        #: Buffers outside the state dict, so that none passes from one client to the next.
        self.passing = {n: b.detach().clone() for n, b in self.module.named_buffers() if n not in state}

    def run(self, task: ClientTask) -> ClientUpdate:
        """Return the client's update.

        Raises:
            ClientError: If anything fails on the client, with the original error as cause.
            RoundInterrupted: If the user asks to stop.
        """
        stage = "load"
        started = time.perf_counter()
        try:
            private = self.context.store.read(task.client_id)
            self._load(task, private)
            data = self.context.data
            first_step, num_steps = task.local.span(
                round=task.round, steps_per_epoch=data.steps_per_epoch(task.client_id)
            )
            batches = data.client_batches(task.client_id, first_step=first_step, num_steps=num_steps)
            info = RoundInfo(round=task.round, cohort=(task.client_id,), first_step=first_step, num_steps=num_steps)
            visit = _Visit(self, task, private)
            stage = "train"
            with isolated_rng(task.seed), quiet_lightning():
                if isinstance(self.module, ClientHook):
                    self.module.on_client_round_start(info)
                trainer = self._trainer_for(visit)
                trainer.fit(self.module, train_dataloaders=batches)
            if self.context.stop_requested():
                raise RoundInterrupted("the user asked to stop")
            stage = "update"
            metrics = {name: float(value) for name, value in {**trainer.callback_metrics, **visit.statistics}.items()}
            metrics |= {f"{SCHEDULE}{index}": float(position) for index, position in enumerate(visit.positions)}
            metrics |= {
                "images": float(visit.num_images),
                "steps": float(num_steps),
                "seconds": time.perf_counter() - started,
            }
            self.context.store.write(task.client_id, visit.private)
            return ClientUpdate(
                client_id=task.client_id,
                num_examples=data.num_examples(task.client_id),
                delta=visit.delta,
                metrics=metrics,
                extras=visit.extras,
            )
        except RoundInterrupted:
            self._trainer = None  # it was left in the middle
            raise
        except SystemExit as error:  # Lightning's answer to SIGTERM
            self._trainer = None
            raise RoundInterrupted("the process was asked to end") from error
        except Exception as error:
            self._trainer = None
            raise ClientError(client_id=task.client_id, round=task.round, stage=stage, cause=error) from error

    def _load(self, task: ClientTask, private: State) -> None:
        """Put the module where this client starts: server's state, its own, and initial values for the rest."""
        shared = {name: value for name, value in task.state.items() if not optimizer_state.is_optimizer_entry(name)}
        own = {name: value for name, value in private.items() if not optimizer_state.is_optimizer_entry(name)}
        states.load_entries(self.module, {**self.initial, **shared, **own})
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name in self.passing:
                    buffer.copy_(self.passing[name])
        self.module.zero_grad(set_to_none=True)

    def _trainer_for(self, visit: _Visit) -> L.Trainer:
        """Return a Trainer that has trained nothing yet.

        Constructing one scans all installed packages for callbacks, which takes longer than ten small GAN steps
        (measured); so its loops, where all its progress is, are renewed instead.
        """
        if self._trainer is None:
            self._trainer = L.Trainer(
                **self.context.trainer_options,
                max_epochs=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                limit_val_batches=0,
                use_distributed_sampler=False,
            )
            self._external_callbacks = list(self._trainer.callbacks)  # type: ignore[attr-defined]
        trainer = self._trainer
        trainer.fit_loop = _FitLoop(trainer, max_epochs=1)
        trainer.fit_loop.epoch_loop = _TrainingEpochLoop(trainer)
        trainer.should_stop = False
        trainer.callbacks = [*self._external_callbacks, visit]  # type: ignore[attr-defined]
        return trainer


class _Visit(L.Callback):
    """One client's round inside its Trainer: restore moments, count images, form the update on the device."""

    def __init__(self, owner: LocalTrainer, task: ClientTask, private: State) -> None:
        self.owner, self.task, self.start_private = owner, task, private
        self.num_images = 0
        self.positions: tuple[int, ...] = ()
        self.delta: dict[str, Tensor] = {}
        self.extras: dict[str, Tensor] = {}
        self.private: dict[str, Tensor] = {}
        self.statistics: Mapping[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        moments = {
            name: value
            for source in (self.task.state, self.start_private)
            for name, value in source.items()
            if optimizer_state.is_optimizer_entry(name)
        }
        optimizer_state.restore(pl_module, trainer.optimizers, moments)
        self.owner.clock.forward(schedulers_of(trainer), self.task.local.schedule_positions)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.owner.context.stop_requested():
            raise RoundInterrupted("the user asked to stop")
        self.num_images += batch_length(batch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        policy, task = self.owner.context.policy, self.task
        state = pl_module.state_dict()
        for name in policy.shared_parameters:
            self.delta[name] = state[name].detach() - task.state[name].to(state[name].device)
        buffers = {name: state[name] for name in policy.shared_buffers}
        self.extras = states.encode_statistics(buffers, policy.entries)
        self.extras |= self._moments(trainer, pl_module, "average")
        self.private = {name: state[name].detach().clone() for name in policy.private}
        self.private |= self._moments(trainer, pl_module, "keep")
        if isinstance(pl_module, StatisticsHook):
            self.statistics = pl_module.round_statistics()
        clock = self.owner.clock
        self.positions = tuple(clock.remember(index, item) for index, item in enumerate(schedulers_of(trainer)))

    def _moments(self, trainer: L.Trainer, module: L.LightningModule, policy: str) -> dict[str, Tensor]:
        of_network = self.owner.context.policy.optimizer_state
        return optimizer_state.collect(
            module, trainer.optimizers, lambda name: of_network[states.network_of(name)] == policy
        )


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


def schedulers_of(trainer: L.Trainer) -> list[Any]:
    """Return the learning-rate schedulers of a Trainer."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def batch_length(batch: Any) -> int:
    """Return the number of samples in a batch of any nesting."""
    if isinstance(batch, Tensor):
        return len(batch)
    if isinstance(batch, Mapping):
        return batch_length(next(iter(batch.values())))
    if isinstance(batch, Sequence) and batch:
        return batch_length(batch[0])
    return 1


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's information lines for the body; warnings and errors still show."""
    logger = logging.getLogger("lightning.pytorch")
    items: list[Any] = [logger, logging.getLogger("lightning.fabric"), *logger.handlers]
    levels = {item: item.level for item in items}
    for item in levels:
        item.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for item, level in levels.items():
            item.setLevel(level)
