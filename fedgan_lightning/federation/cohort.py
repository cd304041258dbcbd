"""Several clients at once: their states stacked into one module, trained by one per-round Trainer.

Meaning and randomness are those of :class:`~fedgan_lightning.federation.local.LocalTrainer`, client by client.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from fedgan_lightning import states
from fedgan_lightning.errors import ClientError, ConfigurationError, RoundInterrupted, message
from fedgan_lightning.federation import optimizer_state
from fedgan_lightning.federation.local import SCHEDULE, ClientContext, StartingPoint, client_copy
from fedgan_lightning.federation.round_trainer import RoundTrainer, schedulers_of
from fedgan_lightning.gan.module import GAN
from fedgan_lightning.gan.stacked import StackedGAN
from fedgan_lightning.packing import unstack
from fedgan_lightning.protocol import (
    ClientBatches,
    ClientTask,
    ClientUpdate,
    CohortData,
    FederatedData,
    RoundInfo,
    StackedModule,
    StackHook,
    State,
)
from fedgan_lightning.seeding import isolated_rng


class CohortTrainer:
    """Trains several clients at a time on one resident stacked module.

    Args:
        context: Module, data, policy and store.

    Raises:
        ConfigurationError: If the module cannot be stacked.
    """

    def __init__(self, context: ClientContext) -> None:
        self.context = context
        client = client_copy(context.model, context.policy)
        self.module: Any = stacked_module(client)
        self.start = StartingPoint.of(client, context.policy)
        self.clock = optimizer_state.ScheduleClock()
        self.trainer = RoundTrainer(context.trainer_options)

    def run(self, tasks: Sequence[ClientTask]) -> list[ClientUpdate]:
        """Return one update per task, in the order of the tasks.

        Raises:
            ClientError: If anything fails, with the original error as cause.
            RoundInterrupted: If the user asks to stop.
        """
        stage = "load"
        started = time.perf_counter()
        try:
            visits = [_Client.of(task, self.context) for task in tasks]
            visits.sort(key=lambda visit: -visit.info.num_steps)  # stable: those that finish early lie at the end
            self._load(visits)
            batches = cohort_batches(self.context.data, visits)
            callback = _CohortVisit(self, visits)
            stage = "train"
            device = self.context.device
            generators = [torch.Generator(device).manual_seed(visit.task.seed) for visit in visits]
            with isolated_rng(tasks[0].seed):
                cast(StackedModule, self.module).on_cohort_round_start([visit.info for visit in visits], generators)
                self.trainer.fit(self.module, batches, callback=callback)
            if self.context.stop_requested():
                raise RoundInterrupted("the user asked to stop")
            stage = "update"
            seconds = (time.perf_counter() - started) / len(tasks)
            for client_id, private in callback.private.items():
                self.context.store.write(client_id, private)
            return [callback.update_of(task, seconds=seconds) for task in tasks]
        except RoundInterrupted:
            raise
        except SystemExit as error:  # Lightning's answer to SIGTERM
            raise RoundInterrupted("the process was asked to end") from error
        except Exception as error:
            raise ClientError(
                client_id=tasks[0].client_id,
                round=tasks[0].round,
                stage=stage,
                cause=error,
                stacked_with=len(tasks) - 1,
            ) from error

    def _load(self, visits: Sequence[_Client]) -> None:
        """Give every tensor of the module its leading dimension, filled with where each client starts."""
        values = stack([{**self.start.initial, **visit.shared, **visit.own} for visit in visits])
        count = len(visits)
        for name, parameter in self.module.named_parameters():
            parameter.data = values[name].to(parameter.device, parameter.dtype)
            parameter.grad = None
        for prefix, child in self.module.named_modules():
            for key, buffer in child._buffers.items():
                name = f"{prefix}.{key}" if prefix else key
                if buffer is not None:
                    value = values.get(name)
                    if value is None:
                        passing = self.start.passing[name]
                        value = passing.expand(count, *passing.shape).clone()
                    child._buffers[key] = value.to(buffer.device, buffer.dtype)

    def keep(self, count: int) -> None:
        """Cut the stack down to its first ``count`` clients, optimizer state included."""
        for parameter in self.module.parameters():
            parameter.data = parameter.data[:count].clone()
            parameter.grad = None
        for child in self.module.modules():
            for key, buffer in child._buffers.items():
                if buffer is not None:
                    child._buffers[key] = buffer[:count].clone()
        self.module.keep_clients(count)


def stacked_module(client: L.LightningModule) -> Any:
    """Return a client's module for several clients at once: from its own ``stacked()``, or for any :class:`GAN`.

    Raises:
        ConfigurationError: If the module cannot be stacked.
    """
    if isinstance(client, StackHook):
        return client.stacked()
    if isinstance(client, GAN):
        return StackedGAN(client)
    raise ConfigurationError(
        message(
            "clients are stacked if their module is a GAN, or has a method stacked()",
            received=f"{type(client).__name__} without it",
            fix="use the sequential executor",
        )
    )


class _Client:
    """One client's place in a stack: its task, what it does, and where it starts."""

    def __init__(self, task: ClientTask, *, info: RoundInfo, private: State) -> None:
        self.task, self.info = task, info
        self.shared = optimizer_state.without_moments(task.state)
        self.own = optimizer_state.without_moments(private)
        self.moments = {**optimizer_state.only_moments(task.state), **optimizer_state.only_moments(private)}

    @classmethod
    def of(cls, task: ClientTask, context: ClientContext) -> _Client:
        data = context.data
        first_step, num_steps = task.local.span(round=task.round, steps_per_epoch=data.steps_per_epoch(task.client_id))
        info = RoundInfo(round=task.round, cohort=(task.client_id,), first_step=first_step, num_steps=num_steps)
        return cls(task, info=info, private=context.store.read(task.client_id))


