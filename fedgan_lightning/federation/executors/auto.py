"""``executor: auto``: one client after the other or stacked, by a rule that looks at the work and not at the clock."""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.executors.sequential import SequentialExecutor
from fedgan_lightning.federation.executors.vectorized import StackingError, VectorizedExecutor
from fedgan_lightning.federation.parity_check import disagreement, largest_group, trial_context
from fedgan_lightning.federation.ranks import first_known
from fedgan_lightning.federation.threads import available_threads, each_with_threads
from fedgan_lightning.federation.vectorized_trainer import VectorizedLocalTrainer
from fedgan_lightning.federation.workload import Workload, measured_workload, stack_size
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import ClientFailure, ClientTask, ClientUpdate, Executor

logger = logging.getLogger("fedgan_lightning")

#: Floating-point operations of a client step above which arithmetic takes most of its time, which stacking does not
#: save: on CPUs between the MLP for MNIST (1.1 million weights, minibatches of 64) and the DCGAN for 28 pixels.
BUSY_FLOPS = {"cpu": 1.5e9, "cuda": 3e10}
#: The same for a stack, or for a client alone, above which a second thread saves more than it costs.
PARALLEL_FLOPS = 1e9


@dataclasses.dataclass(frozen=True)
class ExecutionMode:
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


class AdaptiveExecutor(Executor):
    """Chooses between the sequential and the vectorized executor, stack size and threads, when the first round starts.

    The choice is said in one line and kept in checkpoints: a run that is resumed goes on with it, hence with the same
    rounding.

    Args:
        num_threads: Threads to use; default chosen as well.
    """

    @checked(num_threads="[1, inf)")
    def __init__(self, *, num_threads: int | None = None) -> None:
        self.num_threads = num_threads
        self.mode: ExecutionMode | None = None
        self.context: ClientContext | None = None
        self._executor: VectorizedExecutor | SequentialExecutor | None = None
        self._inner_state: dict[str, Any] = {}
        self._restored: Mapping[str, Any] = {}

    @abstractmethod
    def choose(self, context: ClientContext, tasks: list[ClientTask]) -> ExecutionMode:
        """Return how to run rounds like that of these tasks, of which there is at least one."""

    def keep(self, mode: ExecutionMode, tasks: list[ClientTask]) -> None:
        """Keep a mode beyond this run; nothing unless overridden."""

    def setup(self, context: ClientContext) -> None:
        known, self._restored = self._restored, {}
        self.context, self._executor = context, None
        self.mode = ExecutionMode(**known["mode"]) if known else None  # an object that has run before begins anew
        self._inner_state = dict(known.get("executor", {}))

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        if self.context is None:
            raise RuntimeError(f"{type(self).__name__}.run before setup; fix: call setup first.")
        listed = list(tasks)
        if self.mode is None:
            self.mode = self._chosen(self.context, listed)
            if self.mode is None:
                return
            if self.context.ranks.rank == 0:
                logger.info(self.mode.describe())
        if self._executor is None:
            self._executor = self._made(self.mode, self.context)
        answered: set[int] = set()
        try:
            for answer in each_with_threads(self.mode.num_threads, self._executor.run(listed)):
                answered.add(answer.client_id)
                yield answer
        except StackingError as error:  # a choice of other days, or of other data
            self.mode = dataclasses.replace(self.mode, chunk_size=1, reason=str(error))
            logger.warning(self.mode.describe())
            self.keep(self.mode, listed)
            self._executor.teardown()
            self._executor = self._made(self.mode, self.context)
            left = [task for task in listed if task.client_id not in answered]
            yield from each_with_threads(self.mode.num_threads, self._executor.run(left))

    def _chosen(self, context: ClientContext, tasks: list[ClientTask]) -> ExecutionMode | None:
        """Return one mode for all ranks: that of the first that has clients; ``None`` where none has."""
        own, failure = None, None
        try:
            own = self.choose(context, tasks) if tasks else None
        except Exception as error:  # the others wait for this rank, and learn here that it failed
            failure = error
        context.ranks.raise_if_any_rank_failed(failure)
        known = first_known(context.ranks.exchange(None if own is None else dataclasses.asdict(own)))
        return None if known is None else ExecutionMode(**known)

    def stacking_obstacle(self, context: ClientContext, tasks: list[ClientTask]) -> str | None:
        """Return why these clients cannot be stacked, in one line, or ``None``."""
        try:
            VectorizedLocalTrainer(context)
        except ConfigurationError as error:
            return str(error)
        if len(tasks) > 1 and len(largest_group(context, tasks)) == 1:
            return "no two clients whose minibatches are of the same sizes"
        reason = disagreement(context, tasks)
        self._inner_state["checked"] = reason is None and len(tasks) > 1  # once in a run is enough
        return reason

    def _made(self, mode: ExecutionMode, context: ClientContext) -> VectorizedExecutor | SequentialExecutor:
        stacked = mode.chunk_size > 1
        executor = VectorizedExecutor(chunk_size=mode.chunk_size) if stacked else SequentialExecutor()
        executor.load_state_dict(self._inner_state)
        executor.setup(context)
        return executor

    def teardown(self) -> None:
        if self._executor is not None:
            self._inner_state = self._executor.state_dict()
            self._executor.teardown()
        self.context = self._executor = None

    def state_dict(self) -> dict[str, Any]:
        if self.mode is None:
            return {}
        inner = self._inner_state if self._executor is None else self._executor.state_dict()
        return {"mode": dataclasses.asdict(self.mode), "executor": inner}

    def facts(self) -> dict[str, Any]:
        return {} if self.mode is None else dataclasses.asdict(self.mode)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._restored = dict(state)


class AutoExecutor(AdaptiveExecutor):
    """Stacks clients where a step is too short for its arithmetic to take most of its time, by a fixed rule.

    The rule counts the floating-point operations of one local step of a client, the first of those that can be stacked,
    and the memory that a stack would take. Neither clocks nor caches have a say, so a command gives the same bits on a
    busy machine, and the next day. :class:`AutotunedExecutor` measures instead.

    Args:
        num_threads: Threads to use; default 1 for short steps and all cores for long ones.
    """

    def choose(self, context: ClientContext, tasks: list[ClientTask]) -> ExecutionMode:
        work = measured_workload(trial_context(context), largest_group(context, tasks)[0])
        reason = self._obstacle(context, tasks, work)
        size = 1 if reason else stack_size(context, work)
        if size > 1:
            reason = f"{work.describe()}: overhead, which stacking saves"
        return ExecutionMode(
            chunk_size=size,
            num_threads=self._threads(context, work, min(size, context.data.num_clients)),
            reason=reason or work.describe(),
        )

    def _obstacle(self, context: ClientContext, tasks: list[ClientTask], work: Workload) -> str | None:
        """Return why clients are not to be stacked, in one line, or ``None``."""
        if context.data.num_clients == 1:
            return "a single client"
        if work.flops > BUSY_FLOPS.get(context.device.type, BUSY_FLOPS["cuda"]):
            return f"{work.describe()}: arithmetic, which stacking does not save"
        return self.stacking_obstacle(context, tasks)

    def _threads(self, context: ClientContext, work: Workload, size: int) -> int:
        if self.num_threads is not None:
            return self.num_threads
        if context.device.type != "cpu" or size * work.flops < PARALLEL_FLOPS:
            return 1
        return available_threads(context.ranks)
