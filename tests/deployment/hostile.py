"""A site that misbehaves by its own doing: a source that its own settings file names, and that alters what it answers.

Nothing in the package knows of it. Whoever runs a site runs code of his own there, and this is what that can do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources import Source
from fedgan_lightning.deployment.site import Site
from fedgan_lightning.federation.executors.faulty import CORRUPTIONS


@dataclass(frozen=True)
class Tainted(Samples):
    """Samples of a site that misbehaves.

    Attributes:
        faults: What it does to its answer, by round, over and over: a name of ``CORRUPTIONS``, ``hang``, or nothing.
        hang_seconds: How long it hangs.
    """

    faults: tuple[str, ...] = ("",)
    hang_seconds: float = 0.0


class Hostile(Source):
    """Another source's samples, at a site that misbehaves; other arguments as the attributes of :class:`Tainted`."""

    def __init__(self, source: Source, faults: list[str], hang_seconds: float = 3600.0) -> None:
        self.source, self.faults, self.hang_seconds = source, tuple(faults), hang_seconds
        self.sample_shape, self.class_names = source.sample_shape, source.class_names

    def load(self, split: Any) -> Samples:
        _corrupt_answers()
        own = self.source.load(split)
        return Tainted(own.x, own.y, own.columns, faults=self.faults, hang_seconds=self.hang_seconds)


def _corrupt_answers() -> None:
    """Let sites of this process that hold tainted samples answer as these say; others answer as ever."""
    honest = Site.train
    if hasattr(honest, "__wrapped__"):
        return

    @wraps(honest)
    def train(self: Site, task: Any, **options: Any) -> Any:
        own = self.data.view.samples
        fault = own.faults[task.round % len(own.faults)] if isinstance(own, Tainted) else ""
        if fault == "hang":
            time.sleep(own.hang_seconds)
        update = honest(self, task, **options)
        return CORRUPTIONS[fault](update, task.round, task.seed) if fault in CORRUPTIONS else update

    Site.train = train


def settings(faults: Sequence[str], *, source: str = "Digits", **options: Any) -> str:
    """Return the settings file of such a site."""
    told = {"source": source, "faults": list(faults), **options}
    return f"data:\n  source:\n    class_path: tests.deployment.hostile.Hostile\n    init_args: {told}\n"
