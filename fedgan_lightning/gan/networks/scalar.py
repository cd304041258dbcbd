"""FedGAN's 2-D system: G(z) = theta z and D(x) = psi x^2, one parameter each (Rasouli et al. 2020, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedgan_lightning.options import checked


class ScaleGenerator(nn.Module):
    """G(z) = theta z.

    Args:
        theta: Start value.
    """

    @checked()
    def __init__(self, theta: float = 0.3) -> None:
        super().__init__()
        self.latent_dim, self.sample_shape, self.num_classes = 1, (1,), 0
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map latents (N, 1) to samples (N, 1)."""
        return self.theta * z


class QuadraticDiscriminator(nn.Module):
    """D(x) = psi x^2, a logit.

    Args:
        psi: Start value.
    """

    @checked()
    def __init__(self, psi: float = 1.0) -> None:
        super().__init__()
        self.sample_shape, self.num_classes, self.conditioning = (1,), 0, "none"
        self.psi = nn.Parameter(torch.tensor(psi, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Map samples (N, 1) to logits (N, 1)."""
        return self.psi * x.square()
