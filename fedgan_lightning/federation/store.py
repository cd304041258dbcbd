"""Private state of clients between rounds, keyed by client id: local networks, kept optimizer moments.

Writes take effect only when the round is committed. A round that is interrupted or abandoned leaves no trace, so a
checkpoint taken at any time holds the state after the last complete round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fedgan_lightning.protocol import State


class ClientStore:
    """Flat states by client id, on the CPU."""

    def __init__(self) -> None:
        self._committed: dict[int, dict[str, Tensor]] = {}
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

    def __len__(self) -> int:
        return len(self._committed)

    def state_dict(self) -> dict[str, Any]:
        """Return all committed states."""
        return {str(client_id): dict(state) for client_id, state in self._committed.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all states."""
        self._committed = {int(client_id): dict(values) for client_id, values in state.items()}
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
