"""Aggregators: many updates to one. Streaming, in float64, in any order."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedgan_lightning.errors import UpdateError, message
from fedgan_lightning.federation.ranks import Ranks, first_known
from fedgan_lightning.options import checked
from fedgan_lightning.packing import Layout, Packed, is_finite
from fedgan_lightning.protocol import Aggregate, Aggregator, ClientUpdate, UpdateSum

#: Largest N_k: so many of a million clients still add up exactly in float64.
MOST_EXAMPLES = 2**33


@dataclass
class Sums:
    """Weighted sums of packed states, in float64; ``layout`` is that of the states."""

    layout: Layout | None = None
    vectors: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def add(self, state: Packed, *, weight: float) -> None:
        """Add ``weight`` times a state of the same layout, wherever it lies: sums stay where the first one was."""
        self.layout = state.layout
        for dtype, vector in state.vectors.items():
            if dtype in self.vectors:
                total = self.vectors[dtype]
                total.add_(vector.to(total.device), alpha=weight)  # a float64 sum of float32 terms, in one pass
            else:
                self.vectors[dtype] = vector.to(torch.float64) * weight

    def mean(self, weight: float) -> Packed:
        """Return the sums over ``weight``, in the dtypes of the states."""
        layout = self.layout if self.layout is not None else Layout((), (), ())
        return Packed(layout, {dtype: (vector / weight).to(dtype) for dtype, vector in self.vectors.items()})


@dataclass
class WeightedSums:
    """Running sums of a weighted mean; its size does not depend on the number of updates."""

    delta: Sums = field(default_factory=Sums)
    extras: Sums = field(default_factory=Sums)
    weight: float = 0.0
    num_clients: int = 0
    num_examples: int = 0

    @property
    def parts(self) -> tuple[Sums, Sums]:
        """Parameter updates and extras."""
        return self.delta, self.extras


class WeightedMean(Aggregator):
    """FedGAN's rule: sum_k w_k delta_k / sum_k w_k with w_k = N_k (Rasouli et al. 2020, algorithm 1).

    Sums are kept in float64, so the order of the updates changes nothing after rounding to float32.

    Args:
        weighting: ``examples`` takes w_k = N_k, ``uniform`` takes w_k = 1.
    """

    additive: ClassVar[bool] = True

    @checked()
    def __init__(self, weighting: Literal["examples", "uniform"] = "examples") -> None:
        self.weighting = weighting

    def init(self) -> WeightedSums:
        return WeightedSums()

    def weight(self, num_examples: int) -> float:
        return float(num_examples) if self.weighting == "examples" else 1.0

    def accumulate(self, accumulator: WeightedSums, update: ClientUpdate) -> WeightedSums:
        delta, extras = checked_states(update)
        weight = update.discount * self.weight_of(update.client_id, update.num_examples)
        parts = ((accumulator.delta, delta), (accumulator.extras, extras))
        for sums, state in parts:  # what is refused must not stay in either sum
            check_layout(f"client {update.client_id}", expected=sums.layout, received=state.layout)
        for sums, state in parts:
            sums.add(state, weight=weight)
        accumulator.weight += weight
        accumulator.num_clients += 1
        accumulator.num_examples += update.num_examples
        return accumulator

    def merge(self, first: WeightedSums, second: WeightedSums) -> WeightedSums:
        if not first.num_clients:
            return second
        if not second.num_clients:
            return first
        pairs = ((first.delta, second.delta), (first.extras, second.extras))
        for sums, others in pairs:
            if others.layout is not None:
                check_layout("other clients", expected=sums.layout, received=others.layout)
        for sums, others in pairs:
            for dtype, vector in others.vectors.items():
                sums.vectors[dtype] = sums.vectors[dtype] + vector.to(sums.vectors[dtype].device)
        first.weight += second.weight
        first.num_clients += second.num_clients
        first.num_examples += second.num_examples
        return first

    def accumulate_sum(self, accumulator: WeightedSums, total: UpdateSum) -> WeightedSums:
        sizes = [own.num_examples for own in total.clients]
        for own in total.clients:
            check_claims(own.client_id, num_examples=own.num_examples)
        delta, extras = Packed.of(total.delta), Packed.of(total.extras)
        check_finite("a sum of clients", delta, extras)
        weight = sum(self.weight_of(own.client_id, own.num_examples) for own in total.clients)
        fresh = WeightedSums(weight=weight, num_clients=len(sizes), num_examples=sum(sizes))
        for sums, state in ((fresh.delta, delta), (fresh.extras, extras)):
            sums.add(state, weight=fresh.weight)
        return self.merge(accumulator, fresh)

    def reduce(self, accumulator: WeightedSums, ranks: Ranks) -> WeightedSums:
        facts = ranks.exchange(
            {
                "weight": accumulator.weight,
                "num_clients": accumulator.num_clients,
                "num_examples": accumulator.num_examples,
                "layouts": [None if sums.layout is None else sums.layout.plain() for sums in accumulator.parts],
            }
        )
        if ranks.world_size == 1:
            return accumulator
        for index, sums in enumerate(accumulator.parts):
            known = first_known([own["layouts"][index] for own in facts])
            if known is None:  # nobody has trained a client
                continue
            for rank, own in enumerate(facts):
                if own["layouts"][index] is not None:
                    received = Layout.from_plain(own["layouts"][index])
                    check_layout(f"rank {rank}", expected=Layout.from_plain(known), received=received)
            if sums.layout is None:
                sums.layout = Layout.from_plain(known)
                sums.vectors = {n: torch.zeros(s, dtype=torch.float64) for n, s in sums.layout.lengths.items()}
            sums.vectors = {dtype: ranks.sum_(sums.vectors[dtype]) for dtype in sums.layout.lengths}
        accumulator.weight = sum(own["weight"] for own in facts)
        accumulator.num_clients = sum(own["num_clients"] for own in facts)
        accumulator.num_examples = sum(own["num_examples"] for own in facts)
        return accumulator

    def finalize(self, accumulator: WeightedSums) -> Aggregate:
        return Aggregate(
            delta=accumulator.delta.mean(accumulator.weight),
            extras=accumulator.extras.mean(accumulator.weight),
            num_clients=accumulator.num_clients,
            num_examples=accumulator.num_examples,
        )


def check_layout(who: str, *, expected: Layout | None, received: Layout) -> None:
    """Refuse an update that does not fit those before it.

    Raises:
        UpdateError: If entries, shapes or dtypes differ; names the sender.
    """
    if expected is None or expected is received or expected == received:
        return
    mine, theirs = expected.by_name, received.by_name
    if mine.keys() != theirs.keys():
        raise UpdateError(
            message(
                "all updates of a round must have the same entries",
                received=f"{who} differing in {sorted(mine.keys() ^ theirs.keys())[:3]}",
                fix="train the same module on every client",
            )
        )
    wrong = [name for name in mine if mine[name] != theirs[name]]
    rule = (
        f"entry {wrong[0]!r} must have shape {mine[wrong[0]]}" if wrong else "updates must have equal dtypes and order"
    )
    value = f"{theirs[wrong[0]]}" if wrong else "others"
    raise UpdateError(message(rule, received=f"{value} from {who}", fix="train the same module on every client"))


def checked_states(update: ClientUpdate) -> tuple[Packed, Packed]:
    """Return delta and extras in flat vectors.

    Raises:
        UpdateError: If the update would poison the model for good: a number is not finite, it counts no examples, or
            its discount is no share; names the client.
    """
    check_claims(update.client_id, num_examples=update.num_examples)
    if not 0 < update.discount <= 1:  # NaN is not, either
        raise UpdateError(
            message(
                "a discount must lie in (0, 1]",
                received=f"{update.discount} for client {update.client_id}",
                fix="set rules.discount",
            )
        )
    delta, extras = Packed.of(update.delta), Packed.of(update.extras)
    check_finite(f"client {update.client_id}", delta, extras)
    return delta, extras


def check_claims(client_id: int, *, num_examples: int) -> None:
    """Refuse a client that counts no examples, or more than sums of float64 tell apart.

    Raises:
        UpdateError: If it does; names the client.
    """
    if (
        isinstance(num_examples, bool)
        or not isinstance(num_examples, Integral)
        or not 1 <= num_examples <= MOST_EXAMPLES
    ):
        raise UpdateError(
            message(
                "an update must count at least one example",
                received=f"{num_examples} from client {client_id}",
                fix="remove the client from the cohort",
            )
        )


def check_finite(who: str, *states: Packed) -> None:
    """Refuse numbers that would poison the model for good.

    Raises:
        UpdateError: If an entry is not finite; names the sender.
    """
    for state in states:
        if all(map(is_finite, state.vectors.values())):
            continue
        name = next(name for name, value in state.items() if not is_finite(value))
        raise UpdateError(
            message(
                "updates must be finite numbers",
                received=f"NaN or infinity in {name!r} from {who}",
                fix="lower the client's learning rate, add a penalty such as R1, or clip gradients",
            )
        )
