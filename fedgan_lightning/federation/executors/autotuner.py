"""What a round costs one client after the other and stacked, on several numbers of threads, by trying."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fedgan_lightning.errors import ClientError
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.local import LocalTrainer
from fedgan_lightning.federation.memory import out_of_memory, release
from fedgan_lightning.federation.parity_check import largest_group, shortened
from fedgan_lightning.federation.threads import threads
from fedgan_lightning.federation.vectorized_trainer import VectorizedLocalTrainer
from fedgan_lightning.protocol import ClientTask

#: Largest stacks tried, and the memory that the weights, gradients and moments of one may take.
STACK_SIZES, STACK_BYTES = (16, 64, 256), 2 * 1024**3
#: Steps that record mapped networks.
WARM_UP = 1
#: Ways that cost up to this much more than the best one in short trials are tried again, in longer ones.
CLOSE = 1.3
#: Of these, taking turns: the seconds that one turn of one mode aims at, and all of them together.
TURN_SECONDS, RUN_OFF_SECONDS = 0.5, 6.0
TURNS = 5
#: Steps of the longer of two short trials.
MANY = 4


class MeasuredMode(NamedTuple):
    """Clients per stack (1: one after the other), and threads of torch."""

    chunk_size: int
    num_threads: int


class Cost(NamedTuple):
    """Seconds of a client's round, or of a stack's: fixed, and per step."""

    fixed: float
    step: float

    def of(self, steps: int) -> float:
        """Return the seconds of a round of so many steps."""
        return self.fixed + steps * self.step


class Autotuner:
    """Measures modes to run a round of ``tasks``.

    Args:
        context: What clients are trained with; its store is not to be written (:func:`trial_context`).
        tasks: The round's tasks.
        steps: Local steps of each.
        counts: Numbers of threads to try.
    """

    def __init__(
        self, context: ClientContext, tasks: Sequence[ClientTask], *, steps: int, counts: Sequence[int]
    ) -> None:
        self.context, self.tasks, self.steps, self.counts = context, tasks, steps, counts
        self.costs: dict[MeasuredMode, Cost] = {}
        self._alike = largest_group(context, shortened(tasks, steps=max(steps, MANY)))
        self._alone = LocalTrainer(context)
        self._stack_trainer: VectorizedLocalTrainer | None = None  # made only where clients can be stacked

    def alone(self) -> None:
        """Measure one client after the other."""
        for n in self.counts:
            self.costs[MeasuredMode(1, n)] = _cost(lambda steps: self._run(1, 1, steps), n)

    def stacked(self) -> None:
        """Measure stacks of several sizes, up to the first that does not fit into memory."""
        for size in stack_sizes(self.context, len(self._alike)):
            if not self._fits(size):
                return
            for n in self.counts:
                self.costs[MeasuredMode(size, n)] = _cost(lambda steps, size=size: self._run(size, 1, steps), n)  # type: ignore[misc]

    def _fits(self, size: int) -> bool:
        """Train a stack for a step; return whether there is memory for it."""
        try:
            self._run(size, 1, WARM_UP)
        except ClientError as error:
            if not out_of_memory(error):
                raise
        else:
            return True
        self._stack_trainer = None
        release(self.context.device)
        return False

    def run_off(self) -> None:
        """Measure again, taking turns, the modes that short trials leave within :data:`CLOSE` of the best.

        A turn trains about as many clients in every mode. The best turn counts: others on the machine only add time.
        """
        seconds = self.seconds()
        close = [mode for mode, value in seconds.items() if value <= CLOSE * min(seconds.values())]
        if len(close) == 1:
            return
        clients = max(mode.chunk_size for mode in close)
        per_step = min(seconds.values()) / len(self.tasks) / self.steps
        steps = min(self.steps, max(2, round(TURN_SECONDS / (clients * per_step))))
        stacks = {mode: clients // mode.chunk_size for mode in close}
        best = dict.fromkeys(close, math.inf)
        deadline = time.perf_counter() + RUN_OFF_SECONDS
        for turn in range(TURNS):
            for mode, number in stacks.items():
                with threads(mode.num_threads):
                    best[mode] = min(best[mode], _timed(lambda: self._run(mode.chunk_size, number, steps)) / number)  # noqa: B023
            if turn and time.perf_counter() > deadline:
                break
        for mode, value in best.items():
            fixed = min(self.costs[mode].fixed, value)
            self.costs[mode] = Cost(fixed=fixed, step=max((value - fixed) / steps, 1e-9))

    def seconds(self) -> dict[MeasuredMode, float]:
        """Return the seconds of a round in every mode measured."""
        return {
            mode: math.ceil(len(self.tasks) / mode.chunk_size) * cost.of(self.steps)
            for mode, cost in self.costs.items()
        }

    def _run(self, size: int, stacks: int, steps: int) -> None:
        """Train the first clients for ``steps`` steps: so many stacks of ``size``."""
        tasks = shortened((self.tasks if size == 1 else self._alike)[: size * stacks], steps=steps)
        if size == 1:
            for task in tasks:
                self._alone.run(task)
            return
        if self._stack_trainer is None:
            self._stack_trainer = VectorizedLocalTrainer(self.context)
        for first in range(0, len(tasks), size):
            self._stack_trainer.run(tasks[first : first + size])


def stack_sizes(context: ClientContext, cohort: int) -> list[int]:
    """Return the stack sizes worth trying: up to the cohort, within memory."""
    size = sum(value.numel() * value.element_size() for value in context.model.state_dict().values())
    largest = max(2, min(cohort, STACK_SIZES[-1], STACK_BYTES // (4 * max(size, 1))))
    return sorted({*(own for own in STACK_SIZES if own < largest), largest})


def _cost(run: Callable[[int], object], num_threads: int) -> Cost:
    """Return the cost of ``run(steps)``: the best of a few, because others on the machine only add time."""
    few, many = 1, MANY
    best = {few: math.inf, many: math.inf}
    with threads(num_threads):
        run(few)
        deadline = time.perf_counter() + 2.0
        for _ in range(3):
            for steps in best:
                best[steps] = min(best[steps], _timed(lambda steps=steps: run(steps)))  # type: ignore[misc]
            if time.perf_counter() > deadline:
                break
    step = max((best[many] - best[few]) / (many - few), 1e-9)
    return Cost(fixed=max(best[few] - step, 0.0), step=step)


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
