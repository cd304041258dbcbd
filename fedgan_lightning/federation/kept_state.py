"""What a client keeps from round to round beside entries of its module: named attributes, callbacks, plateaus.

Everything else that is no entry is put back before every client. See :mod:`.attributes` and :mod:`.plain_state`.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.attributes import AttributeSnapshot
from fedgan_lightning.federation.client_update import Visit
from fedgan_lightning.federation.plain_state import decode, encode, parts_of
from fedgan_lightning.federation.sampling import round_half_up
from fedgan_lightning.protocol import State

logger = logging.getLogger("fedgan_lightning")

#: Hooks of a client's callbacks that are called in its first round alone, and those that are not called.
FIRST, LAST = ("on_fit_start",), ("on_fit_end", "teardown")
#: Callbacks that own a Trainer's whole run, or its epochs, by the name of their class or of one that it inherits.
UNUSABLE = {
    "StochasticWeightAveraging": "a callback of your own that keeps an average",
    "WeightAveraging": "a callback of your own that keeps an average",
    "Checkpoint": "trainer.callbacks, on the server",
    "GradientAccumulationScheduler": "client_trainer.accumulate_grad_batches",
    "BaseFinetuning": "requires_grad_ in the module, and federation.sync of what it thaws",
    "ProgressBar": "trainer.callbacks, on the server",
}
#: What of a callback's attributes is no state of its own: a Trainer sets the last two.
NO_STATE = (*FIRST, *LAST, "log", "log_dict")


class KeptState:
    """Puts a module and its callbacks back before every client, and keeps what the user names.

    Args:
        module: The resident module of the clients.
        attributes: Dotted names of the attributes that every client keeps.
        callbacks: The user's callbacks on clients; they are copied.
        ignored: Attributes that the module sets itself when a round begins.
        left: Attributes that are left alone, since they say nothing of a client.
    """

    def __init__(
        self,
        module: L.LightningModule,
        *,
        attributes: Sequence[str] = (),
        callbacks: Sequence[L.Callback] = (),
        ignored: frozenset[str] = frozenset(),
        left: frozenset[str] = frozenset(),
    ) -> None:
        self.module, self.attributes, self.ignored = module, tuple(attributes), ignored
        check_attributes(module, self.attributes)
        self.callbacks = [copy.deepcopy(callback) for callback in callbacks]
        self._start = {name: _at(module, name) for name in self.attributes}
        self._snapshot = AttributeSnapshot(module, left=left)
        self._of_callbacks = [AttributeSnapshot(_Holder(callback)) for callback in self.callbacks]
        self._parts = parts_of(module) if attributes or callbacks else {}
        self._has_warned = False

    def load(self, private: State) -> None:
        """Put everything back, and give the client what it has kept."""
        self._warn(self._snapshot.restore())
        for name, start in self._start.items():
            kept = namespaces.inside(f"{namespaces.ATTRIBUTE}{name}/", private)
            if kept:
                owner, last = _owner(self.module, name)
                setattr(owner, last, decode(kept, start, parts=self._parts))
        for index, (callback, snapshot) in enumerate(zip(self.callbacks, self._of_callbacks)):
            snapshot.restore()
            kept = namespaces.inside(f"{namespaces.CALLBACK}{index}/", private)
            for hook in (*LAST, *(FIRST if kept else ())):
                vars(callback)[hook] = _nothing_more

    def load_callbacks(self, private: State) -> None:
        """Give callbacks that have been set up what the client has kept of them."""
        for index, callback in enumerate(self.callbacks):
            kept = namespaces.inside(f"{namespaces.CALLBACK}{index}/", private)
            if kept:
                _load(callback, decode(kept, _state(callback), parts=self._parts))

    def private(self, schedulers: Sequence[Any]) -> dict[str, Tensor]:
        """Return what the client keeps after a round."""
        found: dict[str, Tensor] = {}
        for name in self.attributes:
            value = encode(_at(self.module, name), what=f"client attribute {name}", parts=self._parts)
            found |= namespaces.under(f"{namespaces.ATTRIBUTE}{name}/", value)
        for index, callback in enumerate(self.callbacks):
            what = f"the state of {type(callback).__name__}"
            value = encode(_state(callback), what=what, parts=self._parts)
            found |= namespaces.under(f"{namespaces.CALLBACK}{index}/", value)
        for index, scheduler in enumerate(schedulers):
            if isinstance(scheduler, ReduceLROnPlateau):
                rates = [group["lr"] for group in scheduler.optimizer.param_groups]
                value = encode([scheduler.state_dict(), rates], what=type(scheduler).__name__)
                found |= namespaces.under(f"{namespaces.PLATEAU}{index}/", value)
        return found

    def _warn(self, changed: list[str]) -> None:
        """Say once which attributes training changes: users of a plain Trainer count on them from epoch to epoch."""
        lost = [name for name in changed if name not in self.attributes and name not in self.ignored]
        lost = [name for name in lost if not _is_remade(self.module, name)]
        lost = [name for name in lost if not name.startswith(tuple(f"{own}." for own in self.attributes))]
        if lost and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"training changes attributes of {type(self.module).__name__}, which are put back before every client: "
                f"{', '.join(lost[:8])}. To keep them for each client, set federation.client_attributes to their names"
            )


def own_clock(visit: Visit) -> None:
    """Let a visit begin where its client has come to itself: under local epochs clients take unequal steps.

    A client that was not asked for a while has come as far as its minibatches: the rest follows in proportion.
    """
    kept = namespaces.inside(namespaces.CLOCK, visit.stored)
    if not kept:
        return
    minibatches, steps, *positions = (float(value) for value in kept["counts"].tolist())
    share = visit.clock.minibatches / minibatches if minibatches else 1.0
    visit.clock = replace(visit.clock, global_step=round_half_up(steps * share))
    if visit.clock.minibatches == minibatches:
        visit.positions = tuple(int(position) for position in positions)


def counts(visit: Visit, steps: int, positions: Sequence[float]) -> dict[str, Tensor]:
    """Return how far a client has come after this round; nothing where the server knows it.

    Args:
        visit: The round.
        steps: Steps of its optimizers in it.
        positions: Steps that its schedules have taken in all.
    """
    if visit.tasks[0].epochs is None:
        return {}
    minibatches = visit.clock.minibatches + visit.infos[0].num_steps
    found = [float(minibatches), float(visit.clock.global_step + steps), *positions]
    return {f"{namespaces.CLOCK}counts": torch.tensor(found, dtype=torch.float64)}


def restore_plateaus(schedulers: Sequence[Any], private: State) -> None:
    """Give schedules that follow a metric what the client has kept of them."""
    for index, scheduler in enumerate(schedulers):
        kept = namespaces.inside(f"{namespaces.PLATEAU}{index}/", private)
        if kept and isinstance(scheduler, ReduceLROnPlateau):
            state, rates = decode(kept, None)
            scheduler.load_state_dict(state)
            for group, rate in zip(scheduler.optimizer.param_groups, rates):
                group["lr"] = rate


def check_attributes(module: nn.Module, names: Sequence[str]) -> None:
    """Refuse names of attributes that a module has not, or that travel anyway.

    Raises:
        ConfigurationError: If there is one.
    """
    entries = {*dict(module.named_parameters()), *dict(module.named_buffers()), *dict(module.named_modules())}
    for name in names:
        owner = _owner(module, name)[0]
        if name in entries or not hasattr(owner, name.rpartition(".")[2]):
            found = "an entry of its state_dict" if name in entries else "no such attribute"
            raise ConfigurationError(
                message(
                    f"federation.client_attributes must name plain attributes of {type(module).__name__}",
                    received=f"{name}, {found}",
                    fix="name one that __init__ or setup makes, by its dotted path",
                )
            )
        encode(_at(module, name), what=f"client attribute {name}", parts=parts_of(module))


class _Holder(nn.Module):
    """Makes a callback's attributes those of a module."""

    def __init__(self, callback: L.Callback) -> None:
        super().__init__()
        object.__setattr__(self, "callback", callback)


