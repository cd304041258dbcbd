"""One discriminator step and one generator step as pure functions of networks, data and noise.

All randomness comes in as arguments, and nothing is written. With ``vmap_over_clients=torch.vmap`` and networks
that accept a leading dimension of clients, the same functions compute the losses of several clients at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from fedgan_lightning.gan.augment import Augmentation
from fedgan_lightning.gan.draws import Draws
from fedgan_lightning.gan.objectives import AdversarialLoss, auxiliary_classifier
from fedgan_lightning.gan.penalties import Penalty, VmapOverClients, once

Generate = Callable[[Tensor, Tensor], Tensor]
#: (x, y, u) -> logits, or (logits, class logits); u are the numbers of an augmentation, or None.
Discriminate = Callable[[Tensor, Tensor, Tensor | None], Tensor | tuple[Tensor, Tensor]]
Stats = dict[str, Tensor]
#: Layers that make two passes something else than one: statistics of a minibatch, draws, and spectral norm's iteration.
MINIBATCH_LAYERS = (_NormBase, _DropoutNd, nn.RReLU, ParametrizationList)
#: A penalty that is due on this step; for several clients with a factor for each, 1 where it is due and 0 elsewhere.
DuePenalty = tuple[Penalty, Tensor | None]


class DiscriminatorStep(NamedTuple):
    """Loss and statistics of a step, and the logits that it came from, detached."""

    loss: Tensor
    stats: Stats
    real_logits: Tensor
    fake_logits: Tensor


def split_heads(output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return (logits, class logits or None), whichever the discriminator gave."""
    return output if isinstance(output, tuple) else (output, None)


def shares_passes(discriminator: nn.Module, augment: Augmentation | None = None) -> bool:
    """Whether real and generated samples may pass a discriminator together: it says that nothing passes between samples
    (``per_sample``), and none of its layers looks at a whole minibatch, draws, or changes with every pass. Nor may the
    augmentation before it: a transform by somebody else may mix samples.
    """
    if augment is not None and type(augment).transform is not Augmentation.transform:
        return False
    if not getattr(discriminator, "per_sample", False) or not _says_so_of_its_pass(discriminator):
        return False
    return not any(map(_looks_at_minibatches, discriminator.modules()))


def _says_so_of_its_pass(discriminator: nn.Module) -> bool:
    """Whether ``per_sample`` was said of this very ``forward``, and not of one that a subclass has replaced."""
    for level in (discriminator, *type(discriminator).__mro__):
        if "per_sample" in vars(level):
            return True
        if "forward" in vars(level):
            return False
    return False


def _looks_at_minibatches(layer: nn.Module) -> bool:
    hooks = layer._forward_pre_hooks.values()
    attention = isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0
    return attention or isinstance(layer, MINIBATCH_LAYERS) or any(isinstance(hook, SpectralNorm) for hook in hooks)


def discriminator_step(
    generate: Generate,
    discriminate: Discriminate,
    *,
    loss: AdversarialLoss,
    penalties: Sequence[DuePenalty],
    auxiliary_weight: float,
    x: Tensor,
    y: Tensor,
    draws: Draws,
    anchor: Callable[[Tensor, Tensor], Tensor] | None = None,
    vmap_over_clients: VmapOverClients = once,
    together: int | None = None,
) -> DiscriminatorStep:
    """Return the discriminator's loss on one minibatch, detached statistics and logits.

    Loss: adversarial term + penalties + anchor + auxiliary_weight * (L_C on real + L_C on generated), the last for
    ACGAN only. Gradients of penalties are taken with respect to images before augmentation.

    Args:
        generate: (z, y) -> samples.
        discriminate: (x, y, u) -> logits, or (logits, class logits).
        loss: The adversarial loss.
        penalties: Those due on this step.
        auxiliary_weight: Weight of ACGAN's classification terms.
        x: Real samples (N, ...).
        y: Their labels (N,), or conditions (N, ...).
        draws: All randomness of the step.
        anchor: (real logits, fake logits) -> a term that holds them.
        vmap_over_clients: Maps a function of one client's tensors over clients.
        together: Dimension of samples, where real and generated ones may pass the discriminator together: where it
            treats every sample by itself. ``None`` takes one after the other.
    """
    y_fake, (on_real, on_fake) = draws.y, draws.sides
    with torch.no_grad():
        fake = generate(draws.z, y_fake)
    both = _on_both(discriminate, (x, y, on_real), (fake, y_fake, on_fake), together=together)
    (real_logits, real_classes), (fake_logits, fake_classes) = both
    total = vmap_over_clients(loss.discriminator)(real_logits, fake_logits)
    if real_classes is not None and fake_classes is not None:
        classify = vmap_over_clients(auxiliary_classifier)
        total = total + auxiliary_weight * (classify(real_classes, y) + classify(fake_classes, y_fake))
    if anchor is not None:
        total = total + anchor(real_logits, fake_logits)
    probability = vmap_over_clients(mean_probability)
    stats = {"d_real": probability(real_logits.detach()), "d_fake": probability(fake_logits.detach())}
    if penalties:
        # The gradient of a gradient loses 1 % of its value in bfloat16 (measured), so penalties run in full precision.
        with torch.autocast(device_type=x.device.type, enabled=False):
            full = fake.to(x.dtype)
            value = torch.zeros((), device=x.device, dtype=x.dtype)
            for penalty, factor in penalties:
                critic = _critic(discriminate, *((y_fake, on_fake) if penalty.on_fake else (y, on_real)))
                term = penalty(critic, x, full, draws.mix, vmap_over_clients=vmap_over_clients)
                value = value + (term if factor is None else factor * term)
        total = total + value
        stats["penalty"] = value.detach()
    stats["loss_d"] = total.detach()
    return DiscriminatorStep(total, stats, real_logits.detach(), fake_logits.detach())


