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
from fedgan_lightning.gan.batches import read_batch
from fedgan_lightning.gan.conditions import Codec
from fedgan_lightning.gan.priors import Gumbel
from fedgan_lightning.gan.restoring import Restorable
from fedgan_lightning.gan.sampling import generated, inputs
from fedgan_lightning.gan.trainer_steps import may_validate
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


class LanguageModel(Restorable, L.LightningModule):
    """A text generator trained by maximum likelihood: minimises -log P(sentence) per word, ends included.

    It is the usual start of an adversarial run (:class:`~fedgan_lightning.federation.warm_start.StartFrom`), and its
    baseline. Batches are ``(ids, y)``: word ids (N, T), and labels that are ignored; or ``(ids,)``, or ``ids`` alone.
    ``load_from_checkpoint`` needs no arguments where the network is this package's.

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

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Return sentences (N, T, V) for Gumbel noise (N, T * V); labels are ignored."""
        return self.generator(z, y)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, count = self._loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=count)
        return loss

    @property
    def validation_step(self) -> Callable[..., Any]:  # type: ignore[override]
        """Log ``val_loss``, the same on a minibatch; Lightning's own empty step in a fit without a loader for it."""
        return self._validate if may_validate(self) else super().validation_step

    def _validate(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._log_loss("val_loss", batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``test_loss``."""
        self._log_loss("test_loss", batch)

    def _log_loss(self, name: str, batch: Any) -> None:
        loss, count = self._loss(batch)
        self.log(name, loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)

    def _loss(self, batch: Any) -> tuple[Tensor, int]:
        """Return the loss on a minibatch, and its number of sentences."""
        ids, _ = read_batch(batch, generator=self.generator, num_classes=0)
        likelihood, counted = self.generator.log_likelihood(ids)  # type: ignore[operator]
        return -likelihood.sum() / counted.sum(), len(ids)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.describe_into(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.name_as_here(checkpoint)

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
