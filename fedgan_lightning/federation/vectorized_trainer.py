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

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation import optimizer_state
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.client_update import Visit, client_updates
from fedgan_lightning.federation.local import Attempt
from fedgan_lightning.federation.preparation import client_copy, validates
from fedgan_lightning.federation.round_schedules import set_hyperparameters
from fedgan_lightning.federation.round_trainer import Fit, RoundTrainer, schedulers_of
from fedgan_lightning.federation.starting_point import StartingPoint
from fedgan_lightning.federation.step_hooks import begin, check_has_trained
from fedgan_lightning.gan.module import GAN
from fedgan_lightning.gan.stacked import StackedGAN
from fedgan_lightning.hooks import StackedModule, StackHook, offers
from fedgan_lightning.protocol import (
    ClientBatches,
    ClientTask,
    ClientUpdate,
    FederatedData,
    RoundInfo,
    StackedBatches,
    State,
)
from fedgan_lightning.seeding import isolated_rng


class VectorizedLocalTrainer:
    """Trains several clients at a time on one resident stacked module.

    Args:
        context: Module, data, policy, algorithm and store.

    Raises:
        ConfigurationError: If the module cannot be stacked.
    """

    def __init__(self, context: ClientContext) -> None:
        self.context = context
        needs = {
            "federation.client_callbacks": bool(context.callbacks),
            "federation.client_attributes": bool(context.attributes),
            "data.validation_share": validates(context.data),
        }
        for option, is_given in needs.items():
            if is_given:
                raise ConfigurationError(
                    message(
                        "clients that keep attributes, have callbacks, or validate must train one after the other",
                        received=option,
                        fix="use the sequential executor",
                    )
                )
        client = client_copy(context.model, context.policy, context.prepared)
        self.module: Any = stacked_module(client)
        self.start = StartingPoint.of(client, context.policy, constants=True)
        self.clock = optimizer_state.ScheduleClock()
        self.trainer = RoundTrainer(context.trainer_options)

    def run(self, tasks: Sequence[ClientTask]) -> list[ClientUpdate]:
        """Return one update per task, in the order of the tasks.

        Raises:
            ClientError: If anything fails, with the original error as cause.
            RoundInterrupted: If the user asks to stop.
        """
        with Attempt(tasks, self.context) as attempt:
            visit = self._visit(tasks)
            self._load(visit)
            batches = stacked_batches(self.context.data, visit.infos)
            callback = _InTrainer(self, visit, attempt)
            attempt.stage = "train"
            visit.fit = lambda: self._fit(Fit(batches, callback, visit.clock))
            device = self.context.device
            generators = [torch.Generator(device).manual_seed(task.seed) for task in visit.tasks]
            with isolated_rng(tasks[0].seed, device=device):
                cast(StackedModule, self.module).on_stack_round_start(visit.infos, generators)
                self.context.algorithm.work(visit)
            check_has_trained(self.context.algorithm, bool(callback.steps))
            attempt.go_on()
            attempt.stage = "update"
            return callback.finished(tasks, seconds=attempt.seconds)

    def _visit(self, tasks: Sequence[ClientTask]) -> Visit:
        """Return the visit of these clients; those that finish early lie at the end."""
        data = self.context.data
        steps = {t.client_id: t.span(steps_per_epoch=data.steps_per_epoch(t.client_id))[1] for t in tasks}
        return Visit(sorted(tasks, key=lambda task: -steps[task.client_id]), self.context, is_stacked=True)

    def _fit(self, fit: Fit) -> None:
        self.trainer.fit(self.module, fit)

    def _load(self, visit: Visit) -> None:
        """Give every tensor of the module its leading dimension, filled with where each client starts."""
        visit.module = self.module
        values, count = visit.module_state(self.start.initial), len(visit.tasks)
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
        set_hyperparameters(self.module, visit.tasks[0].hyperparameters)

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
    if offers(client, StackHook):
        return client.stacked()  # type: ignore[operator]
    if isinstance(client, GAN):
        return StackedGAN(client)
    raise ConfigurationError(
        message(
            "clients must have a GAN as their module, or one with a method stacked(), to be stacked",
            received=f"{type(client).__name__} without it",
            fix="use the sequential executor",
        )
    )


class _InTrainer(L.Callback):
    """A stack's round inside its Trainer: restore moments, let clients go when they are done, form their updates."""

    def __init__(self, owner: VectorizedLocalTrainer, visit: Visit, attempt: Attempt) -> None:
        self.owner, self.visit, self.attempt = owner, visit, attempt
        self.steps = 0
        self.num_images = 0
        self._results: dict[int, tuple[ClientUpdate, State]] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        begin(self.visit, trainer, self.owner.clock)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.attempt.go_on()
        self.num_images += batch[1].shape[1]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        going_on = sum(info.num_steps > self.steps for info in self.visit.infos)
        trainer.should_stop = not going_on  # the next round is another fit
        if going_on < len(self.visit.tasks):
            self._finish(trainer, pl_module, first=going_on)
            self.visit.keep(going_on)
            if going_on:
                self.owner.keep(going_on, trainer.optimizers)

    def _finish(self, trainer: L.Trainer, module: L.LightningModule, *, first: int) -> None:
        """Form the updates of the last rows of the stack, whose clients have done their steps."""
        statistics = {n: v[first:].tolist() for n, v in cast(StackedModule, module).round_statistics().items()}
        common = {"images": float(self.num_images), "steps": float(self.steps)}
        common["optimizer_steps"] = float(trainer.global_step - self.visit.clock.global_step)
        common |= self.owner.clock.positions(schedulers_of(trainer))
        rows = self.visit.rows(first)
        metrics = [{**{n: own[row] for n, own in statistics.items()}, **common} for row in range(len(rows.tasks))]
        for update, private in client_updates(rows, metrics):
            self._results[update.client_id] = (update, private)

    def finished(self, tasks: Sequence[ClientTask], *, seconds: float) -> list[ClientUpdate]:
        """Return the updates in the order of the tasks, and keep private states; ``seconds`` is a client's share."""
        found = []
        for task in tasks:
            update, private = self._results[task.client_id]
            self.owner.context.store.write(task.client_id, private)
            found.append(replace(update, metrics={**update.metrics, "seconds": seconds}))
        return found


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
