"""Sources for tests, so that configurations for data that is not at hand can run."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources import Source
from fedgan_lightning.evaluation.metrics import Metric


class RandomImages(Source):
    """Uniform noise.

    Args:
        shape: Shape of one image.
        classes: Number of classes; 0 for none.
        num_samples: Size of both splits.
    """

    def __init__(self, shape: list[int], classes: int = 0, num_samples: int = 700) -> None:
        self.sample_shape, self.num_samples = tuple(shape), num_samples
        self.class_names = tuple(str(label) for label in range(classes))

    def load(self, split):
        generator = torch.Generator().manual_seed(len(split))
        x = torch.randint(0, 256, (self.num_samples, *self.sample_shape), generator=generator, dtype=torch.uint8)
        labels = torch.arange(self.num_samples) % self.num_classes if self.num_classes else None
        return Samples(x=x, y=labels, columns={"folder": (torch.arange(self.num_samples) % 3).numpy()})


class RandomSeries(Source):
    """Sines of random phase and noise: six variables of 40 days, which are its classes, in four seasons."""

    sample_shape, class_names = (1, 24), ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL")

    def load(self, split):
        generator = torch.Generator().manual_seed(len(split))
        phase = torch.rand(240, 1, 1, generator=generator)
        hours = torch.arange(24).view(1, 1, 24) / 24
        x = torch.sin(6.28 * (hours + phase)) + 0.1 * torch.randn(240, 1, 24, generator=generator)
        days = torch.arange(240)
        return Samples(x=x, y=days // 40, columns={"variable": (days // 40).numpy(), "season": (days % 4).numpy()})


class Curious(Metric):
    """Asks for a client's samples without saying so beforehand."""

    def prepare(self, data, *, device):
        return {"first": data.client_samples(0)}

    def compute(self, samples, labels):
        return {}


class Hospitals(L.LightningDataModule):
    """A data module as users have it, which knows its clients.

    Args:
        size: Samples of the larger hospital.
        shape: Shape of one sample.
    """

    def __init__(self, size: int = 40, shape: tuple[int, ...] = (2,)) -> None:
        super().__init__()
        self.size, self.shape = size, shape

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        self.samples = torch.rand(self.size, *self.shape, generator=generator)

    def client_dataloaders(self):
        labels = torch.arange(self.size) % 2
        both = [TensorDataset(self.samples[:count], labels[:count]) for count in (self.size, 5)]
        return {name: DataLoader(own, batch_size=8) for name, own in zip(("large", "small"), both)}


def write_pictures(root, counts: dict[str, int], *, side: int = 28, seed: int = 0) -> None:
    """Write grey pictures, one folder per class, the brighter the later the class; no two are alike."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 100, (side, side)) + 120 * number
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index:04d}.png")
