"""Residual pair of SNGAN with projection (Miyato et al. 2018; Miyato and Koyama 2018), 8 to 64 pixels.

The generator's BatchNorm is conditional: each class has a scale and a shift of its own. The discriminator has spectral
norm in every layer. Goes with the hinge loss and Adam 2e-4 (0, .9).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from fedgan_lightning.gan.networks.dcgan import plan
from fedgan_lightning.gan.networks.mlp import Conditioning, DiscriminatorHead
from fedgan_lightning.gan.networks.spectral import spectral_norm
from fedgan_lightning.options import checked


class ConditionalBatchNorm2d(nn.Module):
    """BatchNorm whose scale and shift (C, channels) depend on the class; without classes it is ``nn.BatchNorm2d``.

    A client changes the rows of the classes it holds only. Source: Dumoulin et al. 2017, section 2.2.

    Args:
        channels: Feature maps.
        num_classes: Classes C; 0 for one scale and shift.
    """

    def __init__(self, channels: int, *, num_classes: int = 0) -> None:
        super().__init__()
        self.normalise = nn.BatchNorm2d(channels, affine=num_classes == 0)
        self.scale = nn.Embedding(num_classes, channels) if num_classes else None
        self.shift = nn.Embedding(num_classes, channels) if num_classes else None
        if self.scale is not None and self.shift is not None:
            nn.init.normal_(self.scale.weight, 1.0, 0.02)  # as BigGAN does (Brock et al. 2019)
            nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Normalise feature maps (N, channels, h, w) over the batch, then scale and shift them by class (N,)."""
        normalised: Tensor = self.normalise(x)
        if self.scale is None or self.shift is None:
            return normalised
        if y is None:
            raise ValueError("conditional BatchNorm must have labels; got None. Pass y of shape (N,).")
        scaled: Tensor = self.scale(y)[:, :, None, None] * normalised + self.shift(y)[:, :, None, None]
        return scaled


class _Up(nn.Module):
    """Norm, ReLU, double the side, 3x3; norm, ReLU, 3x3; beside it a doubled 1x1."""

    def __init__(self, fan_in: int, fan_out: int, *, num_classes: int) -> None:
        super().__init__()
        self.first_norm = ConditionalBatchNorm2d(fan_in, num_classes=num_classes)
        self.first = nn.Conv2d(fan_in, fan_out, 3, padding=1)
        self.second_norm = ConditionalBatchNorm2d(fan_out, num_classes=num_classes)
        self.second = nn.Conv2d(fan_out, fan_out, 3, padding=1)
        self.beside = nn.Conv2d(fan_in, fan_out, 1)

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        h = self.first(interpolate(torch.relu(self.first_norm(x, y)), scale_factor=2.0))
        h = self.second(torch.relu(self.second_norm(h, y)))
        doubled: Tensor = h + self.beside(interpolate(x, scale_factor=2.0))
        return doubled


class ResNetGenerator(nn.Module):
    """(z, y) -> image: a linear layer, residual blocks that double the side, BatchNorm, ReLU, 3x3 convolution, tanh.

    Args:
        image_size: Side in pixels: 8, 10, ... 64.
        channels: Colour channels, 1 or 3.
        latent_dim: Dimension of z.
        width: Feature maps of every block, 256 in the paper for 32 pixels.
        num_classes: Classes C; 0 makes it unconditional.
    """

    #: Shapes count here, and not strides.
    channels_last = True
    #: Where its pictures lie.
    output_range = (-1.0, 1.0)

    @checked(
        image_size="[1, inf)", channels="[1, inf)", latent_dim="[1, inf)", width="[1, inf)", num_classes="[0, inf)"
    )
    def __init__(
        self, image_size: int = 32, channels: int = 3, *, latent_dim: int = 128, width: int = 64, num_classes: int = 0
    ) -> None:
        super().__init__()
        self.side, doublings = plan(image_size)
        self.latent_dim, self.num_classes = latent_dim, num_classes
        self.sample_shape = (channels, image_size, image_size)
        self.width = width
        self.start = nn.Linear(latent_dim, width * self.side**2)
        self.blocks = nn.ModuleList(_Up(width, width, num_classes=num_classes) for _ in range(doublings))
        self.norm = nn.BatchNorm2d(width)
        self.end = nn.Conv2d(width, channels, 3, padding=1)
        _initialise(self)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map latents (N, latent_dim) and labels (N,) to images (N, channels, image_size, image_size) in [-1, 1]."""
        if self.num_classes and y is None:
            raise ValueError(
                f"a generator of {self.num_classes} classes must have labels; got None. Pass y of shape (N,)."
            )
        h = self.start(z).view(-1, self.width, self.side, self.side)
        for block in self.blocks:
            h = block(h, y)
        return torch.tanh(self.end(torch.relu(self.norm(h))))


class _Down(nn.Module):
    """ReLU, 3x3, ReLU, 3x3, halve the side; beside it a halved 1x1. The first block does not begin with ReLU."""

    def __init__(self, fan_in: int, fan_out: int, *, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        self.first = spectral_norm(nn.Conv2d(fan_in, fan_out, 3, padding=1))
        self.second = spectral_norm(nn.Conv2d(fan_out, fan_out, 3, padding=1))
        self.beside = spectral_norm(nn.Conv2d(fan_in, fan_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.relu(self.first(x if self.is_first else torch.relu(x))))
        halved: Tensor = avg_pool2d(h, 2) + self.beside(avg_pool2d(x, 2))
        return halved


class ResNetDiscriminator(nn.Module):
    """(image, y) -> logit: residual blocks that halve the side, ReLU, sum over places, head; spectral norm everywhere.

    Args:
        image_size: Side in pixels.
        channels: Colour channels, 1 or 3.
        width: Feature maps of every block, 128 in the paper for 32 pixels.
        num_classes: Classes C; 0 makes it unconditional.
        conditioning: ``none``, ``projection`` (the paper's) or ``auxiliary``.
    """

    #: Shapes count here, and not strides.
    channels_last = True

    @checked(image_size="[1, inf)", channels="[1, inf)", width="[1, inf)", num_classes="[0, inf)")
    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        *,
        width: int = 64,
        num_classes: int = 0,
        conditioning: Conditioning = "none",
    ) -> None:
        super().__init__()
        _, doublings = plan(image_size)
        self.num_classes, self.conditioning = num_classes, conditioning
        self.sample_shape = (channels, image_size, image_size)
        widths = [channels, *[width] * doublings]
        self.blocks = nn.Sequential(
            *(_Down(a, b, is_first=level == 0) for level, (a, b) in enumerate(itertools.pairwise(widths)))
        )
        self.head = DiscriminatorHead(width, num_classes=num_classes, conditioning=conditioning)
        _initialise(self)
        for layer in (self.head.logit, self.head.embedding, self.head.classifier):
            if layer is not None:
                spectral_norm(layer)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Map images (N, channels, image_size, image_size) to logits (N, 1), with ``auxiliary`` also to (N, C)."""
        features = torch.relu(self.blocks(x)).sum((2, 3))
        output: Tensor | tuple[Tensor, Tensor] = self.head(features, y)
        return output


def _initialise(module: nn.Module) -> None:
    """Draw weights as Glorot and Bengio 2010 do, with gain sqrt(2) on the way through a block, 1 beside it."""
    for name, child in module.named_modules():
        if isinstance(child, (nn.Conv2d, nn.Linear)):
            inside = name.rsplit(".", 1)[-1] in ("first", "second")
            nn.init.xavier_uniform_(child.weight, gain=math.sqrt(2) if inside else 1.0)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
