"""Private state of clients between rounds, keyed by client id: local networks, kept optimizer moments.

It lies in memory or, for large populations, in files of which only those in use are read.

Writes take effect only when the round is committed. A round that is interrupted or abandoned leaves no trace, nor does
a client whose update does not count, so a checkpoint taken at any time holds the state after the last complete round.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save

from fedgan_lightning.errors import CheckpointError, message
from fedgan_lightning.files import link
from fedgan_lightning.packing import Layout, Packed
from fedgan_lightning.protocol import State


class StateFiles(MutableMapping[int, Packed]):
    """Flat states by number, one safetensors file each.

    A file never changes: its name tells its contents. So a checkpoint that holds the file too, under a second name on
    the same disk, need not read it again.

    Args:
        folder: Where the files lie; what is there is deleted. It holds nothing that checkpoints do not hold.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        #: File by number.
        self.names: dict[int, str] = {}
        shutil.rmtree(self.folder, ignore_errors=True)

    def __getitem__(self, number: int) -> Packed:
        return read_state(self.folder / self.names[number])

    def __setitem__(self, number: int, state: State) -> None:
        packed = Packed.of(state)
        vectors = {str(dtype): vector.contiguous() for dtype, vector in packed.vectors.items()}
        content = save(vectors, {"layout": json.dumps(packed.layout.plain())})
        name = f"client{number:06d}-{hashlib.blake2b(content, digest_size=8).hexdigest()}.safetensors"
        self._place(number, name, lambda path: path.write_bytes(content))

    def __delitem__(self, number: int) -> None:
        (self.folder / self.names.pop(number)).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[int]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def clear(self) -> None:
        """Delete all files; the inherited way would read each of them."""
        for number in list(self.names):
            del self[number]

    def adopt(self, names: Mapping[int, str], folder: str | Path) -> None:
        """Take over the files of a folder, in place of all states."""
        self.clear()
        for number, name in names.items():
            source = Path(folder) / name
            self._place(number, name, lambda path, source=source: link(source, path))  # type: ignore[misc]

    def _place(self, number: int, name: str, make: Callable[[Path], object]) -> None:
        """Have the file of ``number`` made under this name, unless it is there, and forget its last one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, before = self.folder / name, self.names.get(number)
        if before != name:
            partial = path.with_suffix(".partial")
            make(partial)
            partial.replace(path)
            self.names[number] = name
            if before is not None:
                (self.folder / before).unlink(missing_ok=True)  # who has read it has it mapped, and keeps it


def read_state(path: Path) -> Packed:
    """Return the state in a file, mapped rather than copied."""
    with safe_open(path, framework="pt") as file:
        layout = Layout.from_plain(json.loads(file.metadata()["layout"]))
        return Packed(layout, {dtype: file.get_tensor(str(dtype)) for dtype in layout.lengths})


class ClientStore:
    """Flat states by client id, packed, on the CPU.

    Args:
        committed: Where states are kept; default in memory.
    """

    def __init__(self, committed: MutableMapping[int, Packed] | None = None) -> None:
        self._committed: MutableMapping[int, Packed] = {} if committed is None else committed
        self._pending: dict[int, Packed] = {}

    @property
    def files(self) -> StateFiles | None:
        """The files that states are kept in, if they are."""
        return self._committed if isinstance(self._committed, StateFiles) else None

    def read(self, client_id: int) -> State:
        """Return the client's state after the last committed round; empty before its first."""
        return self._committed.get(client_id, {})

    def newest(self, client_id: int) -> State:
        """Return what was written for the client in this round; else its state after the last committed one."""
        return self._pending.get(client_id) or self.read(client_id)

    def write(self, client_id: int, state: State) -> None:
        """Keep ``state`` for the client, once :meth:`commit` is called; an empty one is not stored."""
        if state:
            packed, shared = Packed.of(state), isinstance(state, Packed)  # perhaps a row of a whole stack's matrix
            vectors = {dtype: vector.to("cpu", copy=shared) for dtype, vector in packed.vectors.items()}
            self._pending[client_id] = Packed(packed.layout, vectors)

    def exchange(self, share: Callable[[Mapping[int, State]], Mapping[int, State]]) -> None:
        """Replace the writes of this round by those of all ranks; ``share`` brings them together."""
        self._pending = {client_id: Packed.of(state) for client_id, state in share(self._pending).items()}

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

    def hand_on(self, moves: Mapping[int, int], names: Callable[[str], bool]) -> None:
        """Let clients go on with entries of others; what a client has not got, nobody takes over.

        Args:
            moves: For every client whose entries it gets.
            names: Whether an entry moves.
        """
        before = {client_id: dict(self.read(client_id)) for client_id in {*moves, *moves.values()}}
        for client_id, source in moves.items():
            stays = {name: value for name, value in before[client_id].items() if not names(name)}
            gets = {name: value for name, value in before[source].items() if names(name)}
            after = {**stays, **gets}
            if after:
                self.write(client_id, after)
            else:  # whoever gets nothing keeps nothing: what it had is with another client now
                self._committed.pop(client_id, None)
        self.commit()

    def __len__(self) -> int:
        return len(self._committed)

    def state_dict(self) -> dict[str, Any]:
        """Return all committed states."""
        return {str(client_id): dict(state) for client_id, state in self._committed.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all states."""
        self._committed.clear()
        self._committed.update((int(client_id), Packed.of(values)) for client_id, values in state.items())
        self._pending.clear()

    def load_files(self, names: Mapping[str, str], folder: Path) -> None:
        """Replace all states by those in files by client, in the folder beside a checkpoint.

        Raises:
            CheckpointError: If one is missing.
        """
        own = {int(client_id): Path(name).name for client_id, name in names.items()}  # no way out of the folder
        missing = [name for name in own.values() if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                message(
                    "a checkpoint with client_state: disk must have its clients' states in the folder beside it",
                    received=f"{len(missing)} files missing, such as {folder / missing[0]}",
                    fix="copy the folder along with the checkpoint, or resume from another one",
                )
            )
        if self.files is not None:
            self.files.adopt(own, folder)
        else:
            self._committed.clear()
            self._committed.update((number, read_state(folder / name)) for number, name in own.items())
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