def generator_step(
    generate: Generate,
    discriminate: Discriminate,
    *,
    loss: AdversarialLoss,
    auxiliary_weight: float,
    x: Tensor,
    y: Tensor,
    draws: Draws,
    extra_losses: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]] | None = None,
    vmap_over_clients: VmapOverClients = once,
) -> tuple[Tensor, Stats]:
    """Return the generator's loss on one minibatch, and detached statistics; arguments as in
    :func:`discriminator_step`, and ``extra_losses``, (generated, real, conditions) -> weighted terms by name to add.

    Real samples enter only where the loss pairs them with generated ones, and in ``extra_losses``.
    """
    y_fake, (on_real, on_fake) = draws.y, draws.sides
    fake = generate(draws.z, y_fake)
    fake_logits, fake_classes = split_heads(discriminate(fake, y_fake, on_fake))
    logits = (fake_logits, split_heads(discriminate(x, y, on_real))[0]) if loss.pairs_real else (fake_logits,)
    total = vmap_over_clients(loss.generator)(*logits)
    if fake_classes is not None:
        total = total + auxiliary_weight * vmap_over_clients(auxiliary_classifier)(fake_classes, y_fake)
    stats: Stats = {}
    for name, term in (extra_losses(fake, x, y_fake) if extra_losses is not None else {}).items():
        total, stats[name] = total + term, term.detach()
    return total, {"loss_g": total.detach(), **stats}


def mean_probability(logits: Tensor) -> Tensor:
    """Return E sigmoid(logits), a scalar: D's mean belief that samples are real."""
    return logits.float().sigmoid().mean()


def _on_both(
    discriminate: Discriminate,
    real: tuple[Tensor, Tensor, Tensor | None],
    fake: tuple[Tensor, Tensor, Tensor | None],
    *,
    together: int | None,
) -> list[tuple[Tensor, Tensor | None]]:
    """Return the discriminator's heads on real and on generated samples.

    In one pass its weights are read once, and their gradient is one product and not the sum of two: a quarter of the
    time of stacked MNIST MLPs (measured).
    """
    if together is None or real[0].shape[together + 1 :] != fake[0].shape[together + 1 :]:
        return [split_heads(discriminate(*inputs)) for inputs in (real, fake)]
    x, y = (torch.cat(pair, dim=together) for pair in zip(real[:2], fake[:2]))
    u = None if real[2] is None or fake[2] is None else torch.cat([real[2], fake[2]], dim=together)
    logits, classes = split_heads(discriminate(x, y, u))
    sizes = [real[0].shape[together], fake[0].shape[together]]  # a prior may have a number of nodes of its own
    parts = [(None, None) if heads is None else _parted(heads, sizes, dim=together) for heads in (logits, classes)]
    return list(zip(*parts))


def _parted(values: Tensor, sizes: list[int], *, dim: int) -> tuple[Tensor, Tensor]:
    """Return the first and the second part; views of their own, which a loss may change in place."""
    first, second = sizes
    return values.narrow(dim, 0, first), values.narrow(dim, first, second)


def _critic(discriminate: Discriminate, labels: Tensor, u: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda samples: split_heads(discriminate(samples, labels, u))[0]
