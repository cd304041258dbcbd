"""What happens on a client: load the task, train with a quiet per-round Trainer, form the update.

Whoever runs clients in this way, in one process or on a machine of their own, uses :class:`LocalTrainer`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fedgan_lightning import states
from fedgan_lightning.errors import ClientError, RoundInterrupted
from fedgan_lightning.federation import optimizer_state
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.ranks import Ranks
from fedgan_lightning.federation.round_trainer import RoundTrainer, batch_length, schedulers_of
from fedgan_lightning.federation.store import ClientStore
from fedgan_lightning.packing import Packed
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
        ranks: The processes that share the run.
    """

    model: L.LightningModule
    data: FederatedData
    policy: Policy
    store: ClientStore
    trainer_options: Mapping[str, Any] = field(default_factory=dict)
    stop_requested: Callable[[], bool] = never
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def device(self) -> torch.device:
        """Where clients are trained."""
        devices = self.trainer_options.get("devices", 1)
        kind = str(self.trainer_options.get("accelerator", "cpu"))
        return torch.device(kind, devices[0]) if isinstance(devices, list) else torch.device(kind)


@dataclass(frozen=True)
class StartingPoint:
    """Where a client starts as far as neither the server nor its own past says otherwise.

    Attributes:
        initial: Entries of the state dict.
        passing: Buffers outside the state dict, so that none passes from one client to the next.
    """

    initial: Mapping[str, Tensor]
    passing: Mapping[str, Tensor]

    @classmethod
    def of(cls, client: L.LightningModule, policy: Policy) -> StartingPoint:
        """Return the starting point of clients that are copies of ``client``."""
        state = client.state_dict()
        stays = {*policy.private, *policy.names(Kind.COUNTER, sync="average")}
        initial = {name: state[name].detach().clone() for name in stays}
        passing = {n: b.detach().clone() for n, b in client.named_buffers() if n not in state}
        return cls(initial=initial, passing=passing)


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
            with isolated_rng(task.seed):
                if self._counts_rounds:
                    self.module.on_client_round_start(info)  # type: ignore[operator]
                trainer = self.trainer.fit(self.module, batches, callback=visit)
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
                delta=Packed.of(visit.delta),
                metrics=metrics,
                extras=Packed.of(visit.extras),
            )
        except RoundInterrupted:
            raise
        except SystemExit as error:  # Lightning's answer to SIGTERM
            raise RoundInterrupted("the process was asked to end") from error
        except Exception as error:
            raise ClientError(client_id=task.client_id, round=task.round, stage=stage, cause=error) from error

    def _load(self, task: ClientTask, private: State) -> None:
        """Put the module where this client starts: server's state, its own, and initial values for the rest."""
        shared, own = optimizer_state.without_moments(task.state), optimizer_state.without_moments(private)
        states.load_entries(self.module, {**self.start.initial, **shared, **own})
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name in self.start.passing:
                    buffer.copy_(self.start.passing[name])
        self.module.zero_grad(set_to_none=True)


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
        moments = optimizer_state.only_moments({**self.task.state, **self.start_private})
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
        if self.owner.reports:
            self.statistics = pl_module.round_statistics()  # type: ignore[operator]
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
