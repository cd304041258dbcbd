"""Checks of a GAN before it trains: settings that contradict each other, networks that do not fit the data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fedgan_lightning.errors import ConfigurationError, DataError, message

#: Where the numbers of a GAN lie.
INTERVALS = {
    **dict.fromkeys(("d_steps", "g_steps"), "[1, inf)"),
    **dict.fromkeys(("ema_half_life_images", "ema_rampup", "clip_gradient_norm"), "(0, inf)"),
    "auxiliary_weight": "[0, inf)",
}


def check_settings(gan: Any) -> None:
    """Refuse arguments that contradict each other.

    Raises:
        ConfigurationError: If they do.
    """
    other = int(getattr(gan.discriminator, "num_classes", 0))
    if gan.num_classes != other:
        raise ConfigurationError(
            message(
                "generator and discriminator must have the same number of classes",
                received=f"{gan.num_classes} and {other}",
                fix="set num_classes to the same value in both",
            )
        )
    shapes = [getattr(network, "sample_shape", None) for network in (gan.generator, gan.discriminator)]
    if None not in shapes and shapes[0] != shapes[1]:
        raise ConfigurationError(
            message(
                "generator and discriminator must have the same sample shape",
                received=f"{list(shapes[0] or ())} and {list(shapes[1] or ())}",
                fix="set image_size and channels, or sample_shape, to the same values in both",
            )
        )
    shape = next((shape for shape in shapes if shape is not None), None)
    if gan.augment is not None and shape is not None and len(shape) != 3:
        raise ConfigurationError(
            message(
                "what is augmented must be images", received=f"samples of shape {list(shape)}", fix="set augment: null"
            )
        )
    if gan.updates == "simultaneous" and (gan.d_steps, gan.g_steps) != (1, 1):
        raise ConfigurationError(
            message(
                "simultaneous updates must take one step of each network",
                received=f"d_steps={gan.d_steps}, g_steps={gan.g_steps}",
                fix="set both to 1, or updates: alternating",
            )
        )
    prior = getattr(gan.generator, "prior", None)
    if prior is not None and not isinstance(gan.prior, prior):
        raise ConfigurationError(
            message(
                f"{type(gan.generator).__name__} must have noise from {prior.__name__}",
                received=f"model.prior={type(gan.prior).__name__}",
                fix=f"set prior: {prior.__name__}",
            )
        )
    aids = {
        "augment": gan.augment is not None,
        "fake_labels": gan.fake_labels != "held",
        "num_classes": gan.num_classes,
    }
    if gan.condition is not None and any(aids.values()):
        raise ConfigurationError(
            message(
                "with a condition, samples must not be augmented, and networks must see no labels",
                received=", ".join(name for name, value in aids.items() if value),
                fix="leave these out",
            )
        )


def check_minibatch(num_samples: int, *, d_steps: int, whose: str = "") -> None:
    """Refuse a minibatch, of a client where that is known, that cannot be split into parts for the discriminator.

    Raises:
        DataError: If it cannot.
    """
    if num_samples % d_steps:
        raise DataError(
            message(
                f"a minibatch must be divisible into d_steps={d_steps} equal parts",
                received=f"{num_samples} samples{f' of {whose}' if whose else ''}",
                fix=f"set batch_size to a multiple of {d_steps} that every client has samples for, or d_steps to 1",
            )
        )


def check_precision(gan: Any) -> None:
    """Refuse a loss scaler where two losses are differentiated before two steps: it may change its scale after the
    first step, and the second one's gradients still have the old.

    Raises:
        ConfigurationError: If updates are simultaneous under a precision with such a scaler.
    """
    if gan.updates == "simultaneous" and getattr(gan.trainer.precision_plugin, "scaler", None) is not None:
        raise ConfigurationError(
            message(
                "simultaneous updates must have one scale for both losses, which Lightning's scaler does not keep",
                received=f"updates='simultaneous' with precision={gan.trainer.precision}",
                fix="set precision to bf16-mixed or 32-true, or updates to alternating",
            )
        )


def check_conditions(gan: Any, conditions: torch.Tensor | None) -> None:
    """Refuse to generate without the conditions that a generator needs, or with some that it does not take.

    Raises:
        ConfigurationError: If they are missing, or given to a generator that takes none.
    """
    if (gan.condition is None) != (conditions is None):
        raise ConfigurationError(
            message(
                "a GAN must be sampled with conditions exactly if it has been built with one",
                received="no conditions" if conditions is None else "conditions without one",
                fix="pass conditions=condition.make(x, y, u)" if conditions is None else "leave them out",
            )
        )


def check_networks(gan: Any, *, sample_shape: tuple[int, ...], num_classes: int) -> None:
    """Pass two samples of the data's shape through both networks.

    Raises:
        ConfigurationError: If networks and data do not fit.
    """
    if gan.num_classes and gan.num_classes != num_classes:
        raise ConfigurationError(
            message(
                "conditional networks must have as many classes as the data",
                received=f"num_classes={gan.num_classes}, data with {num_classes}",
                fix=f"set num_classes of both networks to {num_classes}",
            )
        )
    wanted = list(sample_shape)
    real, labels = _zeros(gan, sample_shape)
    conditions = None if gan.condition is None else labels
    with _accepting(f"the generator accepts latents ({gan.latent_dim},) and conditions", fix="set its sizes to theirs"):
        made = list(gan.sample(2, latents=torch.zeros(2, gan.latent_dim), conditions=conditions, raw=True).shape[1:])
    if made != wanted:
        raise ConfigurationError(
            message(
                "the generator's samples must have the shape of the data's",
                received=f"{made} from the generator, {wanted} in the data",
                fix="set the networks' image_size and channels (or sample_shape), or the source's image_size",
            )
        )
    mode = gan.discriminator.training
    fix = "set its image_size and channels (or sample_shape) to the data's"
    try:
        with _accepting(f"the discriminator accepts samples of shape {wanted}", fix=fix), torch.no_grad():
            gan.discriminator.eval()(real, labels)
    finally:
        gan.discriminator.train(mode)


def _zeros(gan: Any, sample_shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two samples as the networks see them, and the labels or conditions that go with them."""
    like = next(gan.discriminator.parameters())
    labels, real = torch.zeros(2, dtype=torch.int64, device=like.device), like.new_zeros(2, *sample_shape)
    if gan.codec is not None:
        real = gan.codec.encode(real.long()).to(like.dtype)
    if gan.condition is None:
        return real, labels
    return real, gan.condition.make(real, labels, like.new_full((2, gan.condition.num_random), 0.5))


@contextlib.contextmanager
def _accepting(rule: str, *, fix: str) -> Iterator[None]:
    """Say of a network that does not take its inputs which rule it breaks."""
    try:
        yield
    except RuntimeError as error:
        raise ConfigurationError(message(rule, received=str(error).splitlines()[0], fix=fix)) from error
