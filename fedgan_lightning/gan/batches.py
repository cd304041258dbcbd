"""Batches as data loaders give them: images and labels out of pairs, of images alone, or of a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedgan_lightning.errors import ConfigurationError, message

#: Names under which data sets keep images, and those of labels.
IMAGE_KEYS = ("image", "x", "pixel_values", "img")
LABEL_KEYS = ("label", "y", "labels")
#: What to do with the loader of a federation, of which every batch is a round.
POOLED = "train a ServerModule with a FederatedOrchestrator, or pool the data: data.pooled(num_steps=...)"


def is_usual(batch: Any, *, label_dims: int) -> bool:
    """Whether a batch is ``(x, y)`` with int64 labels of ``label_dims`` dimensions; takes well under a microsecond."""
    if type(batch) not in (tuple, list) or len(batch) != 2:
        return False
    x, y = batch
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return False
    return y.dtype is torch.int64 and y.dim() == label_dims and x.dtype is not torch.uint8


def read_batch(
    batch: Any, *, generator: nn.Module, num_classes: int, label_dims: int = 1, look: bool = True
) -> tuple[Tensor, Tensor]:
    """Return samples and int64 labels (N,) of a batch of any usual structure.

    Labels are ignored, and zeros instead, where there are no classes.

    Args:
        batch: ``(x, y)``, ``(x,)``, ``x``, or a mapping.
        generator: Says by its last layer in which range bytes are to lie.
        num_classes: Classes of the networks.
        label_dims: Dimensions of labels: 1, or 2 where several clients' are stacked.
        look: Whether to look at the entries of one-hot labels, for which a device has to be waited for.

    Raises:
        ConfigurationError: If it has another structure, or labels are missing or are none.
    """
    x, y = _parts(batch, num_classes=num_classes)
    if not isinstance(x, Tensor) or x.dim() <= label_dims:
        shown = f"a tensor of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise _structure(shown)
    leading = x.shape[:label_dims]
    if x.dtype is torch.uint8 and x.dim() == 3 + label_dims:
        x = _of_bytes(x, output_range(generator))
    if num_classes:
        return x, class_numbers(y, leading=leading, num_classes=num_classes, look=look)
    if isinstance(y, Tensor) and y.dtype is torch.int64 and y.shape == leading:
        return x, y
    return x, torch.zeros(leading, dtype=torch.int64, device=x.device)


def _parts(batch: Any, *, num_classes: int) -> tuple[Any, Any]:
    """Return what stands for the images in a batch, and for the labels; ``None`` if nothing does."""
    if isinstance(batch, Tensor) and batch.dim() > 0:
        return batch, None
    if isinstance(batch, Mapping):
        found = [next((batch[key] for key in keys if key in batch), None) for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if found[0] is None:
            raise _structure(f"a mapping with {', '.join(map(str, batch)) or 'nothing in it'}")
        return found[0], found[1]
    if isinstance(batch, (tuple, list)) and batch and (len(batch) <= 2 or not num_classes):
        return batch[0], batch[1] if len(batch) > 1 else None
    if isinstance(batch, int):
        raise ConfigurationError(
            message(
                "a FederatedDataModule must be trained with a FederatedOrchestrator, or pooled",
                received=f"{batch}, the tick of a round, as a minibatch",
                fix=POOLED,
            )
        )
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    raise _structure(f"a {type(batch).__name__}{size}")


def _structure(received: str) -> ConfigurationError:
    names = [" or ".join((", ".join(keys[:-1]), keys[-1])) for keys in (IMAGE_KEYS, LABEL_KEYS)]
    return ConfigurationError(
        message(
            "a minibatch must be images x of shape (N, ...), (x,), (x, y) with labels y, or a mapping with "
            f"{names[0]}, and {names[1]}",
            received=received,
            fix="give the loader a collate_fn that returns (x, y)",
        )
    )


def class_numbers(y: Any, *, leading: torch.Size, num_classes: int, look: bool = False) -> Tensor:
    """Return labels as int64 class numbers of shape ``leading``, from these, (..., 1), or one-hot (..., C).

    Args:
        y: The labels.
        leading: (N,), or (clients, N).
        num_classes: C.
        look: Whether to look at the entries of one-hot labels.

    Raises:
        ConfigurationError: If they are missing, or something else.
    """
    kind = f"{list(y.shape)}, {str(y.dtype).removeprefix('torch.')}" if isinstance(y, Tensor) else type(y).__name__
    if y is None:
        raise labels_error(num_classes, received="no labels", fix="have the loader return (x, y), or set num_classes=0")
    if isinstance(y, Tensor) and num_classes > 1 and y.shape == (*leading, num_classes) and not y.is_complex():
        if look and not bool(((y != 0).sum(-1) == 1).all()):
            received = f"rows of {num_classes} with none or several entries that are not 0"
            raise labels_error(num_classes, received=received, fix="choose one class for every image")
        return y.argmax(-1)
    if isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex()):
        if y.shape == leading:
            return y.long()
        if y.shape == (*leading, 1):
            return y.squeeze(-1).long()
    received = f"labels {kind}, for {' x '.join(map(str, leading))} images"
    raise labels_error(num_classes, received=received, fix="give one integer per image, y.long()")


def labels_error(num_classes: int, *, received: str, fix: str) -> ConfigurationError:
    """Return what is said of labels that are none."""
    rule = f"labels of a conditional GAN of {num_classes} classes must be integers (N,) or (N, 1) from 0 to"
    return ConfigurationError(
        message(f"{rule} {num_classes - 1}, or one-hot (N, {num_classes})", received=received, fix=fix)
    )


# ---------------------------------------------------------------------- ranges


def output_range(generator: nn.Module) -> tuple[float, float] | None:
    """Return where a generator's samples lie: by its attribute ``output_range`` or its last layer, if they say so."""
    known = getattr(generator, "output_range", None)
    if known is not None:
        return float(known[0]), float(known[1])
    *_, last = generator.modules()
    if isinstance(last, nn.Tanh):
        return -1.0, 1.0
    return (0.0, 1.0) if isinstance(last, nn.Sigmoid) else None


def _of_bytes(pixels: Tensor, target: tuple[float, float] | None) -> Tensor:
    """Return bytes as images in the generator's range."""
    if target is None:
        raise ConfigurationError(
            message(
                "images of bytes must come with a generator that says in which range its own lie",
                received="uint8 images and a generator whose last layer is neither tanh nor sigmoid",
                fix="turn images to floats in its range, or give it the attribute output_range = (-1.0, 1.0)",
            )
        )
    low, high = target
    return pixels.to(torch.get_default_dtype()).div_(255.0 / (high - low)).add_(low)
