"""What example-level privacy has cost so far: the steps of every client's discriminator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedgan_lightning.dp.accounting import Release, epsilon_of, noise_for, refused, rounded_up
from fedgan_lightning.dp.charges import Ledger
from fedgan_lightning.dp.statement import Guarantee
from fedgan_lightning.gan.example_privacy import ExampleLevelPrivacy
from fedgan_lightning.protocol import FederatedData


class ExampleCharges:
    """Charges the steps of clients that are asked. No record is at two clients, so the one that pays most counts.

    Of clients with as many records the ledger has the one that was asked most.

    Args:
        privacy: The settings; z is calibrated where they give an epsilon.
        data: Says how many records clients have.
        ledger: What is written down.
        steps: Steps of a client's discriminator by round.

    Raises:
        ConfigurationError: If delta is too large, or no noise is enough.
    """

    def __init__(self, privacy: ExampleLevelPrivacy, data: FederatedData, ledger: Ledger, *, steps: list[int]) -> None:
        self.privacy, self.data, self.ledger, self.steps = privacy, data, ledger, steps
        self.sizes = [data.num_examples(client) for client in range(data.num_clients)]
        if privacy.epsilon is not None and not getattr(data, "has_client_samples", True):
            raise refused(
                "every site must know the noise multiplier that its steps follow from",
                f"model.privacy.epsilon={privacy.epsilon:g} between machines",
                "set noise_multiplier: python -m fedgan_lightning privacy says which",
            )
        calibrate(privacy, data, steps=sum(steps))
        if privacy.delta >= 1 / min(self.sizes):
            raise refused(
                "delta must be below one over the number of a client's records",
                f"model.privacy.delta={privacy.delta:g}, and a client with {min(self.sizes)} records",
                f"set it below {1 / min(self.sizes):.3g}",
            )

    def release(self, size: int, *, count: int = 1) -> Release:
        """Return what ``count`` steps release of a client with so many records."""
        return self.privacy.release(size, noise_multiplier=self.privacy.noise or 0.0, count=count)

    def charge(self, cohort: Sequence[int], round: int) -> None:
        """Write down a round of these clients."""
        taken, before = self.ledger.counts.setdefault("steps", {}), self._most()
        for client in cohort:
            taken[str(client)] = taken.get(str(client), 0) + self.of_round(round)
        more = {size: count - before.get(size, 0) for size, count in self._most().items()}
        self.ledger.charge([self.release(size, count=count) for size, count in more.items() if count])

    def _most(self) -> dict[int, int]:
        """Return by number of records the most steps that a client with so many has taken part in."""
        found: dict[int, int] = {}
        for client, count in self.ledger.counts.get("steps", {}).items():
            size = self.sizes[int(client)]
            found[size] = max(found.get(size, 0), count)
        return found

    def of_round(self, round: int) -> int:
        """Return the steps of a client in a round; after the last planned one those of the last."""
        return self.steps[min(round, len(self.steps) - 1)]

    def epsilon(self, *, more: int = 0, planned: int = 0) -> float:
        """Return what the client that pays most has paid, from above.

        Args:
            more: Steps that would be next.
            planned: Steps of the whole run: epsilon is computed for multiples of a share of these, rounded up; 0
                computes it for what there is.
        """
        taken = self._most()
        counts = {self.release(size): taken.get(size, 0) + more for size in {*self.sizes}}
        worst = [
            one
            for one, count in counts.items()
            if not any(other.rate > one.rate and counts[other] >= count for other in counts)
        ]
        return max(self._cost(replace(one, count=rounded_up(counts[one], planned=planned))) for one in worst)

    def _cost(self, release: Release) -> float:
        return epsilon_of([release], delta=self.privacy.delta, accountant=self.privacy.accountant)

    def guarantee(self, *, planned: bool, is_seeded: bool) -> Guarantee | None:
        """Return what is guaranteed to the records that pay most; ``None`` before anything was released."""
        taken = self._most()
        counts = {size: sum(self.steps) if planned else taken.get(size, 0) for size in {*self.sizes}}
        costs = {size: self._cost(self.release(size, count=count)) for size, count in counts.items() if count}
        if not costs:
            return None
        worst = max(costs, key=lambda size: costs[size])
        return Guarantee(
            release=self.release(worst, count=counts[worst]),
            epsilon=costs[worst],
            delta=self.privacy.delta,
            accountant=self.privacy.accountant,
            population=worst,
            noise="client",
            is_seeded=is_seeded,
        )


def calibrate(privacy: ExampleLevelPrivacy, data: FederatedData, *, steps: int) -> None:
    """Settle z of example-level privacy, where an epsilon is given: the client that pays most pays that.

    Args:
        privacy: The settings; ``noise`` is set.
        data: Says how many records clients have.
        steps: Steps of the discriminator in the whole run.
    """
    if privacy.epsilon is None:
        return
    fewest = min(data.num_examples(k) for k in range(data.num_clients))
    privacy.noise = noise_for(
        lambda z: [privacy.release(fewest, noise_multiplier=z, count=steps)],
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        accountant=privacy.accountant,
    )
