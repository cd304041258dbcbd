"""Sums of updates that were opened, on the server's disk until a checkpoint holds their round.

A server that is killed between the two asks for the round again. Sites open a sum for one group of sites alone, and a
group of which one is away could never answer; so the server takes what it has opened before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from fedgan_lightning.files import replacing
from fedgan_lightning.protocol import ClientReport, State, UpdateSum

#: Rounds that are kept: more than lie between two checkpoints, as a rule.
MOST_ROUNDS = 100
SEPARATOR = "|"


class OpenedSums:
    """Sums by the hash of the task that they answer.

    Args:
        folder: Where they lie; ``None`` keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._seen: set[str] = set()

    def of(self, subject: str, clients: Sequence[int]) -> UpdateSum | None:
        """Return what an earlier process opened for this task and these clients, once, or ``None``."""
        path = None if self.folder is None else self.folder / f"{subject}.safetensors"
        if path is None or subject in self._seen or not path.exists():
            return None
        self._seen.add(subject)
        with safe_open(path, framework="pt") as file:
            kept = json.loads(file.metadata()["sum"])
            states: dict[str, State] = {"delta": {}, "extras": {}}
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                group, _, name = key.partition(SEPARATOR)
                states[group] = {**states[group], name: file.get_tensor(key)}
        if kept["asked"] != sorted(clients):
            return None
        members = tuple(ClientReport(**own) for own in kept["members"])
        return UpdateSum(kept["round"], members, states["delta"], states["extras"], kept["metrics"])

    def keep(self, subject: str, clients: Sequence[int], total: UpdateSum) -> None:
        """Remember a sum, whole or not at all; forget the oldest."""
        if self.folder is None:
            return
        self._seen.add(subject)  # a second try of the same round is another sum
        fields = ("client_id", "outcome", "num_examples", "metrics", "bytes_up")
        members = [{name: getattr(own, name) for name in fields} for own in total.clients]
        known = {"round": total.round, "asked": sorted(clients), "members": members, "metrics": dict(total.metrics)}
        states = {"delta": total.delta, "extras": total.extras}
        tensors = {
            f"{group}{SEPARATOR}{name}": value.contiguous()
            for group, state in states.items()
            for name, value in state.items()
        }
        with replacing(self.folder / f"{subject}.safetensors", mode=0o600) as file:
            file.write(save(tensors, metadata={"sum": json.dumps(known)}))
        listed = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        for path in listed[:-MOST_ROUNDS]:
            path.unlink(missing_ok=True)
