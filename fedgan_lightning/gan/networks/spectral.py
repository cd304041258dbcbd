"""Spectral normalisation that can be mapped over clients.

torch's own fails under ``torch.vmap`` in training mode: it writes its power iteration into its vectors with ``out=``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize


class SpectralNorm(nn.Module):
    """A parametrization W -> W / sigma(W), sigma estimated by one power iteration per training-mode forward.

    W is taken as a matrix (out channels, everything else). The vectors u (rows,) and v (columns,) are buffers.
    Source: Miyato et al. 2018, algorithm 1.

    Args:
        weight: The weight to normalise.
        eps: Smallest norm that is divided by.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, *, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = eps
        rows, columns = weight.flatten(1).shape
        self.register_buffer("_u", normalize(weight.new_empty(rows).normal_(), dim=0, eps=eps))
        self.register_buffer("_v", normalize(weight.new_empty(columns).normal_(), dim=0, eps=eps))
        self._iterate(weight.detach().flatten(1), iterations=15)

    def _iterate(self, matrix: Tensor, *, iterations: int) -> None:
        for _ in range(iterations):
            self._u.copy_(normalize(torch.mv(matrix, self._v), dim=0, eps=self.eps))
            self._v.copy_(normalize(torch.mv(matrix.t(), self._u), dim=0, eps=self.eps))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight divided by its largest singular value, estimated."""
        matrix = weight.flatten(1)
        if self.training:
            with torch.no_grad():
                self._iterate(matrix, iterations=1)
        sigma = torch.dot(self._u.clone(), torch.mv(matrix, self._v.clone()))
        return weight / sigma


def spectral_norm(layer: nn.Module, *, name: str = "weight") -> nn.Module:
    """Normalise the weight of ``layer``; return the layer."""
    parametrize.register_parametrization(layer, name, SpectralNorm(getattr(layer, name)))
    return layer
