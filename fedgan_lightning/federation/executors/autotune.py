"""``executor: autotune``: the fastest mode to run clients here, by measurement."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.executors.auto import AdaptiveExecutor, ExecutionMode
from fedgan_lightning.federation.executors.autotuner import Autotuner, MeasuredMode
from fedgan_lightning.federation.parity_check import NOTHING_TO_COMPARE, trial_context
from fedgan_lightning.federation.threads import available_threads
from fedgan_lightning.files import cache_folder, write_text
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import ClientTask
from fedgan_lightning.version import __version__

logger = logging.getLogger("fedgan_lightning")

#: A mode that is more involved must be faster by this factor, for what it takes in memory.
WORTH_IT = 1.02
#: A step as long as this keeps a CPU busy with arithmetic.
BUSY_SECONDS = 0.1


class AutotunedExecutor(AdaptiveExecutor):
    """Trains the first clients for a few steps in each mode, without effect on the federation, and takes the fastest.

    The choice depends on what else the machine does in that second, and with it the rounding of results. It is kept,
    by workload and machine, in a cache as well as in checkpoints.

    Args:
        num_threads: Threads to use; default measured.
        cache: Folder of the cache; default ``$FEDGAN_CACHE`` or ``~/.cache/fedgan_lightning``.
    """

    @checked(num_threads="[1, inf)")
    def __init__(self, *, num_threads: int | None = None, cache: str | None = None) -> None:
        super().__init__(num_threads=num_threads)
        self.cache = cache

    def choose(self, context: ClientContext, tasks: list[ClientTask]) -> ExecutionMode:
        path = self._path(context, tasks)
        try:
            return ExecutionMode(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            mode = self._measured(context, tasks)
        if mode.reason != NOTHING_TO_COMPARE:
            self._write(mode, path)
        return mode

    def keep(self, mode: ExecutionMode, tasks: list[ClientTask]) -> None:
        if self.context is not None:
            self._write(mode, self._path(self.context, tasks))

    def _write(self, mode: ExecutionMode, path: Path) -> None:
        try:
            write_text(path, json.dumps(dataclasses.asdict(mode)))
        except OSError:  # a cache that cannot be written is no reason to stop
            logger.warning(f"the choice of executor could not be kept in {path}")

    def _path(self, context: ClientContext, tasks: list[ClientTask]) -> Path:
        return cache_folder(self.cache) / f"executor-{self._workload(context, tasks)}.json"

    def _workload(self, context: ClientContext, tasks: list[ClientTask]) -> str:
        """Return a hash of what the speed depends on."""
        model, data, device = context.model, context.data, context.device
        shapes = [tuple(value.shape) for value in model.state_dict().values()]
        facts: list[Any] = [__version__, torch.__version__, platform.machine(), platform.processor()]
        facts.append(torch.cuda.get_device_name(device) if device.type == "cuda" else str(device))
        facts.append(available_threads(context.ranks))
        facts += [dict(context.trainer_options), self.num_threads, repr(model), shapes, len(tasks)]
        facts += [described(vars(model)), type(context.algorithm).__qualname__, described(vars(context.algorithm))]
        with suppress(Exception):  # a module that asks its trainer is told apart by its settings alone
            facts.append(described(model.configure_optimizers()))
        facts += [tasks[0].steps, tasks[0].epochs, data.fingerprint()]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def _measured(self, context: ClientContext, tasks: list[ClientTask]) -> ExecutionMode:
        trial = trial_context(context)
        _, steps = tasks[0].span(steps_per_epoch=context.data.steps_per_epoch(tasks[0].client_id))
        counts = [self.num_threads] if self.num_threads else sorted({1, available_threads(context.ranks)})
        tuner = Autotuner(trial, tasks, steps=steps, counts=counts)
        tuner.alone()
        obstacle = self._obstacle(trial, tasks, seconds_per_step=min(cost.step for cost in tuner.costs.values()))
        if obstacle is None:
            tuner.stacked()
        tuner.run_off()
        seconds = tuner.seconds()
        best = min(
            seconds, key=lambda mode: seconds[mode] * WORTH_IT ** ((mode.chunk_size > 1) + (mode.num_threads > 1))
        )
        reason = obstacle or _comparison(seconds, best, client_steps=len(tasks) * steps)
        return ExecutionMode(chunk_size=best.chunk_size, num_threads=best.num_threads, reason=reason)

    def _obstacle(self, context: ClientContext, tasks: list[ClientTask], *, seconds_per_step: float) -> str | None:
        """Return why clients are not to be stacked, in one line, or ``None``."""
        if context.data.num_clients == 1:
            return "a single client"
        if context.device.type == "cpu" and seconds_per_step > BUSY_SECONDS:
            return f"{1e3 * seconds_per_step:.0f} ms per client step: arithmetic, which stacking does not save"
        return self.stacking_obstacle(context, tasks)


def described(value: Any, *, depth: int = 4) -> Any:
    """Return what an object was made of as plain values: types and settings, without addresses, tensors and modules."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Enum, set, frozenset)):
        return value.name if isinstance(value, Enum) else sorted(map(str, value))
    if depth == 0 or isinstance(value, (torch.Tensor, torch.nn.Module)):  # networks are described by their owner
        return type(value).__qualname__
    if isinstance(value, partial):
        return [described(value.func, depth=depth), described(value.args, depth=depth - 1), described(value.keywords)]
    if isinstance(value, Mapping):
        return [(str(key), described(own, depth=depth - 1)) for key, own in value.items() if str(key)[:1] != "_"]
    if isinstance(value, (list, tuple)):
        return [len(value), *(described(own, depth=depth - 1) for own in value[:32])]
    if isinstance(value, torch.optim.Optimizer):
        groups = [{**group, "params": len(group["params"])} for group in value.param_groups]
        return [type(value).__qualname__, described(groups, depth=depth)]
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    slots = {own: getattr(value, own, None) for own in getattr(type(value), "__slots__", ())}
    return [name, described({**slots, **getattr(value, "__dict__", {})}, depth=depth - 1)]


def _comparison(seconds: Mapping[MeasuredMode, float], best: MeasuredMode, *, client_steps: int) -> str:
    """Return what the best mode costs, and the best of the other kind."""
    other = min(value for mode, value in seconds.items() if (mode.chunk_size == 1) != (best.chunk_size == 1))
    name = "one by one" if best.chunk_size > 1 else "stacked"
    own, others = (1e3 * value / client_steps for value in (seconds[best], other))
    return f"{own:.2g} ms per client step, {name} {others:.2g}"
