"""The report of a round: what came of every client, and the statistics that follow from it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedgan_lightning.federation.costs import bytes_by_network
from fedgan_lightning.federation.optimizer_state import SCHEDULE
from fedgan_lightning.packing import Packed, plain
from fedgan_lightning.protocol import ROUND_TRIP, Aggregate, ClientReport, ClientUpdate, State

#: In populations above this per-client curves are replaced by minimum, median and maximum over the cohort.
MAX_CLIENT_CURVES = 32
#: The metrics that say how long an update is begin with this; a network's name follows.
UPDATE_NORM = "update_norm/"
#: Counts that are no curves.
HIDDEN = ("images", "steps", "optimizer_steps")
#: What is shown of a population too large for curves of its own.
QUANTILES: dict[str, Callable[[Sequence[float]], float]] = {"min": min, "median": statistics.median, "max": max}


@dataclass(frozen=True)
class RoundReport:
    """What came of one attempt of a round, over all ranks.

    Attributes:
        round: Rounds completed before.
        attempt: Attempts of this round before.
        counted: Whether enough clients answered; else the round was abandoned.
        num_asked: Clients that were asked.
        seconds: Wall time from the first task to the last answer.
        clients: One report per client that was asked, and one per late answer, by client.
        networks: Networks whose parameters come up.
        population: Number of clients of the federation.
        pooled: Means over clients, weighted by N_k, of scalars that no client reports alone.
        gauges: What the executor shows of itself, such as ``sites/connected``.
        total: What all updates that count amount to; ``None`` where the round was abandoned.
        public_images: Under client-level privacy the samples that every client is taken to have seen; then nothing is
            said of single clients, nor of sums without noise.
    """

    round: int
    attempt: int
    counted: bool
    num_asked: int
    seconds: float
    clients: tuple[ClientReport, ...]
    networks: tuple[str, ...] = ()
    population: int = 0
    pooled: Mapping[str, float] = field(default_factory=dict)
    gauges: Mapping[str, float] = field(default_factory=dict)
    total: Aggregate | None = None
    public_images: float | None = None

    @property
    def answered(self) -> list[ClientReport]:
        """The clients whose updates count, in ascending order."""
        return [client for client in self.clients if client.outcome == "answered"]

    def plain(self) -> dict[str, Any]:
        """Return it as plain values for ``rounds.jsonl``; what is not known or empty is left out."""
        known = {"round": self.round, "attempt": self.attempt, "counted": self.counted, "seconds": _short(self.seconds)}
        if self.public_images is not None:
            return {**known, "clients": []}
        gauges = {"gauges": dict(self.gauges)} if self.gauges else {}
        return {**known, **gauges, "clients": [_line(client) for client in self.clients]}

    # ------------------------------------------------------------------ statistics

    @property
    def schedule_positions(self) -> tuple[int, ...]:
        """Where schedules stand; clients may differ under local epochs: those with most steps lead, by their median."""
        answered = self.answered
        most = max((client.metrics.get("steps", 0.0) for client in answered), default=0.0)
        leading = [
            client.schedule_positions
            for client in answered
            if client.metrics.get("steps", 0.0) == most and client.schedule_positions
        ]
        if not leading:
            return ()
        usual = statistics.mode(map(len, leading))
        columns = zip(*(positions for positions in leading if len(positions) == usual))
        return tuple(statistics.median_low(column) for column in columns)

    @property
    def optimizer_steps(self) -> tuple[int, int]:
        """Steps of a client's optimizers in this round, and its minibatches: of those with most, by their median."""
        known = [own.metrics for own in self.answered if {"optimizer_steps", "steps"} <= own.metrics.keys()]
        most = max((int(own["steps"]) for own in known), default=0)
        leading = [int(own["optimizer_steps"]) for own in known if own["steps"] == most]
        return (statistics.median_low(leading), most) if leading else (0, 0)

    @property
    def mean_images(self) -> float:
        """Mean over clients, weighted by N_k, of images seen: the length of one local path."""
        if self.public_images is not None:
            return self.public_images
        return self._means().get("images", 0.0)

    def _means(self) -> dict[str, float]:
        """Return means weighted by N_k over the clients that reported the value."""
        sums: dict[str, float] = {}
        weights: dict[str, int] = {}
        for client in self.answered:
            for name, value in client.metrics.items():
                sums[name] = sums.get(name, 0.0) + client.num_examples * value
                weights[name] = weights.get(name, 0) + client.num_examples
        return {**{name: total / weights[name] for name, total in sums.items()}, **self.pooled}

    def metrics(self) -> dict[str, float]:
        """Return means over the cohort; per-client values of small populations, quantiles of large ones."""
        if self.public_images is not None:
            return {}
        means = {name: value for name, value in self._means().items() if name not in HIDDEN}
        values = {(name if name.startswith(UPDATE_NORM) else f"train/{name}"): mean for name, mean in means.items()}
        delta = {} if self.total is None else self.total.delta
        for network, value in norms(delta, self.networks).items():
            values[f"{UPDATE_NORM}{network}/aggregated"] = value
        by_client = self._by_client()
        if self.population <= MAX_CLIENT_CURVES:
            for client_id, found in by_client.items():
                values |= {f"client/{client_id:03d}/{name}": value for name, value in found.items()}
            return values
        for name in sorted({name for found in by_client.values() for name in found}):
            known = [found[name] for found in by_client.values() if name in found]
            for quantile, function in QUANTILES.items():
                values[f"clients/{name}/{quantile}"] = function(known)
        return values

    def _by_client(self) -> dict[int, dict[str, float]]:
        """Return by client what it reported, the bytes that passed, and whether it answered."""
        found: dict[int, dict[str, float]] = {}
        for client in self.clients:
            values = found.setdefault(client.client_id, {"bytes_down": 0.0, "bytes_up": 0.0})
            values["bytes_down"] += sum(client.bytes_down.values())
            values["bytes_up"] += sum(client.bytes_up.values())
            if client.outcome != "late":
                values["answered"] = float(client.outcome == "answered")
        for client in self.answered:
            found[client.client_id] |= {n: value for n, value in client.metrics.items() if n not in HIDDEN}
        return found


