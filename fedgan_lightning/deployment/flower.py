"""The flower executor: the same tasks, carried by Flower to sites on other machines, and their answers back.

Flower's own strategies are not used: they wait for ever for lost nodes, average whatever came, and know no resume.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch

from fedgan_lightning.deployment import wire
from fedgan_lightning.deployment.handed_on import check_handed, exchanged, hands_on_after, taken, with_handed
from fedgan_lightning.deployment.replies import Malformed, trouble_in
from fedgan_lightning.deployment.sites import Sites
from fedgan_lightning.errors import RoundInterrupted
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.schema import printable
from fedgan_lightning.federation.update_schema import expected_moments
from fedgan_lightning.protocol import ROUND_TRIP, ClientFailure, ClientTask, ClientUpdate, Executor

logger = logging.getLogger("fedgan_lightning")

#: An answer is at most so many times as long as its task, and so many bytes: moments, and an algorithm's, come on top.
MOST_TIMES, MOST_BYTES = 10, 64 << 20
#: Tag of the number of connected sites.
CONNECTED = "sites/connected"
#: Where the server notes, among a client's private state, the last task whose update counted.
ACCEPTED = "accepted/seed"


class Sent(NamedTuple):
    """A task on its way, since when on the monotonic clock, its size, and whether networks come with its answer."""

    task: ClientTask
    since: float
    size: int
    hands_on: bool


class FlowerExecutor(Executor):
    """Runs the clients of a round at their sites.

    Args:
        sites: The sites.
        timeout: Seconds that a client has; ``None`` waits as long as its site is connected.
    """

    concurrent: ClassVar[bool] = True
    in_real_time: ClassVar[bool] = True

    def __init__(self, sites: Sites, *, timeout: float | None = None) -> None:
        self.sites, self.timeout = sites, timeout
        self._context: ClientContext | None = None
        self._sent: dict[str, Sent] = {}
        self._moments: dict[str, torch.Tensor] = {}  # that clients' optimizers keep
        self._spoilt: set[int] = set()  # clients that failed on what they were handed

    def setup(self, context: ClientContext) -> None:
        context.ranks.refuse_several("the server of a deployment must be one process")
        self._context = context

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        assert self._context is not None
        listed, arrivals = list(tasks), self._context.arrivals
        if not listed and not arrivals.at_work:
            return
        self.sites.refresh()
        away = {task.client_id: task for task in listed if self.sites.node_of(task.client_id) is None}
        late, open_ = self._under_way(listed)
        open_ |= self._push(
            [own for own in listed if own.client_id not in away]
        )  # at once: the first answer may end it
        overdue: dict[str, Sent] = {}
        try:
            known = {task.client_id for task in listed} | {sent.task.client_id for sent in open_.values()}
            untold = {
                k: arrivals.given(k) for k in arrivals.at_work if k not in known
            }  # an answer had ended their wave
            for client_id, task in {**away, **untold}.items():
                is_out = client_id in self.sites.expelled
                cause = "its site was expelled" if is_out else "its site is not connected"
                told = {"reached": False, "refused": is_out}
                yield ClientFailure(client_id, task.round, stage="connect", cause=cause, **told)
            while waited := [key for key, sent in open_.items() if not arrivals.holds(sent.task.client_id)]:
                if self._stop_requested():
                    raise RoundInterrupted("the user asked to stop")
                for key, reply in self.sites.pull([*late, *waited]):  # the late ones, before the goal is reached
                    is_late = key in late
                    yield self._answer(reply, (late if is_late else open_).pop(key), is_late=is_late)
                for key in [key for key in waited if key in open_ and self._is_over(open_[key])]:
                    overdue[key] = open_.pop(key)
                    task, cause = overdue[key].task, f"no answer within {self.timeout:.0f} s"
                    yield ClientFailure(task.client_id, task.round, stage="reply", cause=cause)
                self.sites.pause()
        finally:
            self._sent = {**open_, **overdue}  # they may still come, and then late

    def _under_way(self, tasks: list[ClientTask]) -> tuple[dict[str, Sent], dict[str, Sent]]:
        """Return what was sent before and may be answered now, by message: late, and in time."""
        assert self._context is not None
        arrivals = self._context.arrivals
        if not arrivals.of_any_age:
            return {key: sent for key, sent in self._sent.items() if sent.task.round == tasks[0].round - 1}, {}
        going_on = {*arrivals.at_work} - {task.client_id for task in tasks}
        rounds = {client_id: arrivals.given(client_id).round for client_id in going_on}
        return {}, {key: sent for key, sent in self._sent.items() if rounds.get(sent.task.client_id) == sent.task.round}

    def _is_over(self, sent: Sent) -> bool:
        return self.timeout is not None and time.monotonic() > sent.since + self.timeout

    def _push(self, tasks: list[ClientTask]) -> dict[str, Sent]:
        """Send the tasks; return them by the message that asks for each."""
        from flwr.app import Message

        assert self._context is not None
        messages, policy = [], self._context.policy
        for task in tasks:
            store, k = self._context.store, task.client_id
            kept = store.newest(k) if self._context.arrivals.holds(k) else store.read(k)
            accepted = int(kept.get(ACCEPTED, torch.tensor(-1)))
            handed = {} if task.client_id in self._spoilt else exchanged(kept, policy)
            task = with_handed(task, handed)
            how: dict[str, Any] = {"accepted": accepted, "hands_on": self._hands_on(task.round)}
            content = wire.from_task(task, digest=self.sites.digest, **how)
            node_id = self.sites.node_of(task.client_id)
            assert node_id is not None  # checked by run
            content = self.sites.stamp(content, node_id)
            messages.append(Message(content, dst_node_id=node_id, message_type=wire.TRAIN, group_id=str(task.round)))
        keys = self.sites.grid.push_messages(messages) if messages else []
        now = time.monotonic()
        sizes = [wire.size_of(own.content) for own in messages]
        return {key: Sent(own, now, size, self._hands_on(own.round)) for key, own, size in zip(keys, tasks, sizes)}

    def _hands_on(self, round: int) -> bool:
        """Whether clients hand on networks after a round."""
        assert self._context is not None
        return self._context.data.num_clients > 1 and hands_on_after(round, self._context)

    def _answer(self, reply: Any, sent: Sent, *, is_late: bool) -> ClientUpdate | ClientFailure:
        assert self._context is not None
        trouble, task = trouble_in(reply), sent.task
        if trouble is not None:
            is_none = isinstance(trouble, Malformed)
            if exchanged(self._context.store.read(task.client_id), self._context.policy):
                self._spoilt.add(task.client_id)  # perhaps by what it was handed: it goes on with its own
                logger.warning(f"client {task.client_id} goes on without the network that was handed to it")
            return ClientFailure(task.client_id, task.round, stage="reply", cause=trouble, refused=is_none)
        try:
            most = MOST_TIMES * (sent.size + self._size_handed_on * sent.hands_on) + MOST_BYTES
            if (size := wire.size_of(reply.content)) > most:
                raise ValueError(f"{size} bytes in answer to {sent.size}")
            update, handed = wire.to_update(reply.content, client_id=task.client_id), dict[str, torch.Tensor]()
            if sent.hands_on:
                update, handed = taken(update)
                self._moments = self._moments or expected_moments(self._context)
                check_handed(f"client {task.client_id}", handed, self._context, moments=self._moments)
        except Exception as error:  # what comes can be anything, and must not end the server
            cause = printable(f"an answer that is no update ({type(error).__name__}: {error})")
            return ClientFailure(task.client_id, task.round, stage="reply", cause=cause, refused=True)
        if not is_late:
            self._context.store.write(task.client_id, {ACCEPTED: torch.tensor(task.seed), **handed})
            self._spoilt.discard(task.client_id)
        return dataclasses.replace(update, metrics={**update.metrics, ROUND_TRIP: time.monotonic() - sent.since})

    @property
    def _size_handed_on(self) -> int:
        assert self._context is not None
        state = self._context.model.state_dict()
        return sum(state[name].numel() * state[name].element_size() for name in self._context.policy.exchanged)

    def _stop_requested(self) -> bool:
        return self._context is not None and self._context.stop_requested()

    def teardown(self) -> None:
        self._context = None

    def facts(self) -> dict[str, Any]:
        return {"sites": self.sites.num_clients, "timeout": self.timeout}

    def gauges(self) -> dict[str, float]:
        return {CONNECTED: float(self.sites.num_connected)}
