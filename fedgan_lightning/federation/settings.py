"""What objects were made of, as plain values, and what of it differs between two runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any

import torch

from fedgan_lightning.errors import CheckpointError, message

#: Of a longer list, its length and so many elements.
ELEMENTS = 32

#: Settings of an optimizer that depend on the device, and say how it computes and not what.
MEANS = ("foreach", "fused", "capturable", "differentiable")


def described(value: Any, *, depth: int = 4) -> Any:
    """Return what an object was made of: types and settings, without addresses, tensors, modules and private names.

    Args:
        value: Any object.
        depth: Levels to go down; below, an object is its type.

    Returns:
        Numbers, texts, lists, and mappings in which the entry ``type`` is an object's.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Enum, set, frozenset)):
        return value.name if isinstance(value, Enum) else sorted(map(str, value))
    if depth == 0 or isinstance(value, (torch.Tensor, torch.nn.Module)):  # networks are described by their owner
        return type(value).__qualname__
    if isinstance(value, partial):
        arguments = {"arguments": list(value.args)} if value.args else {}
        own = {**arguments, **value.keywords}
        return {"type": described(value.func, depth=depth), **described(own, depth=depth - 1)}
    if isinstance(value, Mapping):
        return {str(key): described(own, depth=depth - 1) for key, own in value.items() if str(key)[:1] != "_"}
    if isinstance(value, (list, tuple)):
        first = [described(one, depth=depth - 1) for one in value[:ELEMENTS]]
        return first if len(value) <= ELEMENTS else [len(value), *first]
    if isinstance(value, torch.optim.Optimizer):
        own_groups = [{**group, "params": len(group["params"])} for group in value.param_groups]
        groups = [{name: group[name] for name in group if name not in MEANS} for group in own_groups]
        return {"type": type(value).__qualname__, "groups": described(groups, depth=depth)}
    if (name := getattr(value, "__qualname__", None)) is not None:  # of a class or function, its name
        return str(name)
    slots = {own: getattr(value, own, None) for own in getattr(type(value), "__slots__", ())}
    own = described({**slots, **getattr(value, "__dict__", {})}, depth=depth - 1)
    return {"type": type(value).__qualname__, **own} if own else type(value).__qualname__


def described_module(module: torch.nn.Module) -> dict[str, Any]:
    """Return what a module was made of: what its constructor was given, its optimizers, and its layers by name.

    Of the former what the module keeps under the same name: other attributes may count what it has done.
    """
    known = {**vars(module), **getattr(module, "hparams", {})}
    own = {name: known[name] for name in inspect.signature(type(module)).parameters if name in known}
    inner = {name: layer for name, layer in module.named_modules() if name}
    leaves = {name: repr(layer) for name, layer in inner.items() if not [*layer.children()]}
    layers = {name: leaves.get(name, type(layer).__qualname__) for name, layer in inner.items()}
    optimizers: Any = None
    with suppress(Exception):  # a module that asks its trainer is told apart by its settings alone
        optimizers = described(module.configure_optimizers(), depth=7)  # type: ignore[operator, union-attr]
    return {"type": type(module).__qualname__, **described(own), "layers": layers, "optimizers": optimizers}


def differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Return ``"KEY was A, is B"`` for every leaf in which two nested mappings differ, and lists of one length."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted({*before, *now}, key=str)
        found = [differences(before.get(key), now.get(key), f"{prefix}{key}.") for key in keys]
        return [line for lines in found for line in lines]
    return [] if before == now else [f"{prefix.rstrip('.')} was {before}, is {now}"]


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other settings.

    Args:
        before: What the checkpoint says.
        now: What the run says.

    Raises:
        CheckpointError: If something differs; names up to three settings.
    """
    if changed := differences(before, now):
        raise CheckpointError(
            message(
                "a run is resumed with the settings it was started with",
                received=f"a checkpoint that differs in {'; '.join(changed[:3])}",
                fix="restore the settings, or start a new run in another directory",
            )
        )
