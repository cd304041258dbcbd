"""DCGAN (Radford et al. 2016) for square images of 8 to 64 pixels, with 1 or 3 channels."""

from __future__ import annotations

import itertools
import math
from typing import Literal

from torch import Tensor, nn

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.gan.networks.mlp import Conditioning, DiscriminatorHead, join_label
from fedgan_lightning.gan.networks.spectral import spectral_norm
from fedgan_lightning.options import checked

GeneratorNorm = Literal["batch", "group", "none"]
DiscriminatorNorm = Literal["batch", "group", "spectral", "none"]


def plan(image_size: int) -> tuple[int, int]:
    """Return (side of the coarsest map, number of doublings): 28 -> (7, 2), 64 -> (4, 4).

    Raises:
        ConfigurationError: If the size is outside 8..64, or not a small side doubled.
    """
    side, doublings = image_size, 0
    while side % 2 == 0 and side >= 8:
        side, doublings = side // 2, doublings + 1
    if not (8 <= image_size <= 64 and doublings > 0 and side < 8):
        raise ConfigurationError(
            message(
                "DCGAN must have square images of 8 to 64 pixels whose side is 4, 5, 6 or 7 doubled a few times",
                received=f"image_size={image_size}",
                fix="resize the source's images, to 28, 32, 48 or 64 pixels say",
            )
        )
    return side, doublings


class DCGANGenerator(nn.Module):
    """(z, y) -> image by a linear layer and 4x4 transposed convolutions of stride 2, tanh at the end.

    Args:
        image_size: Side in pixels: 8, 10, ... 64.
        channels: Colour channels, 1 or 3.
        latent_dim: Dimension of z.
        width: Channels before the last layer; doubled at every halving of resolution.
        num_classes: Classes C; 0 makes it unconditional.
        norm: ``batch``, ``group`` (8 channels a group, fewer where 8 does not divide the width; nothing to average) or
            ``none``.
    """

    #: Shapes count here, and not strides.
    channels_last = True

    @checked(
        image_size="[1, inf)", channels="[1, inf)", latent_dim="[1, inf)", width="[1, inf)", num_classes="[0, inf)"
    )
    def __init__(
        self,
        image_size: int = 28,
        channels: int = 1,
        *,
        latent_dim: int = 64,
        width: int = 32,
        num_classes: int = 0,
        norm: GeneratorNorm = "batch",
    ) -> None:
        super().__init__()
        side, doublings = plan(image_size)
        self.latent_dim, self.num_classes = latent_dim, num_classes
        self.sample_shape = (channels, image_size, image_size)
        widths = [width * 2**level for level in reversed(range(doublings))]
        layers: list[nn.Module] = [
            nn.Linear(latent_dim + num_classes, widths[0] * side * side),
            nn.Unflatten(1, (widths[0], side, side)),
            normalisation(norm, widths[0]),
            nn.ReLU(),
        ]
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.ConvTranspose2d(fan_in, fan_out, 4, 2, 1), normalisation(norm, fan_out), nn.ReLU()]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        initialise(self)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map latents (N, latent_dim) and labels (N,) to images (N, channels, image_size, image_size) in [-1, 1]."""
        images: Tensor = self.layers(join_label(z, y, self.num_classes))
        return images


class DCGANDiscriminator(nn.Module):
    """(image, y) -> logit by 4x4 convolutions of stride 2 with leaky ReLU (slope .2).

    Args:
        image_size: Side in pixels.
        channels: Colour channels, 1 or 3.
        width: Channels after the first layer; doubled at every halving of resolution.
        num_classes: Classes C; 0 makes it unconditional.
        conditioning: ``none``, ``projection`` or ``auxiliary`` (ACGAN).
        norm: ``none`` (nothing to average; goes with R1), ``spectral``, ``group``, or ``batch`` as in the paper.
    """

    #: Shapes count here, and not strides.
    channels_last = True

    #: Nothing passes between samples, but in BatchNorm where there is any.
    per_sample = True

    @checked(image_size="[1, inf)", channels="[1, inf)", width="[1, inf)", num_classes="[0, inf)")
    def __init__(
        self,
        image_size: int = 28,
        channels: int = 1,
        *,
        width: int = 32,
        num_classes: int = 0,
        conditioning: Conditioning = "none",
        norm: DiscriminatorNorm = "none",
    ) -> None:
        super().__init__()
        side, doublings = plan(image_size)
        self.num_classes, self.conditioning = num_classes, conditioning
        self.sample_shape = (channels, image_size, image_size)
        widths = [channels, *(width * 2**level for level in range(doublings))]
        layers: list[nn.Module] = []
        for level, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            convolution: nn.Module = nn.Conv2d(fan_in, fan_out, 4, 2, 1)
            if norm == "spectral":
                convolution = spectral_norm(convolution)
            layers.append(convolution)
            if level > 0 and norm in ("batch", "group"):  # never on the input layer (Radford et al. 2016, section 3)
                layers.append(normalisation(norm, fan_out))
            layers.append(nn.LeakyReLU(0.2))
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = DiscriminatorHead(widths[-1] * side * side, num_classes=num_classes, conditioning=conditioning)
        initialise(self)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Map images (N, channels, image_size, image_size) to logits (N, 1), with ``auxiliary`` also to (N, C)."""
        output: Tensor | tuple[Tensor, Tensor] = self.head(self.features(x), y)
        return output


def normalisation(norm: str, channels: int) -> nn.Module:
    """Return the normalisation layer for ``channels`` feature maps."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(channels // math.gcd(channels, 8), channels)
    return nn.Identity()


def initialise(module: nn.Module) -> None:
    """Draw convolution weights from N(0, .02^2) and BatchNorm scales from N(1, .02^2) (Radford et al. 2016, section
    4).
    """
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(child.weight, 0.0, 0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.BatchNorm2d):
            nn.init.normal_(child.weight, 1.0, 0.02)
