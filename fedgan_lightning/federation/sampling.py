"""Client sampling: the cohort of a round as a pure function of (seed, round)."""

from __future__ import annotations

from collections.abc import Sequence

from fedgan_lightning.data.tables import Table
from fedgan_lightning.errors import ConfigurationError, DataError, message
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import ClientSampler
from fedgan_lightning.seeding import make_numpy_generator

#: Columns of a trace.
COLUMNS = ("client", "first_round", "last_round")


class AllClients(ClientSampler):
    """Every client in every round, as FedGAN assumes."""

    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        return tuple(range(num_clients))


class FractionOfClients(ClientSampler):
    """A fixed share of the clients, without replacement, at least one.

    Args:
        fraction: Share in (0, 1].
        secret: Whether nobody can know the cohort beforehand, or from the seed; for client-level privacy.
    """

    @checked(fraction="(0, 1]")
    def __init__(self, fraction: float = 0.1, *, secret: bool = False) -> None:
        self.fraction, self.secret = _checked(fraction, "FractionOfClients.fraction"), secret

    def size(self, num_clients: int) -> int:
        """Return the size of every cohort."""
        return max(1, round_half_up(self.fraction * num_clients))

    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        size = self.size(num_clients)
        chosen = make_numpy_generator(seed, "cohort", round).choice(num_clients, size=size, replace=False)
        return tuple(sorted(int(client_id) for client_id in chosen))


class PoissonSampling(ClientSampler):
    """Every client on its own with the same probability: cohorts vary in size and may be empty.

    Args:
        probability: Probability in (0, 1].
        secret: Whether nobody can know the cohort beforehand, or from the seed; for client-level privacy.
    """

    @checked(probability="(0, 1]")
    def __init__(self, probability: float = 0.1, *, secret: bool = False) -> None:
        self.probability, self.secret = _checked(probability, "PoissonSampling.probability"), secret

    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        drawn = make_numpy_generator(seed, "cohort", round).random(num_clients) < self.probability
        return tuple(int(client_id) for client_id in drawn.nonzero()[0])


class SelectedClients(ClientSampler):
    """The same clients in every round: one of them is the local-only control at equal steps, on the same metrics.

    Args:
        clients: Their ids, distinct.
    """

    @checked(clients="[0, inf)")
    def __init__(self, clients: Sequence[int]) -> None:
        ids = sorted(map(int, clients))
        if not ids or len(set(ids)) != len(ids):
            raise ConfigurationError(
                message("SelectedClients must have distinct client ids", received=ids, fix="name some, from 0 on")
            )
        self.clients = tuple(ids)

    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        if self.clients[-1] >= num_clients:
            raise ConfigurationError(
                message(
                    f"client ids must lie below the number of clients, {num_clients}",
                    received=self.clients[-1],
                    fix="name other clients, or raise data.num_clients",
                )
            )
        return self.clients

    def population(self, *, num_clients: int, round: int) -> Sequence[int]:
        return self.clients


class AvailableClients(ClientSampler):
    """Only clients that a trace says are there: devices at night, hospitals that join late or leave.

    Args:
        trace: CSV file with the columns ``client``, ``first_round`` and ``last_round``, both inclusive; a client may
            have several rows, and one without rows is never there.
        among: Chooses among those that are there; default all of them.
        encoding: Encoding of the file.
        delimiter: What separates its fields.

    Raises:
        ConfigurationError: If ``among`` names clients.
        DataError: If the file cannot be read as such.
    """

    @checked()
    def __init__(
        self, trace: str, *, among: ClientSampler | None = None, encoding: str = "utf-8", delimiter: str = ","
    ) -> None:
        self.among = among if among is not None else AllClients()
        if isinstance(self.among, SelectedClients):
            raise ConfigurationError(
                message(
                    "AvailableClients.among must draw from however many are there",
                    received="SelectedClients, which names them",
                    fix="leave the others out of the trace",
                )
            )
        table = Table(trace, option="AvailableClients.trace", encoding=encoding, delimiter=delimiter)
        places = table.positions(COLUMNS)
        self.spans: list[tuple[int, int, int]] = []
        for line, row in table:
            client, first, last = (
                table.whole(row[place], line=line, column=name) for place, name in zip(places, COLUMNS)
            )
            if last < first:
                raise table.unfit(f"at least first_round, {first}", str(last), line=line, column="last_round")
            self.spans.append((client, first, last))
        if not self.spans:
            raise DataError(
                message("a trace must say when some client is there", received=f"no row in {trace}", fix="add rows")
            )

    def population(self, *, num_clients: int, round: int) -> Sequence[int]:
        there = {client for client, first, last in self.spans if first <= round <= last}
        beyond = sorted(client for client in there if not 0 <= client < num_clients)
        if beyond:
            raise ConfigurationError(
                message(
                    f"the trace must name clients in [0, {num_clients})",
                    received=beyond[0],
                    fix="raise data.num_clients",
                )
            )
        return sorted(there)

    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        there = self.population(num_clients=num_clients, round=round)
        if not there:
            return ()
        return tuple(there[place] for place in self.among.sample(num_clients=len(there), round=round, seed=seed))


def round_half_up(value: float) -> int:
    """Return the nearest integer; Python's ``round`` takes 2.5 to 2."""
    return int(value + 0.5)


def _checked(share: float, name: str) -> float:
    if not 0 < share <= 1:
        raise ConfigurationError(message(f"{name} must lie in (0, 1]", received=share, fix="set a share in that range"))
    return share
