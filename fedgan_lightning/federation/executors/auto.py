"""``executor: auto``: the faster of the two ways to run clients here, by measurement, on the best number of threads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.federation.agreement import disagreement, shortened, trial_context
from fedgan_lightning.federation.cohort import CohortTrainer
from fedgan_lightning.federation.executors.sequential import SequentialExecutor
from fedgan_lightning.federation.executors.vectorized import VectorizedExecutor
from fedgan_lightning.federation.local import ClientContext, LocalTrainer
from fedgan_lightning.federation.ranks import Ranks, first_known
from fedgan_lightning.protocol import ClientTask, ClientUpdate, Executor
from fedgan_lightning.version import __version__

logger = logging.getLogger("fedgan_lightning")

#: A way that is more involved must be faster by this factor: measurements on shared machines are noisy.
WORTH_IT = 1.05
#: Largest stacks tried, and the memory that the weights, gradients and moments of one may take.
STACK_SIZES, STACK_BYTES = (16, 64, 256), 2 * 1024**3
#: A step as long as this keeps a CPU busy with arithmetic.
BUSY_SECONDS = 0.05
#: Steps that bring mapped networks to speed.
WARM_UP = 6


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

    def __init__(self, *, num_threads: int | None = None, cache: str | None = None) -> None:
        self.num_threads, self.cache = num_threads, cache
        self.plan: Plan | None = None
        self._context: ClientContext | None = None
        self._executor: Executor | None = None

    def setup(self, context: ClientContext) -> None:
        self._context, self._executor = context, None

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate]:
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
            yield from self._executor.run(listed)

    def teardown(self) -> None:
        if self._executor is not None:
            self._executor.teardown()
        self._context = self._executor = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.plan is None else dataclasses.asdict(self.plan)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.plan = Plan(**state) if state else None

    # ------------------------------------------------------------------ choosing

    def _remembered(self, tasks: list[ClientTask]) -> Plan:
        """Return the plan of an earlier run of this workload on this machine, or make one and keep it."""
        folder = self.cache or os.environ.get("FEDGAN_CACHE") or str(Path.home() / ".cache" / "fedgan_lightning")
        path = Path(folder) / f"executor-{self._workload(tasks)}.json"
        try:
            return Plan(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            plan = self._choose(tasks)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(dataclasses.asdict(plan)))
            partial.replace(path)
        except OSError:  # a cache that cannot be written is no reason to stop
            logger.warning(f"the choice of executor could not be kept in {path}")
        return plan

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
        facts += [tasks[0].local.steps, tasks[0].local.epochs, data.fingerprint()]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def _choose(self, tasks: list[ClientTask]) -> Plan:
        assert self._context is not None
        context = self._context
        _, steps = tasks[0].local.span(round=0, steps_per_epoch=context.data.steps_per_epoch(tasks[0].client_id))
        counts = [self.num_threads] if self.num_threads else sorted({1, available_threads(context.ranks)})
        alone = LocalTrainer(trial_context(context))
        sequential = {n: _seconds(lambda s: [alone.run(t) for t in shortened(tasks[:1], steps=s)], n) for n in counts}
        seconds = {(1, n): len(tasks) * (fixed + steps * step) for n, (fixed, step) in sequential.items()}
        reason = _obstacle(context, tasks, seconds_per_step=min(step for _, step in sequential.values()))
        if reason is None:
            cohort = CohortTrainer(trial_context(context))
            for size in _stack_sizes(context, len(tasks)):
                stack = tasks[:size]
                cohort.run(shortened(stack, steps=WARM_UP))
                for n in counts:
                    fixed, step = _seconds(_stacked(cohort, stack), n)
                    seconds[size, n] = math.ceil(len(tasks) / size) * (fixed + steps * step)
        best = min(seconds, key=lambda way: seconds[way] * WORTH_IT ** ((way[0] > 1) + (way[1] > 1)))
        per_step = 1e3 / (len(tasks) * steps)
        if reason is None:
            other = min(value for (size, _), value in seconds.items() if (size == 1) != (best[0] == 1))
            name = "one by one" if best[0] > 1 else "stacked"
            reason = f"{seconds[best] * per_step:.2g} ms per client step, {name} {other * per_step:.2g}"
        return Plan(chunk_size=best[0], num_threads=best[1], reason=reason)


def _stacked(cohort: CohortTrainer, tasks: list[ClientTask]) -> Callable[[int], object]:
    return lambda steps: cohort.run(shortened(tasks, steps=steps))


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


def _stack_sizes(context: ClientContext, cohort: int) -> list[int]:
    """Return the stack sizes worth trying: up to the cohort, within memory."""
    size = sum(value.numel() * value.element_size() for value in context.model.state_dict().values())
    largest = max(2, min(cohort, STACK_SIZES[-1], STACK_BYTES // (4 * max(size, 1))))
    return sorted({*(own for own in STACK_SIZES if own < largest), largest})


def _seconds(run: Callable[[int], object], num_threads: int) -> tuple[float, float]:
    """Return (fixed, per step) seconds of ``run(steps)``: the best of a few, because others only add time."""
    few, many = 1, 4
    best = {few: math.inf, many: math.inf}
    with threads(num_threads):
        run(few)
        deadline = time.perf_counter() + 2.0
        for _ in range(3):
            for steps in best:
                started = time.perf_counter()
                run(steps)
                best[steps] = min(best[steps], time.perf_counter() - started)
            if time.perf_counter() > deadline:
                break
    step = max((best[many] - best[few]) / (many - few), 1e-9)
    return max(best[few] - step, 0.0), step


def available_threads(ranks: Ranks) -> int:
    """Return the cores that this process may use: its part of the host's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks.local_world_size)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the body with ``count`` threads of torch; restore their number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
