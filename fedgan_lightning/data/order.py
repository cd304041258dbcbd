"""Which samples make up which minibatch: the order of a client's data, wherever the samples lie.

The samples are visited in a fresh random order every epoch; the order of epoch e depends on (seed, stream, e) alone.
Step s is therefore the same minibatch whether rounds are long or short, and a resumed run needs no state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgan_lightning.errors import DataError, message
from fedgan_lightning.seeding import make_generator


@dataclass(frozen=True)
class MinibatchOrder:
    """The endless stream of minibatches of one client, as positions within its samples.

    A client with fewer samples than ``batch_size`` has minibatches of all that it holds.

    Attributes:
        num_samples: Samples of the client, N_k.
        batch_size: Samples per minibatch.
        seed: Root seed.
        stream: Number of the stream: the client id.
        drop_last: Whether an epoch drops its incomplete last minibatch; otherwise it ends with it.
    """

    num_samples: int
    batch_size: int
    seed: int
    stream: int
    drop_last: bool = True

    @property
    def full(self) -> int:
        """Samples of a complete minibatch."""
        return min(self.batch_size, self.num_samples)

    @property
    def steps_per_epoch(self) -> int:
        """Minibatches in one pass over the samples, at least 1."""
        return steps_per_epoch(self.num_samples, batch_size=self.batch_size, drop_last=self.drop_last)

    def sizes(self, first_step: int, num_steps: int) -> list[int]:
        """Return the number of samples in each minibatch of a window."""
        rest = 0 if self.drop_last else self.num_samples % self.full
        last = self.steps_per_epoch - 1
        if not rest:
            return [self.full] * num_steps
        steps = range(first_step, first_step + num_steps)
        return [rest if step % (last + 1) == last else self.full for step in steps]

    def epochs(self, first_step: int, num_steps: int) -> Iterator[tuple[int, Tensor]]:
        """Yield, for every epoch that a window touches, its first step in the window and the positions visited."""
        per_epoch, end = self.steps_per_epoch, first_step + num_steps
        for epoch in range(first_step // per_epoch, -(-end // per_epoch)):
            order = torch.randperm(self.num_samples, generator=make_generator(self.seed, "batches", self.stream, epoch))
            before = epoch * per_epoch
            begin, stop = max(first_step, before), min(end, before + per_epoch)
            yield begin, order[(begin - before) * self.full : (stop - before) * self.full]

    def positions(self, first_step: int, num_steps: int) -> Tensor:
        """Return the positions that a window visits, one minibatch after the other; :meth:`sizes` cuts them."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *(own for _, own in self.epochs(first_step, num_steps))])


def steps_per_epoch(num_samples: int, *, batch_size: int, drop_last: bool) -> int:
    """Return the minibatches in one pass over ``num_samples`` samples, at least 1."""
    full = min(batch_size, num_samples)
    return num_samples // full if drop_last else -(-num_samples // full)


def check_not_empty(num_samples: int, *, client: object) -> None:
    """Refuse a client that has nothing to train on.

    Raises:
        DataError: If ``num_samples`` is 0.
    """
    if num_samples < 1:
        raise DataError(
            message(
                "every client must hold at least one sample",
                received=f"client {client} with none",
                fix="leave that client out",
            )
        )
