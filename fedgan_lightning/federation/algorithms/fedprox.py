"""FedProx: a proximal term holds clients near the server's networks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.client_update import Visit
from fedgan_lightning.options import checked


class FedProx(FederatedAlgorithm):
    """Every client adds (mu / 2) |w - w_t|^2 to the loss of each network, with w_t as the server sent it.

    The gradient of the term, mu (w - w_t), is added after all clipping. It holds generator and discriminator, as far as
    they travel; networks that stay with their client have no w_t. For K = 1 it is FedGAN. Source: Li, Sahu, Zaheer,
    Sanjabi, Talwalkar, Smith 2020, section 3.2, equation 2.

    Args:
        mu: Weight of the term, at least 0; 0 is FedGAN. ``federation.schedules`` may change it as ``algorithm.mu``.
    """

    scheduled = frozenset({"mu"})

    @checked(mu="[0, inf)")
    def __init__(self, *, mu: float = 0.01) -> None:
        self.mu = float(mu)

    def before_step(self, visit: Visit, gradients: Mapping[str, Tensor]) -> None:
        mu, start, current = visit.hyperparameter("mu", self.mu), visit.start, visit.parameters
        for name in gradients.keys() & start.keys():
            gradients[name].add_(current[name] - start[name], alpha=mu)
