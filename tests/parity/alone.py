"""What a federation has to equal: every client alone on a plain ``L.Trainer``, all of them averaged after every epoch.

Nothing of the federation's own trainers is used here. A client is one ``L.Trainer`` that fits one module for all
epochs, so its clocks, schedules, optimizers, callbacks and attributes are what Lightning makes of them. It runs in a
thread that waits where an epoch begins; while all wait, weights are averaged by hand. One thread at a time runs.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fedgan_lightning.seeding import derive_seed, isolated_rng
from tests.conftest import quiet_trainer


class EpochsOfAClient:
    """The client's minibatches of the epoch that its Trainer is in."""

    def __init__(self, data: Any, client_id: int, num_steps: int) -> None:
        self.data, self.client_id, self.num_steps = data, client_id, num_steps
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Any]:
        first = self.epoch * self.num_steps
        return iter(self.data.client_batches(self.client_id, first_step=first, num_steps=self.num_steps))


class Client(L.Callback):
    """A client alone: a plain Trainer that waits before each of its epochs, with the random numbers it is given.

    Args:
        module: Its module.
        batches: Its minibatches.
        validation: Those that it is validated on, if it is.
        attributes: Plain attributes, by dotted name, that it keeps from epoch to epoch; all others are as at the start
            in every epoch.
        **trainer: Further arguments of its Trainer.
    """

    def __init__(
        self,
        module: L.LightningModule,
        batches: EpochsOfAClient,
        *,
        validation: Any = None,
        attributes: Sequence[str] = (),
        callbacks: Sequence[L.Callback] = (),
        **trainer: Any,
    ) -> None:
        self.module, self.batches, self.validation, self.attributes = module, batches, validation, attributes
        limit = 0 if validation is None else 1.0
        self.trainer = quiet_trainer(self, *callbacks, **{"limit_val_batches": limit, **trainer})
        self.first_attributes = self._attributes()
        self._may_run, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._seed, self._draws = 0, contextlib.ExitStack()
        threading.Thread(target=self._fit, daemon=True).start()
        self._await()

    def epoch(self, seed: int) -> None:
        """Train an epoch, with random numbers from ``seed``."""
        self._seed = seed
        self._reset_attributes()
        self._may_run.release()
        self._await()
        self.batches.epoch += 1

    def _await(self) -> None:
        self._waits.acquire()
        if self._error is not None:
            raise self._error

    def _fit(self) -> None:
        torch.set_num_threads(1)
        try:
            self.trainer.fit(self.module, train_dataloaders=self.batches, val_dataloaders=self.validation)
        except BaseException as error:
            self._error = error
        finally:
            self._draws.close()
            self._waits.release()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draws.close()
        self._waits.release()
        self._may_run.acquire()
        self._draws.enter_context(isolated_rng(self._seed))

    def _attributes(self) -> dict[str, Any]:
        """Return copies of the module's plain attributes; what they hold of its networks is not copied."""
        parts = [*self.module.modules(), *self.module.parameters(), *self.module.buffers()]
        memo: dict[int, Any] = {id(part): part for part in parts}
        return {name: copy.deepcopy(vars(self.module)[name], memo) for name in self._names()}

    def _names(self) -> list[str]:
        taken = {"training", *self.attributes}
        return [name for name in vars(self.module) if not name.startswith("_") and name not in taken]

    def _reset_attributes(self) -> None:
        kept = {name: operator.attrgetter(name)(self.module) for name in self.attributes}
        for name in self._names():
            del vars(self.module)[name]
        vars(self.module).update(self.first_attributes)
        self.first_attributes = self._attributes()
        for name, value in kept.items():
            owner, _, last = name.rpartition(".")
            setattr(operator.attrgetter(owner)(self.module) if owner else self.module, last, value)


