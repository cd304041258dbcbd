"""FedGAN: clients train both networks for K steps, the server averages what they have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.exchange import cycle
from fedgan_lightning.options import checked


class FedGAN(FederatedAlgorithm):
    """w <- w + sum_k (N_k / N) (w_k - w) for generator and discriminator alike, every K local steps.

    Source: Rasouli, Sun, Rajagopal 2020, algorithm 1. It is what :class:`FederatedAlgorithm` does by itself: weights
    are the aggregator's, and the server's optimizer makes FedAdam or FedAvgM of it.

    A network with ``sync: exchange`` is nobody's for long: it is trained where it is, never averaged, and handed on to
    another client, with its moments, every ``exchange_every`` rounds. With the discriminator this is what MD-GAN does
    (Hardy, Le Merrer, Sericola 2019), whose generator is averaged here.

    Args:
        exchange_every: Rounds between two exchanges; each is a random cycle through all clients that have answered in
            the round, so that nobody of them keeps what he had.
    """

    trains = frozenset({"exchange"})

    @checked(exchange_every="[1, inf)")
    def __init__(self, *, exchange_every: int = 1) -> None:
        self.exchange_every = exchange_every

    def hand_on(self, *, round: int, clients: Sequence[int], seed: int) -> Mapping[int, int]:
        return cycle(round=round, clients=clients, seed=seed, every=self.exchange_every)
