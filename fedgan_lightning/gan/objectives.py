"""Adversarial losses as pure functions of logits, and the small classes that name them in a configuration.

Notation: r = D(x) logits on real samples, f = D(G(z)) logits on generated ones, sp(t) = log(1 + e^t),
sigmoid(t) = 1 / (1 + e^-t). Every function accepts logits of any shape, averages over all of them, and is minimised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy, relu, softplus


def logistic_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """-E log D(x) - E log(1 - D(G(z))) = E sp(-r) + E sp(f). Goodfellow et al. 2014, equation 1."""
    return softplus(-real).mean() + softplus(fake).mean()


def saturating_generator(fake: Tensor) -> Tensor:
    """E log(1 - D(G(z))) = -E sp(f). Goodfellow et al. 2014, equation 1; its gradient vanishes where f << 0."""
    return -softplus(fake).mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    """-E log D(G(z)) = E sp(-f). Goodfellow et al. 2014, section 3."""
    return softplus(-fake).mean()


def least_squares_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E (r - 1)^2 / 2 + E f^2 / 2. Mao et al. 2017, equation 9 with a = 0, b = 1."""
    return 0.5 * ((real - 1).square().mean() + fake.square().mean())


def least_squares_generator(fake: Tensor) -> Tensor:
    """E (f - 1)^2 / 2. Mao et al. 2017, equation 9 with c = 1."""
    return 0.5 * (fake - 1).square().mean()


def wasserstein_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E f - E r. Arjovsky et al. 2017, equation 2; needs a Lipschitz discriminator."""
    return fake.mean() - real.mean()


def wasserstein_generator(fake: Tensor) -> Tensor:
    """-E f. Arjovsky et al. 2017, equation 2; also the generator's part of the hinge loss."""
    return -fake.mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 - r) + E max(0, 1 + f). Lim and Ye 2017, equation 4."""
    return relu(1 - real).mean() + relu(1 + fake).mean()


def relativistic_pairing(winner: Tensor, loser: Tensor) -> Tensor:
    """E sp(-(winner - loser)), paired elementwise, so of equal shape. Jolicoeur-Martineau 2018, equation 4."""
    return softplus(loser - winner).mean()


def auxiliary_classifier(class_logits: Tensor, labels: Tensor) -> Tensor:
    """-E log P(c | x), from (N, C) logits and (N,) labels. Odena et al. 2017, equation 3."""
    return cross_entropy(class_logits, labels)


class AdversarialLoss(ABC):
    """The pair of losses of one GAN formulation."""

    #: Whether the generator's loss looks at real logits too.
    pairs_real: ClassVar[bool] = False

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the discriminator's loss, a scalar, from logits of any shape."""

    @abstractmethod
    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """Return the generator's loss, a scalar; ``real`` is given where :attr:`pairs_real` is set."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Minimax(AdversarialLoss):
    """The order's objective as it stands: min_G max_D E log D(x) + E log(1 - D(G(z))) (saturating)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return logistic_discriminator(real, fake)

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return saturating_generator(fake)


class NonSaturating(AdversarialLoss):
    """Same discriminator as :class:`Minimax`; the generator maximises log D(G(z)) and keeps its gradient."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return logistic_discriminator(real, fake)

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return non_saturating_generator(fake)


class LeastSquares(AdversarialLoss):
    """Least-squares GAN with targets 0 and 1."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return least_squares_discriminator(real, fake)

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return least_squares_generator(fake)


class Wasserstein(AdversarialLoss):
    """Wasserstein GAN; combine with :class:`~fedgan_lightning.gan.penalties.GradientPenalty`."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return wasserstein_discriminator(real, fake)

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return wasserstein_generator(fake)


class Hinge(AdversarialLoss):
    """Hinge loss, as in SNGAN and BigGAN; goes with spectral norm."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return hinge_discriminator(real, fake)

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return wasserstein_generator(fake)


class RelativisticPairing(AdversarialLoss):
    """RpGAN: each generated sample against one real sample; with R1 and R2 this is R3GAN's loss (Huang et al. 2024)."""

    pairs_real: ClassVar[bool] = True

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return relativistic_pairing(real, fake)

    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        if real is None:
            raise ValueError("RelativisticPairing.generator must have the real logits; got None. Pass real=D(x).")
        return relativistic_pairing(fake, real)
