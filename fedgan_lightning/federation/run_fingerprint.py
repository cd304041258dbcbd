"""What objects were made of, as plain values, and what of it differs between two runs.

A run must never be refused for what training, the device or the number of rounds changes, so only what constructors
were given counts, and of that only what an object keeps under the same name: numbers, texts, and further objects.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedgan_lightning.errors import CheckpointError, message

#: Settings that a run may change where that is asked for: what is refused, and by whom, and not what is trained.
MAY_BE_CHANGED: dict[str, tuple[str, ...]] = {
    "federation": ("rules", "validator", "aggregator", "clients", "secure"),
}
#: Settings of an optimizer that depend on the device, and say how it computes and not what.
MEANS = ("foreach", "fused", "capturable", "differentiable")


def made_of(value: Any, *, depth: int = 4) -> Any:
    """Return type and settings of an object.

    Of functions, tensors and networks there is their kind alone: they can be equal without looking so, and what is
    learned is in the checkpoint.

    Args:
        value: Any object.
        depth: Levels to go down; below, an object is its type.

    Returns:
        Numbers, texts, lists, and mappings in which the entry ``type`` is an object's; all of exact types, which a
        checkpoint can hold.
    """
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (Integral, Real)):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, (Tensor, nn.Module)):
        return "Tensor" if isinstance(value, Tensor) else type(value).__qualname__
    if isinstance(value, partial):
        own = {name: given for name, given in value.keywords.items() if name not in MEANS}
        return {"type": made_of(value.func), **_each(own, depth)}
    if inspect.isroutine(value):
        return "function"
    if isinstance(value, type):
        return value.__qualname__
    if depth == 0:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return _each(value, depth)
    if isinstance(value, (list, tuple)):
        return [made_of(one, depth=depth - 1) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return {"type": type(value).__qualname__, **_each(given_to(value), depth)}


def given_to(value: Any) -> dict[str, Any]:
    """Return what a constructor was given, as far as the object keeps it under the same name."""
    known = {**getattr(value, "__dict__", {}), **getattr(value, "hparams", {})}
    try:
        names = inspect.signature(type(value)).parameters
    except (TypeError, ValueError):  # of some built-in types nobody knows
        return {}
    return {name: known[name] for name in names if name in known}


def _each(values: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    return {str(name): made_of(value, depth=max(0, depth - 1)) for name, value in values.items()}


def differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Return ``"KEY was A, is B"`` for every leaf in which two nested mappings differ, and lists of one length."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted({*before, *now}, key=str)
        found = [differences(before.get(key), now.get(key), f"{prefix}{key}.") for key in keys]
        return [line for lines in found for line in lines]
    both_nan = all(isinstance(value, float) and math.isnan(value) for value in (before, now))
    return [] if both_nan or before == now else [f"{prefix.rstrip('.')} was {before}, is {now}"]


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
                "a run must be resumed with the settings it was started with",
                received=f"a checkpoint that differs in {'; '.join(changed[:3])}",
                fix="restore the settings, or start a new run in another directory",
            )
        )


@dataclass(frozen=True)
class RunFingerprint:
    """What a resumed run must share with the one that wrote a checkpoint.

    Attributes:
        settings: Nested plain values, by group and name: the command line's, or what everything was made of.
        identity: What must be equal whatever settings look like, the fingerprint of the data among it.
        is_remote: Whether clients' samples are elsewhere, where new clients leave those of the others as they are.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    is_remote: bool = False

    @classmethod
    def of(cls, federation: Any, server: Any, data: Any) -> RunFingerprint:
        """Return that of a federation."""
        settings = federation.settings or settings_of(federation, server, data)
        is_remote = not getattr(data, "has_client_samples", True)
        return cls(settings=settings, identity=identity_of(federation, server, data), is_remote=is_remote)

    def check(self, before: RunFingerprint, accept: bool = False) -> list[str]:
        """Refuse to continue another run; return what has changed and was accepted.

        Args:
            before: What the checkpoint says.
            accept: Whether rules, screening, aggregator, cohorts and bounds of secure aggregation may differ, and
                clients elsewhere may have joined.

        Raises:
            CheckpointError: If settings, data or anything else differ.
        """
        known = {group: values for group, values in before.settings.items() if group in self.settings}
        now_known = {group: self.settings[group] for group in known}
        changed: list[str] = []
        for group, names in (MAY_BE_CHANGED | ({"data": ("num_clients",)} if self.is_remote else {})).items():
            for name in names if group in known else ():
                changed += differences({name: known[group].get(name)}, {name: now_known[group].get(name)}, f"{group}.")
                known[group], now_known[group] = (
                    {key: own for key, own in one[group].items() if key != name} for one in (known, now_known)
                )
        if changed and not accept:
            raise CheckpointError(
                message(
                    "a run must be resumed with the settings it was started with",
                    received=f"a checkpoint that differs in {'; '.join(changed[:3])}",
                    fix="restore the settings, start a new run in another directory, or have the change accepted and "
                    "recorded with --accept_changes true",
                )
            )
        check_unchanged(known, now_known)  # these say what was changed
        data, now = before.identity["data"], self.identity["data"]
        if data != now and not (accept and self.is_remote):
            raise CheckpointError(
                message(
                    "a run must be resumed with the data it was started with",
                    received=f"other samples, another order, or another division of them among the clients "
                    f"(fingerprint {data} in the checkpoint, {now} here)",
                    fix="restore the data, or start a new run in another directory",
                )
            )
        check_unchanged({**before.identity, "data": now}, self.identity)
        return changed


def identity_of(federation: Any, server: Any, data: Any) -> dict[str, Any]:
    """Return what a resumed run must share whatever its settings look like."""
    return {
        "data": data.fingerprint(),
        "sync": dict(server.policy.sync),
        "placements": {n: own for n, own in server.policy.placements.items() if own != "average"},
        "optimizer_state": dict(server.policy.optimizer_state),
        "buffers": federation.buffers,
        "local_steps": federation.local_steps,
        "local_epochs": federation.local_epochs,
        "algorithm": type(federation.algorithm).__name__,
        "transforms": [type(transform).__name__ for transform in federation.transforms],
        "seed": federation.seed,
    }


def settings_of(federation: Any, server: Any, data: Any) -> dict[str, Any]:
    """Return what a federation that was built in Python was made of, as nested plain values."""
    held = ("num_clients", "partition", "batch_size", "max_samples")
    parts = ("algorithm", "transforms", "schedules", "clients", "aggregator", "rules", "validator", "secure", "privacy")
    return {
        "model": {"type": type(server.model).__qualname__, **made_of(given_to(server.model))},
        "data": {name: made_of(getattr(data, name)) for name in held if hasattr(data, name)},
        "federation": {name: made_of(getattr(federation, name)) for name in parts},
        "server": {"optimizer": made_of(server.optimizer), "scheduler": made_of(server.scheduler)},
    }
