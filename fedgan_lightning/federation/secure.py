"""Secure aggregation: what it is asked for, what it cannot go with, and how numbers become summands that can be masked.

The server learns the sum of the clients' updates and no single one. The protocol itself runs between machines: see
:mod:`fedgan_lightning.deployment.secure`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, OutOfRangeError, UpdateError, message
from fedgan_lightning.federation.optimizer_state import is_optimizer_entry
from fedgan_lightning.federation.rules import RoundRules, UpdateValidator
from fedgan_lightning.options import checked
from fedgan_lightning.packing import Layout
from fedgan_lightning.protocol import Aggregator, State

#: A sum of two tells each of them the other's update.
FEWEST = 3
#: Groups of a summand whose numbers take 32 bits; those of others take 64.
NARROW = "delta"
#: Bound of optimizers' step counts, of metrics, and of sums of features.
STEPS_BOUND, METRICS_BOUND, SUMS_BOUND = 2.0**30, 2.0**32, 2.0**40


#: Moments that one word holds. Squares need two: Adam divides by their root, so that the smallest count.
ONE_WORD = ("step", "exp_avg", "momentum_buffer")
#: Bits by which a second word is finer than the first.
FINER = 48


@dataclass(frozen=True)
class Ring:
    """Integers modulo 2^bits that stand for multiples of ``step`` = bound / 2^(bits - 2), up to twice ``bound``.

    Attributes:
        bits: 32 or 64.
        bound: Largest absolute value of a number, and of the sum.
        words: 1, or 2: then a second integer holds what rounding left over, in steps finer by 2^48.
    """

    bits: int
    bound: float
    words: int = 1

    @property
    def step(self) -> float:
        """Distance of two numbers that can be told apart; one rounding errs by half of it."""
        return self.bound / 2.0 ** (self.bits - 2)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Return float64 numbers of at most ``bound`` as unsigned integers, rounded to the nearest step: (n words,)."""
        coarse = np.rint(values / self.step)
        parts = [coarse]
        if self.words == 2:
            parts.append(np.rint((values - coarse * self.step) / (self.step / 2.0**FINER)))
        whole = np.concatenate(parts).astype(np.int64)
        return whole.astype(np.uint32) if self.bits == 32 else whole.view(np.uint64)

    def decode(self, numbers: np.ndarray) -> np.ndarray:
        """Return the float64 numbers in [-2 bound, 2 bound) that unsigned integers stand for."""
        signed = numbers.view(np.int32 if self.bits == 32 else np.int64)
        coarse, *fine = np.split(signed.astype(np.float64) * self.step, self.words)
        return coarse + fine[0] / 2.0**FINER if fine else coarse