class _CohortVisit(L.Callback):
    """A stack's round inside its Trainer: restore moments, let clients go when they are done, form their updates."""

    def __init__(self, owner: CohortTrainer, clients: Sequence[_Client]) -> None:
        self.owner, self.clients = owner, list(clients)
        self.steps = 0
        self.images_per_step = 0
        self.private: dict[int, State] = {}
        self._finished: dict[int, ClientUpdate] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer_state.restore(pl_module, trainer.optimizers, stack([client.moments for client in self.clients]))
        self.owner.clock.forward(schedulers_of(trainer), self.clients[0].task.local.schedule_positions)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.owner.context.stop_requested():
            raise RoundInterrupted("the user asked to stop")
        self.images_per_step = batch[1].shape[1]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        going_on = sum(client.info.num_steps > self.steps for client in self.clients)
        if going_on < len(self.clients):
            self._finish(trainer, pl_module, self.clients[going_on:], first=going_on)
            self.clients = self.clients[:going_on]
            if going_on:
                self.owner.keep(going_on)
                for optimizer in trainer.optimizers:
                    optimizer_state.keep_first(optimizer, going_on)

    def _finish(self, trainer: L.Trainer, module: L.LightningModule, clients: Sequence[_Client], *, first: int) -> None:
        """Form the updates of those that have done their steps: the last rows of the stack."""
        policy, clock = self.owner.context.policy, self.owner.clock
        state = {name: value.detach()[first:] for name, value in module.state_dict().items()}
        start = clients[0].task.state
        deltas = {name: state[name] - start[name].to(state[name].device) for name in policy.shared_parameters}
        extras = states.encode_statistics({name: state[name] for name in policy.shared_buffers}, policy.entries)
        moments = optimizer_state.collect_stacked(module, trainer.optimizers, first=first)
        of_network = policy.optimizer_state
        averaged, kept = (
            {n: v for n, v in moments.items() if of_network[optimizer_state.network_of_entry(n)] == choice}
            for choice in ("average", "keep")
        )
        own = unstack({**{name: state[name] for name in policy.private}, **kept})
        delta_rows, extra_rows = unstack(deltas), unstack({**extras, **averaged})
        positions = {f"{SCHEDULE}{i}": float(clock.remember(i, item)) for i, item in enumerate(schedulers_of(trainer))}
        statistics = {n: v[first:].tolist() for n, v in cast(StackedModule, module).round_statistics().items()}
        for row, client in enumerate(clients):
            task = client.task
            metrics = {name: values[row] for name, values in statistics.items()}
            counts = {"images": float(self.images_per_step * self.steps), "steps": float(self.steps)}
            self._finished[task.client_id] = ClientUpdate(
                client_id=task.client_id,
                num_examples=self.owner.context.data.num_examples(task.client_id),
                delta=delta_rows[row],
                metrics={**metrics, **positions, **counts},
                extras=extra_rows[row] if extra_rows else {},
            )
            if own:
                self.private[task.client_id] = own[row]

    def update_of(self, task: ClientTask, *, seconds: float) -> ClientUpdate:
        """Return the update of a client; ``seconds`` is its share of the stack's time."""
        update = self._finished[task.client_id]
        return ClientUpdate(
            client_id=update.client_id,
            num_examples=update.num_examples,
            delta=update.delta,
            metrics={**update.metrics, "seconds": seconds},
            extras=update.extras,
        )


def stack(values: Sequence[State]) -> dict[str, Tensor]:
    """Return tensors with a leading dimension of clients; numbers that all share (step counts) without it.

    A tensor that is the same object for all clients is expanded, not compared.
    """
    stacked = {}
    for name, first in values[0].items():
        others = [own[name].to(first.device) for own in values]
        if optimizer_state.is_shared_number(name, first):
            stacked[name] = first
        elif all(value is first for value in others):
            stacked[name] = first.unsqueeze(0).repeat(len(values), *([1] * first.dim()))
        else:
            stacked[name] = torch.stack(others)
    return stacked


def cohort_batches(data: FederatedData, clients: Sequence[_Client]) -> ClientBatches:
    """Return the stacked minibatches of these clients, whatever the data module offers."""
    ids = [client.task.client_id for client in clients]
    first_steps, num_steps = ([getattr(client.info, key) for client in clients] for key in ("first_step", "num_steps"))
    if isinstance(data, CohortData):
        return data.cohort_batches(ids, first_steps=first_steps, num_steps=num_steps)
    own = [
        data.client_batches(client_id, first_step=first, num_steps=count)
        for client_id, first, count in zip(ids, first_steps, num_steps)
    ]
    return _Zipped(own)


class _Zipped:
    """Stacks the pairs (x, y) that the clients' own loaders give."""

    def __init__(self, loaders: Sequence[ClientBatches]) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        iterators = [iter(loader) for loader in self.loaders]
        for step in range(len(self)):
            pairs = [next(own) for own, loader in zip(iterators, self.loaders) if len(loader) > step]
            yield torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
