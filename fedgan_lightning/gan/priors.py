"""Latent priors p(z): what the generator's noise is drawn from."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Prior(ABC):
    """A distribution over latent vectors."""

    @abstractmethod
    def sample(
        self,
        num_samples: int,
        latent_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return (num_samples, latent_dim) latents; ``generator=None`` draws from the global generator."""


class Normal(Prior):
    """z ~ N(0, I)."""

    def sample(
        self,
        num_samples: int,
        latent_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return torch.randn(
            num_samples, latent_dim, generator=generator, dtype=dtype, device=_where(generator, device)
        ).to(device)


class Uniform(Prior):
    """z ~ U[-1, 1], independently in every dimension."""

    def sample(
        self,
        num_samples: int,
        latent_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        noise = torch.rand(num_samples, latent_dim, generator=generator, dtype=dtype, device=_where(generator, device))
        return (2 * noise - 1).to(device)


class MidpointNodes(Prior):
    """The quadrature nodes of U[-1, 1] under the midpoint rule: expectations over z become exact, without noise.

    Always returns all nodes, in order, whatever number is asked for in training. For one-dimensional latents.

    Args:
        num_nodes: Cells of [-1, 1]; node k is -1 + (2k + 1) / num_nodes.
    """

    def __init__(self, num_nodes: int = 200) -> None:
        self.num_nodes = num_nodes

    def sample(
        self,
        num_samples: int,
        latent_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        nodes = -1 + (2 * torch.arange(self.num_nodes, dtype=torch.float64) + 1) / self.num_nodes
        return nodes.to(device=device, dtype=dtype).unsqueeze(1).expand(-1, latent_dim)


def _where(generator: torch.Generator | None, device: torch.device) -> torch.device:
    """Where to draw: a generator's own device, so that a CPU seed gives the same picture on every machine."""
    return device if generator is None else generator.device
