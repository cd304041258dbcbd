"""FedGAN's conditional pair for time series: one-dimensional convolutions over noise, or a series, and the labels.

Source: Rasouli et al. 2020, table of networks: an input of (labels + 1) x 24, a block of two convolutions of width 5
with 64 channels and a ReLU, eight times; then a convolution of width 1 to one channel (generator), or a linear layer
(discriminator). There is no normalisation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.options import checked


class ProfileGenerator(nn.Module):
    """(z, y) -> series (N, channels, length); z is noise of the series' length, a channel of the input.

    Args:
        length: Points of a series, 24 hours in the paper.
        channels: Series that belong together.
        width: Channels of the convolutions.
        blocks: Blocks of two convolutions.
        num_classes: Classes C; each is a channel of the input. 0 makes it unconditional.
        output: ``tanh`` for data in [-1, 1], ``linear`` for unbounded data.
    """

    @checked(length="[1, inf)", channels="[1, inf)", width="[1, inf)", blocks="[1, inf)", num_classes="[0, inf)")
    def __init__(
        self,
        length: int = 24,
        channels: int = 1,
        *,
        width: int = 64,
        blocks: int = 8,
        num_classes: int = 0,
        output: Literal["tanh", "linear"] = "linear",
    ) -> None:
        super().__init__()
        self.latent_dim, self.sample_shape, self.num_classes = length, (channels, length), num_classes
        self.trunk = _trunk(1 + num_classes, width=width, blocks=blocks)
        self.head = nn.Conv1d(width, channels, 1)
        self.output = nn.Tanh() if output == "tanh" else nn.Identity()

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map latents (N, length) and labels (N,) to series (N, channels, length)."""
        series: Tensor = self.output(self.head(self.trunk(_join(z.unsqueeze(1), y, self.num_classes))))
        return series


class ProfileDiscriminator(nn.Module):
    """(x, y) -> logit (N, 1).

    Args:
        length: Points of a series.
        channels: Series that belong together.
        width: Channels of the convolutions.
        blocks: Blocks of two convolutions.
        num_classes: Classes C; each is a channel of the input.
    """

    #: Nothing passes between samples.
    per_sample = True

    @checked(length="[1, inf)", channels="[1, inf)", width="[1, inf)", blocks="[1, inf)", num_classes="[0, inf)")
    def __init__(
        self, length: int = 24, channels: int = 1, *, width: int = 64, blocks: int = 8, num_classes: int = 0
    ) -> None:
        super().__init__()
        self.sample_shape, self.num_classes = (channels, length), num_classes
        self.conditioning = "channels" if num_classes else "none"
        self.trunk = _trunk(channels + num_classes, width=width, blocks=blocks)
        self.head = nn.Linear(width * length, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Map series (N, channels, length) and labels (N,) to logits (N, 1)."""
        logits: Tensor = self.head(self.trunk(_join(x, y, self.num_classes)).flatten(1))
        return logits


def _trunk(channels: int, *, width: int, blocks: int) -> nn.Sequential:
    if min(width, blocks) < 1:
        raise ConfigurationError(
            message("width and blocks must be at least 1", received=f"{width} and {blocks}", fix="raise them")
        )
    layers: list[nn.Module] = []
    for index in range(blocks):
        layers += [nn.Conv1d(channels if index == 0 else width, width, 5, padding=2)]
        layers += [nn.Conv1d(width, width, 5, padding=2), nn.ReLU()]
    return nn.Sequential(*layers)


def _join(x: Tensor, y: Tensor | None, num_classes: int) -> Tensor:
    """Return x (N, c, length), or (x, a channel of ones for the label) where there are classes."""
    if num_classes == 0:
        return x
    if y is None:
        raise ValueError(f"a network of {num_classes} classes must have labels; got None. Pass y of shape (N,).")
    labels = one_hot(y, num_classes).to(x.dtype).unsqueeze(2)
    return torch.cat([x, labels.expand(-1, -1, x.shape[2])], dim=1)
