"""Who is asked in a round: the sampler's cohort without benched clients, and the reserves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fedgan_lightning.errors import QuorumError, message
from fedgan_lightning.federation.arrivals import Arrivals
from fedgan_lightning.federation.rules import RoundRules, UpdateValidator
from fedgan_lightning.federation.secure import SecureAggregation
from fedgan_lightning.protocol import ClientSampler
from fedgan_lightning.seeding import derive_seed, make_numpy_generator

#: Rounds that are looked at for somebody to ask, where a trace has nobody for this one.
ROUNDS_AHEAD = 1000


class Selection(NamedTuple):
    """Clients to ask, reserves for those that fail, the fewest updates that make a round, and how many end it."""

    cohort: tuple[int, ...]
    reserves: list[int]
    needed: int
    goal: int


class ClientSelection:
    """Selects the clients of a round, and counts rejected updates.

    Args:
        sampler: The cohort, before any client is benched.
        num_clients: Clients of the federation.
        rules: How many reserves there are.
        validator: After how many rejected updates a client is not asked again; ``None`` benches nobody.
        seed: Root seed of cohorts.
        needed: Updates that the aggregator needs.
        strikes: Rejected answers by client; counted on in place.
        secure: How many a sum needs, and after how many rejected answers a client is not asked, where there are sums.
        keeper: Of a private run: charges the round, and draws a secret cohort.
        arrivals: Who answers in a round by the clock, or is at rest.
    """

    def __init__(
        self,
        sampler: ClientSampler,
        *,
        num_clients: int,
        rules: RoundRules,
        validator: UpdateValidator | None,
        seed: int,
        needed: int = 1,
        strikes: dict[int, int],
        secure: SecureAggregation | None = None,
        keeper: Any = None,
        arrivals: Arrivals | None = None,
    ) -> None:
        self.arrivals = Arrivals() if arrivals is None else arrivals
        sampler = self.arrivals.sampler(sampler)
        self.sampler, self.num_clients, self.rules, self.seed = sampler, num_clients, rules, seed
        options = validator if validator is not None else secure
        self.limit = None if options is None else options.strikes
        self.secure, self.keeper = secure, keeper
        self.needed, self.strikes = max(1, needed), strikes

    def select(self, round: int, attempt: int) -> Selection:
        """Return whom to ask in an attempt of a round; benched clients are neither in the cohort nor in reserve.

        A cohort that chance, or benching, has made smaller than the aggregator needs is filled up from the population.

        Raises:
            QuorumError: If fewer clients are left than a round needs.
        """
        if self.keeper is not None and self.keeper.client is not None:
            return self._private(round)
        begun = self.arrivals.starting(lambda client_id: not self.is_benched(client_id), attempt=attempt)
        if begun is not None:
            starting, size = begun
            return Selection(starting, [], size, size)
        seed = self.seed if attempt == 0 else derive_seed(self.seed, "attempt", attempt)
        sampled = self.sampler.sample(num_clients=self.num_clients, round=round, seed=seed)
        population = self.sampler.population(num_clients=self.num_clients, round=round)
        free = [client_id for client_id in population if not self.is_benched(client_id)]
        if not sampled or (not free and self._is_anybody_free_after(round)):
            return Selection((), [], 0, 0)  # chance, or the trace, leaves nobody to be asked in this round
        if len(free) < self.needed:
            raise QuorumError(self._too_few(population, free))
        cohort = [client_id for client_id in sampled if not self.is_benched(client_id)]
        missing = max(0, self.needed - len(cohort))
        goal = len(cohort) + missing
        wanted = missing + self.rules.num_reserves(goal)
        others = self._shuffled({*free} - {*cohort}, seed=seed, round=round)[:wanted] if wanted else []
        needed = max(self.rules.needed(goal), self.needed, self.secure.needed(goal) if self.secure else 0)
        asked, reserves = tuple(sorted([*cohort, *others[:missing]])), others[missing:]
        if self.keeper is not None:
            self.keeper.admitted([*asked, *reserves], round)
        return Selection(asked, reserves, needed, len(asked))

    def _private(self, round: int) -> Selection:
        """Return a cohort that nothing but chance, or the settings, has a say in; nobody stands in for who fails."""
        secret = self.keeper.begin_round(round)
        public = {"num_clients": self.num_clients, "round": round, "seed": self.seed}
        cohort = self.keeper.admitted(self.sampler.sample(**public) if secret is None else secret, round)
        return Selection(cohort, [], self.secure.needed(len(cohort)) if self.secure else 0, len(cohort))

    @staticmethod
    def _shuffled(clients: set[int], *, seed: int, round: int) -> list[int]:
        listed = sorted(clients)
        return [listed[int(place)] for place in make_numpy_generator(seed, "reserves", round).permutation(len(listed))]

    def _is_anybody_free_after(self, round: int) -> bool:
        """Whether a client that is not benched could be asked in any of the next rounds."""
        later = range(round + 1, round + 1 + ROUNDS_AHEAD)
        populations = (self.sampler.population(num_clients=self.num_clients, round=number) for number in later)
        return any(not self.is_benched(client_id) for population in populations for client_id in population)

    def _too_few(self, population: Sequence[int], free: Sequence[int]) -> str:
        benched = sorted({*population} - {*free})
        why = f": {self.limit} updates or more of clients {benched} were refused" if benched else ""
        fix = (
            "look at the reasons in the log, raise strikes (of the validator, or of secure), or loosen its bounds"
            if benched
            else ""
        )
        return message(
            f"at least {self.needed} clients must be left to be asked",
            received=f"{len(free)}{why}",
            fix=fix or "ask more clients per round, or withstand fewer bad ones",
        )

    def is_benched(self, client_id: int) -> bool:
        """Whether the client is not asked any more."""
        return self.limit is not None and self.strikes.get(client_id, 0) >= self.limit

    def strike(self, client_id: int) -> bool:
        """Count a rejected update; return whether the client is not asked any more."""
        self.strikes[client_id] = self.strikes.get(client_id, 0) + 1
        return self.is_benched(client_id)