def log_round(trainer: Any, server: Any, metrics: Mapping[str, float], *, own_names: bool) -> None:
    """Log the values of a round, and let callbacks of the server's Trainer watch those of training.

    Args:
        trainer: The server's.
        server: Its module, which has completed the round.
        metrics: The values.
        own_names: Whether callbacks may know them by the names that a module gives them, too.
    """
    every = trainer.log_every_n_steps
    if every and server.rounds_completed % every == 0:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=server.rounds_completed)
    shown = {name: value for name, value in metrics.items() if name.startswith(("train/", "privacy/"))}
    if own_names:
        shown |= {name.removeprefix("train/"): value for name, value in shown.items()}
    server.log_dict(shown, on_step=False, on_epoch=True, logger=False, batch_size=1, sync_dist=trainer.world_size > 1)


@dataclass
class ClientClock:
    """How far clients have come in all rounds so far, as the server knows it from what they report.

    Attributes:
        schedules: Steps that every learning-rate schedule has taken.
        optimizer_steps: Steps of a client's optimizers.
        minibatches: The minibatches that they were taken in.
    """

    schedules: tuple[int, ...] = ()
    optimizer_steps: int = 0
    minibatches: int = 0

    @property
    def stepping(self) -> float:
        """Steps of optimizers per minibatch; 1 before any is known."""
        return self.optimizer_steps / self.minibatches if self.minibatches else 1.0

    def move(self, report: RoundReport) -> None:
        """Go on by a round."""
        steps, minibatches = report.optimizer_steps
        self.schedules = report.schedule_positions or self.schedules
        self.optimizer_steps, self.minibatches = self.optimizer_steps + steps, self.minibatches + minibatches

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**vars(self), "schedules": list(self.schedules)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> ClientClock:
        """Return the clock of a :meth:`state_dict`."""
        return cls(tuple(state["schedules"]), int(state["optimizer_steps"]), int(state["minibatches"]))


def with_metrics(report: ClientReport, metrics: Mapping[str, float]) -> ClientReport:
    """Return a report with a client's metrics, positions of schedules apart."""
    positions = [int(metrics[name]) for name in sorted(filter(is_position, metrics), key=_index_of)]
    others = {name: value for name, value in metrics.items() if not is_position(name)}
    return dataclasses.replace(report, metrics=others, schedule_positions=positions)


def is_position(name: str) -> bool:
    """Whether a metric is the position of a schedule."""
    return name.startswith(SCHEDULE) and name.removeprefix(SCHEDULE).isdecimal()


def _index_of(position: str) -> int:
    return int(position.removeprefix(SCHEDULE))


def _line(client: ClientReport) -> dict[str, Any]:
    """Return a client's part of a line of ``rounds.jsonl``."""
    fields = {
        "client_id": client.client_id,
        "outcome": client.outcome,
        "bytes_down": sum(client.bytes_down.values()),
        "bytes_up": sum(client.bytes_up.values()),
        "seconds": _short(client.metrics.get("seconds")),
        "round_trip": _short(client.metrics.get(ROUND_TRIP)),
        "reason": client.reason,
    }
    return {name: value for name, value in fields.items() if value not in (None, "")}


def _short(value: Any) -> Any:
    """Return seconds to the tenth of a millisecond."""
    return round(value, 4) if isinstance(value, float) else value


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
