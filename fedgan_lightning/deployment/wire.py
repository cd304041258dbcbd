"""Tasks and updates as Flower's records: arrays in NumPy's format, and plain values, none of which is executed."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedgan_lightning.packing import Layout, Packed
from fedgan_lightning.protocol import ClientTask, ClientUpdate, State

#: Message types, as Flower routes them to a function of the ClientApp.
TRAIN, QUERY = "train", "query"
SEPARATOR = "|"
#: Letters of a layout, and bytes of an array's header, that are read.
MOST_LAYOUT, MOST_HEADER = 50_000_000, 1 << 12
#: What server and sites share, and a task's digest is of, in words.
SHARED = "the settings of model and federation, the precision, names of classes, and words or items"


def content(facts: Mapping[str, Any], **states: State) -> Any:
    """Return a ``RecordDict`` of plain values and of states by name.

    A state travels as one flat array per dtype: Flower sends every array by requests of its own, and with one array per
    parameter they took longer than the training (measured).
    """
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    arrays, layouts = {}, {}
    for group, state in states.items():
        packed = Packed.of(state)
        layouts[f"layout{SEPARATOR}{group}"] = json.dumps(packed.layout.plain())
        for dtype, vector in packed.vectors.items():
            arrays[f"{group}{SEPARATOR}{dtype}"] = Array(vector.cpu().contiguous().view(on_wire(dtype)).numpy())
    return RecordDict({"facts": ConfigRecord({**facts, **layouts}), "arrays": ArrayRecord(arrays)})


def on_wire(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype whose bits stand for those of ``dtype`` in an array: itself, unless NumPy does not know it."""
    if not dtype.is_floating_point or dtype in (torch.float16, torch.float32, torch.float64):
        return dtype
    return torch.int16 if dtype.itemsize == 2 else torch.uint8


def facts_of(records: Any) -> dict[str, Any]:
    """Return the plain values."""
    return {name: value for name, value in records["facts"].items() if not name.startswith(f"layout{SEPARATOR}")}


def state_of(records: Any, group: str) -> dict[str, Tensor]:
    """Return the state called ``group``; its tensors are copies.

    Raises:
        ValueError: If arrays and layout do not fit each other.
    """
    text = records["facts"][f"layout{SEPARATOR}{group}"]
    if not isinstance(text, str) or len(text) > MOST_LAYOUT:
        raise ValueError(f"a layout of {group} that is no text, or longer than {MOST_LAYOUT} letters")
    layout = Layout.from_plain(json.loads(text))
    vectors = {}
    for dtype, length in layout.lengths.items():
        array = records["arrays"][f"{group}{SEPARATOR}{dtype}"]
        _check_header(bytes(array.data[:MOST_HEADER]), len(array.data), length=length, dtype=on_wire(dtype))
        vectors[dtype] = torch.from_numpy(array.numpy().copy()).view(dtype)
    packed = Packed(layout, vectors)
    return {name: packed[name].clone() for name in packed}


#: What a message says beside a query, of the way that it takes.
OF_THE_WAY = ("ask", "run", "joined", "session", "others", "texts")


def query_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a message says of its query, and nothing else that it says."""
    return {name: value for name, value in facts.items() if name not in OF_THE_WAY}


def hash_of(facts: Mapping[str, Any], state: State) -> str:
    """Return a hash of plain values and of a state: both sides name a query, or a task, by it.

    Numbers count by their value: the same in another dtype, or with another sign of zero, have the same hash.
    """
    found = hashlib.sha256(json.dumps(dict(facts), sort_keys=True, default=str).encode())
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        value = value.double() + 0.0 if value.is_floating_point() else value
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def hash_of_task(task: ClientTask) -> str:
    """Return a hash of what a task has in common with those of the round's other clients: of its state, then of the
    rest, with a dot between.
    """
    names = ("round", "steps", "epochs", "before", "rounds", "total", "stepping")
    facts = {name: getattr(task, name) for name in names}
    facts |= {"positions": list(task.schedule_positions), "hyperparameters": dict(task.hyperparameters)}
    return f"{hash_of({}, task.state)}.{hash_of(facts, {})}"


def size_of(records: Any) -> int:
    """Return the size of a message's arrays and texts in bytes, without reading any of them."""
    arrays = sum(len(array.data) for array in records["arrays"].values())
    texts = (value for value in records["facts"].values() if isinstance(value, (str, bytes)))
    return arrays + sum(map(len, texts))


