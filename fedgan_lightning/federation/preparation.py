"""What Lightning calls once in a fit, called once in a federation: on the global module, before the first round.

Networks and weights that are made there belong to the server's start; clients are copies of it.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import types
from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler

from fedgan_lightning.errors import ConfigurationError, FedGANError, message
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.hooks import nothing

logger = logging.getLogger("fedgan_lightning")

#: Hooks of a module in the order in which Lightning calls them before it trains.
BEFORE = ("prepare_data", "setup", "configure_model", "on_fit_start")
#: Those that follow when it has trained, by the one of the first that must have been called.
AFTER = {"on_fit_end": "on_fit_start", "teardown": "setup"}
#: Whose hooks may run for every client and round.
LIBRARIES = ("lightning.", "fedgan_lightning.")
#: Hooks of a module about data of its own: those are the federation's.
LOADERS = ("train_dataloader", "val_dataloader")


def is_foreign(module: L.LightningModule) -> bool:
    """Whether a module is of a class that somebody else has written."""
    return not type(module).__module__.startswith(LIBRARIES)


def own_hook(module: L.LightningModule, name: str) -> bool:
    """Whether somebody else's class gives a module this hook."""
    owner = next((own for own in type(module).__mro__ if name in vars(own)), type(module))
    return not owner.__module__.startswith(LIBRARIES)


def prepare(module: L.LightningModule, *, stage: str, trainer: L.Trainer) -> frozenset[str]:
    """Call the hooks that somebody else's module has for the start of a fit; return the names of those called.

    Args:
        module: The global module.
        stage: ``fit``, ``test``, ...
        trainer: What it finds as its Trainer.

    Raises:
        ConfigurationError: If one cannot be called before the first round.
    """
    called = set()
    before, module.trainer = module._trainer, trainer  # type: ignore[assignment]
    try:
        for name in BEFORE:
            if not own_hook(module, name) or (name == "on_fit_start" and stage != "fit"):
                continue
            if name == "on_fit_start":
                if _is_called_early(module):
                    called.add(name)
                continue
            _call(module, name, *((stage,) if name == "setup" else ()))
            called.add(name)
    finally:
        module.trainer = before
    _check_initialised(module)
    return frozenset(called)


def _call(module: L.LightningModule, name: str, *arguments: Any) -> None:
    try:
        getattr(module, name)(*arguments)
    except FedGANError:
        raise
    except Exception as error:
        raise ConfigurationError(
            message(
                f"{name}() of {type(module).__name__} must run once before the first round, without a client's data",
                received=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                fix="make there what does not depend on minibatches, and look at those in training_step",
            )
        ) from error


def _is_called_early(module: L.LightningModule) -> bool:
    """Call ``on_fit_start``, unless it needs optimizers or data: then clients call it themselves, every round."""
    kept = dict(vars(module))
    try:
        module.on_fit_start()
    except Exception as error:
        vars(module).clear()
        vars(module).update(kept)
        logger.warning(
            f"{type(module).__name__}.on_fit_start is called for every client and round: before the first one it fails "
            f"({type(error).__name__}: {error})"
        )
        return False
    return True


def _check_initialised(module: nn.Module) -> None:
    """Refuse parameters that have no shape yet: nobody could say what travels.

    Raises:
        ConfigurationError: If there are any.
    """
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    lazy = [name for name, value in tensors if is_lazy(value)]
    if lazy:
        raise ConfigurationError(
            message(
                f"{type(module).__name__} must have its shapes before the first round",
                received=f"{lazy[0]} of a lazy layer, which no data have passed",
                fix="pass an example through it in setup(), such as self(torch.zeros(1, 3, 32, 32))",
            )
        )


def warn_of_loaders(module: L.LightningModule, *, validates: bool) -> None:
    """Say which hooks about data nobody calls."""
    name = type(module).__name__
    for hook in LOADERS:
        if own_hook(module, hook):
            logger.warning(f"{name}.{hook} is not called: clients have the federation's data")
    if is_overridden("validation_step", module) and own_hook(module, "validation_step") and not validates:
        logger.warning(f"{name}.validation_step is not called: set data.validation_share to hold out some of clients'")


def validates(data: Any) -> bool:
    """Whether data hold out a share of every client's samples for validation."""
    return bool(getattr(data, "validation_share", 0)) and hasattr(data, "client_validation_batches")


def finish(module: L.LightningModule, prepared: Iterable[str], *, stage: str, trainer: L.Trainer) -> None:
    """Call what follows the hooks that have been called."""
    before, module.trainer = module._trainer, trainer  # type: ignore[assignment]
    try:
        for name, first in AFTER.items():
            if first in prepared and own_hook(module, name):
                getattr(module, name)(*((stage,) if name == "teardown" else ()))
    finally:
        module.trainer = before


def client_copy(model: L.LightningModule, policy: Policy, prepared: Iterable[str] = ()) -> L.LightningModule:
    """Return a copy of the global module as clients have it.

    A network that lives on the server alone, and that the module declares as such, is ``None``. Hooks that were called
    on the global module do nothing.
    """
    trainer = model._trainer
    model.trainer = None  # a copy of the module must not copy the server's Trainer
    try:
        copied = _copied(model)
    finally:
        model.trainer = trainer
    for network in policy.absent_networks:
        setattr(copied, network, None)
    for value in [own for child in copied.modules() for own in vars(child).values()]:
        if isinstance(value, LRScheduler):
            _count_steps(value.optimizer)
    done = {*prepared, *(last for last, first in AFTER.items() if first in prepared)}
    for name in done:
        object.__setattr__(copied, name, nothing)
    return copied


def _count_steps(optimizer: Any) -> None:
    """Let a schedule that was copied see the steps of its optimizer, as torch does where one is made."""
    step = optimizer.step
    if hasattr(step, "_wrapped_by_lr_sched"):
        return

    @functools.wraps(step.__func__)
    def counted(*arguments: Any, **options: Any) -> Any:
        optimizer._opt_called = True
        return step(*arguments, **options)

    counted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = counted


def without_validation(module: L.LightningModule) -> None:
    """Let a client's module have no ``validation_step``, so that no Trainer misses its data."""
    object.__setattr__(module, "validation_step", types.MethodType(L.LightningModule.validation_step, module))


def _copied(model: L.LightningModule) -> L.LightningModule:
    try:
        return copy.deepcopy(model)
    except (TypeError, RuntimeError, AttributeError):  # something in it cannot be copied
        return copy.deepcopy(model, memo=_uncopied(model))


def _uncopied(model: nn.Module) -> dict[int, Any]:
    """Return what ``deepcopy`` is to take for attributes that it cannot copy itself.

    Results of a computation lose its graph; what cannot be copied at all, such as a lock, is shared.
    """
    memo: dict[int, Any] = {}
    for child in model.modules():
        for value in vars(child).values():
            _spare(value, memo)
    return memo


def _spare(value: Any, memo: dict[int, Any]) -> None:
    if isinstance(value, Tensor):
        if not value.is_leaf:
            memo[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
        return
    if isinstance(value, nn.Module) or value is None or isinstance(value, (bool, int, float, str)):
        return
    if isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _spare(item, memo)
        return
    try:
        copy.deepcopy(value, memo={})
    except (TypeError, RuntimeError, AttributeError):
        memo[id(value)] = value
