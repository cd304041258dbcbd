"""Gradient penalties on the discriminator, as pure functions, and the classes that name them in a configuration.

All take ``critic``, a function from samples to logits of any shape. Gradients are taken per sample:
||g_i||^2 sums over all dimensions but the first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message

Critic = Callable[[Tensor], Tensor]


def squared_gradient_norm(critic: Critic, samples: Tensor) -> Tensor:
    """Return ||d critic(x_i) / d x_i||^2 as (N,), differentiable in the critic's parameters."""
    samples = samples.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(samples).sum(), samples, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def zero_centred_penalty(critic: Critic, samples: Tensor, *, gamma: float) -> Tensor:
    """gamma/2 E ||grad D(x)||^2: R1 on real, R2 on generated samples. Mescheder et al. 2018, equations 9 and 10."""
    return 0.5 * gamma * squared_gradient_norm(critic, samples).mean()


def interpolated_penalty(critic: Critic, real: Tensor, fake: Tensor, mix: Tensor, *, weight: float) -> Tensor:
    """Weight * E (||grad D(x^)|| - 1)^2 at x^ = m x + (1 - m) G(z), m ~ U[0,1] per sample, shape (N,).

    Gulrajani et al. 2017, equation 3. The small constant keeps the square root's gradient finite at zero.
    """
    mix = mix.view(-1, *([1] * (real.dim() - 1)))
    norms = (squared_gradient_norm(critic, mix * real + (1 - mix) * fake) + 1e-12).sqrt()
    return weight * (norms - 1).square().mean()


class Penalty(ABC):
    """A term added to the discriminator's loss on every ``interval``-th local step, times ``interval``.

    Args:
        interval: Lazy regularisation (Karras et al. 2020, appendix B): 1 applies the term on every step.
    """

    #: Whether the term needs one uniform number per sample.
    needs_mix: ClassVar[bool] = False
    #: Whether the term looks at generated samples, hence at their labels.
    on_fake: ClassVar[bool] = False

    def __init__(self, *, interval: int = 1) -> None:
        if interval < 1:
            raise ConfigurationError(
                message("a penalty's interval is at least 1 step", received=interval, fix="set interval: 1 or more")
            )
        self.interval = interval

    def is_due(self, step: int) -> bool:
        """Whether the term is applied on local step ``step``, counted from 0 over the whole run."""
        return step % self.interval == 0

    @abstractmethod
    def __call__(self, critic: Critic, real: Tensor, fake: Tensor, mix: Tensor | None) -> Tensor:
        """Return the penalty, a scalar, already multiplied by the interval."""


class R1(Penalty):
    """Zero-centred gradient penalty on real samples, gamma/2 E ||grad D(x)||^2.

    Args:
        gamma: Weight, >= 0: .01 for 2-D data, .1 to 1 for small images, 10 for large ones.
        interval: Apply on every ``interval``-th step.
    """

    def __init__(self, gamma: float = 1.0, *, interval: int = 1) -> None:
        super().__init__(interval=interval)
        self.gamma = gamma

    def __call__(self, critic: Critic, real: Tensor, fake: Tensor, mix: Tensor | None) -> Tensor:
        return self.interval * zero_centred_penalty(critic, real, gamma=self.gamma)


class R2(Penalty):
    """The same as :class:`R1`, on generated samples (detached).

    Args:
        gamma: Weight, >= 0.
        interval: Apply on every ``interval``-th step.
    """

    on_fake: ClassVar[bool] = True

    def __init__(self, gamma: float = 1.0, *, interval: int = 1) -> None:
        super().__init__(interval=interval)
        self.gamma = gamma

    def __call__(self, critic: Critic, real: Tensor, fake: Tensor, mix: Tensor | None) -> Tensor:
        return self.interval * zero_centred_penalty(critic, fake, gamma=self.gamma)


class GradientPenalty(Penalty):
    """WGAN-GP's one-centred penalty between real and generated samples.

    Args:
        weight: lambda, 10 in the paper.
        interval: Apply on every ``interval``-th step.
    """

    needs_mix: ClassVar[bool] = True

    def __init__(self, weight: float = 10.0, *, interval: int = 1) -> None:
        super().__init__(interval=interval)
        self.weight = weight

    def __call__(self, critic: Critic, real: Tensor, fake: Tensor, mix: Tensor | None) -> Tensor:
        if mix is None:
            raise ValueError("GradientPenalty needs mix, one uniform number per sample; received None. Fix: draw it.")
        return self.interval * interpolated_penalty(critic, real, fake.detach(), mix, weight=self.weight)
