"""Samples in memory: uint8 pixels or floats, labels, and columns that say where each sample came from.

Inside the framework images are float32 in [-1, 1]; in memory they stay uint8 and are converted per minibatch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedgan_lightning.data.order import MinibatchOrder, check_not_empty
from fedgan_lightning.data.rows import RowsOnDisk
from fedgan_lightning.errors import DataError, message

#: Numbers that are gathered at a time: small minibatches cost as much for the call as for the copy.
READ_AHEAD = 1 << 16


@dataclass(frozen=True)
class Samples:
    """A data set in memory.

    Attributes:
        x: (n, ...) uint8 images (channels first), or floating-point vectors. In place of a tensor it may be a
            :class:`~fedgan_lightning.data.rows.RowsOnDisk`, which has of one what minibatches and partitions ask for.
        y: (n,) int64 labels, or ``None``.
        columns: Natural groupings by name, (n,) each: folder, identity, mode, ...
        form: What minibatches are: ``(x, y)``, with zeros for y where there are no labels; ``(x,)``; or ``x`` alone.
    """

    x: Tensor
    y: Tensor | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    form: Literal["(x, y)", "(x,)", "x"] = "(x, y)"

    def __post_init__(self) -> None:
        if len(self.x) == 0:
            raise DataError(
                message("a data set must hold at least one sample", received="none", fix="check the source's path")
            )
        if self.y is not None and (self.y.dim() != 1 or self.y.is_floating_point() or self.y.is_complex()):
            raise DataError(
                message(
                    "labels must be whole numbers of shape (n,), one for each sample",
                    received=f"{self.y.dtype} of shape {tuple(self.y.shape)}",
                    fix="convert them",
                )
            )
        if self.y is not None and len(self.y) != len(self.x):
            raise DataError(
                message(
                    "every sample must have one label",
                    received=f"{len(self.x)} samples, {len(self.y)} labels",
                    fix="check the label file",
                )
            )
        for name, column in self.columns.items():
            if len(np.atleast_1d(column)) != len(self.x):
                raise DataError(
                    message(
                        "every column must have a value for each sample",
                        received=f"{len(self.x)} samples, {len(np.atleast_1d(column))} values of {name}",
                        fix="check the source's columns",
                    )
                )
        if isinstance(self.x, Tensor) and self.x.is_floating_point() and not bool(torch.isfinite(self.x).all()):
            bad = (~torch.isfinite(self.x)).flatten(1).any(1)
            raise DataError(
                message(
                    "samples must be finite numbers",
                    received=f"NaN or infinity in {int(bad.sum())} of {len(self.x)} samples, "
                    f"first in sample {int(bad.int().argmax())}",
                    fix="clean the data or impute the values",
                )
            )

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def digest(self) -> str:
        """Hash of samples and labels; of samples in a file, of a few of them."""
        found = hashlib.sha256(f"{tuple(self.x.shape)} {self.x.dtype}".encode())
        if isinstance(self.x, RowsOnDisk):
            found.update(self.x.look())
        for values in (own for own in (self.x, self.y) if isinstance(own, Tensor)):
            found.update(np.ascontiguousarray(values.numpy()).tobytes())
        return found.hexdigest()

    @property
    def is_image(self) -> bool:
        """Whether samples are pixels."""
        return self.x.dtype == torch.uint8

    def subset(self, kept: Tensor) -> Samples:
        """Return the samples at these positions."""
        x: Any = self.x.subset(kept) if isinstance(self.x, RowsOnDisk) else self.x[kept]
        return replace(
            self,
            x=x,
            y=None if self.y is None else self.y[kept],
            columns={name: column[kept.numpy()] for name, column in self.columns.items()},
        )

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return float samples and int64 labels (zeros where there are none) at ``indices``."""
        x = self.x[indices]
        if self.is_image:
            x = of_bytes(x)
        y = torch.zeros(len(indices), dtype=torch.int64) if self.y is None else self.y[indices]
        return x, y


class SampleForm(Samples):
    """What samples are, without any: their shape and dtype, where nobody here has one."""

    def __post_init__(self) -> None:
        """Nothing: a data set must hold samples, and this is none."""

    @classmethod
    def of(cls, shape: Sequence[int], *, is_image: bool) -> SampleForm:
        """Return the form of samples of this shape.

        Args:
            shape: Of one sample.
            is_image: Whether they are pixels, bytes; else numbers.
        """
        return cls(x=torch.empty(0, *shape, dtype=torch.uint8 if is_image else torch.float32))


