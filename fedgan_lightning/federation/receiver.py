"""What becomes of the answers of one attempt of a round: checked, decoded, aggregated, and reported."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fedgan_lightning.errors import UpdateError, message
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.arrivals import Arrivals
from fedgan_lightning.federation.entry_sums import EntrySums
from fedgan_lightning.federation.ranks import Ranks, flattened
from fedgan_lightning.federation.report import RoundReport, lengths, with_metrics
from fedgan_lightning.federation.rules import RoundRules
from fedgan_lightning.federation.schema import is_whole, printable
from fedgan_lightning.federation.update_checks import RoundChecks, sent_moments, without_unsent
from fedgan_lightning.protocol import Aggregate, Aggregator, ClientFailure, ClientReport, ClientUpdate, UpdateSum

logger = logging.getLogger("fedgan_lightning")


class Receiver:
    """Takes answers: checks first, then adds. What is refused changes nothing but its client's report; without a
    validator it ends the run.

    Args:
        checks: What answers must be.
        aggregator: How updates become one.
        rules: What becomes of late updates.
        arrivals: What each client was given, and what its answer counts as.

    Attributes:
        asked: Clients that were asked.
        open: Of them those that have not answered.
        num_accepted: Updates of this round that count.
        following: Clients that start now, since the last answer.
        reports: What came of clients so far.
    """

    def __init__(
        self,
        checks: RoundChecks,
        *,
        aggregator: Aggregator,
        rules: RoundRules,
        arrivals: Arrivals,
    ) -> None:
        self.arrivals, self._checks_of = arrivals, arrivals.checks(checks.run.of_round)
        self.checks, self.aggregator, self.rules = checks, aggregator, rules
        self.is_private = checks.run.context.privacy is not None
        self.is_validated = self.is_private or checks.run.validator is not None  # what is refused counts as zero
        self.asked: list[int] = []
        self.following: list[int] = []
        self.num_asked = 0
        self.open: set[int] = set()
        self.num_accepted = 0
        self.reports: list[ClientReport] = []
        self.pooled: dict[str, float] = {}
        self._late: set[int] = set()
        self._unsent = checks.optional
        self._accumulator: Any = aggregator.init()
        self._sums: EntrySums | None = None

    @property
    def round(self) -> int:
        """Rounds completed before this one."""
        return self.checks.round

    @property
    def networks(self) -> tuple[str, ...]:
        """Networks of which something comes up."""
        return self.checks.run.context.policy.shared_networks

    def ask(self, clients: Sequence[int]) -> None:
        """Note that these clients are asked now."""
        self.asked += clients
        self.num_asked += len(clients)
        self.open |= {*clients, *self.arrivals.at_work}
        self.following = []

    def take(self, answer: ClientUpdate | UpdateSum | ClientFailure) -> ClientUpdate | None:
        """Take one answer; return the update as it counts, if it is one that does.

        Raises:
            UpdateError: If an update cannot be right, and there is no validator.
        """
        if isinstance(answer, UpdateSum):
            self._take_sum(answer)
        elif isinstance(answer, ClientFailure):
            self._take_failure(answer)
            self.following = self.arrivals.answered(answer.client_id, counts=False)
        elif isinstance(answer, ClientUpdate) and is_whole(answer.client_id):
            update = self._take_update(answer)
            self.following = self.arrivals.answered(answer.client_id, counts=update is not None)
            return update
        else:
            raise UpdateError(f"an executor yields updates of clients, and not {printable(answer)}")
        return None

    # ------------------------------------------------------------------ one answer

    def _take_failure(self, failure: ClientFailure) -> None:
        is_late = not self.arrivals.of_any_age and failure.round == self.checks.round - 1
        report = self._report(failure.client_id, was_sent=failure.reached and not is_late)
        if not is_late:  # its answer of this round may still come
            self.open.discard(failure.client_id)
        self._incident(report, "rejected" if failure.refused else "failed", f"{failure.stage}: {failure.cause}")

    def _take_update(self, answer: ClientUpdate) -> ClientUpdate | None:
        client_id = answer.client_id
        checks = self._checks_of(client_id) or self.checks
        is_late = not self.arrivals.of_any_age and is_whole(answer.round) and answer.round == checks.round - 1
        is_first = client_id not in self._late if is_late else client_id in self.open
        report = self._report(client_id, was_sent=not is_late, bytes_up=checks.bytes_up(answer))
        try:
            _check_round(answer, checks.round, is_first=is_first, is_late=is_late)
            if is_late and self.rules.stale_updates == "drop":
                self._late.add(client_id)
                self._incident(
                    with_metrics(report, checks.cost(answer, is_first=True)), "late", f"answers round {answer.round}"
                )
                return None
            update = checks.admitted(answer, is_late=is_late)
            share = checks.run.context.algorithm.credit(namespaces.inside(namespaces.ALGORITHM, update.extras))
            update = dataclasses.replace(update, discount=share * (self.rules.discount if is_late else 1.0))
            aged = self.arrivals.counted(update, round=self.round)
            if aged is None:
                self.open.discard(client_id)
                reason = f"answers round {answer.round}, older than rules.asynchronous.most_stale allows"
                self._incident(with_metrics(report, update.metrics), "late", reason)
                return None
            self._add(aged)
        except UpdateError as error:
            self._refuse(with_metrics(report, checks.cost(answer, is_first=is_first)), str(error), is_late=is_late)
            return None
        if is_late:  # its round is over: it is in the average, and in no statistics
            self._late.add(client_id)
            reason = f"answers round {answer.round}, at a discount"
            self._incident(with_metrics(report, update.metrics), "late", reason)
            return None
        self._unsent -= sent_moments(answer.extras) if self._unsent else set()
        update = dataclasses.replace(update, metrics={**update.metrics, **lengths(update.delta, self.networks)})
        self.open.discard(client_id)
        self.num_accepted += 1
        found = with_metrics(dataclasses.replace(report, num_examples=update.num_examples), update.metrics)
        self.reports.append(found if checks is self.checks else self._from_now(found, checks))
        return update

    def _from_now(self, report: ClientReport, checks: RoundChecks) -> ClientReport:
        """Return a report whose schedules have moved as far from where the server's stand now as the client's have."""
        now, then = self.checks.task.schedule_positions, checks.task.schedule_positions
        pairs = itertools.zip_longest(now, then, report.schedule_positions, fillvalue=0)
        moved = [stood + went - began for stood, began, went in pairs] if report.schedule_positions else []
        return dataclasses.replace(report, schedule_positions=moved)

    def _add(self, update: ClientUpdate) -> None:
        """Aggregate an update that has passed all checks."""
        sums = self._entry_sums
        self._accumulator = self.aggregator.accumulate(self._accumulator, sums.rest_of(update))
        if sums:
            sums.add(update)

    def _weight_of(self, report: ClientReport) -> float:
        size, rule = report.num_examples, self.aggregator
        return rule.weight_of(report.client_id, size) if rule.additive else 1.0

    @property
    def _entry_sums(self) -> EntrySums:
        if self._sums is None:
            data = self.checks.run.context.data
            sizes = (data.num_examples(k) for k in range(data.num_clients))
            self._sums = EntrySums(self.checks.rules, aggregator=self.aggregator, sizes=sizes)
        return self._sums

    def _refuse(self, report: ClientReport, reason: str, *, is_late: bool) -> None:
        """Leave an answer out, by name.

        Raises:
            UpdateError: Without a validator.
        """
        if not self.is_validated:
            fix = "mend this client, or have such updates left out by federation.validator"
            rule = "an update must be one that can be right, or a validator must leave it out"
            raise UpdateError(reason if "; got " in reason else message(rule, received=reason, fix=fix))
        if not is_late:
            self.open.discard(report.client_id)
        self._incident(report, "rejected", reason)

    def _take_sum(self, total: UpdateSum) -> None:
        """Take the sum of several updates; one that cannot be right counts for nobody.

        Raises:
            UpdateError: If it answers another round, holds updates of clients that were not asked, or comes with claims
                about single clients that are not true.
        """
        members = {client.client_id for client in total.clients}
        if total.round != self.checks.round or len(members) < len(total.clients) or not members <= self.open:
            raise UpdateError(
                f"a sum of clients {sorted(members)} of round {total.round} answers round {self.checks.round}"
            )
        known = tuple(self.checks.member(client) for client in total.clients)
        reports = [
            with_metrics(dataclasses.replace(own, bytes_down=self.arrivals.bytes_of(own.client_id)), own.metrics)
            for own in known
        ]
        self.open -= members
        try:
            admitted = self.checks.admitted_sum(dataclasses.replace(total, clients=known))
            sums = self._entry_sums
            self._accumulator = self.aggregator.accumulate_sum(self._accumulator, sums.rest_of(admitted))
            if sums:
                sums.add_sum(admitted)
        except UpdateError as error:
            reason = f"in a sum that cannot be right, of whom nobody can be named: {error}"
            for report in reports:
                self._incident(report, "failed", reason)
            return
        self._unsent -= sent_moments(total.extras)
        self.reports += [dataclasses.replace(report, outcome="answered") for report in reports]
        self.num_accepted += len(members)
        self.pooled |= admitted.metrics

    # ------------------------------------------------------------------ reports

    def _report(
        self, client_id: int, *, was_sent: bool = True, bytes_up: Mapping[str, int] | None = None
    ) -> ClientReport:
        """Return what passed between the server and a client that answers, or is known not to."""
        down = self.arrivals.bytes_of(client_id) if was_sent and client_id in self.open else {}
        return ClientReport(client_id, "answered", bytes_down=down, bytes_up=bytes_up or {})

    def _incident(self, report: ClientReport, outcome: str, reason: str) -> None:
        self.reports.append(dataclasses.replace(report, outcome=outcome, reason=reason))
        logger.warning(f"round {self.checks.round}: client {report.client_id} {outcome}: {reason}")

    def all_reports(self, ranks: Ranks) -> tuple[ClientReport, ...]:
        """Return the reports of all ranks, and one for everybody who was asked and is not waited for any more."""
        found = [
            ClientReport(**fields)
            for fields in flattened(ranks.exchange([dict(vars(report)) for report in self.reports]))
        ]
        missing = {*self.asked} - {report.client_id for report in found if report.outcome != "late"}
        missing -= {*self.arrivals.at_work}  # they go on, and are not missed
        found += [ClientReport(own, "unneeded", bytes_down=self.arrivals.bytes_of(own)) for own in sorted(missing)]
        return tuple(sorted(found, key=lambda report: (report.client_id, report.outcome != "late")))

    def report(self, *, clients: tuple[ClientReport, ...], total: Aggregate | None, **facts: Any) -> RoundReport:
        """Return the report of the attempt; without a total it does not count."""
        return RoundReport(
            round=self.checks.round,
            counted=total is not None,
            num_asked=self.num_asked,
            clients=clients,
            networks=self.networks,
            population=self.checks.run.context.data.num_clients,
            pooled=self.pooled,
            total=total,
            public_images=self._public_images,
            **facts,
        )

    @property
    def _public_images(self) -> float | None:
        """Samples that every client is taken to have seen, where nothing may follow from data."""
        keeper = self.checks.run.context.keeper
        if not self.is_private or keeper is None:
            return None
        return float(keeper.public_images * (self.checks.task.steps or 0))

    def total(self, ranks: Ranks) -> Aggregate:
        """Return what all updates of all ranks amount to."""
        found = self.aggregator.finalize(self.aggregator.reduce(self._accumulator, ranks))
        unsent = set.intersection(*map(set, ranks.exchange(sorted(self._unsent))))
        sums, collected = self._entry_sums.totals(ranks)
        own = {r.client_id: self._weight_of(r) for r in self.reports if r.outcome == "answered"}
        weights = {int(k): weight for part in ranks.exchange(own) for k, weight in part.items()}  # keys were text
        found = dataclasses.replace(
            found, extras=without_unsent(found.extras, unsent), collected=collected, weights=weights
        )
        if not sums:
            return found
        known = self.checks.schema.delta.spans
        delta = {name: value for name, value in sums.items() if name in known}
        extras = {name: value for name, value in sums.items() if name not in known}
        return dataclasses.replace(found, delta={**found.delta, **delta}, extras={**found.extras, **extras})


def _check_round(update: ClientUpdate, round: int, *, is_first: bool, is_late: bool) -> None:
    """Refuse an update of another round, or of a client that was not asked, or has answered.

    Raises:
        UpdateError: If it is one.
    """
    who = f"client {update.client_id}"
    if update.round is not None and not (is_late or (is_whole(update.round) and update.round == round)):
        raise UpdateError(f"{who}: answers round {printable(update.round)} in round {round}")
    if not is_first:
        raise UpdateError(f"{who}: was not asked, or has answered already")
