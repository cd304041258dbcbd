"""One discriminator step and one generator step as pure functions of networks, data and noise.

All randomness comes in as arguments, and nothing is written. With ``lift=torch.vmap`` and networks that accept a
leading dimension of clients, the same functions compute the losses of several clients at once, one per client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedgan_lightning.gan.objectives import AdversarialLoss, auxiliary_classifier
from fedgan_lightning.gan.penalties import Lift, Penalty, once

Generate = Callable[[Tensor, Tensor], Tensor]
Discriminate = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]
Stats = dict[str, Tensor]
#: A penalty that is due on this step; for several clients with a factor for each, 1 where it is due and 0 elsewhere.
DuePenalty = tuple[Penalty, "Tensor | None"]


def split_heads(output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return (logits, class logits or None), whichever the discriminator gave."""
    return output if isinstance(output, tuple) else (output, None)


def discriminator_step(
    generate: Generate,
    discriminate: Discriminate,
    *,
    loss: AdversarialLoss,
    penalties: Sequence[DuePenalty],
    auxiliary_weight: float,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    y_fake: Tensor,
    mix: Tensor | None,
    lift: Lift = once,
) -> tuple[Tensor, Stats]:
    """Return the discriminator's loss on one minibatch, and detached statistics.

    Loss: adversarial term + penalties + auxiliary_weight * (L_C on real + L_C on generated), the last for ACGAN only.

    Args:
        generate: (z, y) -> samples.
        discriminate: (x, y) -> logits, or (logits, class logits).
        loss: The adversarial loss.
        penalties: Those due on this step.
        auxiliary_weight: Weight of ACGAN's classification terms.
        x: Real samples (N, ...).
        y: Their labels (N,).
        z: Latents (M, latent_dim).
        y_fake: Labels to generate (M,).
        mix: Uniform numbers (N,), where a penalty needs them.
        lift: Maps a function of one client's tensors over clients.
    """
    with torch.no_grad():
        fake = generate(z, y_fake)
    real_logits, real_classes = split_heads(discriminate(x, y))
    fake_logits, fake_classes = split_heads(discriminate(fake, y_fake))
    total = lift(loss.discriminator)(real_logits, fake_logits)
    if real_classes is not None and fake_classes is not None:
        classify = lift(auxiliary_classifier)
        total = total + auxiliary_weight * (classify(real_classes, y) + classify(fake_classes, y_fake))
    probability = lift(mean_probability)
    stats = {"d_real": probability(real_logits.detach()), "d_fake": probability(fake_logits.detach())}
    if penalties:
        # The gradient of a gradient loses 1 % of its value in bfloat16 (measured), so penalties run in full precision.
        with torch.autocast(device_type=x.device.type, enabled=False):
            full = fake.to(x.dtype)
            value = torch.zeros((), device=x.device, dtype=x.dtype)
            for penalty, factor in penalties:
                critic = _critic(discriminate, y_fake if penalty.on_fake else y)
                term = penalty(critic, x, full, mix, lift=lift)
                value = value + (term if factor is None else factor * term)
        total = total + value
        stats["penalty"] = value.detach()
    stats["loss_d"] = total.detach()
    return total, stats


def generator_step(
    generate: Generate,
    discriminate: Discriminate,
    *,
    loss: AdversarialLoss,
    auxiliary_weight: float,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    y_fake: Tensor,
    lift: Lift = once,
) -> tuple[Tensor, Stats]:
    """Return the generator's loss on one minibatch, and detached statistics; arguments as in
    :func:`discriminator_step`.

    Real samples enter only where the loss pairs them with generated ones.
    """
    fake_logits, fake_classes = split_heads(discriminate(generate(z, y_fake), y_fake))
    logits = (fake_logits, split_heads(discriminate(x, y))[0]) if loss.pairs_real else (fake_logits,)
    total = lift(loss.generator)(*logits)
    if fake_classes is not None:
        total = total + auxiliary_weight * lift(auxiliary_classifier)(fake_classes, y_fake)
    return total, {"loss_g": total.detach()}


def mean_probability(logits: Tensor) -> Tensor:
    """Return E sigmoid(logits), a scalar: D's mean belief that samples are real."""
    return logits.float().sigmoid().mean()


def _critic(discriminate: Discriminate, labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda samples: split_heads(discriminate(samples, labels))[0]
