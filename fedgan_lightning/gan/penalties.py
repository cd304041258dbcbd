"""Gradient penalties on the discriminator, as pure functions, and the classes that name them in a configuration.

All take ``critic``, a function from samples to logits of any shape. Gradients are taken per sample:
||g_i||^2 sums over all dimensions but the first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedgan_lightning.options import checked

Critic = Callable[[Tensor], Tensor]
#: Turns a function for one client into one for those that are trained together: the identity, or ``torch.vmap``.
VmapOverClients = Callable[[Callable[..., Any]], Callable[..., Any]]


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as it is: a client on its own needs no mapping."""
    return function


def input_gradient(critic: Critic, samples: Tensor) -> Tensor:
    """Return d critic(x_i) / d x_i in the shape of ``samples``, differentiable in the critic's parameters."""
    samples = samples.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(samples).sum(), samples, create_graph=True)
    return gradient


def squared_norms(gradient: Tensor) -> Tensor:
    """Return ||g_i||^2 as (N,)."""
    return gradient.square().flatten(1).sum(1)


def zero_centred(norms: Tensor, *, gamma: float) -> Tensor:
    """gamma/2 E ||grad D(x)||^2 from squared norms: R1 on real, R2 on generated samples.

    Mescheder et al. 2018, equations 9 and 10.
    """
    return 0.5 * gamma * norms.mean()


def one_centred(norms: Tensor, *, weight: float) -> Tensor:
    """Weight * E (||grad D(x^)|| - 1)^2 from squared norms at x^ = m x + (1 - m) G(z), m ~ U[0,1].

    Gulrajani et al. 2017, equation 3. The small constant keeps the square root's gradient finite at zero.
    """
    return weight * ((norms + 1e-12).sqrt() - 1).square().mean()


def interpolate(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """Return m x + (1 - m) G(z) with one m per sample, (N,)."""
    mix = mix.view(-1, *([1] * (real.dim() - 1)))
    return mix * real + (1 - mix) * fake


class Penalty(ABC):
    """A term added to the discriminator's loss on every ``interval``-th local step, times ``interval``.

    Args:
        interval: Lazy regularisation (Karras et al. 2020, appendix B): 1 applies the term on every step.
    """

    #: Whether the term needs one uniform number per sample.
    needs_mix: ClassVar[bool] = False
    #: Whether the term looks at generated samples, hence at their labels.
    on_fake: ClassVar[bool] = False

    @checked(interval="[1, inf)")
    def __init__(self, *, interval: int = 1) -> None:
        self.interval = interval

    def is_due(self, step: int) -> bool:
        """Whether the term is applied on local step ``step``, counted from 0 over the whole run."""
        return step % self.interval == 0

    @abstractmethod
    def points(self, real: Tensor, fake: Tensor, mix: Tensor | None = None) -> Tensor:
        """Return the samples (N, ...) at which the critic's gradient is penalised."""

    @abstractmethod
    def value(self, norms: Tensor) -> Tensor:
        """Return the penalty, a scalar, from squared gradient norms (N,), without the interval's factor."""

    def __call__(
        self,
        critic: Critic,
        real: Tensor,
        fake: Tensor,
        mix: Tensor | None,
        *,
        vmap_over_clients: VmapOverClients = once,
    ) -> Tensor:
        """Return the penalty times the interval: a scalar, or one per client where ``vmap_over_clients`` maps."""
        inputs = (real, fake) if mix is None else (real, fake, mix)
        points = vmap_over_clients(self.points)(*inputs)
        norms = vmap_over_clients(squared_norms)(input_gradient(critic, points))
        value: Tensor = self.interval * vmap_over_clients(self.value)(norms)
        return value


class R1(Penalty):
    """Zero-centred gradient penalty on real samples, gamma/2 E ||grad D(x)||^2.

    Args:
        gamma: Weight, >= 0: .01 for 2-D data, .1 to 1 for small images, 10 for large ones.
        interval: Apply on every ``interval``-th step.
    """

    @checked(gamma="[0, inf)", interval="[1, inf)")
    def __init__(self, gamma: float = 1.0, *, interval: int = 1) -> None:
        super().__init__(interval=interval)
        self.gamma = gamma

    def points(self, real: Tensor, fake: Tensor, mix: Tensor | None = None) -> Tensor:
        return real

    def value(self, norms: Tensor) -> Tensor:
        return zero_centred(norms, gamma=self.gamma)


class R2(Penalty):
    """The same as :class:`R1`, on generated samples (detached).

    Args:
        gamma: Weight, >= 0.
        interval: Apply on every ``interval``-th step.
    """

    on_fake: ClassVar[bool] = True

    @checked(gamma="[0, inf)", interval="[1, inf)")
    def __init__(self, gamma: float = 1.0, *, interval: int = 1) -> None:
        super().__init__(interval=interval)
        self.gamma = gamma

    def points(self, real: Tensor, fake: Tensor, mix: Tensor | None = None) -> Tensor:
        return fake

    def value(self, norms: Tensor) -> Tensor:
        return zero_centred(norms, gamma=self.gamma)


class GradientPenalty(Penalty):
    """WGAN-GP's one-centred penalty between real and generated samples.

    Args:
        weight: lambda, 10 in the paper.
        interval: Apply on every ``interval``-th step.
    """

    needs_mix: ClassVar[bool] = True

    @checked(weight="[0, inf)", interval="[1, inf)")
    def __init__(self, weight: float = 10.0, *, interval: int = 1) -> None:
        super().__init__(interval=interval)
        self.weight = weight

    def points(self, real: Tensor, fake: Tensor, mix: Tensor | None = None) -> Tensor:
        if mix is None:
            raise ValueError("GradientPenalty must have mix, one uniform number per sample; got None. Draw it.")
        return interpolate(real, fake, mix)

    def value(self, norms: Tensor) -> Tensor:
        return one_centred(norms, weight=self.weight)
