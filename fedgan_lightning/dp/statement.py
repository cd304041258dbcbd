"""A guarantee in words: what is hidden from whom, and what is not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fedgan_lightning.dp.accounting import Accountant, Release

#: What is said where nothing is guaranteed.
NO_PRIVACY = "No privacy guarantee: this run has no differential privacy."
#: What leaves clients without one.
LEAVES = (
    "What leaves a client: the difference of its networks' weights after every round, buffers and optimizer moments "
    "where they are averaged, its number of samples, losses, and what metrics ask for. From these, training images can "
    "be reconstructed."
)
#: What no guarantee covers.
OUTSIDE = {
    "client": (
        "Outside of it: numbers of samples that clients state when they join, label counts, vocabularies and items "
        "that clients agree on, how many took part in a round, its times and bytes, metrics and pictures that compare "
        "with private data, settings that were chosen by looking at private data, and what a client's own disk holds."
    ),
    "example": (
        "Outside of it: numbers of samples, label counts, vocabularies and items that clients agree on, private states "
        "on a client's own disk, metrics and pictures that compare with private data, and settings that were chosen by "
        "looking at private data."
    ),
}


@dataclass(frozen=True)
class Guarantee:
    """What a run guarantees to one unit.

    Attributes:
        release: Its releases, all of one kind.
        epsilon: What they cost.
        delta: Probability with which the guarantee may fail.
        accountant: How it was computed.
        population: Clients, or records of the client that pays most.
        noise: Who adds it: the server (``central``), clients together (``distributed``), a client for itself
            (``client``).
        is_seeded: Whether noise can be drawn again.
    """

    release: Release
    epsilon: float
    delta: float
    accountant: Accountant
    population: int
    noise: str
    is_seeded: bool = False

    @property
    def unit(self) -> str:
        """Whom it is given to."""
        return self.release.unit

    def plain(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "unit": self.unit,
            "epsilon": self.epsilon if math.isfinite(self.epsilon) else None,
            "delta": self.delta,
            "relation": self.release.relation,
            "accountant": self.accountant,
            "sampling": self.release.words,
            "noise_multiplier": self.release.noise_multiplier,
            "clip": self.release.clip,
            "releases": self.release.count,
            "population": self.population,
            "noise": self.noise,
            "words": self.lines(),
        }

    def lines(self) -> list[str]:
        """Return it in words, a sentence each."""
        who = "all that one client holds" if self.unit == "client" else "one record of a client"
        head = (
            f"({self.epsilon:.4g}, {self.delta:.3g})-differential privacy for {who}, with {self.release.relation}."
            if math.isfinite(self.epsilon)
            else f"No privacy guarantee for {who}: without noise epsilon is infinite."
        )
        trusted = {
            "central": "The server is trusted: it sees single updates (under secure aggregation their exact sum), and "
            "adds the noise. The guarantee is against everybody who sees models.",
            "distributed": "Clients add the noise under masks: the guarantee is against the server, too, as long as "
            "no more clients than stated tell it their share.",
            "client": "Every client adds its own noise: the guarantee is against the server and all other clients.",
        }[self.noise]
        found = [
            head,
            f"{self.release.count} releases with noise multiplier {self.release.noise_multiplier:.5g}; "
            f"{self.release.words}; accountant {self.accountant}; {self.population} "
            f"{'clients' if self.unit == 'client' else 'records at the client that pays most'}.",
            trusted,
            "Noise is drawn in floating-point numbers."
            if self.noise != "distributed"
            else "Noise is of whole numbers.",
            OUTSIDE[self.unit],
        ]
        if self.is_seeded:
            found.insert(0, "NOT PRIVATE (seeded noise): whoever knows testing_seed can take the noise away.")
        return found


def facts_of(keeper: Any) -> dict[str, Any]:
    """Return what a summary says of a run's privacy: of one without, that there is none, and what leaves."""
    return {"note": NO_PRIVACY, "leaves": LEAVES} if keeper is None else keeper.facts()


def words_of(facts: Any) -> list[str]:
    """Return what a summary's privacy says in words; that there is none, and what leaves, where it says nothing."""
    found = [line for unit in ("client", "example") for line in ((facts or {}).get(unit) or {}).get("words", [])]
    return found or [NO_PRIVACY, LEAVES]
