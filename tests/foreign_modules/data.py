"""Three clients of 24, 16 and 8 samples: digits and points by our data module, pairs by a class of one's own."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from torch.nn import functional as F

from fedgan_lightning import FederatedDataModule
from fedgan_lightning.data.own import RoundTick
from fedgan_lightning.partitions import Partition
from fedgan_lightning.sources import Digits, Ring

SIZES = (24, 16, 8)
BATCH_SIZE = 4


class Sizes(Partition):
    """Gives every client as many samples as is said, in a random order."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def assign(self, samples, *, num_clients, generator):
        ends = np.cumsum(self.sizes[:num_clients])
        return np.split(generator.permutation(len(samples))[: ends[-1]], ends[:-1])


def pictures(**options):
    """Pictures of digits, (x, y)."""
    return FederatedDataModule(Digits(), partition=Sizes([*SIZES]), num_clients=3, batch_size=BATCH_SIZE, **options)


def points(**options):
    """Points of the plane with one of eight categories, (x, y)."""
    source = Ring(num_samples=sum(SIZES))
    return FederatedDataModule(source, partition=Sizes([*SIZES]), num_clients=3, batch_size=BATCH_SIZE, **options)


class Batches:
    """Minibatches in a list, which Lightning would take for several loaders."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)


class OwnData(L.LightningDataModule):
    """What somebody writes whose minibatches are no (x, y): the interface of ``fedgan_lightning.protocol`` and no more.

    Args:
        samples: Tensors of all clients' samples.
        collate: Makes a minibatch of rows of all tensors.
    """

    def __init__(self, *samples, collate) -> None:
        super().__init__()
        ends = np.cumsum(SIZES)[:-1].tolist()
        self.parts = [torch.tensor_split(tensor, ends) for tensor in samples]
        self.collate = collate

    num_clients = len(SIZES)

    def num_examples(self, client_id):
        return SIZES[client_id]

    def steps_per_epoch(self, client_id):
        return SIZES[client_id] // BATCH_SIZE

    def client_batches(self, client_id, *, first_step, num_steps):
        return Batches([self._batch(client_id, step) for step in range(first_step, first_step + num_steps)])

    def _batch(self, client_id, step):
        epoch, place = divmod(step, self.steps_per_epoch(client_id))
        order = torch.randperm(SIZES[client_id], generator=torch.Generator().manual_seed(1000 * client_id + epoch))
        rows = order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]
        return self.collate(*(part[client_id][rows] for part in self.parts))

    def fingerprint(self):
        return "pairs"

    def train_dataloader(self):
        return RoundTick()


def digits():
    """All pictures of the three clients, in order, from -1 to 1."""
    data = pictures()
    streams = [data.client_batches(k, first_step=0, num_steps=size // BATCH_SIZE) for k, size in enumerate(SIZES)]
    return torch.cat([x for stream in streams for x, _ in stream])


class HeldOut(OwnData):
    """Own data of which every client holds two minibatches back."""

    validation_share = 0.25

    def client_validation_batches(self, client_id):
        return Batches([self.collate(*(-part[client_id][i : i + BATCH_SIZE] for part in self.parts)) for i in (0, 4)])


def held_out(*, validation_share=0.25):
    """Pictures of digits and nothing that their labels say, (x, y), with validation."""
    return HeldOut(digits(), collate=lambda x: (x, torch.zeros(len(x), dtype=torch.long)))


def domains():
    """Unpaired pictures of two kinds, {"A": ..., "B": ...}: digits, and others as negatives."""
    x = digits()
    return OwnData(x, -x.flip(0), collate=lambda a, b: {"A": a, "B": b})


def pairs():
    """Pictures and what is seen of their edges, {"A": ..., "B": ...}."""
    x = digits()
    return OwnData((x - x.roll(1, -1)) / 2, x, collate=lambda a, b: {"A": a, "B": b})


def resolutions():
    """Pictures and half of their pixels, (high, low)."""
    x = digits()
    return OwnData(x, F.avg_pool2d(x, 2), collate=lambda high, low: (high, low))
