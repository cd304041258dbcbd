"""The client: a GAN as an ordinary LightningModule. It knows nothing of federation.

``L.Trainer().fit(GAN(...), data)`` is the centralised baseline. In a federation the same class is trained on each
client by a per-round Trainer. What a Trainer does beside training it is in :mod:`.trainer_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedgan_lightning.gan.abilities import AlgorithmAbilities
from fedgan_lightning.gan.augment import Augmentation, LeCam
from fedgan_lightning.gan.average import make_ema
from fedgan_lightning.gan.checks import (
    INTERVALS,
    check_minibatch,
    check_networks,
    check_precision,
    check_settings,
)
from fedgan_lightning.gan.conditions import Codec, Condition
from fedgan_lightning.gan.draws import Draws, draw_step_noise
from fedgan_lightning.gan.example_privacy import ExampleLevelPrivacy, alone, check_gan
from fedgan_lightning.gan.exporting import Exporting
from fedgan_lightning.gan.layout import lay_out
from fedgan_lightning.gan.objectives import AdversarialLoss, NonSaturating
from fedgan_lightning.gan.optimizers import OptimizerCallable, SchedulerCallable, dcgan_adam
from fedgan_lightning.gan.penalties import Penalty
from fedgan_lightning.gan.priors import Normal, Prior
from fedgan_lightning.gan.private_steps import DATA_FREE, PrivateSteps
from fedgan_lightning.gan.restoring import Restorable, drop_hyperparameters
from fedgan_lightning.gan.sampling import Sampling
from fedgan_lightning.gan.statistics import StepMeans
from fedgan_lightning.gan.steps import DuePenalty, Stats, discriminator_step, generator_step, shares_passes
from fedgan_lightning.gan.trainer_steps import TrainerSteps, check_plain_data
from fedgan_lightning.options import as_plain, checked
from fedgan_lightning.protocol import RoundInfo

#: Attributes of parts of a GAN that begin anew with every round.
OF_A_ROUND = {"_is_validated", "_random_state", "_noise_streams", "trains_only_discriminator", "_given_fakes"}
#: Arguments that loggers show.
HYPERPARAMETERS = ("updates", "d_steps", "g_steps", "fake_labels", *list(INTERVALS)[2:])


class GAN(AlgorithmAbilities, PrivateSteps, Sampling, TrainerSteps, Exporting, Restorable, L.LightningModule):
    """A generator and a discriminator trained against each other by manual optimization.

    One local step is one call of ``training_step``: ``d_steps`` discriminator updates, then ``g_steps`` generator
    updates. The minibatch is split into ``d_steps`` parts, so that every discriminator update sees fresh real samples.

    Batches are ``(x, y)``, ``(x,)``, ``x``, or a mapping with ``image``, ``x``, ``pixel_values`` or ``img``, and
    ``label``, ``y`` or ``labels``. Labels are integers (N,) or (N, 1), or one-hot (N, C); unconditional networks ignore
    them. The first minibatch of a fit is checked: images for a generator that ends in tanh must lie in [-1, 1]; those
    of bytes (uint8) are brought there. ``load_from_checkpoint`` needs no arguments where all parts are this package's.

    Args:
        generator: (z, y) -> samples; has ``latent_dim``, and ``num_classes`` if conditional.
        discriminator: (x, y) -> logits of any shape, or (logits, class logits) for an auxiliary classifier (ACGAN).
            One with a true ``per_sample`` says that row i of its outputs depends on sample i alone: real and generated
            samples then share a pass, unless it has BatchNorm, dropout or spectral norm.
        loss: Adversarial loss; default non-saturating.
        penalties: Terms added to the discriminator's loss.
        generator_optimizer: Makes the generator's optimizer; default Adam 2e-4 (.5, .999).
        discriminator_optimizer: Makes the discriminator's; other rates here than above give two time-scales.
        generator_scheduler: Makes a learning-rate schedule, stepped once per local step.
        discriminator_scheduler: The same for the discriminator.
        updates: ``alternating``: the generator's step sees the discriminator's new parameters, as in usual GAN code.
            ``simultaneous``: both step from the old point, as in FedGAN's algorithm 1; one step of each.
        d_steps: Discriminator updates per local step.
        g_steps: Generator updates per local step.
        prior: Distribution of z; default normal.
        fake_labels: Labels to generate in training: ``held`` takes those of the real minibatch, hence only classes that
            this client holds; ``balanced`` draws uniformly from the classes in the real minibatch, so that a client's
            rare classes are generated as often as its common ones; ``all`` draws uniformly from all classes.
        auxiliary_weight: Weight of the classification terms of an auxiliary classifier.
        ema_half_life_images: Half-life, in images, of the moving average of the generator that is used for sampling
            and metrics; ``None`` keeps no average. In a federation the average lives on the server, and moves by the
            mean number of images that a client of the round has seen. ``sample`` gives it its own BatchNorm statistics.
        ema_rampup: Share of the images seen so far that the half-life does not exceed, so that the average does not
            lag behind weights that still improve fast; ``None`` keeps the half-life constant.
        clip_gradient_norm: Largest norm of each network's gradient; ``None`` does not clip.
        augment: Augmentation of the images that the discriminator sees.
        anchor: Anchors for the discriminator's logits.
        condition: Makes what the networks see beside samples from the real ones, instead of their labels.
        codec: Translates between the data's samples and what the networks see.
        privacy: Example-level differential privacy of the discriminator's steps, in a federation.

    Raises:
        ConfigurationError: If the arguments contradict each other.
    """

    #: Attributes that say what was checked already, and those that begin anew with every round of a client.
    checked_attributes = frozenset({"_checked_stages"})
    round_attributes = frozenset({"local_step", "_means", "_in_federation", "_shares_passes"}) | OF_A_ROUND

    @checked(**INTERVALS)
    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        loss: AdversarialLoss | None = None,
        penalties: Sequence[Penalty] = (),
        generator_optimizer: OptimizerCallable = dcgan_adam,
        discriminator_optimizer: OptimizerCallable = dcgan_adam,
        generator_scheduler: SchedulerCallable | None = None,
        discriminator_scheduler: SchedulerCallable | None = None,
        updates: Literal["alternating", "simultaneous"] = "alternating",
        d_steps: int = 1,
        g_steps: int = 1,
        prior: Prior | None = None,
        fake_labels: Literal["held", "balanced", "all"] = "held",
        auxiliary_weight: float = 1.0,
        ema_half_life_images: float | None = None,
        ema_rampup: float | None = 0.05,
        clip_gradient_norm: float | None = None,
        augment: Augmentation | None = None,
        anchor: LeCam | None = None,
        condition: Condition | None = None,
        codec: Codec | None = None,
        privacy: ExampleLevelPrivacy | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = generator, discriminator
        self.loss = loss if loss is not None else NonSaturating()
        self.penalties = tuple(penalties)
        self.generator_optimizer, self.discriminator_optimizer = generator_optimizer, discriminator_optimizer
        self.generator_scheduler, self.discriminator_scheduler = generator_scheduler, discriminator_scheduler
        self.updates, self.d_steps, self.g_steps = updates, d_steps, g_steps
        self.prior = prior if prior is not None else Normal()
        self.fake_labels, self.auxiliary_weight = fake_labels, auxiliary_weight
        self.ema_half_life_images, self.ema_rampup = ema_half_life_images, ema_rampup
        self.clip_gradient_norm = clip_gradient_norm
        self.augment, self.anchor = augment, anchor
        self.condition, self.codec, self.privacy = condition, codec, privacy
        #: Dimension of z.
        self.latent_dim = int(generator.latent_dim)  # type: ignore[arg-type]
        self.num_classes = int(getattr(generator, "num_classes", 0))
        check_settings(self)
        if privacy is not None:
            check_gan(self)
        self.generator_ema: nn.Module | None = make_ema(generator) if ema_half_life_images is not None else None
        #: Local steps since the start of training; schedules and lazy penalties count in these.
        self.local_step = 0
        self._means = StepMeans()
        self._in_federation = False
        self._shares_passes = False
        self._checked_stages: set[str] = set()
        if not self.has_own_constructor():
            self.save_hyperparameters({name: as_plain(getattr(self, name)) for name in HYPERPARAMETERS})

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample, where the networks state it."""
        shape = getattr(self.generator, "sample_shape", None)
        return None if shape is None else tuple(shape)

    def default_sync(self) -> dict[str, str]:
        """Return where networks live unless settings say otherwise: the average stays at the server."""
        return {"generator_ema": "server"}

    # ------------------------------------------------------------------ checks before training

    def setup(self, stage: str) -> None:
        check_precision(self)
        if stage == "fit":
            self.lay_out()
        data: Any = getattr(self.trainer, "datamodule", None)
        check_plain_data(data)
        if hasattr(data, "sample_shape"):
            self.check_data(data.sample_shape, getattr(data, "num_classes", 0))

    def lay_out(self) -> None:
        """Choose the memory layout of both networks; see :func:`~fedgan_lightning.gan.layout.lay_out`."""
        for network in (self.generator, self.discriminator):
            lay_out(network)

    def check_data(self, sample_shape: Sequence[int], num_classes: int) -> None:
        """Pass two samples through both networks.

        Args:
            sample_shape: Shape of one sample of the data.
            num_classes: Its number of classes.

        Raises:
            ConfigurationError: If networks and data do not fit.
        """
        check_networks(self, sample_shape=tuple(sample_shape), num_classes=num_classes)

    # ------------------------------------------------------------------ training

    def configure_optimizers(self) -> Any:
        optimizers = [
            self.generator_optimizer(self.generator.parameters()),
            self.discriminator_optimizer(self.discriminator.parameters()),
        ]
        makers = (self.generator_scheduler, self.discriminator_scheduler)
        return optimizers, [maker(optimizer) for maker, optimizer in zip(makers, optimizers) if maker is not None]

    def on_client_round_start(self, info: RoundInfo) -> None:
        """Continue counting local steps where this round's minibatches start."""
        self.local_step = info.first_step
        self._in_federation = True
        if self.privacy is not None:
            self.begin_private_round([(info.cohort[0], info.round)])

    def on_fit_start(self) -> None:
        if not self._in_federation:  # there, the first minibatch of a run is checked, and not that of every round
            self._checked_stages.clear()
            if self.privacy is not None:
                raise alone()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = self.prepared(batch, stage="fit")
        try:
            self._train_on(x, y)
        except (RuntimeError, IndexError) as error:
            if not isinstance(error, torch.OutOfMemoryError):
                self.check_minibatch(x, y)  # a later one may have another shape, or a label that the first one had not
            raise

    def _train_on(self, x: Tensor, y: Tensor) -> None:
        """Take the steps of both networks on one minibatch."""
        num_images = y.shape[-1]
        check_minibatch(num_images, d_steps=self.d_steps)
        opt_g, opt_d = self.optimizers()  # type: ignore[misc, attr-defined]
        samples_dim = y.dim() - 1
        parts = list(zip(x.chunk(self.d_steps, dim=samples_dim), y.chunk(self.d_steps, dim=samples_dim)))
        if self.updates == "simultaneous" and not self.trains_only_discriminator:
            self._backward_discriminator(opt_d, *parts[0])
            self._backward_generator(opt_g, *parts[0])
            opt_d.step()
            opt_g.step()
        else:
            for part in parts:
                self._backward_discriminator(opt_d, *part)
                opt_d.step()
            for _ in range(0 if self.trains_only_discriminator else self.g_steps):
                self._backward_generator(opt_g, *parts[-1])
                opt_g.step()
        schedulers = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if scheduler is not None:
                scheduler.step()  # type: ignore[call-arg]
        self.local_step += 1
        self._means.step()
        self.update_ema(num_images=num_images)

    def _backward_discriminator(self, optimizer: Any, x: Tensor, y: Tensor) -> None:
        if self.privacy is not None:
            self.backward_privately(optimizer, x, y)
            return
        due = self.due_penalties()
        draws = self.draw(y, dtype=x.dtype, mix=any(penalty.needs_mix for penalty, _ in due))
        labels, draws = self.conditioned(x, y, draws)
        generate, draws = self.with_given_fakes(self.generate, draws)
        step = discriminator_step(
            generate,
            self.discriminate,
            loss=self.loss,
            penalties=due,
            auxiliary_weight=self.auxiliary_weight,
            x=x,
            y=labels,
            draws=draws,
            anchor=self.anchored if self.anchor is not None else None,
            vmap_over_clients=self.vmap_over_clients,
            together=y.dim() - 1 if self._shares_passes else None,
        )
        self._backward(optimizer, step.loss)
        self._means.add(step.stats, scale=1.0 / self.d_steps)
        if self.augment is not None:
            self.augment.adapt(step.real_logits, num_images=y.shape[-1])
        if self.anchor is not None:
            self.anchor.update_(step.real_logits, step.fake_logits)

    def _backward_generator(self, optimizer: Any, x: Tensor, y: Tensor) -> None:
        if self.privacy is not None:
            x, y = torch.zeros_like(x), torch.zeros_like(y)  # of samples there is a number, and it is public
        loss, stats = self.generator_terms(x, *self.conditioned(x, y, self.draw(y, dtype=x.dtype)))
        self._backward(optimizer, loss)
        self._means.add(stats, scale=1.0 / self.g_steps)

    def generator_terms(self, x: Tensor, y: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the generator's loss, and scalars of it, for real samples, labels or conditions, and random inputs."""
        return generator_step(
            self.generate,
            self.discriminate,
            loss=self.loss,
            auxiliary_weight=self.auxiliary_weight,
            x=x,
            y=y,
            draws=draws,
            extra_losses=None if self.condition is None else self.vmap_over_clients(self.condition.extra_losses),
            vmap_over_clients=self.vmap_over_clients,
        )

    def _backward(self, optimizer: Any, loss: Tensor) -> None:
        """Compute the gradients of this optimizer's parameters, and of no others.

        It does what toggling does, in less time: nothing of the other network is differentiated.
        """
        optimizer.zero_grad()  # also of parameters that have been frozen since, whose old gradients would go on acting
        inputs = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.manual_backward(loss.sum() if loss.dim() else loss, inputs=inputs)

    # ------------------------------------------------------------------ what differs when several clients are stacked

    def generate(self, z: Tensor, y: Tensor) -> Tensor:
        """Return G(z, y)."""
        samples: Tensor = self.generator(z, y)
        return samples

    def discriminate(self, x: Tensor, y: Tensor, u: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """Return D(T_u(x), y): logits, or (logits, class logits)."""
        output: Tensor | tuple[Tensor, Tensor] = self.discriminator(self.augmented(x, u), y)
        return output

    def augmented(self, x: Tensor, u: Tensor | None) -> Tensor:
        """Return what the discriminator sees of ``x``."""
        if self.augment is None or u is None:
            return x
        chance = () if self.augment.probability is None else (self.augment.probability,)
        seen: Tensor = self.vmap_over_clients(self.augment.transform)(x, u, *chance)
        return seen

    def anchored(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return the anchor's term; zero before it starts."""
        assert self.anchor is not None
        anchors = (self.anchor.real, self.anchor.fake)
        term: Tensor = self.vmap_over_clients(self.anchor.value)(real_logits, fake_logits, *anchors)
        return term * self.since(self.anchor.start_step)

    def since(self, step: int) -> Tensor | float:
        """Return 1 from local step ``step`` on, 0 before."""
        return float(self.local_step >= step)

    def vmap_over_clients(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` for the clients that this module trains: here one, so the function itself."""
        return function

    def conditioned(self, x: Tensor, y: Tensor, draws: Draws) -> tuple[Tensor, Draws]:
        """Return the labels or conditions of real samples, and the draws with those of generated ones."""
        if self.condition is None or draws.condition is None:
            return y, draws
        condition = self.vmap_over_clients(self.condition.make)(x, y, draws.condition)
        return condition, replace(draws, y=condition)

    def due_penalties(self) -> list[DuePenalty]:
        """Return the penalties of the coming step."""
        return [(penalty, None) for penalty in self.penalties if penalty.is_due(self.local_step)]

    def draw(
        self, y: Tensor, *, dtype: torch.dtype, mix: bool = False, generator: torch.Generator | None = None
    ) -> Draws:
        """Return what one step needs; arguments are those of :func:`~fedgan_lightning.gan.draws.draw_step_noise`."""
        return draw_step_noise(
            y,
            latents=self.prior.draw,
            latent_dim=self.latent_dim,
            fake_labels=self.fake_labels,
            num_classes=self.num_classes,
            num_augment=None if self.augment is None else self.augment.num_random,
            num_condition=None if self.condition is None else self.condition.num_random,
            mix=mix,
            dtype=dtype,
            generator=generator,
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.clip_gradient_norm is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip_gradient_norm, gradient_clip_algorithm="norm")

    # ------------------------------------------------------------------ statistics

    def on_train_epoch_start(self) -> None:
        self._shares_passes = shares_passes(self.discriminator, self.augment)
        penalised = bool(self.penalties) and self.privacy is None
        self._means.clear(**({"penalty": torch.zeros((), device=self.device)} if penalised else {}))

    def round_statistics(self) -> Stats:
        """Return the means over the epoch so far: ``loss_d``, ``loss_g``, ``d_real`` = E D(x), ``d_fake`` = E
        D(G(z)), ``penalty``, and the condition's extra losses.
        """
        found = self._means.values()
        return found if self.privacy is None else {name: found[name] for name in DATA_FREE if name in found}

    def on_train_epoch_end(self) -> None:
        if not self._in_federation:  # there, the client's Trainer has no logger, and round_statistics is asked for
            for name, value in self.round_statistics().items():
                self.log(name, value, prog_bar=name.startswith("loss"))

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["local_step"] = self.local_step
        self.describe_into(checkpoint)
        drop_hyperparameters(checkpoint, HYPERPARAMETERS)
        checkpoint["state_dict"] = {name: value.contiguous() for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.local_step = int(checkpoint.get("local_step", 0))
        self.name_as_here(checkpoint)
