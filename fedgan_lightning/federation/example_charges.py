"""What example-level privacy has cost so far: the steps of every client's discriminator."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedgan_lightning.dp.accounting import Release, epsilon_of, noise_for
from fedgan_lightning.dp.charges import POINTS, Ledger
from fedgan_lightning.dp.statement import Guarantee
from fedgan_lightning.errors import ConfigurationError, message
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
        calibrate(privacy, data, steps=sum(steps))
        if privacy.delta >= 1 / min(self.sizes):
            raise ConfigurationError(
                message(
                    "delta must be below one over the number of a client's records",
                    received=f"model.privacy.delta={privacy.delta:g}, and a client with {min(self.sizes)} records",
                    fix=f"set it below {1 / min(self.sizes):.3g}",
                )
            )
        self._of_client: dict[int, int] = {}
        self._of_size: dict[int, int] = {}
        self._known: dict[Release, float] = {}

    def release(self, size: int, *, count: int = 1) -> Release:
        """Return what ``count`` steps release of a client with so many records."""
        return self.privacy.release(size, noise_multiplier=self.privacy.noise or 0.0, count=count)

    def charge(self, cohort: Sequence[int], round: int) -> None:
        """Write down a round of these clients."""
        new: list[Release] = []
        for client in cohort:
            size = self.sizes[client]
            self._of_client[client] = self._of_client.get(client, 0) + self.of_round(round)
            more = self._of_client[client] - self._of_size.get(size, 0)
            if more > 0:
                self._of_size[size] = self._of_client[client]
                new.append(self.release(size, count=more))
        if new:
            self.ledger.charge(new)

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
        counts = {self.release(size): self._of_size.get(size, 0) + more for size in {*self.sizes}}
        worst = [
            one
            for one, count in counts.items()
            if not any(other.rate > one.rate and counts[other] >= count for other in counts)
        ]
        step = max(1, planned // POINTS)
        rounded = {one: max(counts[one], min(math.ceil(counts[one] / step) * step, planned)) for one in worst}
        return max(
            (self._cost(dataclasses.replace(one, count=count)) for one, count in rounded.items() if count), default=0.0
        )

    def _cost(self, release: Release) -> float:
        kind = dataclasses.replace(release, clip=0.0)
        if kind not in self._known:
            options: dict[str, Any] = {"delta": self.privacy.delta, "accountant": self.privacy.accountant}
            self._known[kind] = epsilon_of([kind], **options)
        return self._known[kind]

    def guarantee(self, *, planned: bool, is_seeded: bool) -> Guarantee | None:
        """Return what is guaranteed to the records that pay most; ``None`` before anything was released."""
        counts = {size: sum(self.steps) if planned else self._of_size.get(size, 0) for size in {*self.sizes}}
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

    def state_dict(self) -> dict[str, int]:
        """Return the steps of every client."""
        return {str(client): count for client, count in self._of_client.items()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on as the ledger says, which may know of rounds after the checkpoint: all clients took part in these."""
        self._of_client = {int(client): int(count) for client, count in state.items()}
        spent: dict[Release, int] = {}
        for own in self.ledger.of("example"):
            spent[own.kind] = spent.get(own.kind, 0) + own.count
        for size in {*self.sizes}:
            known = max((count for k, count in self._of_client.items() if self.sizes[k] == size), default=0)
            self._of_size[size] = spent.get(self.release(size).kind, 0)
            beyond = max(0, self._of_size[size] - known)
            self._of_client |= {k: n + beyond for k, n in self._of_client.items() if self.sizes[k] == size}


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
