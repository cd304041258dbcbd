"""When a round counts, and which updates are valid.

The terms are those of Bonawitz et al. 2019: a goal count, over-selection, a minimum share, abandoned rounds.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from fedgan_lightning import states
from fedgan_lightning.errors import ConfigurationError, RoundInterrupted, UpdateError, message
from fedgan_lightning.federation.asynchronous import Asynchronous
from fedgan_lightning.federation.optimizer_state import is_optimizer_entry
from fedgan_lightning.options import checked
from fedgan_lightning.packing import Packed
from fedgan_lightning.protocol import Aggregator, ClientUpdate

#: Moments that are means or largest values of gradients, or of their squares: the power of a gradient that they are.
GRADIENTS = {"exp_avg": 1, "exp_inf": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2}


class RoundRules:
    """What a round needs to count.

    The sampler's cohort is the goal. A round ends when as many updates are in; if in the end fewer than
    ``min_report_fraction`` of them came, it is abandoned: the server's state does not change, and the round is tried
    again with a new cohort.

    Args:
        over_selection: Clients asked, over the goal: 1.3 asks 13 for 10. Where clients work at the same time the first
            to answer count; in simulation, which has no time, the surplus stands by for those that fail.
        min_report_fraction: Share of the goal that must report, in (0, 1].
        timeout: Seconds that clients have for a round, where they work on machines of their own; ``None`` waits.
        stale_updates: What becomes of an update that comes in the round after its own: ``drop``, or ``discount`` its
            weight.
        discount: Factor in (0, 1] on the weight of a late update.
        max_attempts: Tries of a round before the run ends; ``None`` tries for ever.
        retry_delay_seconds: Seconds between two tries: sites that are away need time to come back.
        asynchronous: Rounds that end with so many arrivals, of whatever age; default none, all wait for all.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    @checked(
        "federation.rules",
        over_selection="[1, inf)",
        min_report_fraction="(0, 1]",
        timeout="(0, inf)",
        discount="(0, 1]",
        max_attempts="[1, inf)",
        retry_delay_seconds="[0, inf)",
    )
    def __init__(
        self,
        *,
        over_selection: float = 1.0,
        min_report_fraction: float = 1.0,
        timeout: float | None = None,
        stale_updates: Literal["drop", "discount"] = "drop",
        discount: float = 0.5,
        max_attempts: int | None = 10,
        retry_delay_seconds: float = 0.0,
        asynchronous: Asynchronous | None = None,
    ) -> None:
        self.over_selection, self.min_report_fraction, self.timeout = over_selection, min_report_fraction, timeout
        self.stale_updates, self.discount = stale_updates, discount
        self.max_attempts, self.retry_delay_seconds = max_attempts, retry_delay_seconds
        self.asynchronous = asynchronous
        beside = {"over_selection": over_selection > 1, "stale_updates": stale_updates != "drop"}
        if asynchronous is not None and any(beside.values()):
            name = next(name for name, is_set in beside.items() if is_set)
            raise ConfigurationError(
                message(
                    "rules of an asynchronous federation must leave late updates to the buffer",
                    received=f"rules.{name}={over_selection if name == 'over_selection' else stale_updates}",
                    fix=f"leave rules.{name} out, or rules.asynchronous",
                )
            )

    @property
    def counts_late(self) -> bool:
        """Whether updates count that answer an earlier round."""
        return self.stale_updates == "discount" or self.asynchronous is not None

    @property
    def late_setting(self) -> str:
        """What makes late updates count, in words of the settings."""
        return "rules.asynchronous" if self.asynchronous is not None else f"rules.stale_updates={self.stale_updates}"

    @property
    def late_remedy(self) -> str:
        """What has to be set so that they do not."""
        return "leave rules.asynchronous out" if self.asynchronous is not None else "set rules.stale_updates to drop"

    def check(self, aggregator: Aggregator) -> None:
        """Refuse a discount for an aggregator that does not weigh updates.

        Raises:
            ConfigurationError: If it has one.
        """
        if self.stale_updates == "discount" and not aggregator.additive:
            raise ConfigurationError(
                message(
                    "late updates must be weighed to count less",
                    received=f"rules.stale_updates=discount with {type(aggregator).__name__}, which treats all alike",
                    fix="set rules.stale_updates to drop",
                )
            )

    def attempts(self, stop_requested: Callable[[], bool]) -> Iterator[int]:
        """Yield the numbers of a round's attempts, and wait before each but the first.

        Raises:
            RoundInterrupted: If the user asks to stop meanwhile.
        """
        for attempt in itertools.count() if self.max_attempts is None else range(self.max_attempts):
            end = time.monotonic() + (self.retry_delay_seconds if attempt else 0.0)
            while time.monotonic() < end:
                if stop_requested():
                    raise RoundInterrupted("the user asked to stop")
                time.sleep(min(0.2, max(0.0, end - time.monotonic())))
            yield attempt

    def too_few(self, round: int, aggregator: Aggregator) -> str:
        """Return what to say where too few clients answered in every attempt of a round."""
        name, needed = type(aggregator).__name__, aggregator.needed
        rule = f"a round must have {self.min_report_fraction:.0%} of its cohort"
        return message(
            f"{rule}, and {name} {needed} updates" if needed > 1 else rule,
            received=f"fewer in each of {self.max_attempts} attempts of round {round}",
            fix="find out why clients fail, lower rules.min_report_fraction, or raise rules.over_selection",
        )

    def num_reserves(self, goal: int) -> int:
        """Return how many clients are asked beyond the goal."""
        return math.ceil(goal * (self.over_selection - 1) - 1e-9)

    def needed(self, goal: int) -> int:
        """Return how many updates a round needs to count."""
        return math.ceil(goal * self.min_report_fraction - 1e-9)


