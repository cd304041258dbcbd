"""What becomes of the answers of one try of a round: into the aggregate, or among the incidents, and counted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedgan_lightning.errors import UpdateError, message
from fedgan_lightning.federation.admission import Terms, sent_moments
from fedgan_lightning.federation.costs import Contact, Incident
from fedgan_lightning.federation.drift import Drift
from fedgan_lightning.federation.rounds import ClientRecord
from fedgan_lightning.federation.rules import RoundRules
from fedgan_lightning.federation.schema import is_whole, printable
from fedgan_lightning.protocol import ROUND_TRIP, Aggregator, ClientFailure, ClientUpdate, LocalWork, State, UpdateSum

logger = logging.getLogger("fedgan_lightning")


@dataclass(frozen=True)
class Order:
    """What is the same for every try of a round.

    Attributes:
        round: Rounds completed before.
        state: What clients receive.
        work: What they are to do.
        bytes_down: Size of the state, by network.
        on_update: Called for every update that is let in.
        terms: What answers must be.
    """

    round: int
    state: State
    work: LocalWork
    bytes_down: Mapping[str, int]
    on_update: Callable[[ClientUpdate], object]
    terms: Terms


@dataclass
class Reports:
    """What has come in during one try of a round, on this rank.

    Attributes:
        cohort: Clients whose answers are the goal.
        accumulator: The aggregator's.
        asked: Clients that were asked.
        open: Of them those that have not answered.
        late: Clients that have answered the round before.
        unsent: Moments that nobody was sent, or has sent yet.
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
    late: set[int] = field(default_factory=set)
    unsent: set[str] = field(default_factory=set)
    num_accepted: int = 0
    records: list[ClientRecord] = field(default_factory=list)
    received: list[tuple[dict[str, int], dict[str, float]]] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    contacts: list[Contact] = field(default_factory=list)
    drift: Drift = field(default_factory=Drift)
    pooled: dict[str, float] = field(default_factory=dict)


class _Account(NamedTuple):
    """What came, in bytes by network, and whether it answers what was sent in this round."""

    answer: ClientUpdate
    sizes: dict[str, int]
    was_sent: bool


