"""Fully connected pairs: the order's MLP for images, and small ones for 2-D data.

Conditional generators see the label as a one-hot vector beside z. Conditional discriminators either add <e_y, phi(x)>
to the logit (projection, Miyato and Koyama 2018) or have a second head of class logits (ACGAN, Odena et al. 2017).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.options import checked

Conditioning = Literal["none", "projection", "auxiliary"]


class MLPGenerator(nn.Module):
    """(z, y) -> x through fully connected layers with ReLU: latent -> 256 -> 512 -> out, tanh.

    Args:
        latent_dim: Dimension of z.
        sample_shape: Shape of one sample, such as [1, 28, 28] or [2].
        hidden: Widths of the hidden layers.
        num_classes: Classes C; 0 makes it unconditional.
        output: ``tanh`` for data in [-1, 1], ``linear`` for unbounded data.
    """

    @checked(latent_dim="[1, inf)", sample_shape="[1, inf)", hidden="[1, inf)", num_classes="[0, inf)")
    def __init__(
        self,
        latent_dim: int = 100,
        sample_shape: Sequence[int] = (1, 28, 28),
        *,
        hidden: Sequence[int] = (256, 512),
        num_classes: int = 0,
        output: Literal["tanh", "linear"] = "tanh",
    ) -> None:
        super().__init__()
        self.latent_dim, self.sample_shape, self.num_classes = latent_dim, tuple(sample_shape), num_classes
        widths = [latent_dim + num_classes, *hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        layers.append(nn.Linear(widths[-1], math.prod(self.sample_shape)))
        if output == "tanh":
            layers.append(nn.Tanh())
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map latents (N, latent_dim) and labels (N,) to samples (N, *sample_shape)."""
        samples: Tensor = self.layers(join_label(z, y, self.num_classes))
        return samples.view(-1, *self.sample_shape)


class MLPDiscriminator(nn.Module):
    """(x, y) -> logit through fully connected layers with leaky ReLU: in -> 512 -> 256 -> 1.

    Args:
        sample_shape: Shape of one sample.
        hidden: Widths of the hidden layers.
        num_classes: Classes C; 0 makes it unconditional.
        conditioning: ``none``, ``projection`` or ``auxiliary`` (ACGAN).
        slope: Of leaky ReLU below zero, in [0, 1); 0 is ReLU.

    Raises:
        ConfigurationError: If the slope is out of range.
    """

    #: Nothing passes between samples.
    per_sample = True

    @checked(sample_shape="[1, inf)", hidden="[1, inf)", num_classes="[0, inf)", slope="[0, 1)")
    def __init__(
        self,
        sample_shape: Sequence[int] = (1, 28, 28),
        *,
        hidden: Sequence[int] = (512, 256),
        num_classes: int = 0,
        conditioning: Conditioning = "none",
        slope: float = 0.2,
    ) -> None:
        super().__init__()
        self.sample_shape, self.num_classes, self.conditioning = tuple(sample_shape), num_classes, conditioning
        widths = [math.prod(self.sample_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.LeakyReLU(slope)]
        self.features = nn.Sequential(*layers)
        self.head = DiscriminatorHead(widths[-1], num_classes=num_classes, conditioning=conditioning)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Map samples (N, *sample_shape) to logits (N, 1); with ``auxiliary`` also to class logits (N, C)."""
        output: Tensor | tuple[Tensor, Tensor] = self.head(self.features(x), y)
        return output


class DiscriminatorHead(nn.Module):
    """Features phi (N, width) -> logit (N, 1), conditional or not; shared by all discriminators.

    Args:
        width: Number of features.
        num_classes: Classes C.
        conditioning: ``none``, ``projection`` or ``auxiliary``.

    Raises:
        ConfigurationError: If a conditional head has no classes, or classes have no conditional head.
    """

    @checked(width="[1, inf)", num_classes="[0, inf)")
    def __init__(self, width: int, *, num_classes: int, conditioning: Conditioning) -> None:
        super().__init__()
        if (num_classes > 0) != (conditioning != "none"):
            raise ConfigurationError(
                message(
                    "a conditional discriminator must have both classes and a kind of conditioning",
                    received=f"num_classes={num_classes}, conditioning={conditioning}",
                    fix="set num_classes > 0 with conditioning projection or auxiliary, or num_classes 0 with none",
                )
            )
        self.logit = nn.Linear(width, 1)
        self.embedding = nn.Embedding(num_classes, width) if conditioning == "projection" else None
        self.classifier = nn.Linear(width, num_classes) if conditioning == "auxiliary" else None

    def forward(self, features: Tensor, y: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        logit: Tensor = self.logit(features)
        if self.embedding is not None:
            logit = logit + (self.embedding(y) * features).sum(1, keepdim=True)
        return logit if self.classifier is None else (logit, self.classifier(features))


def join_label(z: Tensor, y: Tensor | None, num_classes: int) -> Tensor:
    """Return z (N, d), or (z, one-hot y) of shape (N, d + C) where there are classes."""
    if num_classes == 0:
        return z
    if y is None:
        raise ValueError(f"a generator of {num_classes} classes must have labels; got None. Pass y of shape (N,).")
    return torch.cat([z, one_hot(y, num_classes).to(z.dtype)], dim=1)