class UpdateValidator:
    """Validates client updates. Invalid ones are dropped, logged with the reason, and counted.

    Without a validator an update that cannot be right ends the run, which is what one wants to know while developing.
    What cannot be right is the same in both cases: other entries, shapes or dtypes than the server's module has,
    numbers that are not finite or beyond belief, claims that do not follow from the task. Bounds that depend on the
    networks are set here.

    Args:
        max_norm: Largest Euclidean norm of a parameter update; ``None`` for no bound.
        max_examples: Largest N_k of a client; ``None`` for no bound. A large one would own the average.
        max_gradient: Largest gradient that averaged moments may speak of: ``exp_avg`` and ``exp_inf`` reach at most
            this, means of squared gradients its square; ``None`` for no bound. Moments of gradients that nobody has
            would keep all clients from moving, as long as the optimizer remembers them.
        strikes: Refused updates after which a client is no longer asked; ``None`` asks for ever.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    @checked(
        "federation.validator",
        max_norm="(0, inf)",
        max_examples="[1, inf)",
        max_gradient="(0, inf)",
        strikes="[1, inf)",
    )
    def __init__(
        self,
        *,
        max_norm: float | None = None,
        max_examples: int | None = None,
        max_gradient: float | None = None,
        strikes: int | None = None,
    ) -> None:
        self.max_norm, self.max_examples = max_norm, max_examples
        self.max_gradient, self.strikes = max_gradient, strikes

    def check(self, update: ClientUpdate) -> None:
        """Refuse an update of finite numbers that is out of bounds.

        Raises:
            UpdateError: If it is too long, its client has too many examples, or its moments are too large.
        """
        who = f"client {update.client_id}"
        if self.max_examples is not None and update.num_examples > self.max_examples:
            raise UpdateError(f"{who}: claims {update.num_examples} examples, above the cap of {self.max_examples}")
        if self.max_norm is not None:
            vectors = Packed.of(update.delta).vectors.values()
            norm = float(states.norm(vectors, dtype=torch.float64))
            if norm > self.max_norm:
                raise UpdateError(f"{who}: the update's norm is {norm:.4g}, above the bound of {self.max_norm:.4g}")
        if self.max_gradient is None:
            return
        for name, value in update.extras.items():
            power = GRADIENTS.get(name.rsplit("/", 1)[-1]) if is_optimizer_entry(name) else None
            if power is not None and value.numel() and float(value.abs().max()) > self.max_gradient**power:
                raise UpdateError(f"{who}: {name} reaches {float(value.abs().max()):.4g}, above validator.max_gradient")
