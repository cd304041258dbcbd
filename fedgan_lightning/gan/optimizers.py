"""What makes the optimizers of a GAN, and the default."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

OptimizerCallable = Callable[[Iterable], Optimizer]
SchedulerCallable = Callable[[Optimizer], LRScheduler]


def dcgan_adam(parameters: Iterable[Any]) -> Optimizer:
    """Adam, learning rate 2e-4, betas (.5, .999): DCGAN's (Radford et al. 2016, section 4)."""
    return torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999))
