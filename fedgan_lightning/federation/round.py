"""A round, from top to bottom: select clients, train them, check and aggregate their updates, report.

Which clients, and with which randomness, is a pure function of (seed, round, attempt, client). The runner yields what
happens, in order, and its caller fires hooks; nothing of the server changes here.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence

from fedgan_lightning.errors import QuorumError, RoundInterrupted
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.costs import bytes_by_network
from fedgan_lightning.federation.receiver import Receiver
from fedgan_lightning.federation.report import RoundReport
from fedgan_lightning.federation.rules import RoundRules, UpdateValidator
from fedgan_lightning.federation.selection import ClientSelection, Selection
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.federation.update_checks import UpdateChecks
from fedgan_lightning.protocol import Aggregator, ClientSampler, ClientTask, ClientUpdate, Executor, RoundInfo
from fedgan_lightning.seeding import derive_seed
from fedgan_lightning.update_transform import RoundFacts

logger = logging.getLogger("fedgan_lightning")


class RoundRunner:
    """Runs the rounds of a federation.

    Args:
        context: What clients are run with.
        executor: Runs clients; it is set up already.
        aggregator, sampler, rules, validator, seed: Those of the orchestrator.
        strikes: Rejected updates by client; counted on in place.
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
        strikes: dict[int, int],
    ) -> None:
        self.context, self.executor, self.aggregator, self.rules, self.seed = context, executor, aggregator, rules, seed
        self.checks = UpdateChecks(context, validator=validator, sums_only=executor.sums_only)
        self.arrivals = context.arrivals
        facts = {name: getattr(context, name) for name in ("secure", "keeper", "arrivals")}
        facts["num_clients"] = context.data.num_clients
        options = {"rules": rules, "validator": validator, "seed": seed, "strikes": strikes}
        self.selection = ClientSelection(sampler, needed=aggregator.needed, **options, **facts)  # type: ignore[arg-type]

    def run(self, server: ServerModule, task: ClientTask) -> Iterator[RoundInfo | ClientUpdate | RoundReport]:
        """Yield for every attempt of a round its cohort, every update that counts, and its report; the last one counts.

        The server, which is not changed, says what single clients are sent beside the task of all.

        Raises:
            QuorumError: If too few answered in every attempt, or too few are left to be asked.
            RoundInterrupted: If the user asks to stop.
        """
        transforms, policy = self.context.transforms, self.context.policy
        facts = RoundFacts(task.round, task.hyperparameters, derive_seed(self.seed, "broadcast", task.round))
        exact = task.state
        sent, state = transforms.broadcast(exact, is_parameter=policy.is_parameter, facts=facts)
        task = dataclasses.replace(task, state=state, coded=sent if sent.keys() != state.keys() else None)
        own = namespaces.under(namespaces.ALGORITHM, self.context.algorithm.own_task(server, task.round, 0))
        self.arrivals.begin(task, exact=exact, sizes=bytes_by_network({**sent, **own}))
        for attempt in self.rules.attempts(self.context.stop_requested):
            selection = self.selection.select(task.round, attempt)
            yield RoundInfo(round=task.round, cohort=selection.cohort)
            started, checks = time.perf_counter(), self.checks.of_round(task)
            receiver = Receiver(checks, aggregator=self.aggregator, rules=self.rules, arrivals=self.arrivals)
            try:
                yield from self._train(server, task, selection, receiver, attempt)
                report = self._report(attempt, selection.needed, receiver, started)
            except BaseException:
                self.context.store.discard()
                raise
            if not report.counted:
                self.context.store.discard()
                answered = f"{len(report.answered)} of at least {selection.needed} clients answered"
                logger.warning(f"round {task.round} abandoned: {answered}")
            yield report
            if report.counted:
                return
        raise QuorumError(self.rules.too_few(task.round, self.aggregator))

    def _train(
        self, server: ServerModule, task: ClientTask, selection: Selection, receiver: Receiver, attempt: int
    ) -> Iterator[ClientUpdate]:
        """Ask clients until the goal is reached or nobody is left to ask; yield every update that counts."""
        ranks, goal, reserves, wave = self.context.ranks, selection.goal, selection.reserves, [*selection.cohort]
        if self.executor.concurrent:
            wave, reserves = wave + reserves, []
        while wave or (self.arrivals.may_answer and receiver.num_accepted < goal):
            failure: Exception | None = None
            receiver.ask(wave)
            try:
                for answer in self.executor.run(self._tasks(server, task, wave, attempt)):
                    if (update := receiver.take(answer)) is not None:
                        yield update
                    if self.context.stop_requested():
                        raise RoundInterrupted("the user asked to stop")
                    if receiver.following or (self.executor.concurrent and receiver.num_accepted >= goal):
                        break
            except Exception as error:
                failure = error
            ranks.raise_if_any_rank_failed(failure)
            missing = goal - sum(ranks.exchange(receiver.num_accepted)) if reserves else 0
            wave, reserves = [*receiver.following, *reserves[:missing]], reserves[missing:]

    def _tasks(self, server: ServerModule, task: ClientTask, ask: Sequence[int], attempt: int) -> Iterator[ClientTask]:
        """Yield the tasks of this rank's clients."""
        data, algorithm, again = self.context.data, self.context.algorithm, (attempt,) if attempt else ()
        for k in self.context.ranks.share({k: task.span(steps_per_epoch=data.steps_per_epoch(k))[1] for k in ask}):
            own = namespaces.under(namespaces.ALGORITHM, algorithm.own_task(server, task.round, k))
            given = self.arrivals.given(k)
            seed = derive_seed(self.seed, "client", given.round, k, *again)
            yield dataclasses.replace(given, client_id=k, seed=seed, own=own)

    def _report(self, attempt: int, needed: int, receiver: Receiver, started: float) -> RoundReport:
        """Return the report over all ranks; what clients that do not count wrote into the store is forgotten."""
        context, clients, total = self.context, receiver.all_reports(self.context.ranks), None
        for client in clients:
            if client.outcome == "rejected" and self.selection.strike(client.client_id):
                logger.warning(f"client {client.client_id} is not asked any more")
        answered = {client.client_id for client in clients if client.outcome == "answered"}
        if len(answered) >= needed:
            for client_id in {client.client_id for client in clients} - answered:
                context.store.forget(client_id)
            context.store.exchange(context.ranks.exchange_states)
            total = context.transforms.total(receiver.total(context.ranks))
        gauges = self.executor.gauges() | self.arrivals.gauges()
        facts = {"seconds": time.perf_counter() - started, "gauges": gauges}
        return receiver.report(attempt=attempt, clients=clients, total=total, **facts)
