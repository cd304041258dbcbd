"""What secure sums are used for: a round's updates, and what the evaluation asks of all sites together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch

from fedgan_lightning.deployment import wire
from fedgan_lightning.deployment.flower import ACCEPTED, CONNECTED
from fedgan_lightning.deployment.opened_sums import OpenedSums
from fedgan_lightning.deployment.secure import SecureSessions
from fedgan_lightning.deployment.sites import Check, no_check
from fedgan_lightning.errors import ConfigurationError, OutOfRangeError, QuorumError, UpdateError, message
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.report import is_position
from fedgan_lightning.federation.schema import printable
from fedgan_lightning.federation.update_checks import UpdateChecks
from fedgan_lightning.packing import Layout
from fedgan_lightning.protocol import ROUND_TRIP, ClientFailure, ClientReport, ClientTask, Executor, State, UpdateSum

#: Scalars that sites say in the clear: they follow from sizes and clocks, not from data.
CLEAR = ("images", "steps", "optimizer_steps", "seconds")
#: Who tells what all sites together do.
TOGETHER = "together"
#: Stages at which a client that is lost has not been sent its task.
BEFORE_THE_TASK = ("advertise", "share")


def refuse_exchange(context: ClientContext) -> None:
    """Refuse networks that clients hand on to each other, where the server must not see any client's: they pass it.

    Raises:
        ConfigurationError: If there are any.
    """
    if found := sorted(filter(context.policy.is_exchanged, context.policy.placements)):
        raise ConfigurationError(
            message(
                "under secure aggregation sites must keep their own networks",
                received=f"federation.sync.{found[0]}: exchange",
                fix="set it to average or local, or federation.secure to null",
            )
        )


def refuse_coded(context: ClientContext) -> None:
    """Refuse codes of what the server sends, where sites have to agree on what they were sent.

    Raises:
        ConfigurationError: If there are any.
    """
    for transform in context.transforms:
        if transform.downward is not None:
            raise ConfigurationError(
                message(
                    "transforms under secure aggregation must leave what the server sends as it is",
                    received=f"{type(transform).__name__}(down={str(getattr(transform, 'down', True)).lower()})",
                    fix="set its option down to false",
                )
            )


def check_same_for_all(task: ClientTask, *, hands_on: bool = False) -> None:
    """Refuse a task under masks that is not, as a whole, what all clients of the round agree on that they were sent.

    Such are entries for one client alone (weights that leave only its answer in a sum), networks in codes, which the
    hash of the session does not cover, and the wish to have networks handed on.

    Raises:
        ConfigurationError: If it is one.
    """
    beside = [f"{printable(name)}, for client {task.client_id} alone" for name in sorted(task.own)]
    beside += ["networks in codes"] * (task.coded is not None) + ["networks to be handed on"] * hands_on
    if beside:
        raise ConfigurationError(
            message(
                "under secure aggregation all clients of a round must be sent the same, and nothing else",
                received=beside[0],
                fix="set federation.secure to null, or use another algorithm, and no codes down",
            )
        )


class SecureExecutor(Executor):
    """Runs the clients of a round at their sites, and learns the sum of their updates.

    Args:
        sessions: How sums come about.
        opened: Sums that were opened before a checkpoint held them.
    """

    concurrent: ClassVar[bool] = True
    sums_only: ClassVar[bool] = True

    def __init__(self, sessions: SecureSessions, *, opened: OpenedSums | None = None) -> None:
        self.sessions, self.opened = sessions, opened if opened is not None else OpenedSums(None)
        self._context: ClientContext | None = None
        self._checks: UpdateChecks | None = None

    def setup(self, context: ClientContext) -> None:
        context.ranks.refuse_several("the server of a deployment must be one process")
        refuse_exchange(context)
        refuse_coded(context)
        self._context, self._checks = context, UpdateChecks(context)

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[UpdateSum | ClientFailure]:
        assert self._context is not None
        listed, store = {task.client_id: task for task in tasks}, self._context.store
        if not listed:
            return
        for task in listed.values():
            check_same_for_all(task)
        self.sessions.sites.refresh()

        def query(client_id: int) -> Any:
            accepted = int(store.read(client_id).get(ACCEPTED, torch.tensor(-1)))
            return wire.from_task(listed[client_id], accepted=accepted, digest=self.sessions.sites.digest)

        (round,) = {task.round for task in listed.values()}
        subject = wire.hash_of_task(next(iter(listed.values())))
        if (known := self.opened.of(subject, [*listed])) is not None:  # by a server that was killed before it counted
            for client in known.clients:
                store.write(client.client_id, {ACCEPTED: torch.tensor(listed[client.client_id].seed)})
            for client_id in sorted({*listed} - {own.client_id for own in known.clients}):
                cause = "was not in the sum that was opened before"
                yield ClientFailure(client_id, round, stage="reply", cause=cause)
            yield known
            return
        found = self.sessions.run(
            sorted(listed),
            query,
            kind=wire.TRAIN,
            subject=subject,
            group=str(round),
            size_of=self._context.data.num_examples,
            check=self._check(listed),
            stop_requested=self._context.stop_requested,
        )
        for client_id, (stage, cause) in sorted(found.lost.items()):
            told = {"reached": stage not in BEFORE_THE_TASK, "refused": client_id in found.refused}
            yield ClientFailure(client_id, round, stage=stage, cause=cause, **told)
        if not found.means:
            return
        members = []
        for client_id in sorted({*listed} - {*found.lost}):
            store.write(client_id, {ACCEPTED: torch.tensor(listed[client_id].seed)})
            metrics = wire.metrics_of(found.facts[client_id]) | {ROUND_TRIP: found.seconds[client_id]}
            size, sent = found.members[client_id].num_examples, dict(found.bytes_up[client_id])
            members.append(ClientReport(client_id, "answered", num_examples=size, metrics=metrics, bytes_up=sent))
        means = {name: float(value) for name, value in found.means["metrics"].items()}
        total = UpdateSum(round, tuple(members), found.means["delta"], found.means["extras"], means)
        self.opened.keep(subject, [*listed], total)
        yield total

    def _check(self, tasks: Mapping[int, ClientTask]) -> Callable[[int, Mapping[str, Layout], Mapping[str, Any]], None]:
        """Return what looks at every answer while its vector is masked: later nobody could be left out."""
        assert self._checks is not None
        one = next(iter(tasks.values()))
        checks = self._checks.of_round(one)

        def check(client_id: int, layouts: Mapping[str, Layout], facts: Mapping[str, Any]) -> None:
            checks.check_layouts(client_id, layouts)
            clear = wire.metrics_of(facts)
            if others := [name for name in clear if name not in CLEAR and not is_position(name)]:
                raise UpdateError(f"client {client_id}: says {printable(others[0])} in the clear")
            checks.metrics(f"client {client_id}", client_id, clear)

        return check

    def teardown(self) -> None:
        self._context = self._checks = None

    def facts(self) -> dict[str, Any]:
        sites, timeout = self.sessions.sites, self.sessions.timeout
        return {"sites": sites.num_clients, "timeout": timeout, "secure": dict(vars(self.sessions.secure))}

    def gauges(self) -> dict[str, float]:
        return {CONNECTED: float(self.sessions.sites.num_connected)}


class SecureQueries:
    """What the server's data module asks of the sites: sums over the samples of all of them together.

    Args:
        sessions: How sums come about.
    """

    #: Whether :meth:`sums` are those of all sites together.
    sums_only: ClassVar[bool] = True

    def __init__(self, sessions: SecureSessions) -> None:
        self.sessions = sessions

    def facts(self) -> dict[int, dict[str, Any]]:
        """Return what every site said of itself; see :meth:`Sites.facts`."""
        return self.sessions.sites.facts()

    def sums(self, facts: dict[str, Any], state: State, *, check: Check = no_check) -> list[State]:
        """Return the sums over all sites, as one state; sites tell them once in a run.

        Args:
            facts: A query's, with its ``query``.
            state: Its tensors.
            check: Called with the sums; raises an error if these cannot be right.

        Raises:
            OutOfRangeError: If a site's sums are too large to be masked.
            QuorumError: If a site is not in them: sums of some would be mistaken for those of all.
        """
        sites = self.sessions.sites
        answers, known = sites.answers, {k: own for k, own in self.facts().items() if not sites.is_benched(k)}
        query, subject = {**facts, "ask": "sums"}, wire.hash_of(facts, state)
        key = wire.hash_of({**facts, "digest": self.sessions.sites.digest, "members": sorted(known)}, state)
        if kept := answers.of(key):
            return [kept[TOGETHER]]
        found = self.sessions.run(
            sorted(known),
            lambda _: wire.content(query, state=state),
            kind=wire.QUERY,
            subject=subject,
            complete=True,
            size_of=lambda client_id: int(known[client_id]["num_examples"]),
        )
        if found.lost:
            too_large = [cause for _, cause in found.lost.values() if cause.startswith(OutOfRangeError.__name__)]
            if too_large:
                raise OutOfRangeError(too_large[0])
            by_cause: dict[str, list[int]] = {}
            for k, (stage, cause) in sorted(found.lost.items()):
                by_cause.setdefault(f"{stage}: {cause}", []).append(k)
            causes = [f"client {', '.join(map(str, own))} ({cause})" for cause, own in by_cause.items()]
            raise QuorumError(
                message(
                    "every site must be in the sums that the evaluation asks for",
                    received="; ".join(causes),
                    fix="look at their logs",
                )
            )
        try:
            check(None, found.means["sums"])
        except Exception as error:
            received = printable(f"a sum of all of them that cannot be right ({error})")
            fix = "nobody can say whose answer it is; look at all sites' data, or leave the metric out"
            raise QuorumError(message("sites must answer with sums", received=received, fix=fix)) from error
        answers.keep(key, TOGETHER, found.means["sums"])
        return [found.means["sums"]]
