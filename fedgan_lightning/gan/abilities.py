"""What federated algorithms ask of a GAN beside ``fit``: small abilities that stacked clients have as well.

An algorithm that needs one of them works with any module that has the method; :class:`GAN` has all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.gan.draws import Draws
from fedgan_lightning.gan.objectives import auxiliary_classifier
from fedgan_lightning.gan.sampling import inputs
from fedgan_lightning.gan.steps import split_heads

Generate = Callable[[Tensor, Tensor], Tensor]


class AlgorithmAbilities:
    """Abilities of a GAN; part of :class:`~fedgan_lightning.gan.module.GAN`."""

    #: Whether local steps train the discriminator alone.
    trains_only_discriminator = False
    _given_fakes: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def only_discriminator(self, fakes: tuple[Tensor, Tensor] | None = None) -> Iterator[None]:
        """Train the discriminator alone inside the body.

        Args:
            fakes: Samples and labels to train against in every step, at least as many as a minibatch, of which the
                first are taken; with a leading dimension of clients in a stack. By default each step generates its own.
        """
        self.trains_only_discriminator, self._given_fakes = True, fakes
        try:
            yield
        finally:
            self.trains_only_discriminator, self._given_fakes = False, None

    def with_given_fakes(self, generate: Generate, draws: Draws) -> tuple[Generate, Draws]:
        """Return what a discriminator's step generates with, and its draws: those given, or as they are."""
        if self._given_fakes is None:
            return generate, draws
        samples, labels = self._given_fakes
        wanted, given = draws.z.shape[:-1], samples.shape[: draws.z.dim() - 1]
        if any(few < many for few, many in zip(given, wanted)):
            raise ConfigurationError(
                message(
                    "given samples must be at least as many as those of a minibatch",
                    received=f"{list(given)} for {list(wanted)}",
                    fix="set the algorithm's number of samples to data.batch_size",
                )
            )
        first = tuple(map(slice, wanted))  # clients that are done have left a stack; small ones have small minibatches
        return lambda z, y: samples[first], replace(draws, y=labels[first])

    def feedback(self, samples: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the discriminator's logits l(x) and their gradients dl/dx, of the shape of ``samples``.

        A patch discriminator's logits of one sample are summed for the gradient. The discriminator works as in
        training, and is not changed but for what a pass in training changes.

        Args:
            samples: (N, ...), or (clients, N, ...) in a stack.
            labels: (N,), or (clients, N).
        """
        module: Any = self
        points = samples.detach().requires_grad_()
        with torch.enable_grad():
            logits, _ = split_heads(module.discriminate(points, labels, None))
            (gradients,) = torch.autograd.grad(logits.sum(), points)
        return logits.detach(), gradients

    def generator_feedback(self, samples: Tensor, labels: Tensor) -> Tensor:
        """Return d/dx of the generator's loss, the mean over samples, an auxiliary classifier's terms among it.

        Args:
            samples: (N, ...), or (clients, N, ...) in a stack, where each client's loss is its own.
            labels: (N,), or (clients, N).
        """
        module: Any = self
        points = samples.detach().requires_grad_()
        with torch.enable_grad():
            logits, classes = split_heads(module.discriminate(points, labels, None))
            loss = module.vmap_over_clients(module.loss.generator)(logits)
            if classes is not None:
                loss = loss + module.auxiliary_weight * module.vmap_over_clients(auxiliary_classifier)(classes, labels)
            (gradients,) = torch.autograd.grad(loss.sum(), points)
        found: Tensor = gradients
        return found

    def generate_with_graph(self, z: Tensor, labels: Tensor) -> Tensor:
        """Return G(z, y), through which a gradient with respect to the generator's parameters can flow."""
        module: Any = self
        with torch.enable_grad():
            found: Tensor = module.generate(z, labels)
        return found

    def check_needs_no_reals(self) -> None:
        """Refuse a generator whose loss cannot be computed without real samples.

        Raises:
            ConfigurationError: If the loss compares generated with real samples, or the generator needs conditions made
                from them.
        """
        module: Any = self
        if module.loss.pairs_real or module.condition is not None:
            raise ConfigurationError(
                message(
                    "a generator that a server trains must need no real samples",
                    received=type(module.loss if module.loss.pairs_real else module.condition).__name__,
                    fix="use another loss, such as NonSaturating, and no condition",
                )
            )

    def generator_loss(self, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the generator's loss on ``num_samples`` of its own samples, without real data; it has a graph.

        Args:
            num_samples: How many, of all classes in turn.
            generator: Source of the latents; a seeded CPU generator gives the same latents on every device.

        Raises:
            ConfigurationError: As :meth:`check_needs_no_reals`.
        """
        self.check_needs_no_reals()
        module: Any = self
        z, labels = inputs(module, module.generator, num_samples, generator=generator)
        with torch.enable_grad():
            loss: Tensor = module.generator_terms(z, labels, Draws(z=z, y=labels))[0]
        return loss
