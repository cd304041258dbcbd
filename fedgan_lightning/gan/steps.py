"""One discriminator step and one generator step as pure functions of networks, data and noise.

The client module calls them with its own networks. Whoever stacks clients calls them with functional ones: all
randomness comes in as arguments, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedgan_lightning.gan.objectives import AdversarialLoss, auxiliary_classifier
from fedgan_lightning.gan.penalties import Penalty

Generate = Callable[[Tensor, Tensor], Tensor]
Discriminate = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]
Stats = dict[str, Tensor]


def split_heads(output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return (logits, class logits or None), whichever the discriminator gave."""
    return output if isinstance(output, tuple) else (output, None)


def discriminator_step(
    generate: Generate,
    discriminate: Discriminate,
    *,
    loss: AdversarialLoss,
    penalties: Sequence[Penalty],
    auxiliary_weight: float,
    x: Tensor,
    y: Tensor,
    z: Tensor,
    y_fake: Tensor,
    mix: Tensor | None,
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
    """
    with torch.no_grad():
        fake = generate(z, y_fake)
    real_logits, real_classes = split_heads(discriminate(x, y))
    fake_logits, fake_classes = split_heads(discriminate(fake, y_fake))
    total = loss.discriminator(real_logits, fake_logits)
    if real_classes is not None and fake_classes is not None:
        classification = auxiliary_classifier(real_classes, y) + auxiliary_classifier(fake_classes, y_fake)
        total = total + auxiliary_weight * classification
    stats = {
        "d_real": real_logits.detach().float().sigmoid().mean(),
        "d_fake": fake_logits.detach().float().sigmoid().mean(),
    }
    if penalties:
        # The gradient of a gradient loses 1 % of its value in bfloat16 (measured), so penalties run in full precision.
        with torch.autocast(device_type=x.device.type, enabled=False):
            full = fake.to(x.dtype)
            value = sum(
                (
                    penalty(_critic(discriminate, y_fake if penalty.on_fake else y), x, full, mix)
                    for penalty in penalties
                ),
                start=torch.zeros((), device=x.device, dtype=x.dtype),
            )
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
) -> tuple[Tensor, Stats]:
    """Return the generator's loss on one minibatch, and detached statistics; arguments as in
    :func:`discriminator_step`.

    Real samples enter only where the loss pairs them with generated ones.
    """
    fake_logits, fake_classes = split_heads(discriminate(generate(z, y_fake), y_fake))
    real_logits = split_heads(discriminate(x, y))[0] if loss.pairs_real else None
    total = loss.generator(fake_logits, real_logits)
    if fake_classes is not None:
        total = total + auxiliary_weight * auxiliary_classifier(fake_classes, y_fake)
    return total, {"loss_g": total.detach()}


def _critic(discriminate: Discriminate, labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda samples: split_heads(discriminate(samples, labels))[0]
