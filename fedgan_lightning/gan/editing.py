"""Editing real samples with a trained generator: they are projected into its latent space, and moved there.

Any generator (z, y) -> samples serves. Sources: Zhu et al. 2016 (projection by optimisation), Yeh et al. 2017 (of the
known pixels only), Radford et al. 2016 (directions as differences of means).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedgan_lightning.errors import DataError, message
from fedgan_lightning.gan.priors import Normal, Prior
from fedgan_lightning.options import checked


class Projection(NamedTuple):
    """Where samples lie in latent space.

    Attributes:
        latents: (N, latent_dim).
        samples: G(latents) (N, ...).
        start_error: Mean squared difference (N,) before the search, of the best start.
        error: The same after it.
    """

    latents: Tensor
    samples: Tensor
    start_error: Tensor
    error: Tensor


@checked(steps="[1, inf)", lr="(0, inf)", starts="[1, inf)", feature_weight="[0, inf)")
def project(
    generator: nn.Module,
    x: Tensor,
    *,
    labels: Tensor | None = None,
    steps: int = 300,
    lr: float = 0.05,
    starts: int = 16,
    known: Tensor | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    feature_weight: float = 1.0,
    prior: Prior | None = None,
    noise: torch.Generator | None = None,
) -> Projection:
    """Return latents whose samples are like ``x``: min_z E k (G(z) - x)^2 / E k + w E (F(G(z)) - F(x))^2, by Adam.

    Every sample has its own search, from the best of ``starts`` latents. Parameters and mode of the generator are left
    as they were.

    Args:
        generator: (z, y) -> samples (N, ...); has ``latent_dim``.
        x: Samples (N, ...) to project.
        labels: Their classes (N,), for a class-conditional generator.
        steps: Steps of Adam.
        lr: Its learning rate.
        starts: Latents drawn for each sample to begin with.
        known: k, 1 where a sample is known and 0 where it is not, of a shape that broadcasts to that of ``x``; default
            all known. With it, unknown pixels are completed by what the generator makes of the rest.
        features: F, samples -> features (N, ...), such as a
            :class:`~fedgan_lightning.evaluation.features.FrozenNet`; default none.
        feature_weight: w.
        prior: Where starts are drawn; default normal.
        noise: Source of the starts.

    Raises:
        ConfigurationError: If a number is out of its range.
        DataError: If samples have another shape than the generator's.
    """
    parameter, draws = _where(generator), prior if prior is not None else Normal()
    x = x.to(parameter)
    weights = torch.ones_like(x) if known is None else known.to(x).expand_as(x)
    wanted = x if features is None else features(x).detach()
    size = int(generator.latent_dim)  # type: ignore[arg-type]

    def errors(made: Tensor) -> Tensor:
        total = weights.flatten(1).sum(1).clamp(min=1)
        return ((made - x).square() * weights).flatten(1).sum(1) / total

    with _still(generator):
        with torch.no_grad():
            where = {"device": x.device, "dtype": x.dtype, "generator": noise}
            latents = draws.sample(starts * len(x), size, **where).reshape(starts, len(x), size)  # type: ignore[arg-type]
            samples = [_generate(generator, z, labels) for z in latents]
            if samples[0].shape != x.shape:
                raise DataError(
                    message(
                        "samples to project must have the shape of the generator's",
                        received=f"{list(x.shape[1:])}, of the generator's {list(samples[0].shape[1:])}",
                        fix="resize them",
                    )
                )
            found = torch.stack([errors(made) for made in samples])
            best = found.argmin(0)
        start = found.gather(0, best[None])[0]
        latents = latents[best, torch.arange(len(x), device=best.device)].clone().requires_grad_()
        optimizer = torch.optim.Adam([latents], lr=lr)
        for _ in range(steps):
            made = _generate(generator, latents, labels)
            loss = errors(made).sum()  # a sum: no sample's step depends on how many there are
            if features is not None:
                loss = loss + feature_weight * (features(made) - wanted).square().flatten(1).mean(1).sum()
            (latents.grad,) = torch.autograd.grad(loss, [latents])
            optimizer.step()
        with torch.no_grad():
            made = _generate(generator, latents, labels)
            return Projection(latents.detach(), made, start, errors(made))


@torch.no_grad()
@checked(steps="[2, inf)")
def interpolate(
    generator: nn.Module,
    first: Tensor,
    second: Tensor,
    *,
    steps: int = 8,
    labels: Tensor | None = None,
    prior: Prior | None = None,
) -> Tensor:
    """Return samples (N, steps, ...) on the way from latents ``first`` to ``second``, both ends included.

    Args:
        generator: (z, y) -> samples.
        first: Latents (N, latent_dim).
        second: Latents (N, latent_dim).
        steps: Samples on the way, at least 2.
        labels: Classes (N,), for a class-conditional generator.
        prior: Whose way it is; default normal, a great circle.

    Raises:
        ConfigurationError: If there are fewer than 2 steps.
    """
    first, second = first.to(_where(generator)), second.to(_where(generator))
    fractions = torch.linspace(0, 1, steps, device=first.device, dtype=first.dtype)
    latents = (prior if prior is not None else Normal()).between(first, second, fractions)
    with _still(generator):
        made = [_generate(generator, z, labels) for z in latents]
    return torch.stack(made, dim=1)


@checked()
def direction(latents: Tensor, attribute: Tensor) -> Tensor:
    """Return E[z | attribute] - E[z | no attribute] (latent_dim,): moving along it adds the attribute.

    Args:
        latents: (N, latent_dim), of projected samples, or of generated ones that a classifier has judged.
        attribute: Whether each has it, (N,) bool.

    Raises:
        DataError: If all have it, or none.
    """
    held = attribute.to(latents.device).bool()
    if held.all() or not held.any():
        raise DataError(
            message(
                "a direction must have latents with the attribute and without",
                received=f"{int(held.sum())} of {len(held)} with it",
                fix="project samples of both kinds",
            )
        )
    return latents[held].mean(0) - latents[~held].mean(0)


@torch.no_grad()
@checked()
def edited(
    generator: nn.Module, latents: Tensor, along: Tensor, *, amounts: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Return G(z + a d) (N, A, ...) for latents z (N, latent_dim), a direction d (latent_dim,) and amounts a (A,)."""
    latents, along, amounts = (value.to(_where(generator)) for value in (latents, along, amounts))
    with _still(generator):
        return torch.stack([_generate(generator, latents + amount * along, labels) for amount in amounts], dim=1)


def _where(generator: nn.Module) -> Tensor:
    """Return a tensor of the device and dtype of the generator's inputs."""
    return next(generator.parameters())


def _generate(generator: nn.Module, z: Tensor, labels: Tensor | None) -> Tensor:
    samples: Tensor = generator(z, None if labels is None else labels.to(z.device))
    return samples


@contextmanager
def _still(generator: nn.Module) -> Iterator[None]:
    """Hold the generator in evaluation mode; restore its mode."""
    mode = generator.training
    generator.eval()
    try:
        yield
    finally:
        generator.train(mode)
