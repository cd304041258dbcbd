"""What a Trainer does with a GAN beside training it: validate, test, predict; and what is done with it as a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.gan.batches import POOLED, class_numbers, is_usual, read_batch
from fedgan_lightning.gan.checks import check_conditions
from fedgan_lightning.gan.first_batch import check_batch
from fedgan_lightning.gan.steps import discriminator_step
from fedgan_lightning.seeding import derive_seed


class TrainerSteps:
    """Steps of a GAN beside training; part of :class:`~fedgan_lightning.gan.module.GAN`."""

    #: Dimensions of labels: of samples, and in a stack of clients.
    label_dims = 1
    _in_federation = False
    _random_state: Tensor | None = None
    _is_validated = False

    # ------------------------------------------------------------------ as a module

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Return G(z, y) of the generator that is sampled: the average, or the raw one if there is none.

        It works in evaluation mode, as in ``sample``, whatever the mode of the GAN: a sample does not depend on those
        beside it. Gradients flow to ``z``, and to the parameters of a GAN without an average. Nothing is decoded.

        Args:
            z: Latents (N, latent_dim).
            y: Labels (N,), or conditions (N, ...) where it has a ``condition``.

        Raises:
            ConfigurationError: If labels or conditions are missing, or labels are none.
        """
        module: Any = self
        check_conditions(module, y if module.condition is not None else None)
        if module.num_classes and not (isinstance(y, Tensor) and y.dtype is torch.int64 and y.dim() == 1):
            y = class_numbers(y, leading=z.shape[:1], num_classes=module.num_classes)
        network = module.sampling_generator()
        if not network.training:
            return network(z, y)  # type: ignore[no-any-return]
        network.eval()
        try:
            return network(z, y)  # type: ignore[no-any-return]
        finally:
            network.train()

    def prepared(self, batch: Any, *, stage: str) -> tuple[Tensor, Tensor]:
        """Return samples as the networks see them, and labels; check the first minibatch of a stage.

        Raises:
            ConfigurationError: If the batch cannot be read, or does not fit the networks.
            DataError: If a number is not finite.
        """
        module: Any = self
        if not is_usual(batch, label_dims=self.label_dims):
            kinds = {"num_classes": module.num_classes, "label_dims": self.label_dims}
            batch = read_batch(batch, generator=module.generator, look=stage not in module._checked_stages, **kinds)
        x, y = batch
        if module.codec is not None:
            x = module.vmap_over_clients(module.codec.encode)(x)
        if stage not in module._checked_stages:
            self.check_minibatch(x, y)
            module._checked_stages.add(stage)
        return x.to(next(module.discriminator.parameters()).dtype), y

    def check_minibatch(self, x: Tensor, y: Tensor) -> None:
        """Refuse a minibatch as :func:`~fedgan_lightning.gan.first_batch.check_batch` does; also of stacked clients."""
        module: Any = self
        y = y if module.privacy is None else y.clamp_min(0)  # rows that fill up have the label -1
        if self.label_dims > 1:
            x, y = (values.flatten(0, self.label_dims - 1) for values in (x, y))
        check_batch(self, x, y, probe=not self._in_federation)

    # ------------------------------------------------------------------ validation and test

    @property
    def validation_step(self) -> Callable[..., Any]:
        """Log ``val_loss_d``, ``val_loss_g``, ``val_d_real`` = E D(x) and ``val_d_fake`` = E D(G(z)) on a minibatch.

        The losses are those of training without penalties, augmentation and anchors, of the raw generator. Noise is the
        same in every epoch, and nothing is changed: training goes on as if there was no validation.

        In a fit without a validation loader this is Lightning's own empty step, so that no fit
        warns of a missing loader.
        """
        module: Any = super()
        return self._validate if may_validate(self) else module.validation_step  # type: ignore[no-any-return]

    def _validate(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, dataloader_idx, prefix="val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the same as :meth:`validation_step`, by names that begin with ``test_``."""
        self._evaluate(batch, batch_idx, dataloader_idx, prefix="test")

    def _evaluate(self, batch: Any, batch_idx: int, dataloader_idx: int, *, prefix: str) -> None:
        module: Any = self
        x, y = self.prepared(batch, stage=prefix)
        for name, value in self.evaluated(x, y, seed=derive_seed(0, prefix, dataloader_idx, batch_idx)).items():
            shown = name.startswith("loss")
            options = {"on_step": False, "on_epoch": True, "prog_bar": shown, "batch_size": len(x), "sync_dist": True}
            module.log(f"{prefix}_{name}", value, **options)

    @torch.no_grad()
    def evaluated(self, x: Tensor, y: Tensor, *, seed: int) -> dict[str, Tensor]:
        """Return losses and mean beliefs of the discriminator on real samples, and as many generated ones.

        Both networks work in the mode they are in; a Trainer has them in evaluation mode.

        Args:
            x: Samples (N, ...).
            y: Labels (N,).
            seed: Of the noise.
        """
        module: Any = self
        generator = torch.Generator(x.device).manual_seed(seed)
        draws = replace(module.draw(y, dtype=x.dtype, generator=generator), augment=None)
        labels, draws = module.conditioned(x, y, draws)
        arguments = {
            "loss": module.loss,
            "auxiliary_weight": module.auxiliary_weight,
            "x": x,
            "y": labels,
            "draws": draws,
        }
        step = discriminator_step(module.generate, module.discriminate, penalties=(), **arguments)
        _, stats = module.generator_terms(x, labels, draws)
        return {**step.stats, **stats}

    # ------------------------------------------------------------------ training goes on as without validation

    def on_train_start(self) -> None:
        """Note whether this fit is validated."""
        trainer: Any = getattr(self, "trainer")  # noqa: B009 - Lightning's property
        self._is_validated = bool(trainer.enable_validation)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the state of the CPU's random numbers: a validation loader draws some before any hook is called."""
        if self._is_validated:
            self._random_state = torch.get_rng_state()

    def on_validation_end(self) -> None:
        """Go on with the random numbers of training."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            self._random_state = None

    # ------------------------------------------------------------------ prediction

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return samples as :meth:`sample` does, for what a loader gives.

        Args:
            batch: Latents z (N, latent_dim), or ``(z, y)`` with labels or conditions; or how many samples to draw, an
                integer. Without labels all classes come in turn.
            batch_idx: Its number.
            dataloader_idx: The loader's.

        Raises:
            ConfigurationError: If the batch is something else.
        """
        module: Any = self
        if (isinstance(batch, int) or _is_count(batch)) and int(batch) > 0:
            return module.sample(int(batch))  # type: ignore[no-any-return]
        z, y = (batch, None) if isinstance(batch, Tensor) else _pair(batch)
        if not isinstance(z, Tensor) or z.dim() != 2 or z.shape[1] != module.latent_dim:
            shown = f"a tensor of shape {list(z.shape)}" if isinstance(z, Tensor) else repr(z)
            raise ConfigurationError(
                message(
                    f"what a GAN predicts from must be latents (N, {module.latent_dim}), a pair of these and labels, "
                    "or a number of samples",
                    received=shown if len(shown) < 80 else type(z).__name__,
                    fix=f"give the loader torch.randn(num_samples, {module.latent_dim})",
                )
            )
        if module.condition is not None:
            return module.sample(len(z), latents=z, conditions=y)  # type: ignore[no-any-return]
        if y is not None and module.num_classes:
            y = class_numbers(y, leading=z.shape[:1], num_classes=module.num_classes)
        return module.sample(len(z), latents=z, labels=y if module.num_classes else None)  # type: ignore[no-any-return]


def _is_count(batch: Any) -> bool:
    return isinstance(batch, Tensor) and batch.numel() == 1 and not batch.is_floating_point()


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2:
        return batch[0], batch[1] if len(batch) == 2 else None
    return batch, None


def may_validate(module: Any) -> bool:
    """Whether a module's Trainer may validate it: unless it fits it without a validation loader."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None or trainer.state.fn != "fit":
        return True
    return bool(trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined())


def check_plain_data(data: Any) -> None:
    """Refuse the data of a federation where a GAN is trained by itself.

    Raises:
        ConfigurationError: If it is.
    """
    if callable(getattr(data, "client_batches", None)) and not getattr(data, "is_client_view", False):
        raise ConfigurationError(
            message(
                f"a {type(data).__name__} must be trained with a FederatedOrchestrator, or pooled",
                received="a GAN by itself in a Trainer with it",
                fix=POOLED,
            )
        )
