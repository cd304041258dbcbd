"""Several clients at once: their states stacked into one module, trained by one per-round Trainer.

Meaning and randomness are those of :class:`~fedgan_lightning.federation.local.LocalTrainer`, client by client.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from fedgan_lightning import states
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation import optimizer_state
from fedgan_lightning.federation.local import Attempt, ClientContext, StartingPoint, Visit, client_copy
from fedgan_lightning.federation.round_trainer import RoundTrainer, schedulers_of
from fedgan_lightning.gan.module import GAN
from fedgan_lightning.gan.stacked import StackedGAN
from fedgan_lightning.packing import Packed, unstack
from fedgan_lightning.protocol import (
    ClientBatches,
    ClientTask,
    ClientUpdate,
    FederatedData,
    RoundInfo,
    StackedBatches,
    StackedModule,
    StackHook,
    State,
)
from fedgan_lightning.seeding import isolated_rng


class VectorizedLocalTrainer:
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
        with Attempt(tasks, self.context) as attempt:
            visits = [Visit.of(task, self.context) for task in tasks]
            visits.sort(key=lambda visit: -visit.info.num_steps)  # stable: those that finish early lie at the end
            infos = [visit.info for visit in visits]
            self._load(visits)
            batches = stacked_batches(self.context.data, infos)
            callback = _InTrainer(self, visits, attempt)
            attempt.stage = "train"
            device = self.context.device
            generators = [torch.Generator(device).manual_seed(visit.task.seed) for visit in visits]
            with isolated_rng(tasks[0].seed, device=device):
                cast(StackedModule, self.module).on_stack_round_start(infos, generators)
                self.trainer.fit(self.module, batches, callback=callback)
            attempt.go_on()
            attempt.stage = "update"
            for client_id, private in callback.private.items():
                self.context.store.write(client_id, private)
            return [callback.update(task, seconds=attempt.seconds) for task in tasks]

    def _load(self, visits: Sequence[Visit]) -> None:
        """Give every tensor of the module its leading dimension, filled with where each client starts."""
        values = stack([visit.start(self.start.initial) for visit in visits])
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

    def keep(self, count: int, optimizers: Sequence[Optimizer]) -> None:
        """Go on with the first ``count`` clients of the stack; the others have done their steps."""
        for parameter in self.module.parameters():
            parameter.data = parameter.data[:count].clone()
            parameter.grad = None
        for child in self.module.modules():
            for key, buffer in child._buffers.items():
                if buffer is not None:
                    child._buffers[key] = buffer[:count].clone()
        for optimizer in optimizers:
            optimizer_state.keep_first(optimizer, count)
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


class _InTrainer(L.Callback):
    """A stack's round inside its Trainer: restore moments, let clients go when they are done, form their updates."""

    def __init__(self, owner: VectorizedLocalTrainer, visits: Sequence[Visit], attempt: Attempt) -> None:
        self.owner, self.visits, self.attempt = owner, list(visits), attempt
        self.steps = 0
        self.num_images = 0
        self.private: dict[int, State] = {}
        self._updates: dict[int, ClientUpdate] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer_state.restore(pl_module, trainer.optimizers, stack([visit.moments for visit in self.visits]))
        self.owner.clock.forward(schedulers_of(trainer), self.visits[0].task.local.schedule_positions)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.attempt.go_on()
        self.num_images += batch[1].shape[1]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        going_on = sum(visit.info.num_steps > self.steps for visit in self.visits)
        if going_on < len(self.visits):
            self._finish(trainer, pl_module, first=going_on)
            del self.visits[going_on:]
            if going_on:
                self.owner.keep(going_on, trainer.optimizers)

    def _finish(self, trainer: L.Trainer, module: L.LightningModule, *, first: int) -> None:
        """Form the updates of the last rows of the stack, whose clients have done their steps."""
        policy, finished, stop = self.owner.context.policy, self.visits[first:], len(self.visits)
        state = {name: value.detach()[first:] for name, value in module.state_dict().items()}
        start = finished[0].task.state
        deltas = {name: state[name] - start[name].to(state[name].device) for name in policy.shared_parameters}
        extras = states.encode_statistics({name: state[name] for name in policy.shared_buffers}, policy.entries)
        moments = optimizer_state.collect(module, trainer.optimizers, policy.optimizer_state)
        averaged, kept = (optimizer_state.rows(moments[own], first=first, stop=stop) for own in ("average", "keep"))
        delta_rows = unstack(deltas)
        extra_rows = unstack({**extras, **averaged}) or [Packed.of({})] * len(finished)
        own_rows = unstack({**{name: state[name] for name in policy.private}, **kept})
        statistics = {n: v[first:].tolist() for n, v in cast(StackedModule, module).round_statistics().items()}
        common = {"images": float(self.num_images), "steps": float(self.steps)}
        common |= self.owner.clock.positions(schedulers_of(trainer))
        for row, visit in enumerate(finished):
            client_id = visit.task.client_id
            self._updates[client_id] = ClientUpdate(
                client_id=client_id,
                num_examples=self.owner.context.data.num_examples(client_id),
                delta=delta_rows[row],
                metrics={**{name: values[row] for name, values in statistics.items()}, **common},
                extras=extra_rows[row],
                round=self.visits[row].task.round,
            )
            if own_rows:
                self.private[client_id] = own_rows[row]

    def update(self, task: ClientTask, *, seconds: float) -> ClientUpdate:
        """Return the update of a client; ``seconds`` is its share of the stack's time."""
        update = self._updates[task.client_id]
        return replace(update, metrics={**update.metrics, "seconds": seconds})


def stack(values: Sequence[State]) -> dict[str, Tensor]:
    """Return tensors with a leading dimension of clients; numbers that all share (step counts) without it.

    A tensor that is the same object for all clients is repeated, not collected.
    """
    stacked = {}
    for name, first in values[0].items():
        own = [state[name] for state in values]
        if optimizer_state.is_shared_number(name, first):
            stacked[name] = first
        elif all(value is first for value in own):
            stacked[name] = first.unsqueeze(0).repeat(len(values), *([1] * first.dim()))
        else:
            stacked[name] = torch.stack([value.to(first.device) for value in own])
    return stacked


def stacked_batches(data: FederatedData, infos: Sequence[RoundInfo]) -> ClientBatches:
    """Return the stacked minibatches of the clients of these rounds, whatever the data module offers."""
    ids = [client_id for info in infos for client_id in info.cohort]
    first_steps, num_steps = [info.first_step for info in infos], [info.num_steps for info in infos]
    if isinstance(data, StackedBatches):
        return data.stacked_batches(ids, first_steps=first_steps, num_steps=num_steps)
    return _Zipped(
        [
            data.client_batches(client_id, first_step=first, num_steps=count)
            for client_id, first, count in zip(ids, first_steps, num_steps)
        ]
    )


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
