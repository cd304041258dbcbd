"""What a federation costs: bytes by direction and network, client steps, seconds; and the incidents of its rounds."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedgan_lightning.federation.namespaces import ALGORITHM, MOMENTS
from fedgan_lightning.packing import Layout, Packed
from fedgan_lightning.protocol import ClientReport, State
from fedgan_lightning.states import network_of

if TYPE_CHECKING:
    from fedgan_lightning.federation.report import RoundReport

OPTIMIZER = "optimizer"
#: What is counted: three outcomes of clients, and one of rounds.
EVENTS = ("failed", "rejected", "late", "abandoned")
#: Outcomes of clients that sent an update.
CAME = ("answered", "rejected", "late")
#: Incidents that are listed one by one; all are counted.
INCIDENTS_KEPT = 200


def bytes_by_network(state: State) -> dict[str, int]:
    """Return the size of a state in bytes by network; see :func:`cost_group`."""
    return dict(_sizes(state.layout if isinstance(state, Packed) else Layout.of(state)))


def cost_group(name: str) -> str:
    """Return under which name the bytes of an entry are counted: its network, ``optimizer`` for moments, and for an
    algorithm's entries the first part of their names, such as ``control``.
    """
    if name.startswith(MOMENTS):
        return OPTIMIZER
    if name.startswith(ALGORITHM):
        return name.removeprefix(ALGORITHM).split("/", 1)[0]
    return network_of(name)


@lru_cache(maxsize=64)
def _sizes(layout: Layout) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes):
        network = cost_group(name)
        sizes[network] = sizes.get(network, 0) + math.prod(shape) * dtype.itemsize
    return sizes


class CostLedger:
    """Totals since the start of the run; they continue over a resume.

    Attributes:
        bytes_down: Server to clients, by network.
        bytes_up: Clients to server, by network.
        bytes_between: Client to client, by network, where networks are handed on.
        client_steps: Local steps over all clients.
        client_asks: Tasks that clients were asked to do.
        client_runs: Client updates received.
        events: Clients that failed, updates that were rejected or late, rounds that were abandoned.
        incidents: The last of these, with client and reason.
        changes: Settings that a continued run has changed, with the rounds that were complete.
        client_seconds: Time spent on clients.
        round_seconds: Wall time of rounds.
    """

    def __init__(self) -> None:
        self.bytes_down: dict[str, int] = {}
        self.bytes_up: dict[str, int] = {}
        self.bytes_between: dict[str, int] = {}
        self.client_steps = 0
        self.client_asks = 0
        self.client_runs = 0
        self.client_seconds = 0.0
        self.round_seconds = 0.0
        self.events: dict[str, int] = {}
        self.incidents: list[dict[str, Any]] = []
        self.changes: list[dict[str, Any]] = []

    def record(self, report: RoundReport) -> None:
        """Count one attempt of a round."""
        self.client_asks += report.num_asked
        for client in report.clients:
            _add(self.bytes_down, client.bytes_down)
            _add(self.bytes_up, client.bytes_up)
            if client.outcome in EVENTS:
                self._note(report.round, client, is_named=report.public_images is None)
            if client.outcome in CAME:
                self.client_steps += int(client.metrics.get("steps", 0))
                self.client_runs += 1
                self.client_seconds += client.metrics.get("seconds", 0.0)
        if not report.counted:
            self._count("abandoned")

    def record_exchange(self, sizes: Mapping[str, int]) -> None:
        """Count networks that clients have handed on to each other."""
        _add(self.bytes_between, sizes)

    def _count(self, kind: str) -> None:
        self.events[kind] = self.events.get(kind, 0) + 1

    def _note(self, round: int, client: ClientReport, *, is_named: bool) -> None:
        self._count(client.outcome)
        if not is_named:
            return
        incident = {"round": round, "client_id": client.client_id, "kind": client.outcome, "reason": client.reason}
        self.incidents = [*self.incidents, incident][-INCIDENTS_KEPT:]

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
            **({"bytes_between": dict(self.bytes_between)} if self.bytes_between else {}),
            "bytes_per_client_step": self.bytes_per_client_step,
            "client_steps": self.client_steps,
            "client_asks": self.client_asks,
            "client_runs": self.client_runs,
            "client_seconds": self.client_seconds,
            "round_seconds": self.round_seconds,
            "client_steps_per_second": self.client_steps_per_second,
            **({"events": dict(self.events), "incidents": list(self.incidents)} if self.events else {}),
            **({"changes": list(self.changes)} if self.changes else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the totals."""
        return copy.deepcopy(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from these totals."""
        for name in vars(self):
            setattr(self, name, state[name])


def cost_metrics(attempts: Sequence[RoundReport], ledger: CostLedger) -> dict[str, float]:
    """Return what a round's attempts cost and what came of their clients, and the totals of the run."""
    spent = CostLedger()
    for attempt in attempts:
        spent.record(attempt)
    found = {"round/clients": float(sum(client.outcome == "answered" for client in attempts[-1].clients))}
    found |= {f"round/{kind}": float(spent.events.get(kind, 0)) for kind in EVENTS}
    found |= {"round/asked": float(spent.client_asks), **attempts[-1].gauges}
    found["round/client_steps_per_second"] = ledger.client_steps_per_second
    ways = {"down": ledger.bytes_down, "up": ledger.bytes_up, "between": ledger.bytes_between}
    for direction, totals in ways.items():
        found |= {f"bytes/{direction}/{network}": float(total) for network, total in totals.items()}
    return found


def _add(totals: dict[str, int], sizes: Mapping[str, int]) -> None:
    for network, size in sizes.items():
        totals[network] = totals.get(network, 0) + size