def to_bytes(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as bytes: what a data set keeps of them, rounded, and cut where they go beyond."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def of_bytes(pixels: Tensor) -> Tensor:
    """Return bytes as images in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def quantise(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to the 256 levels of a byte: what a saved picture, and every real image, consists of."""
    return of_bytes(to_bytes(images))


@dataclass(frozen=True)
class Shift:
    """A client's own view of the world: x -> scale * x + offset, kept in [-1, 1] for images.

    Attributes:
        scale: Contrast.
        offset: Brightness.
    """

    scale: float = 1.0
    offset: float = 0.0

    def apply(self, x: Tensor, *, is_image: bool) -> Tensor:
        """Return the shifted samples."""
        shifted = x * self.scale + self.offset
        return shifted.clamp(-1.0, 1.0) if is_image else shifted


@dataclass(frozen=True)
class ClientSamples:
    """One client's part of a data set, without a copy of it; also a map-style torch data set.

    Attributes:
        samples: The whole data set.
        indices: Positions of this client's samples.
        shift: Its feature shift, if any.
    """

    samples: Samples
    indices: Tensor
    shift: Shift | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.take(torch.tensor([index]))
        return x[0], y[0]

    def take(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return float samples and labels at positions within this client."""
        x, y = self.samples.take(self.indices[positions])
        return (x if self.shift is None else self.shift.apply(x, is_image=self.samples.is_image)), y

    def label_counts(self, num_classes: int) -> Tensor:
        """Return how many samples of every class there are, (classes,); the samples must have labels."""
        assert self.samples.y is not None
        return torch.bincount(self.samples.y[self.indices], minlength=num_classes)

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all samples in order, ``size`` at a time."""
        for positions in torch.arange(len(self)).split(size):
            yield self.take(positions)


class BatchStream:
    """A window on a client's endless stream of minibatches, in the order of :class:`MinibatchOrder`.

    Args:
        data: The client's samples.
        batch_size: Samples per minibatch; a client with fewer has minibatches of all that it holds.
        seed: Root seed.
        stream: Number of the stream: the client id.
        first_step: First minibatch of the window.
        num_steps: Minibatches in the window.
        drop_last: Whether an epoch drops its incomplete last minibatch.

    Raises:
        DataError: If the client has no sample.
    """

    def __init__(
        self,
        data: ClientSamples,
        *,
        batch_size: int,
        seed: int,
        stream: int,
        first_step: int,
        num_steps: int,
        drop_last: bool = True,
    ) -> None:
        check_not_empty(len(data), client=stream)
        self.data, self.first_step, self.num_steps = data, first_step, num_steps
        self.order = MinibatchOrder(len(data), batch_size, seed, stream, drop_last)
        self.sizes = self.order.sizes(first_step, num_steps)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Any]:
        form = self.data.samples.form
        if form == "(x, y)":
            return self.pairs()
        return ((x,) if form == "(x,)" else x for x, _ in self.pairs())

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the minibatches as (x, y)."""
        if not self.num_steps:
            return
        ahead, begin = max(1, READ_AHEAD // (self.order.full * self.data.samples.x[0].numel())), 0
        positions = self.positions()
        for first in range(0, self.num_steps, ahead):
            sizes = self.sizes[first : first + ahead]
            end = begin + sum(sizes)
            x, y = self.data.take(positions[begin:end])
            yield from zip(x.split(sizes), y.split(sizes))
            begin = end

    def positions(self) -> Tensor:
        """Return the positions within the client that the window visits, one minibatch after the other."""
        return self.order.positions(self.first_step, self.num_steps)


class StackedBatchStream:
    """The minibatches of several clients in one tensor: step s holds those of all clients with more than s steps.

    Args:
        streams: The clients' own streams over one data set, the longest first.

    Raises:
        ValueError: If the minibatches of a step are not of one size.
    """

    def __init__(self, streams: Sequence[BatchStream]) -> None:
        self.streams = streams
        if any(own.sizes != streams[0].sizes[: len(own)] for own in streams):
            raise ValueError("clients with minibatches of different sizes cannot be stacked")

    def __len__(self) -> int:
        return len(self.streams[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        samples, sizes = self.streams[0].data.samples, self.streams[0].sizes
        indices = [own.data.indices[own.positions()].split(own.sizes) if len(own) else () for own in self.streams]
        scales, offsets = self._shifts(samples)
        active = len(indices)
        for step in range(len(self)):
            while len(indices[active - 1]) <= step:
                active -= 1
            x, y = samples.take(torch.cat([own[step] for own in indices[:active]]))
            x = x.view(active, sizes[step], *x.shape[1:])
            if scales is not None and offsets is not None:
                x = x * scales[:active] + offsets[:active]
                x = x.clamp(-1.0, 1.0) if samples.is_image else x
            yield x, y.view(active, sizes[step])

    def _shifts(self, samples: Samples) -> tuple[Tensor | None, Tensor | None]:
        shifts = [stream.data.shift for stream in self.streams]
        if all(shift is None for shift in shifts):
            return None, None
        known = [shift if shift is not None else Shift() for shift in shifts]
        shape = (-1, *([1] * samples.x.dim()))
        scales = torch.tensor([shift.scale for shift in known]).view(shape)
        return scales, torch.tensor([shift.offset for shift in known]).view(shape)
