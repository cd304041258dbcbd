"""The vectorized executor: clients stacked with ``torch.func``, trained together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.agreement import NOTHING_TO_COMPARE, disagreement, stack_key
from fedgan_lightning.federation.cohort import CohortTrainer
from fedgan_lightning.federation.local import ClientContext
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import ClientTask, ClientUpdate, Executor


class StackingError(ConfigurationError):
    """Stacked training of these clients is not what sequential training is; none of the stack has been trained."""


class VectorizedExecutor(Executor):
    """Trains the clients of a round in stacks, in this process. Updates are those of the sequential executor.

    Clients of one stack share their optimizers' step counts; others are trained in stacks of their own. Before the
    first round two clients are trained both ways for a few steps.

    Args:
        chunk_size: Clients per stack, at least 1: memory grows with it, fixed cost per client falls.

    Raises:
        ConfigurationError: If the module cannot be stacked (in :meth:`setup`).
        StackingError: If stacked training is not what sequential training is (in :meth:`run`, before the first stack of
            clients that do not diverge on their own).
    """

    @checked(chunk_size="[1, inf)")
    def __init__(self, *, chunk_size: int = 64) -> None:
        self.chunk_size = chunk_size
        self._cohort: CohortTrainer | None = None
        self._checked = False

    def setup(self, context: ClientContext) -> None:
        self._cohort, self._checked = CohortTrainer(context), False

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate]:
        if self._cohort is None:
            raise RuntimeError("VectorizedExecutor.run before setup; fix: call setup first.")
        groups: dict[object, list[ClientTask]] = {}
        for task in tasks:
            key = stack_key(task, self._cohort.context.store.read(task.client_id))
            groups.setdefault(key, []).append(task)
            if len(groups[key]) == self.chunk_size:
                yield from self._run_stack(self._cohort, groups.pop(key))
        for group in groups.values():
            yield from self._run_stack(self._cohort, group)

    def _run_stack(self, cohort: CohortTrainer, tasks: list[ClientTask]) -> list[ClientUpdate]:
        reason = None if self._checked else disagreement(cohort.context, tasks)
        if reason == NOTHING_TO_COMPARE:
            return cohort.run(tasks)  # and the next ones are looked at again
        if reason is not None:
            raise StackingError(
                message("stacked training equals sequential training", received=reason, fix="set executor: auto")
            )
        self._checked = True
        return cohort.run(tasks)

    def teardown(self) -> None:
        self._cohort = None
