"""A round in numbers: what every client reported, and what the cohort amounts to."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedgan_lightning.federation.costs import Contact, bytes_by_network
from fedgan_lightning.federation.optimizer_state import SCHEDULE
from fedgan_lightning.packing import Packed, plain
from fedgan_lightning.protocol import Aggregate, ClientUpdate, Participant, State

#: In populations above this per-client curves are replaced by minimum, median and maximum over the cohort.
MAX_CLIENT_CURVES = 32
#: The metrics that say how long an update is begin with this; a network's name follows.
UPDATE_NORM = "update_norm/"
#: Counts that are no curves.
HIDDEN = ("images", "steps")
#: What is said of a population too large for curves of its own.
QUANTILES: dict[str, Callable[[Sequence[float]], float]] = {"min": min, "median": statistics.median, "max": max}


@dataclass(frozen=True)
class ClientRecord:
    """The scalars of one client's round; plain values, so that ranks can exchange them.

    Attributes:
        client_id: The client.
        num_examples: Size N_k of its data set.
        metrics: What it reported, and the norm of its update by network.
        positions: Where its learning-rate schedules stand.
    """

    client_id: int
    num_examples: int
    metrics: dict[str, float]
    positions: list[int]

    @classmethod
    def of(cls, update: ClientUpdate, *, networks: Sequence[str]) -> ClientRecord:
        """Return the record of an update; ``networks`` are those that travel."""
        own = Participant(update.client_id, update.num_examples, {**update.metrics, **lengths(update.delta, networks)})
        return cls.of_participant(own)

    @classmethod
    def of_participant(cls, own: Participant) -> ClientRecord:
        """Return the record of a client of whom no more is known than this."""
        return cls(
            client_id=own.client_id,
            num_examples=own.num_examples,
            metrics={name: value for name, value in own.metrics.items() if not is_position(name)},
            positions=[int(own.metrics[name]) for name in sorted(filter(is_position, own.metrics), key=_index_of)],
        )

    @property
    def lengths(self) -> dict[str, float]:
        """Norm of the update by network."""
        return {n.removeprefix(UPDATE_NORM): v for n, v in self.metrics.items() if n.startswith(UPDATE_NORM)}

    def plain(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return dict(vars(self))


class RoundSummary:
    """Statistics over the records of a round, in the order of the clients.

    Args:
        records: One record per update.
        networks: Networks that travel.
        drift: Mean cosine between clients' updates, as ``drift/NETWORK``.
        pooled: Weighted means over all clients of what no single record says.
        contacts: What passed between the server and every client that was asked.
        population: Number of clients of the federation.
    """

    def __init__(
        self,
        records: Iterable[ClientRecord],
        *,
        networks: Sequence[str],
        drift: Mapping[str, float],
        pooled: Mapping[str, float] | None = None,
        contacts: Sequence[Contact] = (),
        population: int = 0,
    ) -> None:
        self.records = sorted(records, key=lambda record: record.client_id)
        self.networks, self.drift, self.pooled = networks, drift, dict(pooled or {})
        self.contacts, self.population = contacts, population

    @property
    def schedule_positions(self) -> tuple[int, ...]:
        """Where schedules stand; clients may differ under local epochs: those with most steps lead, by their median."""
        most = max((record.metrics.get("steps", 0.0) for record in self.records), default=0.0)
        leading = [own.positions for own in self.records if own.metrics.get("steps", 0.0) == most and own.positions]
        if not leading:
            return ()
        usual = statistics.mode(map(len, leading))
        return tuple(statistics.median_low(column) for column in zip(*(own for own in leading if len(own) == usual)))

    @property
    def mean_images(self) -> float:
        """Weighted mean over clients of images seen: the length of one local path."""
        return self._means().get("images", 0.0)

    def _means(self) -> dict[str, float]:
        """Return means weighted by N_k over the clients that reported the value."""
        sums: dict[str, float] = {}
        weights: dict[str, int] = {}
        for record in self.records:
            for name, value in record.metrics.items():
                sums[name] = sums.get(name, 0.0) + record.num_examples * value
                weights[name] = weights.get(name, 0) + record.num_examples
        return {**{name: total / weights[name] for name, total in sums.items()}, **self.pooled}

    def metrics(self, aggregate: Aggregate) -> dict[str, float]:
        """Return means over the cohort; per-client values of small populations, quantiles of large ones."""
        means = {name: value for name, value in self._means().items() if name not in HIDDEN}
        values = {(name if name.startswith(UPDATE_NORM) else f"train/{name}"): mean for name, mean in means.items()}
        for network, value in norms(aggregate.delta, self.networks).items():
            values[f"update_norm/{network}/aggregated"] = value
        values |= self.drift
        by_client = self._by_client()
        if self.population <= MAX_CLIENT_CURVES:
            for client_id, own in by_client.items():
                values |= {f"client/{client_id:03d}/{name}": value for name, value in own.items()}
            return values
        for name in sorted({name for own in by_client.values() for name in own}):
            known = [own[name] for own in by_client.values() if name in own]
            for quantile, function in QUANTILES.items():
                values[f"clients/{name}/{quantile}"] = function(known)
        return values

    def _by_client(self) -> dict[int, dict[str, float]]:
        """Return by client what it reported, the bytes that passed, and whether it answered."""
        found: dict[int, dict[str, float]] = {}
        for contact in self.contacts:
            own = found.setdefault(contact.client_id, {"bytes_down": 0.0, "bytes_up": 0.0})
            own["bytes_down"] += contact.bytes_down
            own["bytes_up"] += contact.bytes_up
            if contact.outcome != "late":
                own["answered"] = float(contact.outcome == "answered")
        for record in self.records:
            own = {name: value for name, value in record.metrics.items() if name not in HIDDEN}
            found.setdefault(record.client_id, {}).update(own)
        return found


def is_position(name: str) -> bool:
    """Whether a metric is the position of a schedule."""
    return name.startswith(SCHEDULE) and name.removeprefix(SCHEDULE).isdecimal()


def _index_of(position: str) -> int:
    return int(position.removeprefix(SCHEDULE))


def bytes_up(update: ClientUpdate) -> dict[str, int]:
    """Return what a client sent, in bytes by network."""
    return dict(Counter(bytes_by_network(update.delta)) + Counter(bytes_by_network(update.extras)))


def lengths(delta: State, networks: Sequence[str]) -> dict[str, float]:
    """Return the norm of an update by network, as the metrics ``update_norm/NETWORK``."""
    return {f"{UPDATE_NORM}{network}": value for network, value in norms(delta, networks).items()}


def norms(state: State, networks: Sequence[str]) -> dict[str, float]:
    """Return the Euclidean norm of each network's entries."""
    packed = Packed.of(state)
    parts = {
        (network, dtype, start, stop): torch.linalg.vector_norm(packed.vectors[dtype][start:stop])
        for dtype, runs in packed.layout.runs.items()
        for network, start, stop in runs
    }
    squares: dict[str, float] = dict.fromkeys(networks, 0.0)
    found = plain(parts)
    for key, norm in found.items():
        if not math.isfinite(norm):  # the squares of large numbers are no float32
            _, dtype, start, stop = key
            norm = float(torch.linalg.vector_norm(packed.vectors[dtype][start:stop], dtype=torch.float64))
        squares[key[0]] = squares.get(key[0], 0.0) + norm**2
    return {network: squares[network] ** 0.5 for network in networks}
