"""The vectorized executor: clients stacked with ``torch.func``, trained together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation import optimizer_state
from fedgan_lightning.federation.cohort import CohortTrainer
from fedgan_lightning.federation.local import ClientContext
from fedgan_lightning.protocol import ClientTask, ClientUpdate, Executor


class VectorizedExecutor(Executor):
    """Trains the clients of a round in stacks, in this process. Updates are those of the sequential executor.

    Clients of one stack share their optimizers' step counts; others are trained in stacks of their own.

    Args:
        chunk_size: Clients per stack, at least 1: memory grows with it, fixed cost per client falls.

    Raises:
        ConfigurationError: If the module cannot be stacked (in :meth:`setup`).
    """

    def __init__(self, *, chunk_size: int = 64) -> None:
        if chunk_size < 1:
            raise ConfigurationError(
                message("chunk_size is at least 1 client", received=chunk_size, fix="set it to 64, say")
            )
        self.chunk_size = chunk_size
        self._cohort: CohortTrainer | None = None

    def setup(self, context: ClientContext) -> None:
        self._cohort = CohortTrainer(context)

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate]:
        if self._cohort is None:
            raise RuntimeError("VectorizedExecutor.run before setup; fix: call setup first.")
        store = self._cohort.context.store
        groups: dict[object, list[ClientTask]] = {}
        for task in tasks:
            moments = {
                **optimizer_state.only_moments(task.state),
                **optimizer_state.only_moments(store.read(task.client_id)),
            }
            key = (id(task.state), task.local.schedule_positions, optimizer_state.signature(moments))
            groups.setdefault(key, []).append(task)
            if len(groups[key]) == self.chunk_size:
                yield from self._cohort.run(groups.pop(key))
        for group in groups.values():
            yield from self._cohort.run(group)

    def teardown(self) -> None:
        self._cohort = None
