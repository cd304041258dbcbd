"""What came of a session of secure aggregation, and what its messages weigh."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedgan_lightning.deployment import masking
from fedgan_lightning.deployment.masking import Member
from fedgan_lightning.federation.costs import cost_group
from fedgan_lightning.federation.secure import NARROW, words_of
from fedgan_lightning.packing import Layout

logger = logging.getLogger("fedgan_lightning")

#: Sets of shares that are tried, where some do not fit.
MOST_TRIES = 500
#: Under this name the ledger counts keys, shares and metrics.
OVERHEAD = "secure"


@dataclass
class Opened:
    """What came of a session.

    Attributes:
        members: Everybody's public keys and sizes.
        means: The states that the sum amounts to, by group; empty where it could not be opened.
        facts: What each client in the sum says beside its vector.
        bytes_up: What each client sent, by network.
        lost: Stage and cause of every client that is not in the sum.
        refused: Those of them who answered with what is no answer.
        seconds: Time that each client's answers took, from query to answer.
    """

    members: dict[int, Member] = field(default_factory=dict)
    means: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    bytes_up: dict[int, Counter[str]] = field(default_factory=dict)
    lost: dict[int, tuple[str, str]] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    seconds: dict[int, float] = field(default_factory=dict)


def masked_bytes(layouts: Mapping[str, Layout]) -> dict[str, int]:
    """Return the size of masked states in bytes by network: four for an entry of a parameter, eight or sixteen for
    others.
    """
    found: Counter[str] = Counter()
    for group, layout in layouts.items():
        for name, shape in layout.by_name.items():
            size = (4 if group == NARROW else 8) * words_of(group, name) * math.prod(shape)
            found[cost_group(name) if group in (NARROW, "extras") else OVERHEAD] += size
    return dict(found)


def fitting(
    answers: Mapping[int, Mapping[int, bytes]],
    client_id: int,
    *,
    needed: int,
    is_right: Callable[[int, bytes], bool],
) -> bytes:
    """Return the secret of a client from the shares of those whose shares fit together; name those whose do not.

    Args:
        answers: Shares by who holds them and whose they are.
        client_id: The client.
        needed: Shares that give the secret.
        is_right: Whether that is the client's secret.

    Raises:
        ValueError: If no such shares do.
    """
    holders = [k for k in sorted(answers) if client_id in answers[k]]

    def combined(some: Sequence[int]) -> bytes | None:
        with contextlib.suppress(Exception):  # of libraries, for what is no share
            found = masking.combine([answers[k][client_id] for k in some])
            return found if is_right(client_id, found) else None
        return None

    for some in itertools.islice(itertools.combinations(holders, needed), MOST_TRIES):
        if (found := combined(some)) is None:
            continue
        for other in sorted({*holders} - {*some}) if some != tuple(holders[:needed]) else ():
            if combined((*some[1:], other)) is None:
                logger.warning(f"client {other} tells a share of client {client_id}'s secret that is none")
        return found
    raise ValueError(f"no {needed} shares of client {client_id}'s secret fit together")
