"""What a federation costs: bytes by direction and network, client steps, seconds; and what came of each client."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from fedgan_lightning.federation.optimizer_state import is_optimizer_entry
from fedgan_lightning.packing import Layout, Packed
from fedgan_lightning.protocol import State
from fedgan_lightning.states import network_of

OPTIMIZER = "optimizer"
#: What is counted: three things that become of clients, and one of rounds.
EVENTS = ("failed", "rejected", "late", "abandoned")
#: Incidents that are told one by one; all are counted.
INCIDENTS_KEPT = 200


def bytes_by_network(state: State) -> dict[str, int]:
    """Return the size of a state in bytes by network; optimizer moments count under ``optimizer``."""
    return dict(_sizes(state.layout if isinstance(state, Packed) else Layout.of(state)))


def network_in_ledger(name: str) -> str:
    """Return under which name the bytes of an entry are counted."""
    return OPTIMIZER if is_optimizer_entry(name) else network_of(name)


@lru_cache(maxsize=64)
def _sizes(layout: Layout) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes):
        network = network_in_ledger(name)
        sizes[network] = sizes.get(network, 0) + math.prod(shape) * dtype.itemsize
    return sizes


@dataclass(frozen=True)
class Incident:
    """A client that did not answer as it should.

    Attributes:
        round: Rounds completed before.
        client_id: The client.
        kind: ``failed``, ``rejected`` or ``late``.
        reason: In words.
    """

    round: int
    client_id: int
    kind: str
    reason: str


@dataclass(frozen=True)
class Contact:
    """What passed between the server and one client in one try of a round.

    Attributes:
        client_id: The client.
        outcome: ``answered``, ``failed``, ``rejected``, ``late`` (what came answers the round before), or ``unneeded``
            (enough others had answered).
        bytes_down: What was sent to it.
        bytes_up: What it sent.
        seconds: Time it worked on its task, as it says itself.
        round_trip: Time from task to answer on the server's clock; known where clients are on machines of their own.
        reason: Why it did not answer, or was not let in.
    """

    client_id: int
    outcome: str
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float | None = None
    round_trip: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class RollCall:
    """Who was asked in one try of a round, and what came of it.

    Attributes:
        round: Rounds completed before.
        attempt: Tries of this round before.
        counted: Whether enough answered; else the round was abandoned.
        seconds: Wall time from the first task to the last answer.
        contacts: One for every client that was asked, and for every late answer, by client.
        gauges: What the executor says of itself, such as ``sites/connected``.
    """

    round: int
    attempt: int
    counted: bool
    seconds: float
    contacts: tuple[Contact, ...]
    gauges: Mapping[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return it as plain values; what is not known or empty is left out."""
        clients = [{n: _short(v) for n, v in vars(own).items() if v not in (None, "")} for own in self.contacts]
        known = {"round": self.round, "attempt": self.attempt, "counted": self.counted, "seconds": _short(self.seconds)}
        return {**known, **({"gauges": dict(self.gauges)} if self.gauges else {}), "clients": clients}


def _short(value: Any) -> Any:
    """Return seconds to the tenth of a millisecond."""
    return round(value, 4) if isinstance(value, float) else value


class Ledger:
    """Totals since the start of the run; they continue over a resume.

    Attributes:
        bytes_down: Server to clients, by network.
        bytes_up: Clients to server, by network.
        client_steps: Local steps over all clients.
        client_asks: Tasks that clients were asked to do.
        client_runs: Client updates received.
        events: Clients that failed, updates that were rejected or late, rounds that were abandoned.
        incidents: The last of these, with client and reason.
        client_seconds: Time spent on clients.
        round_seconds: Wall time of rounds.
    """

    def __init__(self) -> None:
        self.bytes_down: dict[str, int] = {}
        self.bytes_up: dict[str, int] = {}
        self.client_steps = 0
        self.client_asks = 0
        self.client_runs = 0
        self.client_seconds = 0.0
        self.round_seconds = 0.0
        self.events: dict[str, int] = {}
        self.incidents: list[dict[str, Any]] = []

    def send(self, sizes: Mapping[str, int], num_clients: int) -> None:
        """Count what went down: :func:`bytes_by_network` of it, to so many clients."""
        for network, size in sizes.items():
            self.bytes_down[network] = self.bytes_down.get(network, 0) + size * num_clients

    def count(self, kind: str) -> None:
        """Count an event."""
        self.events[kind] = self.events.get(kind, 0) + 1

    def note(self, incident: Incident) -> None:
        """Count an incident, and keep it."""
        self.count(incident.kind)
        self.incidents = [*self.incidents, vars(incident)][-INCIDENTS_KEPT:]

    def record(self, received: Mapping[str, int], metrics: Mapping[str, float]) -> None:
        """Count one client's answer.

        Args:
            received: :func:`bytes_by_network` of what came up.
            metrics: The client's ``steps`` and ``seconds``.
        """
        for network, size in received.items():
            self.bytes_up[network] = self.bytes_up.get(network, 0) + size
        self.client_steps += int(metrics.get("steps", 0))
        self.client_runs += 1
        self.client_seconds += metrics.get("seconds", 0.0)

    def add(self, other: Ledger) -> None:
        """Add the totals of another ledger: those of a round that is complete."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, {key: mine.get(key, 0) + value.get(key, 0) for key in {**mine, **value}})
            elif isinstance(value, list):
                setattr(self, name, [*mine, *value][-INCIDENTS_KEPT:])
            else:
                setattr(self, name, mine + value)

    @property
    def bytes_per_client_step(self) -> float:
        """Bytes in both directions per local step of one client.

        FedGAN's law: 2 (|G| + |D|) * 4 / K in float32; averaged moments, where chosen, and BatchNorm come on top.
        """
        total = sum(self.bytes_down.values()) + sum(self.bytes_up.values())
        return total / self.client_steps if self.client_steps else 0.0

    @property
    def client_steps_per_second(self) -> float:
        """Local steps of all clients per second of round time."""
        return self.client_steps / self.round_seconds if self.round_seconds else 0.0

    def summary(self) -> dict[str, Any]:
        """Return all totals as plain values."""
        return {
            "bytes_down": dict(self.bytes_down),
            "bytes_up": dict(self.bytes_up),
            "bytes_per_client_step": self.bytes_per_client_step,
            "client_steps": self.client_steps,
            "client_asks": self.client_asks,
            "client_runs": self.client_runs,
            "client_seconds": self.client_seconds,
            "round_seconds": self.round_seconds,
            "client_steps_per_second": self.client_steps_per_second,
            **({"events": dict(self.events), "incidents": list(self.incidents)} if self.events else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the totals."""
        return copy.deepcopy(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from these totals."""
        for name in vars(self):
            setattr(self, name, state[name])
