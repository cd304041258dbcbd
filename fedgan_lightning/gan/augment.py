"""What helps discriminators of few samples: augmentation of all that they see, and anchors for their logits.

Both are small modules of the GAN. State that they have (a probability, two means) is made of buffers, which a
federation averages like any other, or leaves with each client: ``sync: {augment: local}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.gan.precision import FullPrecision
from fedgan_lightning.options import checked

Operation = Literal["colour", "translation", "cutout"]
OPERATIONS: tuple[Operation, ...] = ("colour", "translation", "cutout")


class Augmentation(FullPrecision):
    """Differentiable augmentation of real and generated images in both networks' steps (Zhao et al. 2020).

    Colour: brightness +-.5, saturation 0 to 2, contrast .5 to 1.5; translation by up to an eighth of the side, filled
    with zeros; cutout of a square of half the side. Every group of operations is applied to an image with some
    probability: 1 is DiffAugment. With a ``target`` the probability is adapted: it grows while more than that share of
    real images is taken for real, p <- p + sign(E sign D(x) - target) * images / images_to_full, within [0, 1]
    (Karras et al. 2020, section 3.1, on every step).

    Args:
        operations: Groups of operations.
        probability: At the start, in [0, 1].
        target: E sign D(x) that the probability is steered to, .6 in the paper; ``None`` keeps it.
        images_to_full: Images in which p goes from 0 to 1.

    Raises:
        ConfigurationError: If an argument is out of range.
    """

    #: Uniform numbers per image.
    num_random = 10

    @checked(probability="[0, 1]", target="(-1, 1)", images_to_full="(0, inf)")
    def __init__(
        self,
        operations: Sequence[Operation] = OPERATIONS,
        *,
        probability: float = 1.0,
        target: float | None = None,
        images_to_full: float = 500_000,
    ) -> None:
        super().__init__()
        unknown = sorted(set(operations) - set(OPERATIONS))
        if unknown or not operations:
            raise ConfigurationError(
                message(
                    f"augmentation operations must be some of {', '.join(OPERATIONS)}",
                    received=", ".join(unknown) or "none",
                    fix="choose from them, or set augment: null",
                )
            )
        self.operations, self.target, self.images_to_full = tuple(operations), target, images_to_full
        self.fixed = probability
        self.probability: Tensor | None
        self.register_buffer("probability", None if target is None else torch.tensor(float(probability)))

    def transform(self, x: Tensor, u: Tensor, probability: Tensor | None = None) -> Tensor:
        """Return augmented images.

        Args:
            x: Images (N, channels, h, w).
            u: Uniform numbers (N, 10).
            probability: A scalar, where it is adapted.
        """
        chance: Tensor | float = self.fixed if probability is None else probability
        for gate, operation in enumerate(OPERATIONS):
            if operation in self.operations:
                changed = _TRANSFORMS[operation](x, u)
                x = torch.where((u[:, 7 + gate] < chance).view(-1, 1, 1, 1), changed, x)
        return x

    @torch.no_grad()
    def adapt(self, real_logits: Tensor, *, num_images: int) -> None:
        """Move the probability by one step's real logits, (N, ...), or (clients, N, ...) where clients are stacked."""
        if self.probability is None or self.target is None:
            return
        signs = real_logits.float().sign()
        signs = signs.flatten(1).mean(1) if self.probability.dim() else signs.mean()
        self.probability.add_((signs - self.target).sign() * (num_images / self.images_to_full)).clamp_(0.0, 1.0)


def _colour(x: Tensor, u: Tensor) -> Tensor:
    brightness, saturation, contrast = (u[:, index].view(-1, 1, 1, 1) for index in range(3))
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def _translation(x: Tensor, u: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    x = _shifted(x, u[:, 3], size=height, dim=2)
    return _shifted(x, u[:, 4], size=width, dim=3)


def _shifted(x: Tensor, u: Tensor, *, size: int, dim: int) -> Tensor:
    """Shift by up to an eighth of ``size`` along ``dim``; zeros come in."""
    reach = size // 8
    shift = (u * (2 * reach + 1)).floor() - reach
    places = torch.arange(size, device=x.device, dtype=u.dtype) + shift.unsqueeze(1)
    inside = (places >= 0) & (places < size)
    shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
    indices = places.clamp(0, size - 1).long().view(shape).expand(x.shape)
    return torch.gather(x, dim, indices) * inside.view(shape).to(x.dtype)


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    rows, columns = (
        (torch.arange(size, device=x.device, dtype=u.dtype) - (u[:, index] * size).unsqueeze(1)).abs() < size / 4
        for size, index in ((height, 5), (width, 6))
    )
    hole = rows.unsqueeze(2) & columns.unsqueeze(1)
    return x * (~hole).unsqueeze(1).to(x.dtype)


_TRANSFORMS = {"colour": _colour, "translation": _translation, "cutout": _cutout}


class LeCam(FullPrecision):
    """Anchors for the discriminator's logits: weight * (E relu(D(x) - a_F)^2 + E relu(a_R - D(G(z)))^2).

    a_R and a_F are moving averages of the mean logits of real and generated samples. In a federation they are averaged
    over clients, which ties every client's discriminator to what the others' logits are. Source: Tseng et al. 2021,
    equation 6, in the rectified form of the authors' code.

    Args:
        weight: .1 to .3 in the paper, 0 or more.
        decay: Of the averages, in [0, 1).
        start_step: Local step from which the term counts.

    Raises:
        ConfigurationError: If an argument is out of range.
    """

    real: Tensor
    fake: Tensor

    @checked(weight="[0, inf)", decay="[0, 1)", start_step="[0, inf)")
    def __init__(self, weight: float = 0.1, *, decay: float = 0.99, start_step: int = 1000) -> None:
        super().__init__()
        self.weight, self.decay, self.start_step = weight, decay, start_step
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def value(self, real_logits: Tensor, fake_logits: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        """Return the term, a scalar, from logits (N, ...) and the two anchors."""
        above, below = torch.relu(real_logits - fake), torch.relu(real - fake_logits)
        return self.weight * (above.square().mean() + below.square().mean())

    @torch.no_grad()
    def update_(self, real_logits: Tensor, fake_logits: Tensor) -> None:
        """Move the anchors; logits have a leading dimension of clients where the anchors have."""
        for anchor, logits in ((self.real, real_logits), (self.fake, fake_logits)):
            mean = logits.float().flatten(1).mean(1) if anchor.dim() else logits.float().mean()
            anchor.lerp_(mean.to(anchor.dtype), 1 - self.decay)
