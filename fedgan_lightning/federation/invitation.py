"""Who is asked in a round: the sampler's cohort without benched clients, and those who stand by."""

from __future__ import annotations

from fedgan_lightning.errors import QuorumError, message
from fedgan_lightning.federation.rules import RoundRules, Screening
from fedgan_lightning.protocol import ClientSampler
from fedgan_lightning.seeding import derive_seed, make_numpy_generator


class Invitations:
    """Says whom to ask, and counts refused updates.

    Args:
        sampler: The cohort, before anybody is benched.
        num_clients: Clients of the federation.
        rules: How many stand by.
        screening: After how many refused updates a client is no longer asked; ``None`` benches nobody.
        seed: Root seed of cohorts.
        needed: Updates that the aggregator needs.
        strikes: Refused updates by client; counted on in place.
    """

    def __init__(
        self,
        sampler: ClientSampler,
        *,
        num_clients: int,
        rules: RoundRules,
        screening: Screening | None,
        seed: int,
        needed: int = 1,
        strikes: dict[int, int],
    ) -> None:
        self.sampler, self.num_clients, self.rules, self.seed = sampler, num_clients, rules, seed
        self.limit = None if screening is None else screening.strikes
        self.needed, self.strikes = max(1, needed), strikes

    def ask(self, round: int, attempt: int) -> tuple[tuple[int, ...], list[int]]:
        """Return the cohort of a try, and those who stand by; benched clients are in neither.

        Raises:
            QuorumError: If fewer are left to be asked than any round needs.
        """
        population = self.sampler.population(num_clients=self.num_clients, round=round)
        benched = [client_id for client_id in population if self.is_benched(client_id)]
        if benched and len(population) - len(benched) < self.needed:
            raise QuorumError(
                message(
                    f"at least {self.needed} clients are left to be asked",
                    received=f"{len(population) - len(benched)}: {self.limit} updates or more of clients {benched} were"
                    " refused",
                    fix="look at the reasons in the log, raise screening.strikes, or loosen the screening",
                )
            )
        seed = self.seed if attempt == 0 else derive_seed(self.seed, "attempt", attempt)
        drawn = self.sampler.sample(num_clients=self.num_clients, round=round, seed=seed)
        cohort = tuple(client_id for client_id in drawn if not self.is_benched(client_id))
        wanted = self.rules.num_reserves(len(cohort))
        if not wanted:
            return cohort, []
        others = sorted({*population} - {*cohort})
        shuffled = make_numpy_generator(seed, "reserves", round).permutation(len(others))
        free = [others[int(place)] for place in shuffled if not self.is_benched(others[int(place)])]
        return cohort, free[:wanted]

    def is_benched(self, client_id: int) -> bool:
        """Whether the client is no longer asked."""
        return self.limit is not None and self.strikes.get(client_id, 0) >= self.limit

    def strike(self, client_id: int) -> bool:
        """Count a refused update; return whether the client is no longer asked."""
        self.strikes[client_id] = self.strikes.get(client_id, 0) + 1
        return self.is_benched(client_id)
