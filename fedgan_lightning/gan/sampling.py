"""What is done with a generator as a whole: samples of it, its moving average, its statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.gan.average import update_ema_
from fedgan_lightning.gan.checks import check_conditions
from fedgan_lightning.seeding import make_generator

#: Generated samples from which BatchNorm statistics are estimated.
RECALIBRATION_SAMPLES = 2000


class Sampling:
    """What a GAN does with its generator as a whole; part of :class:`~fedgan_lightning.gan.module.GAN`."""

    generator: nn.Module
    generator_ema: nn.Module | None
    ema_half_life_images: float | None
    ema_rampup: float | None
    codec: Any

    # ------------------------------------------------------------------ moving average

    def update_ema(self, *, num_images: float) -> None:
        """Move the average by ``num_images``; see :func:`~fedgan_lightning.gan.average.update_ema_`."""
        if self.generator_ema is None or self.ema_half_life_images is None:
            return
        half_life, rampup = self.ema_half_life_images, self.ema_rampup
        update_ema_(self.generator_ema, self.generator, num_images=num_images, half_life=half_life, rampup=rampup)

    def on_server_round_end(self, *, num_images: float) -> None:
        """Average over rounds on the server."""
        self.update_ema(num_images=num_images)

    # ------------------------------------------------------------------ sampling

    def recalibrate(self) -> None:
        """Set the generator's BatchNorm statistics to those of its own activations; needs noise, and no data.

        Raises:
            ConfigurationError: If the generator needs more than noise and labels.
        """
        check_conditions(self, None)
        recalibrate(self, self.generator)

    def sampling_generator(self, *, raw: bool = False) -> nn.Module:
        """Return the generator that samples come from: the average, or the raw one if there is none, or ``raw``."""
        return self.generator if raw or self.generator_ema is None else ema_for_sampling(self)

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        *,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        conditions: Tensor | None = None,
        raw: bool = False,
        chunk_size: int = 500,
    ) -> Tensor:
        """Return ``num_samples`` samples from the averaged generator (from the raw one if there is none, or ``raw``).

        Args:
            num_samples: How many.
            labels: Classes to generate (num_samples,); default all classes in turn.
            generator: Source of the latents; a seeded CPU generator gives the same latents on every device.
            latents: Latents (num_samples, latent_dim) to use instead.
            conditions: Conditions (num_samples, ...), instead of labels, where it has a ``condition``.
            raw: Use the raw weights, those that are federated.
            chunk_size: Samples per forward pass.

        Raises:
            ConfigurationError: If conditions are missing, or given to a generator that takes none.
        """
        check_conditions(self, conditions)
        network = self.sampling_generator(raw=raw)
        given = {"labels": labels, "latents": latents, "conditions": conditions}
        z, labels_or_conditions = inputs(self, network, num_samples, generator=generator, **given)
        decode = None if self.codec is None else self.codec.decode
        return generated(network, z, labels_or_conditions, chunk_size=chunk_size, decode=decode)


def inputs(
    gan: Any,
    network: nn.Module,
    num_samples: int,
    *,
    labels: Tensor | None = None,
    latents: Tensor | None = None,
    conditions: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what a generator takes, on its device: latents, and labels (all classes in turn) or conditions.

    Args:
        gan: The GAN, with its prior.
        network: The generator, or its moving average.
        num_samples: How many latents to draw.
        labels: Classes to generate.
        latents: Latents to use instead of drawn ones.
        conditions: Conditions to use instead of labels.
        generator: Source of the latents.
    """
    like = next(network.parameters())
    where: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    if latents is None:
        latents = gan.prior.sample(num_samples, gan.latent_dim, generator=generator, **where)
    if conditions is not None:
        return latents.to(**where), conditions.to(**where)
    if labels is not None and len(labels) < len(latents):
        raise ConfigurationError(
            message(
                "every sample must have a label",
                received=f"{len(labels)} for {len(latents)} samples",
                fix="give as many",
            )
        )
    labels_or_conditions = (
        torch.arange(len(latents)) % max(gan.num_classes, 1) if labels is None else labels[: len(latents)]
    )
    return latents.to(**where), labels_or_conditions.to(like.device)


def ema_for_sampling(gan: Any) -> nn.Module:
    """Return the moving average of a GAN's generator, with BatchNorm statistics of its own activations.

    Those that it has copied are of other weights. They are estimated once for the weights that there are. A generator
    with conditions keeps the copied ones: there are no conditions without data. So does an export, unless a sample was
    drawn before.

    Args:
        gan: The GAN, with a moving average.
    """
    average: Any = gan.generator_ema
    if gan.condition is None and _normalised(average) and not _is_recorded():
        known: list[Tensor] = getattr(average, "settled_as", [])
        now = list(average.state_dict().values())
        if len(known) != len(now) or not all(a.device == b.device and torch.equal(a, b) for a, b in zip(known, now)):
            recalibrate(gan, average)
            average.settled_as = [value.clone() for value in average.state_dict().values()]
    return average  # type: ignore[no-any-return]


def _is_recorded() -> bool:
    """Whether operations are being written down, which cannot depend on values, and must not estimate anything."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()  # type: ignore[attr-defined]


def recalibrate(gan: Any, network: nn.Module) -> None:
    """Estimate a generator's BatchNorm statistics from noise and all classes in turn, always the same.

    Args:
        gan: The GAN.
        network: Its generator, or the moving average.
    """
    noise = make_generator(0, "statistics")
    estimate_statistics(network, *inputs(gan, network, RECALIBRATION_SAMPLES, generator=noise))


def _normalised(network: nn.Module) -> list[_BatchNorm]:
    """Return the layers whose running statistics count."""
    return [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


@torch.no_grad()
def generated(
    network: nn.Module,
    latents: Tensor,
    labels: Tensor,
    *,
    chunk_size: int,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return G(z, y) in evaluation mode; the mode is restored.

    Args:
        network: The generator.
        latents: (N, latent_dim).
        labels: (N,), or conditions (N, ...).
        chunk_size: Samples per forward pass.
        decode: Applied to every chunk: words as rows of the vocabulary would take much memory all together.
    """
    mode = network.training
    network.eval()
    try:
        parts = (network(z, y) for z, y in zip(latents.split(chunk_size), labels.split(chunk_size)))
        return torch.cat([part if decode is None else decode(part) for part in parts])
    finally:
        network.train(mode)


@torch.no_grad()
def estimate_statistics(network: nn.Module, latents: Tensor, labels: Tensor, *, chunk_size: int = 500) -> None:
    """Set the running mean and variance of every BatchNorm to their means over chunks of generated activations.

    All other layers work as in evaluation: they draw nothing and learn nothing. Modes and momenta are restored.

    Args:
        network: The generator.
        latents: (N, latent_dim).
        labels: (N,).
        chunk_size: Samples per forward pass.
    """
    layers = _normalised(network)
    if not layers:
        return
    modes = [(part, part.training) for part in network.modules()]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over all passes
    try:
        network.eval()
        for layer in layers:
            layer.train()
        for z, y in zip(latents.split(chunk_size), labels.split(chunk_size)):
            network(z, y)
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
        for part, mode in modes:
            part.training = mode
