"""What came of a session of secure aggregation, and what its messages weigh."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedgan_lightning.deployment.masking import Member
from fedgan_lightning.federation.costs import cost_group
from fedgan_lightning.federation.secure import NARROW, words_of
from fedgan_lightning.packing import Layout

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