def _check_header(beginning: bytes, size: int, *, length: int, dtype: torch.dtype) -> None:
    """Refuse an array that is not what its layout says, before any memory is taken for it.

    Args:
        beginning: The first bytes of the array, in NumPy's format.
        size: Of all its bytes.
        length: How many numbers there are to be.
        dtype: Of which type.

    Raises:
        ValueError: If it is another, or its header is none.
    """
    file = io.BytesIO(beginning)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"NumPy's format {version}")
    shape, _, found = np.lib.format.read_array_header_1_0(file)
    wanted = torch.empty(0, dtype=dtype).numpy().dtype
    if shape != (length,) or found != wanted or size - file.tell() != length * wanted.itemsize:
        raise ValueError(f"an array of shape {shape}, type {found} and {size} bytes, not {length} of {dtype}")


class Asked(NamedTuple):
    """A task as it came.

    Attributes:
        task: The task.
        accepted: Seed of the last task whose update counted; -1 for none.
        hands_on: Whether networks that clients hand on to each other are to come with the answer.
    """

    task: ClientTask
    accepted: int
    hands_on: bool


def from_task(task: ClientTask, *, accepted: int, digest: str, hands_on: bool = False) -> Any:
    """Return a task as records.

    Args:
        task: The task.
        accepted: Seed of the last task whose update counted; -1 for none.
        digest: Hash of what both sides must share.
        hands_on: Whether networks that clients hand on to each other are to come with the answer.
    """
    facts: dict[str, Any] = {
        "client_id": task.client_id,
        "round": task.round,
        "seed": task.seed,
        "steps": task.steps if task.steps is not None else -1,
        "epochs": task.epochs if task.epochs is not None else -1,
        "before": task.before if task.before is not None else -1,
        "schedule_positions": list(task.schedule_positions),
        "hyperparameters": json.dumps(dict(task.hyperparameters)),
        "rounds": task.rounds,
        "total": task.total if task.total is not None else -1,
        "stepping": task.stepping,
        "accepted": accepted,
        "digest": digest,
        "hands_on": hands_on,
        "coded": task.coded is not None,
    }
    return content(facts, state=task.state if task.coded is None else task.coded, own=task.own)


def to_task(records: Any) -> Asked:
    """Return the task, and what was said of it."""
    facts = facts_of(records)
    sent, is_coded = state_of(records, "state"), bool(facts["coded"])
    task = ClientTask(
        client_id=int(facts["client_id"]),
        round=int(facts["round"]),
        seed=int(facts["seed"]),
        state={} if is_coded else sent,
        coded=sent if is_coded else None,
        steps=_known(facts["steps"]),
        epochs=_known(facts["epochs"]),
        before=_known(facts["before"]),
        schedule_positions=tuple(int(position) for position in facts["schedule_positions"]),
        own=state_of(records, "own"),
        hyperparameters={str(n): float(v) for n, v in json.loads(str(facts["hyperparameters"])).items()},
        rounds=int(facts["rounds"]),
        total=_known(facts["total"]),
        stepping=float(facts["stepping"]),
    )
    return Asked(task, int(facts["accepted"]), bool(facts["hands_on"]))


def _known(number: Any) -> int | None:
    return None if int(number) < 0 else int(number)


def from_update(update: ClientUpdate) -> Any:
    """Return an update as records."""
    facts = {"num_examples": update.num_examples, "round": -1 if update.round is None else update.round}
    return content({**facts, **from_metrics(update.metrics)}, delta=update.delta, extras=update.extras)


def to_update(records: Any, *, client_id: int) -> ClientUpdate:
    """Return the update; who sent it is known from the connection, and not asked of the sender.

    Numbers are passed on as they came: whether they can be right is decided where all updates are looked at.
    """
    facts = facts_of(records)
    return ClientUpdate(
        client_id=client_id,
        num_examples=facts["num_examples"],
        delta=state_of(records, "delta"),
        metrics=metrics_of(facts),
        extras=state_of(records, "extras"),
        round=facts["round"],
    )


def from_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return scalars as plain values that are not mistaken for others."""
    return {f"metric{SEPARATOR}{name}": float(value) for name, value in metrics.items()}


def metrics_of(facts: Mapping[str, Any]) -> dict[str, float]:
    """Undo :func:`from_metrics`."""
    prefix = f"metric{SEPARATOR}"
    return {name.removeprefix(prefix): value for name, value in facts.items() if name.startswith(prefix)}
