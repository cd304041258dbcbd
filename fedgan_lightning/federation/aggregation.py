"""Aggregators: many updates to one. Streaming, in float64, in any order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedgan_lightning.errors import UpdateError, message
from fedgan_lightning.protocol import Aggregate, Aggregator, ClientUpdate, State


@dataclass
class WeightedSums:
    """Running sums of a weighted mean; its size does not depend on the number of updates."""

    delta: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    weight: float = 0.0
    num_clients: int = 0
    num_examples: int = 0


class WeightedMean(Aggregator):
    """FedGAN's rule: sum_k w_k delta_k / sum_k w_k with w_k = N_k (Rasouli et al. 2020, algorithm 1).

    Sums are kept in float64, so the order of the updates changes nothing after rounding to float32.

    Args:
        weighting: ``examples`` takes w_k = N_k, ``uniform`` takes w_k = 1.
    """

    additive: ClassVar[bool] = True

    def __init__(self, weighting: Literal["examples", "uniform"] = "examples") -> None:
        self.weighting = weighting

    def init(self) -> WeightedSums:
        return WeightedSums()

    def accumulate(self, accumulator: WeightedSums, update: ClientUpdate) -> WeightedSums:
        check_update(update)
        weight = float(update.num_examples) if self.weighting == "examples" else 1.0
        for sums, values in ((accumulator.delta, update.delta), (accumulator.extras, update.extras)):
            if accumulator.num_clients and sums.keys() != values.keys():
                names = sorted(sums.keys() ^ values.keys())[:3]
                raise UpdateError(
                    message(
                        "all updates of a round have the same entries",
                        received=f"client {update.client_id} differing in {names}",
                        fix="train the same module on every client",
                    )
                )
            for name, value in values.items():
                term = value.detach().to(torch.float64) * weight
                if name in sums and sums[name].shape != term.shape:
                    raise UpdateError(
                        message(
                            f"entry {name!r} has shape {tuple(sums[name].shape)}",
                            received=f"{tuple(term.shape)} from client {update.client_id}",
                            fix="train the same module on every client",
                        )
                    )
                sums[name] = sums[name].add_(term) if name in sums else term
                accumulator.dtypes[name] = value.dtype
        accumulator.weight += weight
        accumulator.num_clients += 1
        accumulator.num_examples += update.num_examples
        return accumulator

    def merge(self, first: WeightedSums, second: WeightedSums) -> WeightedSums:
        if not first.num_clients:
            return second
        for sums, others in ((first.delta, second.delta), (first.extras, second.extras)):
            for name, value in others.items():
                sums[name] = sums[name] + value
        first.weight += second.weight
        first.num_clients += second.num_clients
        first.num_examples += second.num_examples
        return first

    def finalize(self, accumulator: WeightedSums) -> Aggregate:
        def mean(sums: State) -> dict[str, Tensor]:
            return {name: (value / accumulator.weight).to(accumulator.dtypes[name]) for name, value in sums.items()}

        return Aggregate(
            delta=mean(accumulator.delta),
            extras=mean(accumulator.extras),
            num_clients=accumulator.num_clients,
            num_examples=accumulator.num_examples,
        )


def check_update(update: ClientUpdate) -> None:
    """Refuse an update that would poison the model for good.

    Raises:
        UpdateError: If an entry is not finite, or the client claims no examples; names the client.
    """
    if update.num_examples < 1:
        raise UpdateError(
            message(
                "an update counts at least one example",
                received=f"{update.num_examples} from client {update.client_id}",
                fix="remove the client from the cohort",
            )
        )
    for name, value in (*update.delta.items(), *update.extras.items()):
        if not bool(torch.isfinite(value).all()):
            raise UpdateError(
                message(
                    "updates are finite numbers",
                    received=f"NaN or infinity in {name!r} from client {update.client_id}",
                    fix="lower the client's learning rate, add a penalty such as R1, or clip gradients",
                )
            )
