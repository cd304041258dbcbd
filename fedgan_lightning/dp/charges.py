"""The ledger: every noisy release of a run, written down before it is made.

A release that was written down and never made is charged all the same; one that was made and not written down would
be a lie. So the file is written first, in one piece, and it only ever grows: a run that goes on from an older
checkpoint pays again for the rounds that it repeats.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedgan_lightning.dp.accounting import Accountant, Release, Unit, epsilon_of, rounded_up
from fedgan_lightning.errors import CheckpointError, message
from fedgan_lightning.files import replacing, to_json

logger = logging.getLogger("fedgan_lightning")

#: Name of the file in the run directory.
NAME = "privacy.json"
#: What every output of a run says whose noise can be drawn again.
NOT_PRIVATE = "NOT PRIVATE (seeded noise)"


class Ledger:
    """Releases of a run, in order.

    Args:
        path: The file; ``None`` keeps it in memory.
        is_seeded: Whether noise follows from a ``testing_seed``, so that nothing is hidden.
        mode: Who may read and write the file, before the process's own mask.
    """

    def __init__(self, path: Path | None = None, *, is_seeded: bool = False, mode: int = 0o666) -> None:
        self.path, self.is_seeded, self.mode = path, is_seeded, mode
        self.releases: list[Release] = []
        #: What single clients have taken part in, by kind of count and client; written down with the releases.
        self.counts: dict[str, dict[str, int]] = {}

    def charge(self, releases: Iterable[Release]) -> None:
        """Write down releases that are about to be made; like ones are counted together."""
        for release in releases:
            place = next(
                (k for k, own in enumerate(self.releases) if replace(own, count=1) == replace(release, count=1)), -1
            )
            if place < 0:
                self.releases.append(release)
            else:
                known = self.releases[place]
                self.releases[place] = replace(known, count=known.count + release.count)
        self.write()

    def write(self) -> None:
        """Write the file, in one piece."""
        if self.path is not None:
            with replacing(self.path, mode=self.mode) as file:
                file.write(to_json(self.state_dict(), indent=2).encode())

    def of(self, unit: Unit) -> list[Release]:
        """Return the releases that concern a unit."""
        return [release for release in self.releases if release.unit == unit]

    def epsilon(
        self,
        unit: Unit,
        *,
        delta: float,
        accountant: Accountant = "pld",
        planned: int = 0,
        also: Sequence[Release] = (),
    ) -> float:
        """Return what has been spent, from above.

        Args:
            unit: Whose.
            delta: In (0, 1).
            accountant: See :func:`~fedgan_lightning.dp.accounting.epsilon_of`.
            planned: Releases of the whole run: epsilon is computed for multiples of a twentieth of these, rounded up,
                since it takes half a second; 0 computes it for what there is.
            also: Releases that would be next.
        """
        counts = _counts((*self.of(unit), *also))
        rounded = [replace(kind, count=rounded_up(count, planned=planned)) for kind, count in counts.items()]
        return epsilon_of(rounded, delta=delta, accountant=accountant)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "note": NOT_PRIVATE if self.is_seeded else "",
            "releases": [asdict(release) for release in self.releases],
            "counts": self.counts,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the file, which must hold at least what a checkpoint knows.

        Raises:
            CheckpointError: If the file is shorter, missing, or that of another run.
        """
        of_checkpoint = _read(state, "the checkpoint")
        if self.path is None:
            self.take(state)
            return
        written: Mapping[str, Any] = {"releases": [], "counts": {}}
        try:
            if self.path.exists():
                written = json.loads(self.path.read_text(encoding="utf-8"))
            of_file = _read(written, self.path.name)
        except (ValueError, KeyError, TypeError) as error:
            raise _shorter(self.path, f"a file that cannot be read ({error})") from error
        spent, known = _counts(of_file), _counts(of_checkpoint)
        if missing := [kind for kind, count in known.items() if spent.get(kind, 0) < count]:
            short = missing[0]
            raise _shorter(self.path, f"{spent.get(short, 0)} of {known[short]} releases ({short.words})")
        self.take(written)

    def take(self, state: Mapping[str, Any]) -> None:
        """Take over a state as it is."""
        self.releases = _read(state, "a ledger")
        self.counts = {kind: {str(k): int(n) for k, n in own.items()} for kind, own in state["counts"].items()}

    def begin(self) -> None:
        """Start a run; what an attempt has released that was killed before its first checkpoint stays spent."""
        self.restore(Ledger().state_dict())
        if self.releases:
            logger.warning(f"{NAME} holds releases of an earlier attempt in this directory: they count")
        self.write()


def _counts(releases: Iterable[Release]) -> dict[Release, int]:
    found: dict[Release, int] = {}
    for release in releases:
        found[release.kind] = found.get(release.kind, 0) + release.count
    return found


def _read(state: Mapping[str, Any], where: str) -> list[Release]:
    found = [Release(**own) for own in state["releases"]]
    if any(own.count < 1 or own.noise_multiplier < 0 for own in found):
        raise ValueError(f"{where} has releases that are none")
    return found


def _shorter(path: Path, received: str) -> CheckpointError:
    return CheckpointError(
        message(
            "the ledger of a run must hold every release that its checkpoint knows of: what was spent stays spent",
            received=f"{path.name} with {received}",
            fix=f"put back the file {path.name} of this run",
        )
    )
