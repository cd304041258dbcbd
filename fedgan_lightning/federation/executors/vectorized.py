"""The vectorized executor: clients stacked with ``torch.func``, trained together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedgan_lightning.errors import ClientError, ConfigurationError, message
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.local import LocalTrainer
from fedgan_lightning.federation.memory import out_of_memory, release
from fedgan_lightning.federation.parity_check import NOTHING_TO_COMPARE, disagreement, stack_key
from fedgan_lightning.federation.vectorized_trainer import VectorizedLocalTrainer
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import ClientTask, ClientUpdate, Executor

logger = logging.getLogger("fedgan_lightning")


class StackingError(ConfigurationError):
    """Stacked training of these clients is not what sequential training is; none of the stack has been trained."""


class VectorizedExecutor(Executor):
    """Trains the clients of a round in stacks, in this process. Updates are those of the sequential executor.

    Clients of one stack share their optimizers' step counts and the sizes of their minibatches; others are trained in
    stacks of their own, and one that is left alone by itself. Before the first stack of a run two clients are trained
    both ways for a few steps. A stack that the memory does not suffice for is divided, and so are those after it.

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
        self._context: ClientContext | None = None
        self._stack_trainer: VectorizedLocalTrainer | None = None
        self._alone: LocalTrainer | None = None
        self._restored: Mapping[str, Any] = {}
        self._checked, self._largest = False, chunk_size

    def setup(self, context: ClientContext) -> None:
        known, self._restored = self._restored, {}
        self._context, self._stack_trainer, self._alone = context, VectorizedLocalTrainer(context), None
        self._checked = bool(known.get("checked", False))
        self._largest = min(self.chunk_size, int(known.get("largest", self.chunk_size)))

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate]:
        if self._context is None:
            raise RuntimeError("VectorizedExecutor.run before setup; fix: call setup first.")
        groups: dict[object, list[ClientTask]] = {}
        for task in tasks:
            key = stack_key(task, self._context)
            groups.setdefault(key, []).append(task)
            if len(groups[key]) >= self._largest:
                yield from self._updates(self._context, groups.pop(key))
        for group in groups.values():
            yield from self._updates(self._context, group)

    def _updates(self, context: ClientContext, tasks: list[ClientTask]) -> list[ClientUpdate]:
        """Return the updates of a stack, or of its parts where it does not fit into memory."""
        if len(tasks) == 1:
            return [self._one(context, tasks[0])]
        self._check(context, tasks)
        try:
            return self._stacked(context, tasks)
        except ClientError as error:
            if not out_of_memory(error):
                raise
        # Only here, where no traceback holds the stack's tensors any more, can they be released.
        self._stack_trainer = None
        release(context.device)
        self._largest = len(tasks) // 2
        logger.warning(f"no memory for a stack of {len(tasks)} clients; going on with {self._largest} at a time")
        parts = (tasks[: self._largest], tasks[self._largest :])
        return [update for part in parts for update in self._updates(context, part)]

    def _stacked(self, context: ClientContext, tasks: list[ClientTask]) -> list[ClientUpdate]:
        if self._stack_trainer is None:
            self._stack_trainer = VectorizedLocalTrainer(context)
        return self._stack_trainer.run(tasks)

    def _one(self, context: ClientContext, task: ClientTask) -> ClientUpdate:
        if self._alone is None:
            self._alone = LocalTrainer(context)
        return self._alone.run(task)

    def _check(self, context: ClientContext, tasks: list[ClientTask]) -> None:
        """Compare both ways, once in a run.

        Raises:
            StackingError: If they differ.
        """
        reason = None if self._checked else disagreement(context, tasks)
        if reason == NOTHING_TO_COMPARE:
            return  # and the next ones are looked at again
        if reason is not None:
            raise StackingError(
                message("stacked training must equal sequential training", received=reason, fix="set executor: auto")
            )
        self._checked = True

    def state_dict(self) -> dict[str, Any]:
        return {"checked": self._checked, "largest": self._largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._restored = dict(state)

    def teardown(self) -> None:
        self._context = self._stack_trainer = self._alone = None
