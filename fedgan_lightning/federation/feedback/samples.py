"""The generator's samples that a round sends to clients, and their gradients that come back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedgan_lightning.errors import refuse_first
from fedgan_lightning.federation.generator_options import check_options
from fedgan_lightning.seeding import derive_seed, isolated_rng, make_generator

Labels = Literal["uniform", "clients"]
#: What a module must have, beside the options of a GAN.
NEEDED = (
    *("generator", "discriminator", "loss", "prior", "latent_dim", "num_classes", "sample_shape", "generate"),
    *("generate_with_graph", "generator_feedback", "feedback", "only_discriminator", "generator_optimizer"),
    "check_needs_no_reals",
)


@dataclass(frozen=True)
class Inputs:
    """What one batch of a round is generated from; samples follow from it and the generator, and are not kept.

    Attributes:
        z: Latents (b, latent_dim).
        labels: Classes (b,); zeros where the generator takes none.
        seed: Of what the generator draws itself, such as dropout: samples that are made again are the same.
    """

    z: Tensor
    labels: Tensor
    seed: int = 0


def draw_inputs(
    model: Any, *, count: int, num_batches: int, seed: int, round: int, labels: Labels, counts: Tensor | None
) -> list[Inputs]:
    """Return the inputs of a round's batches: a pure function of these arguments.

    Args:
        model: The GAN.
        count: Samples b of a batch.
        num_batches: Batches of the round.
        seed: The federation's seed.
        round: Rounds completed before this one.
        labels: ``uniform`` draws evenly from classes that somebody holds, ``clients`` as often as clients hold them.
        counts: Labels (clients, classes) that clients hold; ``None`` where nobody has any, or nobody says.
    """
    source, like = make_generator(seed, "fakes", round), next(model.generator.parameters())
    where = {"device": like.device, "dtype": like.dtype}
    shares = None
    if model.num_classes:
        shares = torch.ones(model.num_classes, dtype=torch.float64)
        if counts is not None:
            held = counts.double().sum(0)[: model.num_classes]
            shares = held if labels == "clients" else (held > 0).double()
    found = []
    for slot in range(num_batches):
        z = model.prior.sample(count, model.latent_dim, generator=source, **where)
        classes = torch.zeros(count, dtype=torch.long)
        if shares is not None:
            classes = torch.multinomial(shares, count, replacement=True, generator=source)
        found.append(Inputs(z, classes.to(like.device), derive_seed(seed, "fakes of", round, slot)))
    return found


@torch.no_grad()
def generated(model: Any, batches: Sequence[Inputs]) -> list[Tensor]:
    """Return G(z, y) of every batch as in training, and leave the generator's running statistics as they were."""
    with _training(model), _statistics_kept(model.generator):
        found = []
        for own in batches:
            with isolated_rng(own.seed, device=own.z.device):
                found.append(model.generate(own.z, own.labels).detach().clone())
        return found


def generator_gradients(model: Any, batches: Sequence[Inputs], feedback: Mapping[int, Tensor]) -> list[Tensor]:
    """Return sum_j sum_s F_j,s dG(z_j,s)/dw for every parameter w of the generator.

    Every batch is generated again, with the statistics of its own samples, which move running statistics once.

    Args:
        model: The GAN.
        batches: The round's batches.
        feedback: F by batch, of the shape of its samples; batches without one count as zero.
    """
    parameters = list(model.generator.parameters())
    found = [torch.zeros_like(own) for own in parameters]
    with _training(model):
        for slot, inputs in enumerate(batches):
            with isolated_rng(inputs.seed, device=inputs.z.device):
                samples = model.generate_with_graph(inputs.z, inputs.labels)
            if slot not in feedback:
                continue
            own = feedback[slot].to(samples)
            grads = torch.autograd.grad(samples, parameters, own, allow_unused=True)
            for total, value in zip(found, grads):
                if value is not None:
                    total += value
    return found


def check_gan(model: Any, *, who: str, num_samples: int, minibatch: int | None) -> None:
    """Refuse a module whose generator cannot learn from gradients on its samples.

    Raises:
        ConfigurationError: If it cannot, or settings of it would be ignored.
    """
    missing = [name for name in NEEDED if not hasattr(model, name)]
    wrong: list[tuple[bool, str, str, str]] = [
        (
            bool(missing),
            "have a module with the abilities of a GAN",
            f"{type(model).__name__} without {missing}",
            "add them (see fedgan_lightning.gan.abilities), or use another algorithm",
        ),
    ]
    if not missing:
        model.check_needs_no_reals()
        check_options(model, who=who)
        wrong += _of_gan(model, num_samples=num_samples, minibatch=minibatch or 0)
    refuse_first(wrong, prefix=f"{who} must ")


def _of_gan(model: Any, *, num_samples: int, minibatch: int) -> list[tuple[bool, str, str, str]]:
    """Return what a GAN must not have: whether it has it, the rule, the value and the fix."""
    return [
        (
            model.sample_shape is None,
            "know the shape of a sample",
            f"{type(model.generator).__name__} without sample_shape",
            "give the generator an attribute sample_shape",
        ),
        (
            minibatch > num_samples,
            "send as many samples as a minibatch has",
            f"num_samples={num_samples} with minibatches of {minibatch}",
            f"set num_samples to {minibatch}",
        ),
    ]


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Put buffers back after the body: running statistics, and the vectors of spectral norm."""
    before = {name: own.clone() for name, own in network.named_buffers()}
    try:
        yield
    finally:
        for name, own in network.named_buffers():
            own.copy_(before[name])