class SecureAggregation:
    """The server learns the sum of the clients' updates, and of none of them alone (Bonawitz et al. 2017, protocol 1).

    Clients mask their weighted updates with numbers that cancel in the sum, agreed upon by Diffie-Hellman; secrets are
    shared after Shamir, so that a client that is lost after that does not spoil the sum. A client sends round(w_k x_k /
    step) modulo 2^32 for parameters and 2^64 for everything else, with w_k its share of the cohort's weight; with m
    clients left, of share w in sum, the mean errs by at most m step / (2 w) per entry (:meth:`error_bound`). Nothing is
    rounded at random; from max_update / 128 upwards a step is finer than the float32 of the updates themselves.

    What is not finite or out of range is refused by the client itself, by name: in a sum nobody could see it.

    Args:
        threshold: Share of a round's clients that must stay to its end, in (0.5, 1]; always more than half, so that no
            server can get both secrets of one client from two halves of the others, and at least three clients.
        max_update: Largest absolute entry of a parameter update; step = max_update / 2^30.
        max_value: Largest absolute entry of a shared buffer or moment; step = max_value / 2^62.
        consistency: Whether clients sign whose updates are summed up, and open nothing before enough have signed the
            same list: one more message, against a server that tells them different ones (Bonawitz et al. 2017, round
            3). It needs each site's public key at all others (``deploy site --members``).
        strikes: Answers that are none, after which a client is no longer asked; ``None`` asks for ever.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    @checked("federation.secure", threshold="(0.5, 1]", max_update="(0, inf)", max_value="(0, inf)", strikes="[1, inf)")
    def __init__(
        self,
        *,
        threshold: float = 0.6,
        max_update: float = 4.0,
        max_value: float = 1024.0,
        consistency: bool = False,
        strikes: int | None = 5,
    ) -> None:
        self.threshold, self.max_update, self.max_value = threshold, max_update, max_value
        self.consistency, self.strikes = consistency, strikes
        self._fewest = FEWEST

    def of_at_least(self, survivors: int) -> SecureAggregation:
        """Return the same, with sums that are opened only if so many clients are in them."""
        found = copy.copy(self)
        found._fewest = max(survivors, FEWEST)
        return found

    def needed(self, num_clients: int) -> int:
        """Return how many of so many clients must stay: more than half of them, and never fewer than three."""
        return max(math.ceil(self.threshold * num_clients - 1e-9), num_clients // 2 + 1, self._fewest)

    def check(self, *, aggregator: Aggregator, rules: RoundRules, validator: UpdateValidator | None) -> None:
        """Refuse what needs single updates.

        Raises:
            ConfigurationError: If the aggregator is not additive, updates are validated, late ones count, or the first
                to answer do.
        """
        name, rule = type(aggregator).__name__, "under secure aggregation everything must work with sums alone"
        found: list[tuple[bool, object, str]] = [
            (not aggregator.additive, f"{name}, which needs single updates", "use WeightedMean"),
            (not aggregator.weighs_by_size, f"{name}, whose weights clients do not know", "use WeightedMean"),
            (validator is not None, "a validator of updates", "take it out: clients check their own before masking"),
            (rules.counts_late, rules.late_setting, rules.late_remedy),
            (
                rules.over_selection > 1,
                f"rules.over_selection={rules.over_selection}",
                "ask the whole cohort, and lower rules.min_report_fraction",
            ),
        ]
        for is_wrong, received, fix in found:
            if is_wrong:
                raise ConfigurationError(message(rule, received=received, fix=fix))

    def check_cohort(self, size: int, *, sums_only: bool) -> None:
        """Refuse a cohort too small to hide in, and an executor that shows single updates.

        Args:
            size: Clients of a round.
            sums_only: Whether the executor yields sums only.

        Raises:
            ConfigurationError: If either is the case.
        """
        if not sums_only:
            raise ConfigurationError(
                message(
                    "secure aggregation must have a deployment: it hides sites from their server",
                    received="federation.secure in a simulation, where one process sees everything",
                    fix="use the command deploy, or set federation.secure to null",
                )
            )
        if size < FEWEST:
            raise ConfigurationError(
                message(
                    f"secure aggregation must hide a client among at least {FEWEST - 1} others",
                    received=f"a cohort of {size}",
                    fix="ask more clients per round, or take federation.secure out",
                )
            )

    def ring(self, group: str, name: str) -> Ring:
        """Return how the numbers of an entry travel."""
        if group == NARROW:
            return Ring(32, self.max_update)
        bounds = {"sums": SUMS_BOUND, "metrics": METRICS_BOUND}
        if group == "extras" and is_optimizer_entry(name) and name.endswith("/step"):
            return Ring(64, STEPS_BOUND)
        return Ring(64, bounds.get(group, self.max_value), words=words_of(group, name))

    def error_bound(self, group: str, name: str = "", *, num_clients: int, share: float = 1.0) -> float:
        """Return how far an entry of the mean can be from that of exact updates, before it is rounded to its dtype:
        m step / (2 w), with a step finer by 2^48 for squares of an optimizer.

        Args:
            group: ``delta`` or ``extras``.
            name: The entry.
            num_clients: Clients in the sum.
            share: Sum of their shares of the cohort's weight, in (0, 1].
        """
        ring = self.ring(group, name)
        return num_clients * ring.step / (2 * share) / (2.0**FINER if ring.words == 2 else 1.0)


@dataclass(frozen=True)
class Summand:
    """A client's states as integers that can be masked and added, modulo 2^32 and 2^64.

    Attributes:
        layouts: Where the entries lie, by group.
        narrow: Numbers of 32 bits.
        wide: Numbers of 64 bits.
    """

    layouts: Mapping[str, Layout]
    narrow: np.ndarray
    wide: np.ndarray

    @classmethod
    def of(cls, groups: Mapping[str, State], *, shares: Mapping[str, float], secure: SecureAggregation) -> Summand:
        """Return the weighted states of one client.

        Args:
            groups: States by group.
            shares: The client's weight by group, over the sum of all clients'; at most 1.
            secure: Bounds.

        Raises:
            UpdateError: If an entry is not finite or out of range; names it.
        """
        parts: dict[int, list[np.ndarray]] = {32: [np.empty(0, np.uint32)], 64: [np.empty(0, np.uint64)]}
        for group, state in groups.items():
            for name, value in state.items():
                ring, numbers = secure.ring(group, name), value.detach().cpu().double().flatten().numpy()
                largest = float(np.abs(numbers).max(initial=0.0))
                if not largest <= ring.bound:  # NaN is not, either
                    refusal = UpdateError if not math.isfinite(largest) else OutOfRangeError
                    raise refusal(_refusal(group, name, largest, ring.bound))
                parts[ring.bits].append(ring.encode(numbers * shares[group]))
        layouts = {group: Layout.of(state) for group, state in groups.items()}
        return cls(layouts, np.concatenate(parts[32]), np.concatenate(parts[64]))

    def plus(self, narrow: np.ndarray, wide: np.ndarray) -> Summand:
        """Return the sum with other numbers; unsigned integers wrap around."""
        return Summand(self.layouts, self.narrow + narrow, self.wide + wide)

    def minus(self, narrow: np.ndarray, wide: np.ndarray) -> Summand:
        """Return the difference from other numbers."""
        return Summand(self.layouts, self.narrow - narrow, self.wide - wide)

    def means(self, weights: Mapping[str, float], *, secure: SecureAggregation) -> dict[str, dict[str, Tensor]]:
        """Return the states that a sum of summands amounts to, over ``weights``, in the dtypes of their layouts.

        Raises:
            UpdateError: If a number lies out of range: then masks did not cancel.
        """
        positions, vectors, found = {32: 0, 64: 0}, {32: self.narrow, 64: self.wide}, {}
        for group, layout in self.layouts.items():
            states: dict[str, Tensor] = {}
            for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes):
                ring = secure.ring(group, name)
                start, size = positions[ring.bits], ring.words * math.prod(shape)
                positions[ring.bits] = start + size
                numbers = ring.decode(vectors[ring.bits][start : start + size])
                if np.abs(numbers).max(initial=0.0) > 1.001 * ring.bound:
                    raise UpdateError(f"the sum of {group} {name} is out of range: masks do not cancel")
                mean = torch.from_numpy(numbers / weights[group]).reshape(shape)
                states[name] = (mean if dtype.is_floating_point else mean.round()).to(dtype)
            found[group] = states
        return found


def sizes_of(layouts: Mapping[str, Layout]) -> tuple[int, int]:
    """Return how many integers of 32 and of 64 bits states of these layouts are."""
    counts = {32: 0, 64: 0}
    for group, layout in layouts.items():
        for name, shape in layout.by_name.items():
            counts[32 if group == NARROW else 64] += words_of(group, name) * math.prod(shape)
    return counts[32], counts[64]


def words_of(group: str, name: str) -> int:
    """Return how many integers a number of an entry is."""
    is_square = group == "extras" and is_optimizer_entry(name) and name.rsplit("/", 1)[-1] not in ONE_WORD
    return 2 if is_square else 1


def _refusal(group: str, name: str, largest: float, bound: float) -> str:
    if not math.isfinite(largest):
        fix = "lower the client's learning rate, add a penalty such as R1, or clip gradients"
        return message("updates must be finite numbers", received=f"NaN or infinity in {group} {name!r}", fix=fix)
    option = {"delta": "federation.secure.max_update", "extras": "federation.secure.max_value"}.get(group)
    others = {"sums": "scale the data, or take the metric out of evaluation.metrics"}
    fix = f"raise {option}" if option else others.get(group, "look at what the client reports")
    rule = f"entries of {group} must be at most {bound:g} in absolute value before they are masked"
    return message(rule, received=f"{largest:.4g} in {name!r}", fix=fix)
