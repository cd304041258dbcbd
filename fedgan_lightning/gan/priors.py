"""Latent priors p(z): what the generator's noise is drawn from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.options import checked


class Prior(ABC):
    """A distribution over latent vectors."""

    def sample(
        self,
        num_samples: int,
        latent_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return (num_samples, latent_dim) latents; ``generator=None`` draws from the device's global generator.

        A CPU generator draws on the CPU, so that one seed gives the same picture on every machine.
        """
        where = device if generator is None else generator.device
        return self.draw(num_samples, latent_dim, dtype=dtype, device=where, generator=generator).to(device)

    @abstractmethod
    def draw(self, num_samples: int, latent_dim: int, **where: Any) -> Tensor:
        """Return the latents; ``where`` holds dtype, device and generator as torch's functions take them."""

    def draw_ahead(self, times: int, num_samples: int, latent_dim: int, **where: Any) -> Tensor:
        """Return what ``times`` calls of :meth:`draw` would, stacked."""
        return torch.stack([self.draw(num_samples, latent_dim, **where) for _ in range(times)])

    def between(self, first: Tensor, second: Tensor, fractions: Tensor) -> Tensor:
        """Return latents (F, N, d) on the way from ``first`` to ``second``, (N, d) each: a straight line.

        Args:
            first: Where fraction 0 lies.
            second: Where fraction 1 lies.
            fractions: (F,) in [0, 1].
        """
        t = fractions.view(-1, 1, 1)
        return (1 - t) * first + t * second


class Normal(Prior):
    """z ~ N(0, I)."""

    def between(self, first: Tensor, second: Tensor, fractions: Tensor) -> Tensor:
        """Return latents (F, N, d) on the great circle, which keeps the length that normal vectors have (White 2016,
        equation 1).
        """
        t = fractions.view(-1, 1, 1)
        cosine = torch.nn.functional.cosine_similarity(first, second, dim=-1).clamp(-1, 1)
        angle = cosine.acos().unsqueeze(-1)
        sine = angle.sin()
        arc = (torch.sin((1 - t) * angle) * first + torch.sin(t * angle) * second) / sine.clamp_min(1e-7)
        return torch.where(sine > 1e-4, arc, (1 - t) * first + t * second)

    def draw(self, num_samples: int, latent_dim: int, **where: Any) -> Tensor:
        return torch.randn(num_samples, latent_dim, **where)

    def draw_ahead(self, times: int, num_samples: int, latent_dim: int, **where: Any) -> Tensor:
        # On the CPU torch turns uniform numbers into normal ones sixteen at a time, whatever the shape.
        on_cpu = torch.device(where["device"]).type == "cpu" and where["dtype"] in (torch.float32, torch.float64)
        if on_cpu and num_samples * latent_dim % 16 == 0:
            return torch.randn(times, num_samples, latent_dim, **where)
        return super().draw_ahead(times, num_samples, latent_dim, **where)


class Uniform(Prior):
    """z ~ U[-1, 1], independently in every dimension."""

    def draw(self, num_samples: int, latent_dim: int, **where: Any) -> Tensor:
        return 2 * torch.rand(num_samples, latent_dim, **where) - 1


class Gumbel(Prior):
    """z ~ Gumbel(0, 1), independently: z = -log(-log U); argmax(logits + z) is a sample of softmax(logits).

    Source: Gumbel 1954; Maddison et al. 2014, section 2.
    """

    def draw(self, num_samples: int, latent_dim: int, **where: Any) -> Tensor:
        uniform = torch.rand(num_samples, latent_dim, **where)  # from 0 up to just below 1
        tiny = torch.finfo(uniform.dtype).tiny
        return uniform.clamp_min_(tiny).log_().neg_().log_().neg_()


class MidpointNodes(Prior):
    """The quadrature nodes of U[-1, 1] under the midpoint rule: expectations over z become exact, without noise.

    Always returns all nodes, in order, whatever number is asked for. For one-dimensional latents.

    Args:
        num_nodes: Cells of [-1, 1]; node k is -1 + (2k + 1) / num_nodes.
    """

    @checked(num_nodes="[1, inf)")
    def __init__(self, num_nodes: int = 200) -> None:
        self.num_nodes = num_nodes

    def draw(self, num_samples: int, latent_dim: int, **where: Any) -> Tensor:
        nodes = -1 + (2 * torch.arange(self.num_nodes, dtype=torch.float64) + 1) / self.num_nodes
        return nodes.to(device=where["device"], dtype=where["dtype"]).unsqueeze(1).expand(-1, latent_dim)
