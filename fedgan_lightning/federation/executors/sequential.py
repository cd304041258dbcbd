"""The reference executor: one client after the other, one quiet per-round Trainer each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.local import LocalTrainer
from fedgan_lightning.protocol import ClientTask, ClientUpdate, Executor


class SequentialExecutor(Executor):
    """Runs clients in the order of the tasks, in this process. It defines what the other executors must compute."""

    def __init__(self) -> None:
        self._local: LocalTrainer | None = None

    def setup(self, context: ClientContext) -> None:
        self._local = LocalTrainer(context)

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate]:
        if self._local is None:
            raise RuntimeError("SequentialExecutor.run before setup; fix: call setup first.")
        for task in tasks:
            yield self._local.run(task)

    def teardown(self) -> None:
        if self._local is not None:
            self._local.close()
        self._local = None
