"""CFGAN's condition: a user's purchases, and which of the other items count as not wanted.

Source: Chae et al. 2018 (CIKM), sections 4.2 to 4.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.gan.conditions import Condition
from fedgan_lightning.options import checked


class CFGANCondition(Condition):
    """c = (r, k_PM, k_ZR): the purchases r in {0, 1}^I of a user and two masks of items that she did not buy.

    Without masks the generator could answer 1 everywhere: the discriminator sees only what was bought. So the
    discriminator also sees the items of k_PM (partial masking), where a real user has zeros; and the generator pays

        zero_reconstruction = alpha * mean over users of sum_j k_ZR_j (rhat_j - x_j)^2

    on the items of k_ZR (zero-reconstruction). Each mask holds an item that was not bought with the ratio's chance, and
    is drawn anew for every step. Ratio 0 switches a part off: both positive is the paper's CFGAN_ZP, one its CFGAN_PM
    or CFGAN_ZR. The paper draws a fixed number of items instead, for every user and epoch.

    Args:
        items: I.
        partial_masking: Chance of an item to be in k_PM, in [0, 1].
        zero_reconstruction: Chance of an item to be in k_ZR, in [0, 1].
        alpha: Weight of the term, at least 0.

    Raises:
        ConfigurationError: If a number is out of range; when used, if samples are of another length.
    """

    @checked(items="[1, inf)", partial_masking="[0, 1]", zero_reconstruction="[0, 1]", alpha="[0, inf)")
    def __init__(
        self, items: int, *, partial_masking: float = 0.1, zero_reconstruction: float = 0.1, alpha: float = 0.1
    ) -> None:
        self.items, self.alpha = items, alpha
        self.partial_masking, self.zero_reconstruction = partial_masking, zero_reconstruction
        self.num_random = 2 * items

    def make(self, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """Return c (N, 3, I) of purchases x (N, I) and uniform numbers u (N, 2 I); u = 1 draws no masks."""
        if x.shape[-1] != self.items:
            raise ConfigurationError(
                message(
                    f"model.condition.items={self.items} must be the number of items of the data",
                    received=f"samples of {x.shape[-1]} items",
                    fix="set items of the condition and of both networks to data.source.num_items",
                )
            )
        for_masking, for_zeros = u.to(x.dtype).unflatten(-1, (2, self.items)).unbind(-2)
        others = 1 - x
        masks = (
            others * (for_masking < self.partial_masking).to(x.dtype),
            others * (for_zeros < self.zero_reconstruction).to(x.dtype),
        )
        return torch.stack([x, *masks], dim=-2)

    def extra_losses(self, fake: Tensor, x: Tensor, condition: Tensor) -> dict[str, Tensor]:
        if not self.zero_reconstruction or not self.alpha:
            return {}
        errors = condition.select(-2, 2) * (fake - x).square()
        return {"zero_reconstruction": self.alpha * errors.sum(-1).mean()}
