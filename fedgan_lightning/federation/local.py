"""What happens on a client: load the task, train with a quiet per-round Trainer, form the update.

Whoever runs clients in this way, in one process or on a machine of their own, uses :class:`LocalTrainer`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
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
from fedgan_lightning.federation.round_trainer import RoundTrainer, batch_length, device_of, schedulers_of
from fedgan_lightning.federation.store import ClientStore
from fedgan_lightning.packing import Packed, plain
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
        return device_of(self.trainer_options)


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


@dataclass(frozen=True)
class Visit:
    """One client's round: its task, what it amounts to on this client's data, and where the client starts.

    Attributes:
        task: What the server sent.
        info: Position and number of its minibatches.
        own: The client's private entries.
        moments: Optimizer moments to start from, the server's and its own.
    """

    task: ClientTask
    info: RoundInfo
    own: State
    moments: State

    @classmethod
    def of(cls, task: ClientTask, context: ClientContext) -> Visit:
        """Return the visit that ``task`` asks for."""
        steps_per_epoch = context.data.steps_per_epoch(task.client_id)
        first_step, num_steps = task.local.span(round=task.round, steps_per_epoch=steps_per_epoch)
        stored = context.store.read(task.client_id)
        arrived = Packed.of(stored).to(context.device)  # in one piece; step counts are needed where they are
        private = {n: stored[n] if optimizer_state.is_shared_number(n, v) else v for n, v in arrived.items()}
        return cls(
            task=task,
            info=RoundInfo(round=task.round, cohort=(task.client_id,), first_step=first_step, num_steps=num_steps),
            own=optimizer_state.without_moments(private),
            moments=optimizer_state.only_moments({**task.state, **private}),
        )

    def start(self, initial: State) -> dict[str, Tensor]:
        """Return every entry of the client's module: the server's, its own, and ``initial`` ones for the rest."""
        return {**initial, **optimizer_state.without_moments(self.task.state), **self.own}


class Attempt:
    """Context in which clients are run: whatever fails inside becomes an error that names them and the stage.

    Args:
        tasks: The tasks of the clients that are run together.
        context: Asked whether to stop.

    Attributes:
        stage: What is going on: ``load``, ``train``, ``update``.
    """

    def __init__(self, tasks: Sequence[ClientTask], context: ClientContext) -> None:
        self.tasks, self.context = tasks, context
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
        with Attempt([task], self.context) as attempt:
            visit = Visit.of(task, self.context)
            self._load(visit)
            batches = self.context.data.client_batches(
                task.client_id, first_step=visit.info.first_step, num_steps=visit.info.num_steps
            )
            callback = _InTrainer(self, visit, attempt)
            attempt.stage = "train"
            with isolated_rng(task.seed, device=self.context.device):
                if self._counts_rounds:
                    self.module.on_client_round_start(visit.info)  # type: ignore[operator]
                trainer = self.trainer.fit(self.module, batches, callback=callback)
            attempt.go_on()
            attempt.stage = "update"
            self.context.store.write(task.client_id, callback.private)
            return callback.update(reported=trainer.callback_metrics, seconds=attempt.seconds)

    def _load(self, visit: Visit) -> None:
        """Put the module where this client starts."""
        states.load_entries(self.module, visit.start(self.start.initial))
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name in self.start.passing:
                    buffer.copy_(self.start.passing[name])
        self.module.zero_grad(set_to_none=True)


class _InTrainer(L.Callback):
    """A visit inside its Trainer: restore moments, count images, form the update on the device."""

    def __init__(self, owner: LocalTrainer, visit: Visit, attempt: Attempt) -> None:
        self.owner, self.visit, self.attempt = owner, visit, attempt
        self.num_images = 0
        self.delta: dict[str, Tensor] = {}
        self.extras: dict[str, Tensor] = {}
        self.private: dict[str, Tensor] = {}
        self.metrics: dict[str, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer_state.restore(pl_module, trainer.optimizers, self.visit.moments)
        self.owner.clock.forward(schedulers_of(trainer), self.visit.task.local.schedule_positions)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.attempt.go_on()
        self.num_images += batch_length(batch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        policy, start = self.owner.context.policy, self.visit.task.state
        state = pl_module.state_dict()
        for name in policy.shared_parameters:
            self.delta[name] = state[name].detach() - start[name].to(state[name].device)
        buffers = {name: state[name] for name in policy.shared_buffers}
        moments = optimizer_state.collect(pl_module, trainer.optimizers, policy.optimizer_state)
        self.extras = {**states.encode_statistics(buffers, policy.entries), **moments["average"]}
        self.private = {**{name: state[name].detach().clone() for name in policy.private}, **moments["keep"]}
        if self.owner.reports:
            self.metrics |= pl_module.round_statistics()  # type: ignore[operator]
        self.metrics |= self.owner.clock.positions(schedulers_of(trainer))

    def update(self, *, reported: Mapping[str, Tensor], seconds: float) -> ClientUpdate:
        """Return the client's update; ``reported`` is what its module logged."""
        counts = {"images": self.num_images, "steps": self.visit.info.num_steps, "seconds": seconds}
        return ClientUpdate(
            client_id=self.visit.task.client_id,
            num_examples=self.owner.context.data.num_examples(self.visit.task.client_id),
            delta=Packed.of(self.delta),
            metrics=plain({**reported, **self.metrics, **counts}),
            extras=Packed.of(self.extras),
            round=self.visit.task.round,
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
