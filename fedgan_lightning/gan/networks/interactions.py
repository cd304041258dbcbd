"""CFGAN's pair: fully connected networks over a user's vector of items.

Conditions are (N, 3, I): purchases r, mask k_PM of items that the discriminator sees beside them, mask k_ZR of the
generator's loss. Source: Chae et al. 2018 (CIKM), sections 4.2 and 4.3.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedgan_lightning.options import checked


class CFGANGenerator(nn.Module):
    """(z, c) -> rhat in (0, 1)^I: how much a user wants every item, from her purchases.

    Args:
        items: I.
        hidden: Widths of the hidden layers, with the logistic function after each.
        latent_dim: Dimension of z. With the paper's 0 there is one answer per user, the most plausible one.
    """

    @checked(items="[1, inf)", hidden="[1, inf)", latent_dim="[0, inf)")
    def __init__(self, items: int, *, hidden: Sequence[int] = (300,), latent_dim: int = 0) -> None:
        super().__init__()
        self.latent_dim, self.sample_shape, self.num_classes = latent_dim, (items,), 0
        self.layers = _layers(items + latent_dim, hidden, items)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """Map latents (N, latent_dim) and conditions (N, 3, I) to vectors (N, I)."""
        purchases = c.select(-2, 0)
        wanted: Tensor = self.layers(torch.cat([purchases, z], dim=-1) if self.latent_dim else purchases).sigmoid()
        return wanted


class CFGANDiscriminator(nn.Module):
    """(x, c) -> logit (N, 1), from (x * (r + k_PM), r): only items that were bought, or are drawn as not bought, count.

    Args:
        items: I.
        hidden: Widths of the hidden layers, with the logistic function after each.
    """

    #: Nothing passes between samples.
    per_sample = True

    @checked(items="[1, inf)", hidden="[1, inf)")
    def __init__(self, items: int, *, hidden: Sequence[int] = (125,)) -> None:
        super().__init__()
        self.sample_shape, self.num_classes = (items,), 0
        self.layers = _layers(2 * items, hidden, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map vectors (N, I) and conditions (N, 3, I) to logits (N, 1)."""
        purchases, masked = c.select(-2, 0), c.select(-2, 1)
        logits: Tensor = self.layers(torch.cat([x * (purchases + masked), purchases], dim=-1))
        return logits


def _layers(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    widths = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])
