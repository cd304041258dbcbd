"""What is checked on the first minibatch of a fit: shapes, ranges, labels; and again on one that a step fails on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, DataError, message
from fedgan_lightning.gan.batches import labels_error, output_range
from fedgan_lightning.gan.checks import check_networks

#: Images reach this much beyond their range by resizing.
TOLERANCE = 0.01


def check_batch(gan: Any, x: Tensor, y: Tensor, *, probe: bool) -> None:
    """Refuse a minibatch that cannot be trained on, or not to any use.

    Args:
        gan: The GAN.
        x: Samples (N, ...) as its discriminator sees them.
        y: Labels (N,).
        probe: Try networks that do not state the shape of samples with two of them.

    Raises:
        ConfigurationError: If its shape does not fit the networks, its range the generator's, or labels the classes.
        DataError: If a number is not finite.
    """
    _check_shape(gan, x, probe=probe)
    if len(x) != len(y):
        raise ConfigurationError(
            message(
                "every image of a minibatch must have a label",
                received=f"{len(y)} labels for {len(x)} images",
                fix="have the loader return as many",
            )
        )
    if gan.num_classes:
        _check_labels(gan, y)
    if x.is_floating_point():
        _check_values(gan, x)


def _check_shape(gan: Any, x: Tensor, *, probe: bool) -> None:
    shapes = [getattr(network, "sample_shape", None) for network in (gan.generator, gan.discriminator)]
    declared = next((tuple(shape) for shape in shapes if shape is not None), None)
    shape = tuple(x.shape[1:])
    if declared is not None and shape != declared:
        raise ConfigurationError(
            message(
                f"samples must have the shape of the networks' {list(declared)}",
                received=f"samples of shape {list(shape)} (a minibatch {list(x.shape)})",
                fix=_fix(shape, declared),
            )
        )
    if probe and None in shapes and gan.codec is None:
        check_networks(gan, sample_shape=shape, num_classes=gan.num_classes)


def _fix(shape: tuple[int, ...], declared: tuple[int, ...]) -> str:
    """Return what to do with images of another shape."""
    if len(shape) == 3 and shape[0] not in (1, 3) and shape[2] in (1, 3):
        return "put channels first, x.permute(0, 3, 1, 2), as transforms.ToTensor() does: these are channels last"
    if declared == (1, *shape):
        return "add the dimension of channels: x.unsqueeze(1)"
    return "resize the data, or set the networks' sample_shape, or image_size and channels, to the data's"


def _check_labels(gan: Any, y: Tensor) -> None:
    low, high = (int(value) for value in torch.aminmax(y))
    if low < 0 or high >= gan.num_classes:
        received = f"labels from {low} to {high}"
        raise labels_error(gan.num_classes, received=received, fix="count classes from 0, or set num_classes")


def _check_values(gan: Any, x: Tensor) -> None:
    low, high = (float(value) for value in torch.aminmax(x.detach()))  # NaN where one is
    if not (abs(low) < torch.inf and abs(high) < torch.inf):
        count = int((~torch.isfinite(x)).sum())
        what = "NaN" if bool(x.isnan().any()) else "infinite numbers"
        raise DataError(
            message(
                "samples must be finite",
                received=f"{what} among them: {count} of {x.numel()} numbers of the minibatch are not finite",
                fix="find and drop these samples, or fill the gaps",
            )
        )
    is_tanh = output_range(gan.generator) == (-1.0, 1.0)
    if is_tanh and x.dim() == 4 and -TOLERANCE <= low < high and low + high > TOLERANCE:
        scale = "ToTensor() and " if high > 1 + TOLERANCE else ""
        raise ConfigurationError(
            message(
                "images for a generator that ends in tanh must lie in [-1, 1]",
                received=f"images from {low:.3g} to {high:.3g}",
                fix=f"add {scale}Normalize(.5, .5) to their transforms",
            )
        )
