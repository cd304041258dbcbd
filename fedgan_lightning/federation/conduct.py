"""A round from the first client asked to the aggregate: whom to ask, whom to believe, and whether enough came back."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedgan_lightning.errors import QuorumError, RoundInterrupted, UpdateError, message
from fedgan_lightning.federation.drift import Drift
from fedgan_lightning.federation.invitation import Invitations
from fedgan_lightning.federation.ledger import Contact, Incident, Ledger, RollCall, bytes_by_network
from fedgan_lightning.federation.local import ClientContext
from fedgan_lightning.federation.ranks import flattened
from fedgan_lightning.federation.reference import expected_update
from fedgan_lightning.federation.rounds import ClientRecord, RoundSummary, bytes_up
from fedgan_lightning.federation.rules import RoundRules, Screening
from fedgan_lightning.protocol import (
    ROUND_TRIP,
    Aggregate,
    Aggregator,
    ClientFailure,
    ClientSampler,
    ClientTask,
    ClientUpdate,
    Executor,
    LocalWork,
    RoundInfo,
    State,
    UpdateSum,
)
from fedgan_lightning.seeding import derive_seed

logger = logging.getLogger("fedgan_lightning")


@dataclass(frozen=True)
class Outcome:
    """What came of a round: the aggregate, statistics, and what it cost."""

    info: RoundInfo
    aggregate: Aggregate
    summary: RoundSummary
    ledger: Ledger


@dataclass(frozen=True)
class Order:
    """What is the same for every try of a round.

    Attributes:
        round: Rounds completed before.
        state: What clients receive.
        work: What they are to do.
        bytes_down: Size of the state, by network.
        on_update: Called for every update that is let in.
        expected: What updates must look like, where they are screened.
    """

    round: int
    state: State
    work: LocalWork
    bytes_down: Mapping[str, int]
    on_update: Callable[[ClientUpdate], object]
    expected: Mapping[str, State] | None


@dataclass
class Reports:
    """What has come in during one try of a round, on this rank.

    Attributes:
        cohort: Clients whose answers are the goal.
        accumulator: The aggregator's.
        asked: Clients that were asked.
        open: Of them those that have not answered.
        num_accepted: Updates of this round that were let in.
        records: Their statistics.
        received: Bytes and metrics of every update, let in or not.
        incidents: What went wrong.
        contacts: What passed between the server and every client that answered or is known not to.
        drift: How updates agree.
        pooled: Means of scalars that clients did not say one by one.
    """

    cohort: tuple[int, ...]
    accumulator: Any
    asked: list[int] = field(default_factory=list)
    open: set[int] = field(default_factory=set)
    num_accepted: int = 0
    records: list[ClientRecord] = field(default_factory=list)
    received: list[tuple[dict[str, int], dict[str, float]]] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    contacts: list[Contact] = field(default_factory=list)
    drift: Drift = field(default_factory=Drift)
    pooled: dict[str, float] = field(default_factory=dict)


class Conductor:
    """Runs the rounds of a federation.

    Args:
        context: Module, data, policy, private state, ranks.
        executor: Who runs clients; it is set up already.
        aggregator: How updates become one.
        sampler: Whom to ask.
        rules: When a round counts.
        screening: Which updates are let in; ``None`` lets an update that cannot be right end the run.
        seed: Root seed of cohorts and clients.
        strikes: Refused updates by client; counted on in place.
    """

    def __init__(
        self,
        context: ClientContext,
        *,
        executor: Executor,
        aggregator: Aggregator,
        sampler: ClientSampler,
        rules: RoundRules,
        screening: Screening | None,
        seed: int,
        strikes: dict[int, int] | None = None,
    ) -> None:
        self.context, self.executor, self.aggregator = context, executor, aggregator
        self.rules, self.screening, self.seed = rules, screening, seed
        self.invitations = Invitations(
            sampler,
            num_clients=context.data.num_clients,
            rules=rules,
            screening=screening,
            seed=seed,
            needed=aggregator.needed,
            strikes=strikes if strikes is not None else {},
        )
        self._networks = [network for network, sync in context.policy.sync.items() if sync == "average"]

    def conduct(
        self,
        *,
        round: int,
        state: State,
        work: LocalWork,
        on_start: Callable[[RoundInfo], object],
        on_update: Callable[[ClientUpdate], object],
        on_try: Callable[[RollCall], object],
    ) -> Outcome:
        """Return what came of the round, tried until enough clients have answered.

        Args:
            round: Rounds completed before this one.
            state: What clients receive.
            work: What they are to do.
            on_start: Called at the start of every try.
            on_update: Called for every update that is let in.
            on_try: Called at the end of every try, with what came of each client.

        Raises:
            QuorumError: If too few answered in every try, or too few are left to be asked.
            RoundInterrupted: If the user asks to stop.
        """
        expected = expected_update(self.context, state) if self.screening is not None else None
        order = Order(round, state, work, bytes_by_network(state), on_update, expected)
        ledger = Ledger()
        tries = itertools.count() if self.rules.attempts is None else range(self.rules.attempts)
        for attempt in tries:
            if attempt:
                self._pause()
            cohort, reserves, needed = self.invitations.ask(round, attempt)
            info = RoundInfo(round=round, cohort=cohort)
            on_start(info)
            started = time.perf_counter()
            reports = Reports(cohort=cohort, accumulator=self.aggregator.init())
            try:
                self._collect(order, reports, reserves, attempt)
            except BaseException:
                self.context.store.discard()
                raise
            contacts = self._note(order, reports, ledger)
            counted = sum(self.context.ranks.exchange(reports.num_accepted))
            seconds, gauges = time.perf_counter() - started, self.executor.gauges()
            on_try(RollCall(round, attempt, counted >= needed, seconds, contacts, gauges))
            if counted >= needed:
                return self._finish(info, reports, ledger, contacts)
            self.context.store.discard()
            ledger.count("abandoned")
            logger.warning(f"round {round} abandoned: {counted} of at least {needed} clients answered")
        raise QuorumError(self._too_few(round))

    def _too_few(self, round: int) -> str:
        name, needed = type(self.aggregator).__name__, self.aggregator.needed
        rule = f"a round needs {self.rules.minimum:.0%} of its cohort"
        return message(
            f"{rule}, and {name} {needed} updates" if needed > 1 else rule,
            received=f"fewer in each of {self.rules.attempts} tries of round {round}",
            fix="find out why clients fail, lower rules.minimum, or raise rules.over_selection",
        )

    def _pause(self) -> None:
        """Wait before the next try.

        Raises:
            RoundInterrupted: If the user asks to stop.
        """
        end = time.monotonic() + self.rules.pause
        while time.monotonic() < end:
            if self.context.stop_requested():
                raise RoundInterrupted("the user asked to stop")
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))

    # ------------------------------------------------------------------ one try

    def _collect(self, order: Order, reports: Reports, reserves: list[int], attempt: int) -> None:
        """Ask clients until the goal is reached or nobody is left to ask."""
        ranks, goal = self.context.ranks, len(reports.cohort)
        wave = list(reports.cohort)
        if self.executor.concurrent:
            wave, reserves = wave + reserves, []
        while wave:
            failure: Exception | None = None
            reports.open |= {*wave}
            reports.asked += wave
            try:
                for answer in self.executor.run(self._tasks(order, wave, attempt)):
                    self._receive(answer, order, reports)
                    if self.context.stop_requested():
                        raise RoundInterrupted("the user asked to stop")
                    if self.executor.concurrent and reports.num_accepted >= goal:
                        break
            except Exception as error:
                failure = error
            ranks.agree(failure)
            missing = goal - sum(ranks.exchange(reports.num_accepted)) if reserves else 0
            wave, reserves = reserves[:missing], reserves[missing:]

    def _tasks(self, order: Order, clients: Sequence[int], attempt: int) -> Iterator[ClientTask]:
        data, round = self.context.data, order.round
        costs = {k: order.work.span(round=round, steps_per_epoch=data.steps_per_epoch(k))[1] for k in clients}
        again = (attempt,) if attempt else ()
        for client_id in self.context.ranks.share(costs):
            seed = derive_seed(self.seed, "client", round, client_id, *again)
            yield ClientTask(client_id=client_id, round=round, seed=seed, state=order.state, local=order.work)

    def _receive(self, answer: ClientUpdate | UpdateSum | ClientFailure, order: Order, reports: Reports) -> None:
        """Take one answer: into the aggregate, or among the incidents."""
        if isinstance(answer, UpdateSum):
            self._receive_sum(answer, order, reports)
            return
        client_id = answer.client_id
        is_late = answer.round is not None and answer.round == order.round - 1
        if isinstance(answer, ClientFailure):
            contact = self._contact(order, reports, client_id, was_sent=answer.reached and not is_late)
            if not is_late:  # its answer of this round may still come
                reports.open.discard(client_id)
            self._incident(reports, order.round, contact, "failed", f"{answer.stage}: {answer.cause}")
            return
        finite, sizes = {n: v for n, v in answer.metrics.items() if math.isfinite(v)}, bytes_up(answer)
        reports.received.append((sizes, finite))
        contact = self._contact(order, reports, client_id, was_sent=not is_late, received=sizes, metrics=finite)
        if is_late and self.rules.late == "drop":
            self._incident(reports, order.round, contact, "late", f"answers round {answer.round}")
            return
        update = dataclasses.replace(answer, discount=self.rules.discount) if is_late else answer
        try:
            self._check(update, order, reports, is_late=is_late)
            reports.accumulator = self.aggregator.accumulate(reports.accumulator, update)
        except UpdateError as error:
            if self.screening is None:
                raise
            if not is_late:
                reports.open.discard(client_id)
            self._incident(reports, order.round, contact, "rejected", str(error))
            return
        if is_late:  # its round is over: it is in the average, and in no statistics
            self._incident(reports, order.round, contact, "late", f"answers round {answer.round}, at a discount")
            return
        reports.contacts.append(contact)
        record = ClientRecord.of(update, networks=self._networks)
        reports.open.discard(client_id)
        reports.num_accepted += 1
        reports.records.append(record)
        reports.drift.add(update.delta, record.lengths)
        order.on_update(update)

    def _receive_sum(self, total: UpdateSum, order: Order, reports: Reports) -> None:
        """Take the sum of several updates into the aggregate; what was wrong with any of them, its client has found.

        Raises:
            UpdateError: If it answers another round, or holds updates of clients that were not asked.
        """
        members = {own.client_id for own in total.participants}
        if total.round != order.round or len(members) < len(total.participants) or not members <= reports.open:
            raise UpdateError(f"a sum of clients {sorted(members)} of round {total.round} answers round {order.round}")
        reports.accumulator = self.aggregator.accumulate_sum(reports.accumulator, total)
        for own in total.participants:
            reports.received.append((dict(own.bytes_up), dict(own.metrics)))
            contact = self._contact(order, reports, own.client_id, received=own.bytes_up, metrics=own.metrics)
            reports.contacts.append(contact)
            reports.records.append(ClientRecord.of_participant(own))
        reports.open -= members
        reports.num_accepted += len(members)
        reports.pooled |= total.metrics

    def _check(self, update: ClientUpdate, order: Order, reports: Reports, *, is_late: bool) -> None:
        """Refuse an update of another round, of somebody who was not asked, or one that does not pass the screening.

        Raises:
            UpdateError: If it is not let in.
        """
        if update.round is not None and update.round != order.round and not is_late:
            raise UpdateError(f"client {update.client_id}: answers round {update.round} in round {order.round}")
        if not is_late and update.client_id not in reports.open:
            raise UpdateError(f"client {update.client_id}: was not asked, or has answered already")
        if self.screening is not None and order.expected is not None:
            self.screening.check(update, expected=order.expected)

    def _contact(
        self,
        order: Order,
        reports: Reports,
        client_id: int,
        *,
        was_sent: bool = True,
        received: Mapping[str, int] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Contact:
        """Return what passed between the server and a client that answers, or is known not to."""
        known = metrics or {}
        return Contact(
            client_id=client_id,
            outcome="answered",
            bytes_down=sum(order.bytes_down.values()) if was_sent and client_id in reports.open else 0,
            bytes_up=sum((received or {}).values()),
            seconds=known.get("seconds"),
            round_trip=known.get(ROUND_TRIP),
        )

    def _incident(self, reports: Reports, round: int, contact: Contact, kind: str, reason: str) -> None:
        client_id = contact.client_id
        reports.incidents.append(Incident(round=round, client_id=client_id, kind=kind, reason=reason))
        reports.contacts.append(dataclasses.replace(contact, outcome=kind, reason=reason))
        logger.warning(f"round {round}: client {client_id} {kind}: {reason}")

    def _note(self, order: Order, reports: Reports, ledger: Ledger) -> tuple[Contact, ...]:
        """Count what was sent, what came in, and what went wrong, on any rank; return it by client."""
        for sizes, metrics in flattened(self.context.ranks.exchange(reports.received)):
            ledger.record(sizes, metrics)
        plain = flattened(self.context.ranks.exchange([vars(incident) for incident in reports.incidents]))
        for incident in (Incident(**fields) for fields in plain):
            ledger.note(incident)
            if incident.kind == "rejected" and self.invitations.strike(incident.client_id):
                logger.warning(f"client {incident.client_id} is not asked any more")
        contacts = self._contacts(order, reports)
        ledger.client_asks += len(reports.asked)
        ledger.send(order.bytes_down, sum(contact.bytes_down > 0 for contact in contacts))
        return contacts

    def _contacts(self, order: Order, reports: Reports) -> tuple[Contact, ...]:
        """Return the contacts of all ranks, and one for everybody who was asked and is not waited for any more."""
        plain = flattened(self.context.ranks.exchange([vars(contact) for contact in reports.contacts]))
        found = [Contact(**fields) for fields in plain]
        missing = sorted({*reports.asked} - {contact.client_id for contact in found if contact.outcome != "late"})
        size = sum(order.bytes_down.values())
        found += [Contact(client_id, "unneeded", bytes_down=size) for client_id in missing]
        return tuple(sorted(found, key=lambda contact: (contact.client_id, contact.outcome != "late")))

    def _finish(self, info: RoundInfo, reports: Reports, ledger: Ledger, contacts: Sequence[Contact]) -> Outcome:
        """Bring the shares of all ranks together."""
        ranks = self.context.ranks
        plain = flattened(ranks.exchange([record.plain() for record in reports.records]))
        records = (ClientRecord(**fields) for fields in plain)
        drift = reports.drift.values(ranks)
        summary = RoundSummary(
            records,
            networks=self._networks,
            drift=drift,
            pooled=reports.pooled,
            contacts=contacts,
            population=self.context.data.num_clients,
        )
        for client_id in {*reports.asked} - {record.client_id for record in reports.records}:
            self.context.store.forget(client_id)  # a round that does not count for the server does not for the client
        self.context.store.exchange(ranks.exchange_states)
        aggregate = self.aggregator.finalize(self.aggregator.reduce(reports.accumulator, ranks))
        return Outcome(info=info, aggregate=aggregate, summary=summary, ledger=ledger)
