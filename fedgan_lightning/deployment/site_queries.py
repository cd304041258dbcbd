"""What a site answers about its samples: the queries that its own settings make, once a run, and no others.

A query that arrives is compared with those that the metrics of the site's own configuration would ask; what is answered
is the site's own query, with its own feature network, and not what arrived. Weights that come with a query count only
where the query is about weights, such as a recommender's, or the site's policy lets networks be sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fedgan_lightning.deployment import wire
from fedgan_lightning.deployment.site_memory import SiteMemory, hashes_of
from fedgan_lightning.deployment.site_policy import SitePolicy
from fedgan_lightning.errors import ConfigurationError, FedGANError, message
from fedgan_lightning.evaluation.federated_queries import COUNT, FeatureMoments, FederatedQuery, QueryContext
from fedgan_lightning.evaluation.fidelity import ThirdPowers
from fedgan_lightning.evaluation.metrics import Metric
from fedgan_lightning.evaluation.ranking import ItemCounts, Rankings
from fedgan_lightning.protocol import State

#: What a site answers about its samples, and nothing else; see :mod:`fedgan_lightning.evaluation.federated_queries`.
QUERIES = {query.kind: query for query in (FeatureMoments, ThirdPowers, ItemCounts, Rankings)}


class SiteQueries:
    """Answers queries about the samples of a site.

    Args:
        metrics: Those of the site's own configuration.
        context: The site's samples.
        policy: Its limits.
        memory: What it has told before.
    """

    def __init__(
        self, metrics: Sequence[Metric], context: QueryContext, *, policy: SitePolicy, memory: SiteMemory
    ) -> None:
        self.metrics, self.context, self.policy, self.memory = list(metrics), context, policy, memory

    def answer(
        self, facts: Mapping[str, Any], state: State, *, run: str = "", session: int | None = None
    ) -> dict[str, Tensor]:
        """Return the sums that a query asks for.

        Args:
            facts: The query, as it arrived.
            state: Tensors that came with it.
            run: The run in which it is asked.
            session: That of secure aggregation, under whose masks the sums will be; what is told of them counts when
                its sum is opened.

        Raises:
            ConfigurationError: If the site's settings ask no such query, or its policy or memory forbids the answer.
        """
        own = self._own(wire.query_facts(facts))
        self._check_state(own, state)
        query = QUERIES[own.kind].read(facts, state, self.context) if own.state() else own
        positions = query.positions(self.context)
        self._check_count(query, len(positions))
        check = partial(
            self.memory.check_query,
            wire.hash_of(wire.query_facts(facts), state),
            hashes_of(self.context.view, positions),
            run=run,
            fewest=self.policy.fewest_samples,
            most_a_day=self.policy.most_queries_a_day,
            session=session,
        )
        check(remember=False)
        found = query.answer(self.context)
        self._check_count(query, int(found[COUNT]))
        check()
        return found

    def _check_state(self, own: FederatedQuery, state: State) -> None:
        """Refuse tensors that the site's own query has not: with them the same query would look like another; and
        weights of a network, where the policy takes none.

        Raises:
            ConfigurationError: If there are any.
        """
        if {*state} == {*own.state()} or (own.state() and self.policy.sent_networks):
            return
        raise ConfigurationError(
            message(
                "a query must come with the tensors that the site's own has, and no network",
                received=f"{', '.join(sorted(state)[:3]) or 'none'} with {own.kind}",
                fix="set sent_networks: true in the site's policy to tell what a server's network makes of its samples",
            )
        )

    def described(self) -> str:
        """Return, in words, which sums are told, and which its own limits keep."""
        told, kept = [], []
        for metric in self._metrics_told():
            try:
                for query in metric.queries(self.context.data, sent=self.policy.sent_networks):
                    self._check_count(query, len(query.positions(self.context)))
                    told.append(query.kind)
            except FedGANError as error:
                kept.append(f"{type(metric).__name__} is not told: {error}")
        sums = ", ".join(dict.fromkeys(told))
        return "; ".join([f"sums of {sums}, once a run" if sums else "no sums over its samples", *kept])

    def _own(self, facts: Mapping[str, Any]) -> FederatedQuery:
        """Return the query of the site's own settings that is meant.

        Raises:
            ConfigurationError: If there is none.
        """
        asked, known, broken = _text(facts), dict[str, FederatedQuery](), list[str]()
        for metric in self._metrics_told():
            try:
                queries = metric.queries(self.context.data, sent=self.policy.sent_networks)
            except FedGANError as error:  # such as a file of weights that is not there
                broken.append(f"{type(metric).__name__}: {error}")
                continue
            known |= {_text({**own.facts(), "query": own.kind}): own for own in queries}
        if asked not in known:
            raise ConfigurationError(
                message(
                    "a query to a site must be one that its own evaluation.metrics ask, with the same options",
                    received="; ".join([asked, *broken]),
                    fix=f"give server and sites the same evaluation; this site's ask {', '.join(known) or 'nothing'}",
                )
            )
        return known[asked]

    def _metrics_told(self) -> list[Metric]:
        names = self.policy.metrics
        return [own for own in self.metrics if names is None or type(own).__name__ in names]

    def _check_count(self, query: FederatedQuery, count: int) -> None:
        """Refuse sums over so few samples that they nearly say what these are, or exactly.

        Raises:
            ConfigurationError: If it is so.
        """
        fewest, least = self.policy.fewest_samples, query.least() if self.policy.unmixing == "refuse" else 1
        if count >= max(fewest, least):
            return
        why = "" if count < fewest else ": from sums over fewer, single ones can be computed"
        raise ConfigurationError(
            message(
                f"a site must tell sums over at least {fewest if count < fewest else least} samples{why}",
                received=f"{count} for {query.kind}",
                fix="take the metric out of evaluation.metrics, or give it fewer features"
                if why
                else "take the metric out of evaluation.metrics, or raise its number of samples",
            )
        )


def _text(facts: Mapping[str, Any]) -> str:
    return json.dumps(dict(facts), sort_keys=True, default=str)
