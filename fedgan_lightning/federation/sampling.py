"""Client sampling: the cohort of a round as a pure function of (seed, round)."""

from __future__ import annotations

from collections.abc import Sequence

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.protocol import ClientSampler
from fedgan_lightning.seeding import make_numpy_generator


class AllClients(ClientSampler):
    """Every client in every round, as FedGAN assumes."""

    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        return tuple(range(num_clients))


class FractionOfClients(ClientSampler):
    """A fixed share of the clients, without replacement, at least one.

    Args:
        fraction: Share in (0, 1].
    """

    def __init__(self, fraction: float = 0.1) -> None:
        self.fraction = _checked(fraction, "FractionOfClients.fraction")

    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        count = max(1, round_half_up(self.fraction * num_clients))
        chosen = make_numpy_generator(seed, "cohort", round).choice(num_clients, size=count, replace=False)
        return tuple(sorted(int(client_id) for client_id in chosen))


class PoissonSampling(ClientSampler):
    """Every client on its own with the same probability: cohorts vary in size and may be empty.

    Args:
        probability: Probability in (0, 1].
    """

    def __init__(self, probability: float = 0.1) -> None:
        self.probability = _checked(probability, "PoissonSampling.probability")

    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        drawn = make_numpy_generator(seed, "cohort", round).random(num_clients) < self.probability
        return tuple(int(client_id) for client_id in drawn.nonzero()[0])


class SelectedClients(ClientSampler):
    """The same clients in every round: one of them is the local-only control at equal steps, on the same metrics.

    Args:
        clients: Their ids, distinct.
    """

    def __init__(self, clients: Sequence[int]) -> None:
        if not clients or len(set(clients)) != len(clients) or min(clients) < 0:
            raise ConfigurationError(
                message("SelectedClients takes distinct client ids", received=list(clients), fix="name some, from 0 on")
            )
        self.clients = tuple(sorted(clients))

    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        if self.clients[-1] >= num_clients:
            raise ConfigurationError(
                message(
                    f"client ids lie below the number of clients, {num_clients}",
                    received=self.clients[-1],
                    fix="name other clients, or raise data.num_clients",
                )
            )
        return self.clients


def round_half_up(value: float) -> int:
    """Return the nearest integer; Python's ``round`` takes 2.5 to 2."""
    return int(value + 0.5)


def _checked(share: float, name: str) -> float:
    if not 0 < share <= 1:
        raise ConfigurationError(message(f"{name} lies in (0, 1]", received=share, fix="set a share in that range"))
    return share
