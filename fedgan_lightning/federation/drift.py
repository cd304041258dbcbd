"""How far clients pull apart: the mean cosine between the updates of any two of them, without keeping the updates.

With unit vectors e_k, |sum e_k|^2 = n + sum over pairs: one sum per network says it for any number of clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fedgan_lightning.federation.orchestrator import FederatedOrchestrator
from fedgan_lightning.federation.ranks import Ranks
from fedgan_lightning.federation.report import UPDATE_NORM
from fedgan_lightning.packing import Packed
from fedgan_lightning.protocol import ClientUpdate, RoundInfo, State


class ClientDrift(L.Callback):
    """Logs after every round how far clients pull apart, as ``drift/NETWORK``; see :class:`Drift`."""

    def __init__(self) -> None:
        self._drift = Drift()
        #: The values of the last round.
        self.latest: dict[str, float] = {}

    def on_round_start(self, trainer: L.Trainer, server: Any, info: RoundInfo) -> None:
        """Begin anew."""
        self._drift = Drift()

    def on_client_end(self, trainer: L.Trainer, server: Any, update: ClientUpdate) -> None:
        """Count a client."""
        norms = {n.removeprefix(UPDATE_NORM): v for n, v in update.metrics.items() if n.startswith(UPDATE_NORM)}
        self._drift.add(update.delta, norms)

    def on_round_end(self, trainer: L.Trainer, server: Any, info: RoundInfo, metrics: Mapping[str, float]) -> None:
        """Log what came out."""
        found = [item for item in trainer.callbacks if isinstance(item, FederatedOrchestrator)]  # type: ignore[attr-defined]
        self.latest = self._drift.values(found[0].ranks if found else Ranks())
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=info.round + 1)


class Drift:
    """Streaming mean pairwise cosine of client updates by network.

    1 where all clients agree, 0 where they are at right angles, below where they undo each other's work: under label
    skew the discriminators' falls first. Clients whose update is zero do not count.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, delta: State, lengths: Mapping[str, float]) -> None:
        """Count one client.

        Args:
            delta: Its update.
            lengths: Euclidean norm of its update by network.
        """
        packed = Packed.of(delta)
        for dtype, runs in packed.layout.runs.items():
            vector = packed.vectors[dtype]
            for network, start, stop in runs:
                if not lengths.get(network):
                    continue
                key = f"{network}|{dtype}|{start}"
                if key not in self._sums:
                    self._sums[key] = torch.zeros(stop - start, dtype=torch.float32, device=vector.device)
                total = self._sums[key]
                total.add_(vector[start:stop].to(total), alpha=1.0 / lengths[network])
        for network, length in lengths.items():
            if length:
                self._counts[network] = self._counts.get(network, 0) + 1

    def values(self, ranks: Ranks) -> dict[str, float]:
        """Return ``drift/NETWORK``, over all ranks, for networks that two clients or more have changed."""
        counts: dict[str, int] = {}
        for own in ranks.exchange(self._counts):
            for network, count in own.items():
                counts[network] = counts.get(network, 0) + count
        keys = sorted(
            {key for own in ranks.exchange({k: len(v) for k, v in self._sums.items()}) for key in own.items()}
        )
        squares: dict[str, float] = {}
        for key, size in keys:
            total = ranks.sum_(self._sums.get(key, torch.zeros(size)))
            network = key.split("|")[0]
            squares[network] = squares.get(network, 0.0) + float(total.double().square().sum())
        return {f"drift/{n}": (squares[n] - count) / (count * (count - 1)) for n, count in counts.items() if count > 1}
