"""What a GAN gets beside noise, and how its samples are written: the seams for uses beyond classes of images.

Both are pure functions of tensors: stacked clients map them over clients by ``torch.vmap``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Condition(ABC):
    """A condition made from real samples: a picture with a hole, a user's past. Both networks get it instead of labels.

    Attributes:
        num_random: Uniform numbers per sample that :meth:`make` takes.
    """

    num_random: int = 0
    #: Class path of what measures samples under it; ``None`` leaves that to their source.
    modality: str | None = None

    @abstractmethod
    def make(self, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """Return the condition (N, ...) of real samples.

        Args:
            x: Real samples (N, ...).
            y: Their labels (N,).
            u: Uniform numbers (N, num_random) in [0, 1).
        """

    @abstractmethod
    def extra_losses(self, fake: Tensor, x: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Return what the generator minimises beside the adversarial loss: weighted scalars by name.

        Args:
            fake: Generated samples (N, ...), with gradients.
            x: The real samples (N, ...) that the conditions were made from.
            condition: (N, ...).
        """


class Codec(ABC):
    """Samples that are no numbers, such as words: how the networks see them, and how they are written."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Return what the discriminator sees of samples (N, ...) of the data set, floating point."""

    @abstractmethod
    def decode(self, samples: Tensor) -> Tensor:
        """Return generated samples as the data set writes them."""
