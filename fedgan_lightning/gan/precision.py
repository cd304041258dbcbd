"""Modules whose state loses its meaning where it is rounded."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class FullPrecision(nn.Module):
    """Keeps the precision of its tensors when a model around it is turned to a narrower type, as ``bf16-true`` does.

    A sum that many small terms are added to stops growing in bfloat16 once it is 256 times as large as a term; a moving
    average stops moving.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FullPrecision:
        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= tensor.dtype.itemsize else tensor.to(moved.device)

        super()._apply(apply, recurse)
        return self
