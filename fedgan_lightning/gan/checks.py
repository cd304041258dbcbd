"""Checks of a GAN before it trains: settings that contradict each other, networks that do not fit the data."""

from __future__ import annotations

from typing import Any

import torch

from fedgan_lightning.errors import ConfigurationError, message


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
    if min(gan.d_steps, gan.g_steps) < 1:
        raise ConfigurationError(
            message(
                "d_steps and g_steps are at least 1",
                received=f"{gan.d_steps} and {gan.g_steps}",
                fix="raise them",
            )
        )
    shape = next((own for own in shapes if own is not None), None)
    if gan.augment is not None and shape is not None and len(shape) != 3:
        raise ConfigurationError(
            message("augmentation is for images", received=f"samples of shape {list(shape)}", fix="set augment: null")
        )
    if gan.updates == "simultaneous" and (gan.d_steps, gan.g_steps) != (1, 1):
        raise ConfigurationError(
            message(
                "simultaneous updates take one step of each network",
                received=f"d_steps={gan.d_steps}, g_steps={gan.g_steps}",
                fix="set both to 1, or updates: alternating",
            )
        )
    if gan.ema_half_life_images is not None and gan.ema_half_life_images <= 0:
        raise ConfigurationError(
            message(
                "ema_half_life_images is positive",
                received=gan.ema_half_life_images,
                fix="set null to switch it off",
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
                "conditional networks have as many classes as the data",
                received=f"num_classes={gan.num_classes}, data with {num_classes}",
                fix=f"set num_classes of both networks to {num_classes}",
            )
        )
    made = tuple(gan.sample(2, latents=torch.zeros(2, gan.latent_dim)).shape[1:])
    wanted = sample_shape
    if made != wanted:
        raise ConfigurationError(
            message(
                "the generator's samples have the shape of the data's",
                received=f"{list(made)} from the generator, {list(wanted)} in the data",
                fix="set the networks' image_size and channels (or sample_shape), or the source's image_size",
            )
        )
    parameter = next(gan.discriminator.parameters())
    mode = gan.discriminator.training
    try:
        with torch.no_grad():
            labels = torch.zeros(2, dtype=torch.int64, device=parameter.device)
            gan.discriminator.eval()(parameter.new_zeros(2, *wanted), labels)
    except RuntimeError as error:
        raise ConfigurationError(
            message(
                f"the discriminator accepts samples of shape {list(wanted)}",
                received=str(error).splitlines()[0],
                fix="set its image_size and channels (or sample_shape) to the data's",
            )
        ) from error
    finally:
        gan.discriminator.train(mode)
