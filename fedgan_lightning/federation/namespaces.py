"""Namespaces of entries in tasks, updates and private states: the module's own names, and prefixes beside them.

Names of a module's entries are those of its ``state_dict``. Optimizer moments lie under ``optimizer/``, what an
algorithm sends or keeps under ``algorithm/``, what a transform keeps under ``transform/INDEX/``. A client keeps
plain attributes under ``attribute/NAME/``, states of callbacks under ``callback/INDEX/`` and of schedules that follow a
metric under ``plateau/INDEX/``; how far it has come, where that is not the same for all, under ``clock/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from fedgan_lightning.protocol import State

Value = TypeVar("Value")
MOMENTS, ALGORITHM, TRANSFORM = "optimizer/", "algorithm/", "transform/"
ATTRIBUTE, CALLBACK, PLATEAU, CLOCK = "attribute/", "callback/", "plateau/", "clock/"
PREFIXES = (MOMENTS, ALGORITHM, TRANSFORM, ATTRIBUTE, CALLBACK, PLATEAU, CLOCK)


def of_module(state: State) -> dict[str, Tensor]:
    """Return the entries that belong to the module."""
    return {name: value for name, value in state.items() if not name.startswith(PREFIXES)}


def inside(prefix: str, state: Mapping[str, Value]) -> dict[str, Value]:
    """Return the entries under ``prefix``, without it."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def under(prefix: str, state: Mapping[str, Value]) -> dict[str, Value]:
    """Return the entries with ``prefix`` before their names."""
    return {f"{prefix}{name}": value for name, value in state.items()}


def of_moment(name: str) -> tuple[str, str, str]:
    """Return the optimizer's index, the parameter's name, which may have slashes, and the key of a moment."""
    index, _, rest = name.removeprefix(MOMENTS).partition("/")
    parameter, _, key = rest.rpartition("/")
    return index, parameter, key


def of_transform(index: int) -> str:
    """Return the prefix of the transform at ``index``."""
    return f"{TRANSFORM}{index}/"