def _nothing_more(*arguments: Any, **options: Any) -> None:
    """Stand for a hook that is not called again."""


def _state(callback: L.Callback) -> Any:
    """Return a callback's state: what it says itself, or else its attributes."""
    if type(callback).state_dict is not L.Callback.state_dict:
        return callback.state_dict()
    own = {name: value for name, value in vars(callback).items() if name not in NO_STATE}
    return {name: value for name, value in own.items() if not (inspect.isroutine(value) or _is_trainer_s(value))}


def _is_trainer_s(value: Any) -> bool:
    return isinstance(value, (L.Trainer, L.LightningModule))


def check_callbacks(callbacks: Sequence[L.Callback]) -> None:
    """Refuse callbacks that no client's Trainer can have, since it ends with the round.

    Raises:
        ConfigurationError: If there is one.
    """
    for callback in callbacks:
        found = next((own.__name__ for own in type(callback).__mro__ if own.__name__ in UNUSABLE), None)
        if found is not None:
            raise ConfigurationError(
                message(
                    "federation.client_callbacks must be callbacks that can begin anew with every round",
                    received=type(callback).__name__,
                    fix=f"use {UNUSABLE[found]}",
                )
            )


def _load(callback: L.Callback, state: Any) -> None:
    if type(callback).state_dict is not L.Callback.state_dict:
        callback.load_state_dict(state)
    else:
        vars(callback).update(state)


def _is_remade(module: nn.Module, name: str) -> bool:
    """Whether an attribute is one that others make anew: optimizers and schedules, and weights that hooks compute."""
    owner, last = _owner(module, name)
    value = getattr(owner, last, None)
    return isinstance(value, (Optimizer, LRScheduler)) or bool(
        isinstance(value, Tensor) and getattr(owner, "_forward_pre_hooks", None)
    )


def _owner(module: nn.Module, name: str) -> tuple[Any, str]:
    *path, last = name.split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part, None)
    return owner, last


def _at(module: nn.Module, name: str) -> Any:
    owner, last = _owner(module, name)
    return getattr(owner, last)
