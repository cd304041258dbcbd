"""``executor: auto``: the faster of the two ways to run clients here, by measurement, on the best number of threads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.federation.agreement import NOTHING_TO_COMPARE, disagreement, trial_context
from fedgan_lightning.federation.cohort import CohortTrainer
from fedgan_lightning.federation.executors.sequential import SequentialExecutor
from fedgan_lightning.federation.executors.trials import Trials, Way, threads
from fedgan_lightning.federation.executors.vectorized import StackingError, VectorizedExecutor
from fedgan_lightning.federation.local import ClientContext
from fedgan_lightning.federation.ranks import Ranks, first_known
from fedgan_lightning.files import cache_folder, write_text
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import ClientFailure, ClientTask, ClientUpdate, Executor
from fedgan_lightning.version import __version__

logger = logging.getLogger("fedgan_lightning")

#: A way that is more involved must be faster by this factor, for what it takes in memory.
WORTH_IT = 1.02
#: A step as long as this keeps a CPU busy with arithmetic.
BUSY_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Plan:
    """How clients are run.

    Attributes:
        chunk_size: Clients per stack; 1 runs them one after the other.
        num_threads: Threads of torch.
        reason: Why, in one line.
    """

    chunk_size: int
    num_threads: int
    reason: str

    def describe(self) -> str:
        """Return the choice and the reason in one line."""
        way = "one client after the other" if self.chunk_size == 1 else f"{self.chunk_size} clients stacked at a time"
        threads = "1 thread" if self.num_threads == 1 else f"{self.num_threads} threads"
        return f"executor: {way}, {threads} ({self.reason})"


class AutoExecutor(Executor):
    """Chooses between the sequential and the vectorized executor, stack size and threads, when the first round starts.

    Clients of that round are trained for a few steps in each way, without effect on the federation. The choice is said
    in one line, kept in checkpoints and, by workload and machine, in a cache: a run that is repeated or resumed makes
    the same choice, hence the same rounding errors.

    Args:
        num_threads: Threads to use; default measured.
        cache: Folder of the cache; default ``$FEDGAN_CACHE`` or ``~/.cache/fedgan_lightning``.
    """

    @checked(num_threads="[1, inf)")
    def __init__(self, *, num_threads: int | None = None, cache: str | None = None) -> None:
        self.num_threads, self.cache = num_threads, cache
        self.plan: Plan | None = None
        self._context: ClientContext | None = None
        self._executor: VectorizedExecutor | SequentialExecutor | None = None

    def setup(self, context: ClientContext) -> None:
        self._context, self._executor = context, None

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        if self._context is None:
            raise RuntimeError("AutoExecutor.run before setup; fix: call setup first.")
        listed, ranks = list(tasks), self._context.ranks
        if self.plan is None:
            own = self._remembered(listed) if listed else None
            known = first_known(ranks.exchange(None if own is None else dataclasses.asdict(own)))
            if known is None:
                return
            self.plan = Plan(**known)  # one for all ranks
            if ranks.rank == 0:
                logger.info(self.plan.describe())
        if self._executor is None:
            stacked = self.plan.chunk_size > 1
            self._executor = VectorizedExecutor(chunk_size=self.plan.chunk_size) if stacked else SequentialExecutor()
            self._executor.setup(self._context)
        with threads(self.plan.num_threads):
            answered: set[int] = set()
            try:
                for answer in self._executor.run(listed):
                    answered.add(answer.client_id)
                    yield answer
            except StackingError as error:  # a choice of other days, or of other data
                reason = str(error).split(" Fix:")[0]
                self.plan = dataclasses.replace(self.plan, chunk_size=1, reason=reason)
                logger.warning(self.plan.describe())
                self._keep(self.plan, self._path(listed))
                self._executor.teardown()
                self._executor = SequentialExecutor()
                self._executor.setup(self._context)
                yield from self._executor.run([task for task in listed if task.client_id not in answered])

    def teardown(self) -> None:
        if self._executor is not None:
            self._executor.teardown()
        self._context = self._executor = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.plan is None else dataclasses.asdict(self.plan)

    def facts(self) -> dict[str, Any]:
        return self.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.plan = Plan(**state) if state else None

    # ------------------------------------------------------------------ choosing

    def _remembered(self, tasks: list[ClientTask]) -> Plan:
        """Return the plan of an earlier run of this workload on this machine, or make one and keep it."""
        path = self._path(tasks)
        try:
            return Plan(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            plan = self._choose(tasks)
        if plan.reason != NOTHING_TO_COMPARE:
            self._keep(plan, path)
        return plan

    def _keep(self, plan: Plan, path: Path) -> None:
        try:
            write_text(path, json.dumps(dataclasses.asdict(plan)))
        except OSError:  # a cache that cannot be written is no reason to stop
            logger.warning(f"the choice of executor could not be kept in {path}")

    def _path(self, tasks: list[ClientTask]) -> Path:
        return cache_folder(self.cache) / f"executor-{self._workload(tasks)}.json"

    def _workload(self, tasks: list[ClientTask]) -> str:
        """Return a hash of what the speed depends on."""
        assert self._context is not None
        model, data = self._context.model, self._context.data
        shapes = [tuple(value.shape) for value in model.state_dict().values()]
        facts = [
            __version__,
            torch.__version__,
            platform.machine(),
            platform.processor(),
            available_threads(self._context.ranks),
        ]
        facts += [dict(self._context.trainer_options), self.num_threads, repr(model), shapes, len(tasks)]
        facts.append(described(vars(model)))
        with suppress(Exception):  # a module that asks its trainer is told apart by its settings alone
            facts.append(described(model.configure_optimizers()))
        facts += [tasks[0].local.steps, tasks[0].local.epochs, data.fingerprint()]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def _choose(self, tasks: list[ClientTask]) -> Plan:
        assert self._context is not None
        context = trial_context(self._context)
        _, steps = tasks[0].local.span(round=0, steps_per_epoch=context.data.steps_per_epoch(tasks[0].client_id))
        counts = [self.num_threads] if self.num_threads else sorted({1, available_threads(context.ranks)})
        trials = Trials(context, tasks, steps=steps, counts=counts)
        trials.alone()
        obstacle = _obstacle(context, tasks, seconds_per_step=min(cost.step for cost in trials.costs.values()))
        if obstacle is None:
            trials.stacked()
        trials.run_off()
        seconds = trials.seconds()
        best = min(seconds, key=lambda way: seconds[way] * WORTH_IT ** ((way.chunk_size > 1) + (way.num_threads > 1)))
        reason = obstacle or _comparison(seconds, best, client_steps=len(tasks) * steps)
        return Plan(chunk_size=best.chunk_size, num_threads=best.num_threads, reason=reason)


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


def _comparison(seconds: Mapping[Way, float], best: Way, *, client_steps: int) -> str:
    """Return what the best way costs, and the best of the other kind."""
    other = min(value for way, value in seconds.items() if (way.chunk_size == 1) != (best.chunk_size == 1))
    name = "one by one" if best.chunk_size > 1 else "stacked"
    own, others = (1e3 * value / client_steps for value in (seconds[best], other))
    return f"{own:.2g} ms per client step, {name} {others:.2g}"


def _obstacle(context: ClientContext, tasks: list[ClientTask], *, seconds_per_step: float) -> str | None:
    """Return why clients are not to be stacked, in one line, or ``None``."""
    if len(tasks) == 1:
        return "a single client"
    if context.trainer_options.get("accelerator") == "cpu" and seconds_per_step > BUSY_SECONDS:
        return f"{1e3 * seconds_per_step:.0f} ms per client step: arithmetic, which stacking does not save"
    try:
        CohortTrainer(context)
    except ConfigurationError as error:
        return str(error).split(" Fix:")[0]
    return disagreement(context, tasks)


def available_threads(ranks: Ranks) -> int:
    """Return the cores that this process may use: its part of the host's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks.local_world_size)
