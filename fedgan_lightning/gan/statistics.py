"""Means of what the steps of an epoch report, summed on the device: nothing is read back in between."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class StepMeans:
    """Sums statistics by name over the steps of an epoch, or of a round."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._num_steps = 0

    def clear(self, **zeros: Tensor) -> None:
        """Begin anew; names given here are reported even if no step reports them."""
        self._sums, self._num_steps = dict(zeros), 0

    def add(self, stats: Mapping[str, Tensor], *, scale: float = 1.0) -> None:
        """Add values of a part of a step, which is ``scale`` of it."""
        for name, value in stats.items():
            # The sum over an epoch of half-precision numbers would stop growing after some hundred steps.
            value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
            term = value if scale == 1.0 else scale * value
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def step(self) -> None:
        """Count a complete step."""
        self._num_steps += 1

    def keep(self, count: int) -> None:
        """Go on with the first ``count`` clients of stacked values."""
        self._sums = {name: value[:count] if value.dim() else value for name, value in self._sums.items()}

    def values(self) -> dict[str, Tensor]:
        """Return the means per step so far."""
        return {name: value / max(self._num_steps, 1) for name, value in self._sums.items()}
