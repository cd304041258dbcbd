"""Text beside the networks: words as one-hot rows, and the language model that a generator is at first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.optim import Optimizer

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.gan.conditions import Codec
from fedgan_lightning.gan.priors import Gumbel
from fedgan_lightning.gan.sampling import generated, inputs
from fedgan_lightning.options import checked


class OneHot(Codec):
    """Word ids (N, T) as rows (N, T, V) that are 1 at the word, and back by the largest entry.

    Args:
        num_words: V.
    """

    @checked(num_words="[3, inf)")
    def __init__(self, num_words: int) -> None:
        self.num_words = num_words

    def encode(self, x: Tensor) -> Tensor:
        return one_hot(x.long(), self.num_words).to(torch.get_default_dtype())

    def decode(self, samples: Tensor) -> Tensor:
        return words(samples)


def words(rows: Tensor) -> Tensor:
    """Return the ids (N, T) of the largest entries of rows (N, T, V)."""
    return rows.argmax(-1)


def language_adam(parameters: Iterable[Any]) -> Optimizer:
    """Adam, learning rate 2e-3."""
    return torch.optim.Adam(parameters, lr=2e-3)


class LanguageModel(L.LightningModule):
    """A text generator trained by maximum likelihood: minimises -log P(sentence) per word, ends included.

    It is the usual start of an adversarial run (:class:`~fedgan_lightning.federation.warm_start.StartFrom`), and its
    baseline. Batches are ``(ids, y)``: word ids (N, T), and labels that are ignored.

    Args:
        generator: The network; it has ``log_likelihood``.
        optimizer: Makes the optimizer; default Adam 2e-3.

    Raises:
        ConfigurationError: If the network is no language model.
    """

    @checked()
    def __init__(
        self,
        generator: nn.Module,
        *,
        optimizer: Callable[[Iterable], Optimizer] = language_adam,
    ) -> None:
        super().__init__()
        if not hasattr(generator, "log_likelihood"):
            raise ConfigurationError(
                message(
                    "LanguageModel must have a network with log_likelihood(ids)",
                    received=type(generator).__name__,
                    fix="use TextGenerator",
                )
            )
        self.generator, self.optimizer = generator, optimizer
        self.prior, self.num_classes = Gumbel(), 0
        #: Dimension of z.
        self.latent_dim = int(generator.latent_dim)  # type: ignore[arg-type]

    def check_data(self, sample_shape: Sequence[int], num_classes: int) -> None:
        """Refuse data of another length.

        Raises:
            ConfigurationError: If sentences are longer or shorter than the generator's.
        """
        length = int(self.generator.max_length)  # type: ignore[arg-type]
        if tuple(sample_shape) != (length,):
            raise ConfigurationError(
                message(
                    "the generator's sentences must be as long as the data's",
                    received=f"max_length={length}, samples of shape {list(sample_shape)}",
                    fix="set max_length of the generator and of data.source to the same value",
                )
            )

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.generator.parameters())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        likelihood, counted = self.generator.log_likelihood(batch[0])  # type: ignore[operator]
        loss: Tensor = -likelihood.sum() / counted.sum()
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        *,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        chunk_size: int = 250,
    ) -> Tensor:
        """Return the word ids (num_samples, T) of new sentences.

        Args:
            num_samples: How many.
            labels: Ignored: there are no classes.
            generator: Source of the Gumbel noise.
            latents: Noise (num_samples, T * V) to use instead.
            chunk_size: Sentences per forward pass.
        """
        z, labels = inputs(self, self.generator, num_samples, latents=latents, generator=generator)
        return generated(self.generator, z, labels, chunk_size=chunk_size, decode=words)
