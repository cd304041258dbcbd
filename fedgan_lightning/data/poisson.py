"""Minibatches under example-level privacy: every record on its own with one probability, from secret entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedgan_lightning.data.samples import ClientSamples
from fedgan_lightning.dp.randomness import SecretStream
from fedgan_lightning.errors import ConfigurationError, message

#: Label of a row that fills up a minibatch.
NOBODY = -1


class PoissonOptions(Protocol):
    """What is asked of a setting of example-level privacy."""

    rows: int

    def rate(self, num_examples: int) -> float: ...

    def stream(self, *purpose: object) -> SecretStream: ...


class PoissonClients:
    """The clients of a data module, with Poisson minibatches of a fixed number of rows.

    A local step has ``draws`` samples, one for each of the discriminator's steps. The records of a sample come first;
    the rows after them have the label -1. Everything else is the data module's own.

    Args:
        data: A data module whose samples can be looked at one by one.
        options: Probability, rows, and streams of secret numbers.
        draws: Samples of a local step.

    Raises:
        ConfigurationError: If the data module makes its own minibatches.
    """

    def __init__(self, data: Any, options: PoissonOptions, *, draws: int = 1) -> None:
        if not hasattr(data, "client_samples"):
            raise ConfigurationError(
                message(
                    "example-level privacy must draw every record itself",
                    received=f"a {type(data).__name__} that makes its own minibatches",
                    fix="give data sets of samples, not loaders",
                )
            )
        self.data, self.options, self.draws = data, options, draws

    def __getattr__(self, name: str) -> Any:
        if name == "data":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.data, name)

    @property
    def num_rows(self) -> int:
        """Rows of a local step."""
        return self.options.rows * self.draws

    def batch_sizes(self, client_id: int, *, first_step: int, num_steps: int) -> list[int]:
        """Return the number of rows of each minibatch: the same for all."""
        return [self.num_rows] * num_steps

    def client_batches(self, client_id: int, *, first_step: int, num_steps: int) -> PoissonBatches:
        """Return the minibatches of a window of a client's steps; new ones at every call, unless for tests."""
        stream = self.options.stream("minibatches", client_id, first_step)
        samples, goes_on = self.data.client_samples(client_id), getattr(self.data, "check_time", None)
        return PoissonBatches(samples, self.options, stream, self.draws, num_steps, goes_on=goes_on)

    def stacked_batches(
        self, client_ids: Sequence[int], *, first_steps: Sequence[int], num_steps: Sequence[int]
    ) -> _Stacked:
        """Return the minibatches of several clients in one tensor, the client with most steps first."""
        streams = [
            self.client_batches(client_id, first_step=first, num_steps=count)
            for client_id, first, count in zip(client_ids, first_steps, num_steps)
        ]
        return _Stacked(streams)


class PoissonBatches:
    """Poisson minibatches of one client.

    Args:
        samples: The client's.
        options: Probability and rows.
        stream: Secret numbers.
        draws: Samples of a local step.
        num_steps: Local steps.
        goes_on: Called before every step; raises where the data module gives a task no more time.
    """

    def __init__(
        self,
        samples: ClientSamples,
        options: PoissonOptions,
        stream: SecretStream,
        draws: int,
        num_steps: int,
        *,
        goes_on: Callable[[], None] | None = None,
    ) -> None:
        self.goes_on = goes_on
        self.samples, self.options, self.stream = samples, options, stream
        self.draws, self.num_steps = draws, num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.num_steps):
            if self.goes_on is not None:
                self.goes_on()
            parts = [self._padded(self._drawn()) for _ in range(self.draws)]
            yield torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def _drawn(self) -> Tensor:
        """Return the positions of a sample; one that is too large is cut to a random part of it."""
        count = len(self.samples)
        chosen = self.stream.chosen(count, rate=self.options.rate(count))
        if len(chosen) > self.options.rows:
            kept = self.stream.subset(len(chosen), size=self.options.rows)
            chosen = tuple(chosen[place] for place in kept)
        return torch.tensor(chosen, dtype=torch.int64)

    def _padded(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.samples.take(positions)
        rows, count = self.options.rows, len(positions)
        filled = x.new_zeros(rows, *x.shape[1:])
        filled[:count] = x
        labels = torch.full((rows,), NOBODY, dtype=torch.int64)
        labels[:count] = y
        return filled, labels


class _Stacked:
    """Minibatches of several clients, step by step."""

    def __init__(self, streams: Sequence[PoissonBatches]) -> None:
        self.streams = streams

    def __len__(self) -> int:
        return len(self.streams[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        iterators = [iter(own) for own in self.streams]
        for step in range(len(self)):
            pairs = [next(own) for own, stream in zip(iterators, self.streams) if len(stream) > step]
            yield torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
