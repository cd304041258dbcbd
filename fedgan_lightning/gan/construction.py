"""How a module was constructed, as plain values in a checkpoint, and the way back.

A description of an object is ``{class_path, init_args}``, as in configuration files; of what makes an optimizer or a
schedule, the same with ``partial: true``. Without ``init_args`` nobody knows the arguments, and whoever loads the
checkpoint passes the object. Nothing of a file is executed: of its class paths only networks, losses and the like of
this package are imported, and optimizers and schedules of torch.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedgan_lightning.errors import CheckpointError, ConfigurationError, message
from fedgan_lightning.gan.average import uncompiled
from fedgan_lightning.gan.conditions import Codec, Condition
from fedgan_lightning.gan.objectives import AdversarialLoss
from fedgan_lightning.gan.penalties import Penalty
from fedgan_lightning.gan.priors import Prior
from fedgan_lightning.options import CONSTRUCTED_WITH, as_plain

#: Key of a checkpoint.
CONSTRUCTION = "constructed_with"
PACKAGE = "fedgan_lightning."
#: What a class path of this package may name, and one of torch.
PARTS = (nn.Module, AdversarialLoss, Penalty, Prior, Condition, Codec)
MADE_BY_FACTORIES = (Optimizer, LRScheduler)


class NotHeld:
    """Stands for a function that no checkpoint holds; all but training works without it.

    Args:
        owner: Class that was loaded.
        argument: Its argument.
        shown: What the function was called.
    """

    def __init__(self, owner: str, argument: str, shown: str) -> None:
        self.owner, self.argument, self.shown = owner, argument, shown

    def __call__(self, *_: Any) -> Any:
        """Refuse.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            message(
                f"{self.owner}.load_from_checkpoint must be given {self.argument}=... to train on",
                received=f"a checkpoint of a module with {self.shown}, a function, which no checkpoint holds",
                fix=f"pass {self.argument}={self.shown}, or partial(torch.optim.Adam, lr=...), which is held",
            )
        )


# ---------------------------------------------------------------------- to a checkpoint


def describe(module: Any, constructor: Callable[..., None]) -> dict[str, Any]:
    """Return the arguments of a module by name, as plain values; default functions are left out.

    Args:
        module: It keeps every argument under its name.
        constructor: The constructor that has these arguments.
    """
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    values = {parameter.name: getattr(module, parameter.name) for parameter in parameters}
    functions = [parameter for parameter in parameters if inspect.isroutine(parameter.default)]
    defaults = {parameter.name for parameter in functions if parameter.default is values[parameter.name]}
    return {name: described(value) for name, value in values.items() if name not in defaults}


def described(value: Any) -> Any:
    """Return plain values for a plain value, an object, something that makes optimizers, or a list of these."""
    if isinstance(value, nn.Module):
        value = uncompiled(value)
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if isinstance(value, NotHeld):
        return {"function": value.shown}
    if isinstance(value, partial):
        return _described_partial(value)
    if isinstance(value, type) or inspect.isroutine(value):
        is_made = isinstance(value, type) and issubclass(value, MADE_BY_FACTORIES)
        return _described_partial(partial(value)) if is_made else {"function": value.__qualname__}
    try:
        return as_plain(value)
    except TypeError:
        known = _arguments_of(value)
        return {"class_path": path_of(type(value))} | ({} if known is None else {"init_args": known})


def path_of(kind: type) -> str:
    """Return the class path of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _arguments_of(value: Any) -> dict[str, Any] | None:
    """Return the arguments of an object of this package; ``None`` if they are not known."""
    if not type(value).__module__.startswith(PACKAGE):
        return None
    kept = vars(value).get(CONSTRUCTED_WITH)
    if kept is not None or isinstance(value, nn.Module):
        return kept  # type: ignore[no-any-return]
    return None if inspect.signature(type(value)).parameters else {}


def _described_partial(value: partial[Any]) -> dict[str, Any]:
    """Return the description of a partial of an optimizer's class; the parser of configurations calls it by others."""
    is_parsed = getattr(value.func, "__module__", "").startswith("jsonargparse.") and value.args
    made, positional = (value.args[-1], ()) if is_parsed else (value.func, value.args)
    if isinstance(made, type) and not positional:
        try:
            return {"class_path": path_of(made), "init_args": as_plain(value.keywords), "partial": True}
        except TypeError:
            pass
    return {"function": getattr(made, "__qualname__", "a partial")}


# ---------------------------------------------------------------------- and back


def arguments_from(
    checkpoint: Mapping[str, Any],
    constructor: Callable[..., None],
    *,
    owner: str,
    given: Mapping[str, Any],
    required_only: bool = False,
) -> dict[str, Any]:
    """Return arguments for a constructor: those given, and the others as a checkpoint describes them.

    Args:
        checkpoint: Its contents.
        constructor: What the arguments are for.
        owner: The class that the user loads.
        given: Arguments that the user passes.
        required_only: Describe those without a default alone: another constructor's may mean something else.

    Raises:
        ConfigurationError: If one is missing whose value the checkpoint does not hold.
        CheckpointError: If the description is none.
    """
    held = checkpoint.get(CONSTRUCTION, {})
    passed = {*given, *checkpoint.get("hyper_parameters", {}), checkpoint.get("hparams_name")}  # by Lightning
    found, needed = dict(given), []
    for name, parameter in list(inspect.signature(constructor).parameters.items())[1:]:
        is_required = parameter.default is parameter.empty
        if name in passed or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if name in held and (is_required or not required_only):
            found[name] = _rebuilt(held[name], owner=owner, argument=name)
        elif is_required:
            needed.append(name)
    if needed:
        raise ConfigurationError(
            message(
                f"{owner}.load_from_checkpoint must be given {', '.join(f'{name}=...' for name in needed)}",
                received="a checkpoint that says nothing of what the module was constructed with",
                fix="pass what it was made of, as in training",
            )
        )
    return found


def _rebuilt(description: Any, *, owner: str, argument: str) -> Any:
    if isinstance(description, list):
        return [_rebuilt(item, owner=owner, argument=argument) for item in description]
    if not isinstance(description, Mapping):
        return description
    if "function" in description:
        return NotHeld(owner, argument, str(description["function"]))
    path, arguments = str(description.get("class_path")), description.get("init_args")
    name = path.rpartition(".")[2]
    if not isinstance(arguments, Mapping) or not path.startswith((PACKAGE, "torch.optim.")):
        if description.get("partial"):
            return NotHeld(owner, argument, name)
        raise ConfigurationError(
            message(
                f"{owner}.load_from_checkpoint must be given {argument}=...",
                received=f"{name}, whose arguments no checkpoint holds",
                fix=f"pass {argument}={name}(...)",
            )
        )
    kind = _imported(path, MADE_BY_FACTORIES if description.get("partial") else PARTS)
    return partial(kind, **arguments) if description.get("partial") else kind(**arguments)


def _imported(path: str, bases: tuple[type, ...]) -> type:
    """Return the class of a path in a checkpoint.

    Raises:
        CheckpointError: If there is none, or not of such a kind.
    """
    place, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(place), name, None)
    except ImportError:
        found = None
    if isinstance(found, type) and issubclass(found, bases) and found.__module__ == place:
        return found
    raise CheckpointError(
        message(
            "a checkpoint must be made of networks, losses and optimizers that this version has",
            received=path,
            fix="load it with the version that wrote it, or pass the object",
        )
    )
