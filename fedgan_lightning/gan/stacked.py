"""Several clients' GANs as one LightningModule, trained in the time of a few."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.gan.draws import Draws
from fedgan_lightning.gan.module import GAN
from fedgan_lightning.gan.steps import DuePenalty, Stats
from fedgan_lightning.gan.tracing import MappedFunctions
from fedgan_lightning.protocol import RoundInfo

#: Arguments of GAN that are modules.
MODULES = ("generator", "discriminator", "augment", "anchor")
#: Most latent numbers that are drawn ahead of their use: 16 MB in float32.
NUMBERS_AHEAD = 1 << 22
#: What this class replaces or relies on: a subclass of GAN that overrides one of these trains in a way of its own.
TRAINING = (
    "training_step",
    "prepared",
    "configure_optimizers",
    "generate",
    "discriminate",
    "augmented",
    "anchored",
    "conditioned",
    "since",
    "draw",
    "due_penalties",
    "update_ema",
    "forward",
    "on_before_optimizer_step",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_start",
    "on_fit_start",
    "on_train_start",
    "on_train_end",
    "on_client_round_start",
    "round_statistics",
    "backward_privately",
)


class StackedGAN(GAN):
    """A GAN whose parameters and buffers have a leading dimension of clients.

    Batches are ``(x, y)`` of shapes (clients, N, ...) and (clients, N). The networks are mapped over clients by
    ``torch.vmap``; the loss is the sum of the clients' losses, so that each client's gradient is its own. Every client
    draws from a generator of its own, in the order in which it would draw alone.

    Args:
        gan: The module of one client; its tensors get their leading dimension when a cohort is loaded.

    Raises:
        ConfigurationError: If a subclass trains in a way of its own.
    """

    label_dims = 2

    def __init__(self, gan: GAN) -> None:
        overridden = [name for name in TRAINING if getattr(type(gan), name) is not getattr(GAN, name)]
        if overridden:
            raise ConfigurationError(
                message(
                    "stacked clients must train as GAN does",
                    received=f"{type(gan).__name__} with {', '.join(overridden)} of its own",
                    fix="give it a method stacked() as well, or use the sequential executor",
                )
            )
        names = [name for name in inspect.signature(GAN.__init__).parameters if name != "self"]
        settings = {name: getattr(gan, name) for name in names}
        settings["ema_half_life_images"] = None
        settings |= {name: copy.deepcopy(settings[name]) for name in MODULES}
        super().__init__(**settings)
        self.ema_half_life_images = gan.ema_half_life_images
        self.generator_ema = copy.deepcopy(gan.generator_ema)
        self._generators: list[torch.Generator] = []
        self._first_steps: list[int] = []
        self._values: dict[nn.Module, dict[str, Tensor]] = {}
        self._mapped = MappedFunctions()
        self._latents: list[Tensor] = []
        self._draws_left = 0

    def lay_out(self) -> None:
        """Nothing: maps of several clients have a dimension more than layouts of pictures know."""

    # ------------------------------------------------------------------ the cohort

    def on_stack_round_start(self, infos: Sequence[RoundInfo], generators: Sequence[torch.Generator]) -> None:
        """Begin a round of these clients, in the order of the stacked tensors."""
        self.local_step = 0
        self._first_steps, self._generators = [info.first_step for info in infos], list(generators)
        self._in_federation = True
        if self.privacy is not None:
            self.begin_private_round([(info.cohort[0], info.round) for info in infos])
        self._values, self._latents = {}, []
        self._mapped.renew()
        self._draws_left = max(info.num_steps for info in infos) * (self.d_steps + self.g_steps)

    def keep_clients(self, count: int) -> None:
        """Go on with the first ``count`` clients; the others have done their steps."""
        self._first_steps, self._generators = self._first_steps[:count], self._generators[:count]
        self._means.keep(count)
        self._noise_streams = self._noise_streams[:count]
        self._latents = [latents[:count] for latents in self._latents]
        self._values = {}

    def round_statistics(self) -> Stats:
        """Return the means over the round so far, (clients,) each."""
        count = len(self._generators)
        return {name: value.expand(count) for name, value in super().round_statistics().items()}

    # ------------------------------------------------------------------ what differs from one client

    def generate(self, z: Tensor, y: Tensor) -> Tensor:
        samples: Tensor = self._map(self.generator, z, y)
        return samples

    def discriminate(self, x: Tensor, y: Tensor, u: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        output: Tensor | tuple[Tensor, Tensor] = self._map(self.discriminator, self.augmented(x, u), y)
        return output

    def since(self, step: int) -> Tensor | float:
        on = [first + self.local_step >= step for first in self._first_steps]
        if all(on):
            return 1.0
        return torch.tensor(on, device=self.device, dtype=torch.get_default_dtype())

    def _map(self, network: nn.Module, *inputs: Tensor) -> Any:
        if network not in self._values:
            self._values[network] = {**dict(network.named_parameters()), **dict(network.named_buffers())}

        def call(values: dict[str, Tensor], *arguments: Tensor) -> Any:
            return functional_call(network, values, arguments)

        return self._mapped.call(call, (self._values[network], *inputs), name=network)

    def vmap_over_clients(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: self._mapped.call(function, arguments, name=function)

    def due_penalties(self) -> list[DuePenalty]:
        found: list[DuePenalty] = []
        for penalty in self.penalties:
            due = [penalty.is_due(first + self.local_step) for first in self._first_steps]
            if any(due):
                factor = None if all(due) else torch.tensor(due, device=self.device, dtype=torch.get_default_dtype())
                found.append((penalty, factor))
        return found

    def draw(
        self, y: Tensor, *, dtype: torch.dtype, mix: bool = False, generator: torch.Generator | None = None
    ) -> Draws:
        if not self._draws_more_than_latents:
            return Draws(z=self._next_latents(y.shape[1], device=y.device, dtype=dtype), y=y)
        one, mixers = super().draw, [penalty for penalty in self.penalties if penalty.needs_mix]
        draws = []
        for labels, generator, first in zip(y.unbind(0), self._generators, self._first_steps):
            wanted = mix and any(penalty.is_due(first + self.local_step) for penalty in mixers)
            draws.append(one(labels, dtype=dtype, mix=wanted, generator=generator))
        unused = torch.zeros(y.shape[1], device=y.device, dtype=dtype)  # of clients whose penalty is not due
        weights = [unused if draw.mix is None else draw.mix for draw in draws]
        numbers = [draw.augment for draw in draws if draw.augment is not None]
        conditions = [draw.condition for draw in draws if draw.condition is not None]
        return Draws(
            z=torch.stack([draw.z for draw in draws]),
            y=torch.stack([draw.y for draw in draws]) if self.fake_labels != "held" else y,
            mix=torch.stack(weights) if mix else None,
            augment=torch.stack(numbers) if numbers else None,
            condition=torch.stack(conditions) if conditions else None,
        )

    @property
    def _draws_more_than_latents(self) -> bool:
        labels = self.fake_labels != "held" and self.num_classes > 0
        others = self.augment is not None or self.condition is not None
        return labels or others or any(penalty.needs_mix for penalty in self.penalties)

    def _next_latents(self, count: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return latents (clients, count, latent_dim), drawn for many steps at a time: a call for each client and step
        takes as long as the arithmetic of a small network.
        """
        if not self._latents:
            size = max(1, len(self._generators) * count * self.latent_dim)
            times = max(1, min(self._draws_left, NUMBERS_AHEAD // size))
            self._draws_left -= times
            where = {"device": device, "dtype": dtype}
            latents = [
                self.prior.draw_ahead(times, count, self.latent_dim, generator=generator, **where)
                for generator in self._generators
            ]
            self._latents = list(torch.stack(latents, dim=1).unbind(0))
        return self._latents.pop(0)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip each client's gradient by its own norm."""
        if self.clip_gradient_norm is None:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch.stack([gradient.view(len(gradient), -1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        factors = (self.clip_gradient_norm / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *([1] * (gradient.dim() - 1))))
