"""Samples of a generator in pieces that fit memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def generated(network: nn.Module, latents: Tensor, labels: Tensor, *, chunk_size: int) -> Tensor:
    """Return G(z, y) in evaluation mode; the mode is restored.

    Args:
        network: The generator.
        latents: (N, latent_dim).
        labels: (N,).
        chunk_size: Samples per forward pass.
    """
    mode = network.training
    network.eval()
    try:
        return torch.cat([network(z, y) for z, y in zip(latents.split(chunk_size), labels.split(chunk_size))])
    finally:
        network.train(mode)