class Reception:
    """Takes answers: checks first, then adds. What is refused has changed nothing but the account of the round.

    Args:
        aggregator: How updates become one.
        rules: What becomes of late updates.
        networks: Those that travel.
        is_validated: Whether an update that cannot be right is left out; else it ends the run.
    """

    def __init__(
        self, aggregator: Aggregator, *, rules: RoundRules, networks: Sequence[str], is_validated: bool
    ) -> None:
        self.aggregator, self.rules, self.networks, self.is_validated = aggregator, rules, networks, is_validated

    def take(self, answer: ClientUpdate | UpdateSum | ClientFailure, order: Order, reports: Reports) -> None:
        """Take one answer: into the aggregate, or among the incidents.

        Raises:
            UpdateError: If an update cannot be right, and there is no validator.
        """
        if isinstance(answer, UpdateSum):
            self._receive_sum(answer, order, reports)
        elif isinstance(answer, ClientFailure):
            is_late = answer.round == order.round - 1
            contact = self._contact(order, reports, answer.client_id, was_sent=answer.reached and not is_late)
            if not is_late:  # its answer of this round may still come
                reports.open.discard(answer.client_id)
            self._incident(reports, order.round, contact, "failed", f"{answer.stage}: {answer.cause}")
        elif isinstance(answer, ClientUpdate) and is_whole(answer.client_id):
            self._receive_update(answer, order, reports)
        else:
            raise UpdateError(f"an executor yields updates of clients, and not {printable(answer)}")

    def _receive_update(self, answer: ClientUpdate, order: Order, reports: Reports) -> None:
        client_id = answer.client_id
        is_late = is_whole(answer.round) and answer.round == order.round - 1
        is_first = client_id not in reports.late if is_late else client_id in reports.open
        is_dropped = is_late and self.rules.stale_updates == "drop"
        account = _Account(answer, order.terms.bytes_up(answer), was_sent=not is_late)
        try:
            _check_round(answer, order, is_first=is_first, is_late=is_late)
            if not is_dropped:
                update = order.terms.admitted(answer, is_late=is_late)
                update = dataclasses.replace(update, discount=self.rules.discount if is_late else 1.0)
                reports.accumulator = self.aggregator.accumulate(reports.accumulator, update)
        except UpdateError as error:
            contact = self._count(account, order, reports, metrics=order.terms.cost(answer, is_first=is_first))
            self._refuse(str(error), contact, order, reports, is_late=is_late)
            return
        believed = order.terms.cost(answer, is_first=True) if is_dropped else update.metrics
        contact = self._count(account, order, reports, metrics=believed)
        if is_late:  # its round is over: it may be in the average, and is in no statistics
            reports.late.add(client_id)
            how = "" if is_dropped else ", at a discount"
            self._incident(reports, order.round, contact, "late", f"answers round {answer.round}{how}")
            return
        reports.unsent -= sent_moments(answer.extras) if reports.unsent else set()
        reports.contacts.append(contact)
        record = ClientRecord.of(update, networks=self.networks)
        reports.open.discard(client_id)
        reports.num_accepted += 1
        reports.records.append(record)
        reports.drift.add(update.delta, record.lengths)
        order.on_update(update)

    def _count(self, account: _Account, order: Order, reports: Reports, *, metrics: Mapping[str, float]) -> Contact:
        """Count what came, let in or not, and return the contact."""
        reports.received.append((account.sizes, dict(metrics)))
        client_id = account.answer.client_id
        return self._contact(
            order, reports, client_id, was_sent=account.was_sent, received=account.sizes, metrics=metrics
        )

    def _refuse(self, reason: str, contact: Contact, order: Order, reports: Reports, *, is_late: bool) -> None:
        """Leave an answer out, by name.

        Raises:
            UpdateError: Without a validator.
        """
        if not self.is_validated:
            fix = "mend this client, or have such updates left out by federation.validator"
            rule = "without a validator an update that cannot be right ends the run"
            raise UpdateError(reason if "Fix:" in reason else message(rule, received=reason, fix=fix))
        if not is_late:
            reports.open.discard(contact.client_id)
        self._incident(reports, order.round, contact, "rejected", reason)

    def _receive_sum(self, total: UpdateSum, order: Order, reports: Reports) -> None:
        """Take the sum of several updates into the aggregate; one that cannot be right counts for nobody.

        Raises:
            UpdateError: If it answers another round, holds updates of clients that were not asked, or comes with claims
                about single clients that are not true.
        """
        members = {own.client_id for own in total.participants}
        if total.round != order.round or len(members) < len(total.participants) or not members <= reports.open:
            raise UpdateError(f"a sum of clients {sorted(members)} of round {total.round} answers round {order.round}")
        known = tuple(order.terms.participant(own) for own in total.participants)
        try:
            admitted = order.terms.admitted_sum(dataclasses.replace(total, participants=known))
            reports.accumulator = self.aggregator.accumulate_sum(reports.accumulator, admitted)
        except UpdateError as error:
            reason = f"in a sum that cannot be right, of whom nobody can be named: {error}"
            for own in known:
                contact = self._contact(order, reports, own.client_id, received=own.bytes_up, metrics=own.metrics)
                self._incident(reports, order.round, contact, "failed", reason)
            reports.open -= members
            return
        reports.unsent -= sent_moments(total.extras)
        for own in known:
            reports.received.append((dict(own.bytes_up), dict(own.metrics)))
            contact = self._contact(order, reports, own.client_id, received=own.bytes_up, metrics=own.metrics)
            reports.contacts.append(contact)
            reports.records.append(ClientRecord.of_participant(own))
        reports.open -= members
        reports.num_accepted += len(members)
        reports.pooled |= admitted.metrics

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


def _check_round(update: ClientUpdate, order: Order, *, is_first: bool, is_late: bool) -> None:
    """Refuse an update of another round, or of somebody who was not asked, or has answered.

    Raises:
        UpdateError: If it is one.
    """
    who = f"client {update.client_id}"
    if update.round is not None and not (is_late or (is_whole(update.round) and update.round == order.round)):
        raise UpdateError(f"{who}: answers round {printable(update.round)} in round {order.round}")
    if not is_first:
        raise UpdateError(f"{who}: was not asked, or has answered already")
