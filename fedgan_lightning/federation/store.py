"""Private state of clients between rounds, keyed by client id: local networks, kept optimizer moments.

It lies in memory or, for large populations, in files of which only those in use are read.

Writes take effect only when the round is committed. A round that is interrupted or abandoned leaves no trace, nor does
a client whose update is not let in, so a checkpoint taken at any time holds the state after the last complete round.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedgan_lightning.protocol import State


class StateFiles(MutableMapping[int, dict[str, Tensor]]):
    """Flat states by number, one safetensors file each.

    Args:
        folder: Where the files lie; what is there is deleted. It holds nothing that checkpoints do not hold.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._numbers: dict[int, None] = {}
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"client{number:06d}.safetensors"

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if number not in self._numbers:
            raise KeyError(number)
        return load_file(self._path(number))

    def __setitem__(self, number: int, state: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(number)
        fresh = path.with_suffix(".partial")  # what was read before is mapped from the old file, which must not change
        save_file({name: value.contiguous() for name, value in state.items()}, fresh)
        fresh.replace(path)
        self._numbers[number] = None

    def __delitem__(self, number: int) -> None:
        del self._numbers[number]
        self._path(number).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


class ClientStore:
    """Flat states by client id, on the CPU.

    Args:
        committed: Where states are kept; default in memory.
    """

    def __init__(self, committed: MutableMapping[int, dict[str, Tensor]] | None = None) -> None:
        self._committed = {} if committed is None else committed
        self._pending: dict[int, dict[str, Tensor]] = {}

    def read(self, client_id: int) -> State:
        """Return the client's state after the last committed round; empty before its first."""
        return self._committed.get(client_id, {})

    def write(self, client_id: int, state: State) -> None:
        """Keep ``state`` for the client, once :meth:`commit` is called; an empty one is not stored."""
        if state:
            self._pending[client_id] = {name: value.detach().cpu().clone() for name, value in state.items()}

    def exchange(self, share: Callable[[Mapping[int, State]], Mapping[int, State]]) -> None:
        """Replace the writes of this round by those of all ranks; ``share`` brings them together."""
        self._pending = {client_id: dict(state) for client_id, state in share(self._pending).items()}

    def commit(self) -> None:
        """Make the writes of this round permanent."""
        self._committed.update(self._pending)
        self._pending.clear()

    def discard(self) -> None:
        """Forget the writes of this round."""
        self._pending.clear()

    def forget(self, client_id: int) -> None:
        """Forget what was written for one client in this round."""
        self._pending.pop(client_id, None)

    def __len__(self) -> int:
        return len(self._committed)

    def state_dict(self) -> dict[str, Any]:
        """Return all committed states."""
        return {str(client_id): dict(state) for client_id, state in self._committed.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all states."""
        self._committed.clear()
        self._committed.update((int(client_id), dict(values)) for client_id, values in state.items())
        self._pending.clear()


class ReadOnlyStore(ClientStore):
    """A view of a store for trials: what is written is forgotten.

    Args:
        store: The store to read.
    """

    def __init__(self, store: ClientStore) -> None:
        super().__init__()
        self._store = store

    def read(self, client_id: int) -> State:
        return self._store.read(client_id)

    def write(self, client_id: int, state: State) -> None:
        """Forget it."""
