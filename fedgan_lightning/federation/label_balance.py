"""Weights and cohorts from the labels that clients hold: FeGAN's two ideas against label skew."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.aggregation import WeightedMean
from fedgan_lightning.federation.sampling import round_half_up
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import ClientSampler, FederatedData
from fedgan_lightning.seeding import make_numpy_generator


class DivergenceWeightedMean(WeightedMean):
    """The mean with weights w_k = exp(+-KL(p_k || p) N_k / N), for client k's label law p_k and that of all clients, p.

    The exponent is at most log(classes) max N_k / N, so that with many clients of one size it is nearly the plain mean.
    Published code has ``divergent`` clients gain; ``typical`` turns the sign round. Labels are those that clients
    state when they join; they must be counted. Source: Guerraoui, Guirguis, Kermarrec, Le Merrer 2020 (FeGAN), section
    4.2, with the laws of the whole federation in place of the cohort's.

    Args:
        favour: Who weighs more.
    """

    weighs_by_size: ClassVar[bool] = False

    @checked()
    def __init__(self, *, favour: Literal["divergent", "typical"] = "divergent") -> None:
        super().__init__("uniform")
        self.favour = favour
        self._weights: list[float] = []

    def prepare(self, data: FederatedData) -> None:
        counts = label_counts(data, who=type(self).__name__)
        sizes, total = counts.sum(1, keepdims=True), counts.sum(0) / counts.sum()
        own = counts / np.maximum(sizes, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(own > 0, own * np.log(own / total), 0.0)
        sign = 1.0 if self.favour == "divergent" else -1.0
        self._weights = np.exp(sign * terms.sum(1) * sizes[:, 0] / counts.sum()).tolist()

    def weight_of(self, client_id: int, num_examples: int) -> float:
        return self._weights[client_id]


class BalancedClients(ClientSampler):
    """Cohorts whose classes add up evenly: in turn a client that holds the class of which there is least so far.

    Clients of a class are queued in an order of the round. Source: Guerraoui, Guirguis, Kermarrec, Le Merrer 2020
    (FeGAN), section 4.1, algorithm 2.

    Args:
        fraction: Share of all clients in a cohort, in (0, 1]; at least one.
    """

    @checked(fraction="(0, 1]")
    def __init__(self, *, fraction: float = 0.1) -> None:
        self.fraction = float(fraction)
        self._counts: NDArray[Any] = np.zeros((0, 0))

    def prepare(self, data: FederatedData) -> None:
        self._counts = label_counts(data, who=type(self).__name__)

    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        counts = self._counts
        order = make_numpy_generator(seed, "balanced cohort", round).permutation(num_clients)
        size, chosen = max(1, round_half_up(self.fraction * num_clients)), list[int]()
        so_far = np.zeros(counts.shape[1])
        while len(chosen) < size:
            free = [k for k in order if k not in chosen]
            for label in np.argsort(so_far, kind="stable"):
                holders = [k for k in free if counts[k, label] > 0]
                if holders:
                    break
            following = int(holders[0]) if holders else int(free[0])
            chosen.append(following)
            so_far = so_far + counts[following]
        return tuple(sorted(chosen))


def label_counts(data: FederatedData, *, who: str) -> NDArray[Any]:
    """Return how many samples of every class each client holds, (clients, classes).

    Raises:
        ConfigurationError: If the data does not say, or has no classes.
    """
    counts = getattr(data, "label_counts", None)
    found = np.zeros((0, 0)) if counts is None else np.asarray(counts(), dtype=np.float64)
    if found.ndim != 2 or found.shape[1] < 2:
        raise ConfigurationError(
            message(
                f"{who} must know how many labels of every class clients hold",
                received=f"{type(data).__name__} without labels" if counts is not None else type(data).__name__,
                fix="use WeightedMean and FractionOfClients, or data with labels and a method label_counts()",
            )
        )
    return found
