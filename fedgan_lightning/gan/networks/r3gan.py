"""Residual pair without normalisation layers, after R3GAN (Huang et al. 2024), 8 to 64 pixels.

There is nothing in it that averaging over clients could get wrong: no running statistics, no power iteration. Stability
comes from the loss, ``RelativisticPairing`` with ``R1`` and ``R2``; goes with Adam of beta1 = 0. The variance of every
block is kept by its initial weights: the last convolution of a block begins at zero, the others are scaled by
L^(-1/4) for L blocks in all (Zhang et al. 2019, Fixup, section 3).
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from fedgan_lightning.gan.networks.dcgan import plan
from fedgan_lightning.gan.networks.mlp import Conditioning, DiscriminatorHead, join_label
from fedgan_lightning.options import checked

SLOPE = 0.2


class _Block(nn.Module):
    """x + bottleneck(x): 1x1 to twice the width, grouped 3x3, 1x1 back, biased leaky ReLU between them."""

    def __init__(self, width: int, *, group_size: int, num_blocks: int) -> None:
        super().__init__()
        inner = 2 * width
        self.layers = nn.Sequential(
            nn.Conv2d(width, inner, 1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner // math.gcd(inner, group_size)),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(inner, width, 1, bias=False),
        )
        scale = num_blocks**-0.25
        for index, gain in ((0, scale), (2, scale), (4, 0.0)):
            convolution = self.layers[index]
            assert isinstance(convolution, nn.Conv2d)
            _scaled(convolution, gain)

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = x + self.layers(x)
        return grown


class R3GANGenerator(nn.Module):
    """(z, y) -> image: a linear layer, per resolution a few residual blocks, bilinear doubling, 1x1 convolution.

    Args:
        image_size: Side in pixels: 8, 10, ... 64.
        channels: Colour channels, 1 or 3.
        latent_dim: Dimension of z, 64 in the paper.
        width: Feature maps at every resolution.
        blocks: Residual blocks per resolution, 2 in the paper.
        group_size: Channels a group of the 3x3 convolutions, 16 in the paper; fewer where it does not divide them.
        num_classes: Classes C; 0 makes it unconditional. The label stands beside z as a one-hot vector.
    """

    #: Shapes count here, and not strides.
    channels_last = True

    @checked(
        image_size="[1, inf)",
        channels="[1, inf)",
        latent_dim="[1, inf)",
        width="[1, inf)",
        blocks="[1, inf)",
        group_size="[1, inf)",
        num_classes="[0, inf)",
    )
    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        *,
        latent_dim: int = 64,
        width: int = 64,
        blocks: int = 2,
        group_size: int = 16,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        side, doublings = plan(image_size)
        self.latent_dim, self.num_classes = latent_dim, num_classes
        self.sample_shape = (channels, image_size, image_size)
        count = blocks * (doublings + 1)
        start = nn.Linear(latent_dim + num_classes, width * side * side)
        _scaled(start, 1.0)
        layers: list[nn.Module] = [start, nn.Unflatten(1, (width, side, side))]
        for level in range(doublings + 1):
            if level:
                layers.append(nn.Upsample(scale_factor=2.0, mode="bilinear"))
            layers += [_Block(width, group_size=group_size, num_blocks=count) for _ in range(blocks)]
        end = nn.Conv2d(width, channels, 1)
        _scaled(end, 1.0)
        self.layers = nn.Sequential(*layers, end, nn.Tanh())

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map latents (N, latent_dim) and labels (N,) to images (N, channels, image_size, image_size) in [-1, 1]."""
        images: Tensor = self.layers(join_label(z, y, self.num_classes))
        return images


class R3GANDiscriminator(nn.Module):
    """(image, y) -> logit: 1x1 convolution, per resolution a few residual blocks, averaging to half the side, head.

    Args:
        image_size: Side in pixels.
        channels: Colour channels, 1 or 3.
        width: Feature maps at every resolution.
        blocks: Residual blocks per resolution.
        group_size: Channels a group of the 3x3 convolutions.
        num_classes: Classes C; 0 makes it unconditional.
        conditioning: ``none``, ``projection`` or ``auxiliary``.
    """

    #: Shapes count here, and not strides.
    channels_last = True

    #: Nothing passes between samples.
    per_sample = True

    @checked(
        image_size="[1, inf)",
        channels="[1, inf)",
        width="[1, inf)",
        blocks="[1, inf)",
        group_size="[1, inf)",
        num_classes="[0, inf)",
    )
    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        *,
        width: int = 64,
        blocks: int = 2,
        group_size: int = 16,
        num_classes: int = 0,
        conditioning: Conditioning = "none",
    ) -> None:
        super().__init__()
        side, doublings = plan(image_size)
        self.num_classes, self.conditioning = num_classes, conditioning
        self.sample_shape = (channels, image_size, image_size)
        count = blocks * (doublings + 1)
        start = nn.Conv2d(channels, width, 1)
        _scaled(start, 1.0)
        layers: list[nn.Module] = [start]
        for level in range(doublings + 1):
            if level:
                layers.append(nn.AvgPool2d(2))
            layers += [_Block(width, group_size=group_size, num_blocks=count) for _ in range(blocks)]
        gather = nn.Conv2d(width, width, side, groups=width)  # one weight per place and map, as a last basis
        _scaled(gather, 1.0)
        self.layers = nn.Sequential(*layers, gather, nn.Flatten())
        self.head = DiscriminatorHead(width, num_classes=num_classes, conditioning=conditioning)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Map images (N, channels, image_size, image_size) to logits (N, 1), with ``auxiliary`` also to (N, C)."""
        features = leaky_relu(self.layers(x), SLOPE)
        output: Tensor | tuple[Tensor, Tensor] = self.head(features, y)
        return output


def _scaled(layer: nn.Conv2d | nn.Linear, gain: float) -> None:
    """Draw weights that keep the variance of their input up to ``gain``; zero biases."""
    fan_in = layer.weight[0].numel()
    nn.init.normal_(layer.weight, 0.0, gain / fan_in**0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
