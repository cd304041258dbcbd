"""A round from the first client asked to the aggregate: whom to ask, whom to believe, and whether enough came back."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedgan_lightning.errors import QuorumError, RoundInterrupted, message
from fedgan_lightning.federation.admission import Admission, without_unsent
from fedgan_lightning.federation.costs import Contact, Incident, Ledger, RollCall, bytes_by_network
from fedgan_lightning.federation.invitation import Invitations
from fedgan_lightning.federation.local import ClientContext
from fedgan_lightning.federation.ranks import flattened
from fedgan_lightning.federation.reception import Order, Reception, Reports
from fedgan_lightning.federation.rounds import ClientRecord, RoundSummary
from fedgan_lightning.federation.rules import RoundRules, UpdateValidator
from fedgan_lightning.protocol import (
    Aggregate,
    Aggregator,
    ClientSampler,
    ClientTask,
    ClientUpdate,
    Executor,
    LocalWork,
    RoundInfo,
    State,
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


class Conductor:
    """Runs the rounds of a federation.

    Args:
        context: Module, data, policy, private state, ranks.
        executor: Who runs clients; it is set up already.
        aggregator: How updates become one.
        sampler: Whom to ask.
        rules: When a round counts.
        validator: Which updates are let in; ``None`` lets an update that cannot be right end the run.
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
        validator: UpdateValidator | None,
        seed: int,
        strikes: dict[int, int] | None = None,
    ) -> None:
        self.context, self.executor, self.aggregator = context, executor, aggregator
        self._networks = [network for network, sync in context.policy.sync.items() if sync == "average"]
        self.rules, self.seed = rules, seed
        self.admission = Admission(context, validator=validator)
        self.reception = Reception(aggregator, rules=rules, networks=self._networks, is_validated=validator is not None)
        self.invitations = Invitations(
            sampler,
            num_clients=context.data.num_clients,
            rules=rules,
            validator=validator,
            seed=seed,
            needed=aggregator.needed,
            strikes=strikes if strikes is not None else {},
        )

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
        terms = self.admission.terms(round=round, state=state, work=work)
        order = Order(round, state, work, bytes_by_network(state), on_update, terms)
        ledger = Ledger()
        tries = itertools.count() if self.rules.max_attempts is None else range(self.rules.max_attempts)
        for attempt in tries:
            if attempt:
                self._pause()
            cohort, reserves, needed = self.invitations.ask(round, attempt)
            info = RoundInfo(round=round, cohort=cohort)
            on_start(info)
            started = time.perf_counter()
            reports = Reports(cohort=cohort, accumulator=self.aggregator.init(), unsent=terms.optional)
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
        rule = f"a round needs {self.rules.min_report_fraction:.0%} of its cohort"
        return message(
            f"{rule}, and {name} {needed} updates" if needed > 1 else rule,
            received=f"fewer in each of {self.rules.max_attempts} tries of round {round}",
            fix="find out why clients fail, lower rules.min_report_fraction, or raise rules.over_selection",
        )

    def _pause(self) -> None:
        """Wait before the next try.

        Raises:
            RoundInterrupted: If the user asks to stop.
        """
        end = time.monotonic() + self.rules.retry_delay_seconds
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
                    self.reception.take(answer, order, reports)
                    if self.context.stop_requested():
                        raise RoundInterrupted("the user asked to stop")
                    if self.executor.concurrent and reports.num_accepted >= goal:
                        break
            except Exception as error:
                failure = error
            ranks.raise_if_any_rank_failed(failure)
            missing = goal - sum(ranks.exchange(reports.num_accepted)) if reserves else 0
            wave, reserves = reserves[:missing], reserves[missing:]

    def _tasks(self, order: Order, clients: Sequence[int], attempt: int) -> Iterator[ClientTask]:
        data, round = self.context.data, order.round
        costs = {k: order.work.span(round=round, steps_per_epoch=data.steps_per_epoch(k))[1] for k in clients}
        again = (attempt,) if attempt else ()
        for client_id in self.context.ranks.share(costs):
            seed = derive_seed(self.seed, "client", round, client_id, *again)
            yield ClientTask(client_id=client_id, round=round, seed=seed, state=order.state, local=order.work)

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
        unsent = set.intersection(*map(set, ranks.exchange(sorted(reports.unsent))))
        aggregate = dataclasses.replace(aggregate, extras=without_unsent(aggregate.extras, unsent))
        return Outcome(info=info, aggregate=aggregate, summary=summary, ledger=ledger)
