"""Samples in memory: uint8 pixels or floats, labels, and columns that say where each sample came from.

Inside the framework images are float32 in [-1, 1]; in memory they stay uint8 and are converted per minibatch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedgan_lightning.errors import DataError, message
from fedgan_lightning.seeding import make_generator

#: Numbers that are gathered at a time: small minibatches cost as much for the call as for the copy.
READ_AHEAD = 1 << 16


@dataclass(frozen=True)
class Samples:
    """A data set in memory.

    Attributes:
        x: (n, ...) uint8 images (channels first), or floating-point vectors.
        y: (n,) int64 labels, or ``None``.
        columns: Natural groupings by name, (n,) each: folder, identity, mode, ...
    """

    x: Tensor
    y: Tensor | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

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
        if self.x.is_floating_point() and not bool(torch.isfinite(self.x).all()):
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
        """Hash of samples and labels."""
        found = hashlib.sha256(f"{tuple(self.x.shape)} {self.x.dtype}".encode())
        for values in (self.x, *(() if self.y is None else (self.y,))):
            found.update(np.ascontiguousarray(values.numpy()).tobytes())
        return found.hexdigest()

    @property
    def is_image(self) -> bool:
        """Whether samples are pixels."""
        return self.x.dtype == torch.uint8

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return float samples and int64 labels (zeros where there are none) at ``indices``."""
        x = self.x[indices]
        if self.is_image:
            x = of_bytes(x)
        y = torch.zeros(len(indices), dtype=torch.int64) if self.y is None else self.y[indices]
        return x, y


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

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all samples in order, ``size`` at a time."""
        for positions in torch.arange(len(self)).split(size):
            yield self.take(positions)


class BatchStream:
    """A window on a client's endless stream of minibatches.

    The stream visits the samples in a fresh random order every epoch; the order of epoch e depends on (seed, stream, e)
    alone. Step s is therefore the same minibatch whether rounds are long or short, and a resumed run needs no state.
    An epoch drops its incomplete last minibatch.

    Args:
        data: The client's samples.
        batch_size: Samples per minibatch.
        seed: Root seed.
        stream: Number of the stream: the client id.
        first_step: First minibatch of the window.
        num_steps: Minibatches in the window.

    Raises:
        DataError: If the client has fewer samples than one minibatch.
    """

    def __init__(
        self, data: ClientSamples, *, batch_size: int, seed: int, stream: int, first_step: int, num_steps: int
    ) -> None:
        check_batch_size(len(data), batch_size=batch_size, client_id=stream)
        self.data, self.batch_size, self.seed, self.stream = data, batch_size, seed, stream
        self.first_step, self.num_steps = first_step, num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.num_steps:
            return
        ahead = max(1, READ_AHEAD // (self.batch_size * self.data.samples.x[0].numel()))
        for rows in self.positions().split(ahead):
            x, y = self.data.take(rows.flatten())
            yield from zip(x.split(self.batch_size), y.split(self.batch_size))

    def positions(self) -> Tensor:
        """Return the positions (num_steps, batch_size) within the client of every minibatch."""
        steps_per_epoch = len(self.data) // self.batch_size
        end = self.first_step + self.num_steps
        parts = [torch.empty(0, self.batch_size, dtype=torch.int64)]
        for epoch in range(self.first_step // steps_per_epoch, -(-end // steps_per_epoch)):
            generator = make_generator(self.seed, "batches", self.stream, epoch)
            order = torch.randperm(len(self.data), generator=generator)
            rows = order[: steps_per_epoch * self.batch_size].view(steps_per_epoch, self.batch_size)
            before = epoch * steps_per_epoch
            parts.append(rows[max(0, self.first_step - before) : end - before])
        return torch.cat(parts)


class StackedBatchStream:
    """The minibatches of several clients in one tensor: step s holds those of all clients with more than s steps.

    Args:
        streams: The clients' own streams over one data set, the longest first.
    """

    def __init__(self, streams: Sequence[BatchStream]) -> None:
        self.streams = streams

    def __len__(self) -> int:
        return len(self.streams[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        samples = self.streams[0].data.samples
        batch_size = self.streams[0].batch_size
        indices = [stream.data.indices[stream.positions()] for stream in self.streams]
        scales, offsets = self._shifts(samples)
        active = len(indices)
        for step in range(len(self)):
            while len(indices[active - 1]) <= step:
                active -= 1
            x, y = samples.take(torch.cat([own[step] for own in indices[:active]]))
            x = x.view(active, batch_size, *x.shape[1:])
            if scales is not None and offsets is not None:
                x = x * scales[:active] + offsets[:active]
                x = x.clamp(-1.0, 1.0) if samples.is_image else x
            yield x, y.view(active, batch_size)

    def _shifts(self, samples: Samples) -> tuple[Tensor | None, Tensor | None]:
        shifts = [stream.data.shift for stream in self.streams]
        if all(shift is None for shift in shifts):
            return None, None
        known = [shift if shift is not None else Shift() for shift in shifts]
        shape = (-1, *([1] * samples.x.dim()))
        scales = torch.tensor([shift.scale for shift in known]).view(shape)
        return scales, torch.tensor([shift.offset for shift in known]).view(shape)


def check_batch_size(num_samples: int, *, batch_size: int, client_id: int) -> None:
    """Refuse a client that cannot fill one minibatch.

    Raises:
        DataError: If ``num_samples < batch_size``.
    """
    if num_samples < batch_size:
        raise DataError(
            message(
                f"every client must have at least one full minibatch of {batch_size} samples",
                received=f"client {client_id} with {num_samples}",
                fix="lower data.batch_size, use fewer clients, or raise the partition's min_samples",
            )
        )