def clients_alone(
    make: Callable[[], L.LightningModule],
    data: Any,
    *,
    rounds: int,
    steps: Sequence[int],
    validation: Callable[[Any, int], Any] = lambda data, client_id: None,
    optimizer_state: str = "keep",
    client_attributes: Sequence[str] = (),
    client_callbacks: Sequence[L.Callback] = (),
    client_trainer: dict[str, Any] | None = None,
    logger: Callable[[], Any] = lambda: False,
    seed: int = 0,
) -> tuple[dict[str, Tensor], list[Client]]:
    """Return the average weights and buffers after the last epoch, and the clients.

    Args:
        make: Makes the module, always with the same weights.
        data: Says what a client holds.
        rounds: Number of epochs.
        steps: Minibatches of an epoch, by client.
        validation: What a client is validated on.
        optimizer_state, client_attributes, client_callbacks, client_trainer: Those of the federation.
        logger: Makes a client's logger.
        seed: Root seed of the federation.
    """
    clients = [
        Client(
            make(),
            EpochsOfAClient(data, k, steps[k]),
            validation=validation(data, k),
            attributes=client_attributes,
            callbacks=copy.deepcopy(list(client_callbacks)),
            max_epochs=rounds,
            logger=logger(),
            **(client_trainer or {}),
        )
        for k in range(data.num_clients)
    ]
    sizes = torch.tensor([float(data.num_examples(k)) for k in range(data.num_clients)], dtype=torch.float64)
    state = states_of(clients[:1])[0]
    for epoch in range(rounds):
        for k, client in enumerate(clients):
            client.epoch(derive_seed(seed, "client", epoch, k))
        trained = {name for name, _ in clients[0].module.named_parameters()}
        state = average(states_of(clients), sizes, before=state, trained=trained)
        if epoch < rounds - 1:
            for client in clients:
                client.module.load_state_dict(state)
            {"keep": lambda *_: None, "reset": reset_moments, "average": average_moments}[optimizer_state](
                [client.trainer.optimizers for client in clients], sizes
            )
    return state, clients


def states_of(clients: Sequence[Client]) -> list[dict[str, Tensor]]:
    return [{n: v.detach().clone() for n, v in client.module.state_dict().items()} for client in clients]


def mean(sizes: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Return the mean weighted by N_k / N, in float64."""
    return torch.stack([size * value.double() for size, value in zip(sizes, values)]).sum(0) / sizes.sum()


def average(
    states: Sequence[dict[str, Tensor]], sizes: Tensor, *, before: dict[str, Tensor], trained: Collection[str]
) -> dict[str, Tensor]:
    """Return means weighted by N_k / N: variances as those of the pooled data, integers rounded, counts of BatchNorm's
    minibatches as they were.

    Of parameters the differences are averaged. In exact numbers that is the same, and in float32 it is what a
    federation does: biases before BatchNorm have no gradient but rounding, and Adam makes steps of that as long as any.
    """
    found = {}
    for name, old in before.items():
        values = [state[name] for state in states]
        if name.endswith("num_batches_tracked"):
            new = old
        elif name in trained:
            new = old + mean(sizes, [value - old for value in values]).to(old.dtype)
        elif name.endswith("running_var"):
            means = [state[name.replace("running_var", "running_mean")].double() for state in states]
            new = mean(sizes, [v.double() + m.square() for v, m in zip(values, means)]) - mean(sizes, means).square()
        else:
            new = mean(sizes, values)
        found[name] = (new if old.is_floating_point() else new.round()).to(old.dtype)
    return found


def reset_moments(optimizers: Sequence[Sequence[torch.optim.Optimizer]], sizes: Tensor) -> None:
    """Have all optimizers forget what they know."""
    for own in optimizers:
        for optimizer in own:
            optimizer.state.clear()


def average_moments(optimizers: Sequence[Sequence[torch.optim.Optimizer]], sizes: Tensor) -> None:
    """Give all optimizers the weighted means of what they know."""
    for same in zip(*optimizers):
        parameters = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in same]
        for counterparts in zip(*parameters):
            entries = [optimizer.state[p] for optimizer, p in zip(same, counterparts)]
            for key in entries[0]:
                new = mean(sizes, [entry[key] for entry in entries]).to(entries[0][key].dtype)
                for entry in entries:
                    entry[key] = new.clone()
