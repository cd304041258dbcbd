"""2-D data with known modes, and FedGAN's one-dimensional system. Generated, the same for the same seed."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources.base import Source, Split
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_generator


class GaussianMixture(Source):
    """Gaussians of equal weight in the plane; class and column ``mode`` are the number of the Gaussian.

    Args:
        centres: (k, 2) centres in units of the data.
        sigma: Standard deviation of every Gaussian.
        scale: Factor applied to everything, so that the data has about unit variance: GANs need it (measured).
        num_samples: Size of the training split; the test split is a quarter of it.
        seed: Root seed.
    """

    modality = "fedgan_lightning.evaluation.modalities.KnownModes"

    @checked(sigma="[0, inf)", scale="(0, inf)", num_samples="[1, inf)", seed="[0, inf)")
    def __init__(self, centres: Tensor, *, sigma: float, scale: float, num_samples: int, seed: int) -> None:
        self.centres, self.sigma = centres * scale, sigma * scale
        self.num_samples, self.seed = num_samples, seed
        self.sample_shape = (2,)
        self.class_names = tuple(f"mode {index}" for index in range(len(centres)))

    def load(self, split: Split) -> Samples:
        generator = make_generator(self.seed, f"mixture {split}")
        count = self.num_samples if split == "train" else max(self.num_samples // 4, 1)
        labels = torch.arange(count) % len(self.centres)
        noise = torch.randn(count, 2, generator=generator)
        x = (self.centres[labels] + self.sigma * noise).float()
        return Samples(x=x, y=labels, columns={"mode": labels.numpy()})


class Ring(GaussianMixture):
    """Gaussians on the unit circle, neighbours next to each other in number.

    Args:
        modes: Number of Gaussians, 8 in the paper.
        sigma: Their standard deviation on the unit circle.
        scale: Factor applied to everything; sqrt(2) gives unit variance.
        num_samples: Size of the training split.
        seed: Root seed.
    """

    @checked(modes="[1, inf)", sigma="[0, inf)", scale="(0, inf)", num_samples="[1, inf)", seed="[0, inf)")
    def __init__(
        self,
        modes: int = 8,
        *,
        sigma: float = 0.02,
        scale: float = math.sqrt(2),
        num_samples: int = 40_000,
        seed: int = 0,
    ) -> None:
        angles = 2 * math.pi * torch.arange(modes) / modes
        centres = torch.stack([angles.cos(), angles.sin()], dim=1)
        super().__init__(centres, sigma=sigma, scale=scale, num_samples=num_samples, seed=seed)


class Grid(GaussianMixture):
    """Gaussians on a square grid with spacing 2 (PacGAN's 25-grid: means {-4, ..., 4}^2, sigma .05).

    Args:
        side: Gaussians per side.
        sigma: Their standard deviation.
        scale: Factor applied to everything; default 1 / sqrt(8), which gives the 25-grid unit variance.
        num_samples: Size of the training split.
        seed: Root seed.
    """

    @checked(side="[1, inf)", sigma="[0, inf)", scale="(0, inf)", num_samples="[1, inf)", seed="[0, inf)")
    def __init__(
        self,
        side: int = 5,
        *,
        sigma: float = 0.05,
        scale: float = 1 / math.sqrt(8),
        num_samples: int = 100_000,
        seed: int = 0,
    ) -> None:
        line = 2.0 * torch.arange(side) - (side - 1)
        super().__init__(torch.cartesian_prod(line, line), sigma=sigma, scale=scale, num_samples=num_samples, seed=seed)


class SwissRoll(Source):
    """A spiral in the plane, t (cos t, sin t) with t in [1.5 pi, 4.5 pi], scaled to unit variance, plus noise.

    Column ``part`` cuts it along t into four parts of equal probability, as FedGAN's clients hold them.

    Args:
        noise: Standard deviation of the noise, in units of t.
        num_samples: Size of the training split; the test split is a quarter of it.
        parts: Number of parts.
        seed: Root seed.
    """

    scale = 1 / 6.8  # measured: the standard deviation of t cos t and t sin t over this range

    @checked(noise="[0, inf)", num_samples="[1, inf)", parts="[1, inf)", seed="[0, inf)")
    def __init__(self, *, noise: float = 0.25, num_samples: int = 40_000, parts: int = 4, seed: int = 0) -> None:
        self.noise, self.num_samples, self.parts, self.seed = noise, num_samples, parts, seed
        self.sample_shape = (2,)

    def load(self, split: Split) -> Samples:
        generator = make_generator(self.seed, f"swiss roll {split}")
        count = self.num_samples if split == "train" else max(self.num_samples // 4, 1)
        share = torch.rand(count, generator=generator)
        t = 1.5 * math.pi * (1 + 2 * share)
        clean = torch.stack([t * t.cos(), t * t.sin()], dim=1)
        x = self.scale * (clean + self.noise * torch.randn(count, 2, generator=generator))
        return Samples(x=x, columns={"part": (share * self.parts).long().clamp_max(self.parts - 1).numpy()})


class Segments(Source):
    """FedGAN's 2-D system: x ~ U[-1, 1] as the nodes of the midpoint rule; column ``segment`` cuts it into equal parts.

    Minibatches as large as a segment's nodes make the expectations exact.

    Args:
        segments: Number of parts, 5 in the paper.
        num_nodes: Nodes on [-1, 1]; a multiple of ``segments``.
    """

    @checked(segments="[1, inf)", num_nodes="[1, inf)")
    def __init__(self, segments: int = 5, *, num_nodes: int = 200) -> None:
        self.segments, self.num_nodes = segments, num_nodes
        self.sample_shape = (1,)

    def load(self, split: Split) -> Samples:
        x = -1 + (2 * torch.arange(self.num_nodes, dtype=torch.float64) + 1) / self.num_nodes
        segment = np.arange(self.num_nodes) * self.segments // self.num_nodes
        return Samples(x=x.unsqueeze(1), columns={"segment": segment})
