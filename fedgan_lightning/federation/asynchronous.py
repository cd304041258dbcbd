"""Buffered asynchronous aggregation: the server steps when K updates are in, whatever the age of each."""

from __future__ import annotations

from typing import Literal

from fedgan_lightning.errors import refuse_first
from fedgan_lightning.federation.durations import Durations, LogNormalDurations
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import ClientSampler


class Asynchronous:
    """A round is K = ``buffer_size`` arrivals, of which the server adds (1 / K) sum_i s(tau_i) delta_i.

    tau_i is the number of server steps since client i got its networks. Whoever is done gets the newest networks at
    once, and is at most once in a buffer. The sum is divided by K, and not by the sum of s; where the aggregator weighs
    clients by N_i, by their sum. Moments and buffers of networks are values, and are averaged without s. The server's
    learning rate is that of ``server.optimizer``.

    Source: Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba 2022, algorithm 1 (FedBuff); with ``toward: model`` and
    ``buffer_size: 1`` Xie, Koyejo, Gupta 2019, algorithm 1 (FedAsync): w <- w + alpha s(tau) (w_i - w).

    Args:
        buffer_size: Arrivals K of a round; all clients make it synchronous.
        concurrency: Clients at work at the same time; ``None`` for all. Others are drawn evenly from those at rest.
        staleness: s(tau): ``constant`` 1, ``polynomial`` (1 + tau)^-exponent, or ``hinge``: 1 up to ``hinge`` and
            1 / (exponent (tau - hinge) + 1) above.
        exponent: a, above 0.
        hinge: b, at least 0.
        most_stale: Largest tau that counts; older updates are dropped. ``None`` for no bound.
        toward: What a late update means: ``update`` adds what the client has changed, ``model`` moves toward its
            networks.
        durations: Virtual seconds that clients take, in simulation; default log-normal over clients.
    """

    @checked(
        "federation.rules.asynchronous",
        buffer_size="[1, inf)",
        concurrency="[1, inf)",
        exponent="(0, inf)",
        hinge="[0, inf)",
        most_stale="[0, inf)",
    )
    def __init__(
        self,
        *,
        buffer_size: int = 10,
        concurrency: int | None = None,
        staleness: Literal["constant", "polynomial", "hinge"] = "polynomial",
        exponent: float = 0.5,
        hinge: int = 4,
        most_stale: int | None = None,
        toward: Literal["update", "model"] = "update",
        durations: Durations | None = None,
    ) -> None:
        self.buffer_size, self.concurrency = buffer_size, concurrency
        self.staleness, self.exponent, self.hinge, self.most_stale = staleness, float(exponent), hinge, most_stale
        self.toward = toward
        self.durations = durations if durations is not None else LogNormalDurations()

    def check(self, *, num_clients: int, sampler: ClientSampler, chooses: bool) -> None:
        """Refuse settings that do not go with a federation.

        Args:
            num_clients: Clients of the federation.
            sampler: The federation's.
            chooses: Whether it is one that chooses among clients.

        Raises:
            ConfigurationError: If they do not.
        """
        at_work = num_clients if self.concurrency is None else self.concurrency
        wrong = [
            (chooses, "clients must be left to the clock", f"federation.clients={type(sampler).__name__}",
             "set federation.clients to AllClients, and asynchronous.concurrency"),
            (at_work > num_clients, f"concurrency must be at most {num_clients}, all clients", f"{at_work}",
             "lower it, or set it to null"),
            (self.buffer_size > at_work, f"buffer_size must be at most {at_work}, the clients at work",
             f"{self.buffer_size}", "lower it, or raise concurrency"),
        ]  # fmt: skip
        refuse_first(wrong, prefix="asynchronous: ")
        self.durations.check(num_clients=num_clients)

    def discount(self, tau: int) -> float:
        """Return s(tau)."""
        if self.staleness == "polynomial":
            return float((1 + tau) ** -self.exponent)
        if self.staleness == "hinge":
            return 1.0 if tau <= self.hinge else 1.0 / (self.exponent * (tau - self.hinge) + 1.0)
        return 1.0

    def counts(self, tau: int) -> bool:
        """Whether an update of this age counts."""
        return self.most_stale is None or tau <= self.most_stale
