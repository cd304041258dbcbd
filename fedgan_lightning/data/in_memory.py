"""Clients' items read into memory, where they are numbers of one shape and few enough: then all can be measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedgan_lightning.data.items import digest_of, form_of, is_pair, pixels_of
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources.base import Source, Split
from fedgan_lightning.data.streams import MapStream
from fedgan_lightning.errors import SampleSizeError, message
from fedgan_lightning.seeding import derive_seed, isolated_rng

#: Items that are read twice, to see whether the data set gives the same again.
READ_TWICE = 16
#: Labels up to this number are numbers of classes whatever the number of samples.
FEW_CLASSES = 1000


@dataclass(frozen=True)
class Form:
    """What items are.

    Attributes:
        kind: ``(x, y)``, ``(x,)`` or ``x`` alone.
        shape: Shape of x.
        dtype: Its dtype: uint8 for pixels, or a floating-point one.
    """

    kind: Literal["(x, y)", "(x,)", "x"]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Memory of one x."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class ItemsSource(Source):
    """Samples that were read from data sets of users.

    Args:
        train: Those of all clients.
        test: Held-out ones, if there are any.
        class_names: Names of the classes; default their numbers.
    """

    def __init__(self, train: Samples, test: Samples | None, *, class_names: Sequence[str] = ()) -> None:
        self.train, self.test = train, test
        self.sample_shape = tuple(train.x.shape[1:])
        highest = max((int(own.y.max()) for own in (train, test) if own is not None and own.y is not None), default=-1)
        named = len(class_names) > highest >= 0
        self.class_names = tuple(class_names) if named else tuple(str(label) for label in range(highest + 1))

    def load(self, split: Split) -> Samples:
        found = self.train if split == "train" else self.test
        if found is None:
            raise SampleSizeError(
                message("metrics on held-out samples must have some", received="no test data", fix="give test=Dataset")
            )
        return found


def form_of_first(stream: MapStream) -> Form | None:
    """Return what a client's first item is, or ``None`` if it is nothing that is read into memory."""
    return _form(_raw(stream, 0))


def read_samples(streams: Sequence[MapStream], form: Form) -> Samples | None:
    """Return the items of all clients, one after the other.

    Args:
        streams: The clients'.
        form: What their items are.

    Returns:
        ``None`` if they are not the same when they are read again, or if y of some is no number of a class.

    Raises:
        DataError: If one cannot be read, or is not of that form; names client and item.
    """
    if not _are_constant(streams):
        return None
    count = sum(own.num_examples for own in streams)
    x = torch.empty(count, *form.shape, dtype=form.dtype)
    labels = torch.empty(count, dtype=torch.int64) if form.kind == "(x, y)" else None
    for row, (stream, position) in enumerate(_all(streams)):
        item = _raw(stream, position)
        found = _form(item)
        if found != form:
            raise stream.reader.unfit(
                stream.places(torch.tensor([position]))[0],
                f"must be like the first item, {form.kind} with x {form.dtype} of shape {form.shape}",
                form_of(item),
                "give all items one form (a transform of the data set, say), or set collate_fn",
            )
        x[row] = _number(item[0] if is_pair(item) else item)
        if labels is not None:
            labels[row] = int(item[1])
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < max(count, FEW_CLASSES):
        return None
    return Samples(x=x, y=labels, form=form.kind)


def _all(streams: Sequence[MapStream]) -> Iterator[tuple[MapStream, int]]:
    for stream in streams:
        for position in range(stream.num_examples):
            yield stream, position


def _raw(stream: MapStream, position: int) -> Any:
    place = stream.places(torch.tensor([position]))[0]
    return stream.reader.raw(place)


def _are_constant(streams: Sequence[MapStream]) -> bool:
    """Whether items are the same when they are read again; those of a data set that augments at random are not."""
    count = sum(own.num_examples for own in streams)
    ends = np.cumsum([own.num_examples for own in streams])
    for row in {*np.linspace(0, count - 1, READ_TWICE).astype(int).tolist()}:
        client = int(np.searchsorted(ends, row, side="right"))
        stream, position = streams[client], row - int(ends[client]) + streams[client].num_examples
        digests = set()
        for attempt in range(2):
            with isolated_rng(derive_seed(attempt, "read twice", row)):
                digests.add(digest_of(_raw(stream, position)))
        if len(digests) > 1:
            return False
    return True


def _number(x: Any) -> Tensor:
    pixels = pixels_of(x)
    return torch.as_tensor(np.array(x) if isinstance(x, np.ndarray) else x) if pixels is None else pixels


def _form(item: Any) -> Form | None:
    """Return what an item is, or ``None``."""
    x, y = (item[0], item[1:]) if is_pair(item) else (item, ())
    if pixels_of(x) is None and not (isinstance(x, (Tensor, np.ndarray)) and _is_float(x) and x.ndim):
        return None
    if y and not _is_label(y[0]):
        return None
    number = _number(x)
    kind: Literal["(x, y)", "(x,)", "x"] = "(x, y)" if y else "(x,)" if is_pair(item) else "x"
    return Form(kind, tuple(number.shape), number.dtype)


def _is_float(x: Tensor | np.ndarray) -> bool:
    return x.is_floating_point() if isinstance(x, Tensor) else x.dtype.kind == "f"


def _is_label(y: Any) -> bool:
    """Whether y is a single whole number."""
    if isinstance(y, (Tensor, np.ndarray)):
        return not y.ndim and "int" in str(y.dtype)
    return isinstance(y, Integral) and not isinstance(y, bool)
