"""A share of every client's samples that is held out of training, for ``validation_step``; it stays with the client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fedgan_lightning.data.samples import ClientSamples
from fedgan_lightning.seeding import make_generator


def divided(indices: np.ndarray, share: float, *, seed: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions that a client trains on, and those that it holds out, both in their order.

    Args:
        indices: The client's positions.
        share: Share to hold out, in [0, 1): rounded, at least one sample, and never all of them.
        seed: Root seed.
        stream: The client, whose draw depends on nobody else's.
    """
    count = min(max(1, round(share * len(indices))), len(indices) - 1) if share else 0
    if count < 1:
        return indices, indices[:0]
    order = torch.randperm(len(indices), generator=make_generator(seed, "validation", stream)).numpy()
    return indices[np.sort(order[count:])], indices[np.sort(order[:count])]


class HeldOutBatches:
    """Held-out samples in their order, the last minibatch with what is left.

    Args:
        data: The samples.
        batch_size: Samples per minibatch.
    """

    def __init__(self, data: ClientSamples, *, batch_size: int) -> None:
        self.data, self.batch_size = data, batch_size

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        form = self.data.samples.form
        for positions in torch.arange(len(self.data)).split(self.batch_size):
            x, y = self.data.take(positions)
            yield {"(x, y)": (x, y), "(x,)": (x,), "x": x}[form]
