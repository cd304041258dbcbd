"""Forgiver-first updates: the generator listens to the client that likes a sample best."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.feedback.ensemble import EnsembleFeedback, mean_logit, slopes
from fedgan_lightning.federation.feedback.samples import Labels
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import State

SHARPNESS = "sharpness"


class F2U(EnsembleFeedback):
    """l(x) = max_i l_i(x), sample by sample: a sample is as real as the most forgiving client takes it for.

    With optimal discriminators the generator learns q ~ max_i p_i: every class that somebody has is there, in shares
    that are not those of the mixture. Clients without a sample's class have no say on it; other weights there are none.
    Source: Yonetani, Takahashi, Hashimoto, Ushiku 2019, section 3.2 (F2U).
    """

    needs_odds: ClassVar[bool] = False

    def combined(self, logits: Tensor, log_weights: Tensor) -> Tensor:
        return logits.masked_fill(torch.isinf(log_weights), -torch.inf).max(0).values


class F2A(EnsembleFeedback):
    """D(x) = sum_i S_i(x) D_i(x) with S = softmax_i(lambda D_i(x)): between the mean of all and the most forgiving.

    lambda >= 0 is learned by plain projected gradient steps on the generator's loss plus ``penalty`` lambda^2;
    at 0 it is the weighted mean of discriminators, for lambda -> inf F2U. Weights pi_i(y) multiply S_i.
    Source: Yonetani, Takahashi, Hashimoto, Ushiku 2019, section 3.3 (F2A).

    Args:
        sharpness: lambda before the first round, at least 0.
        learning_rate: Of lambda; 0 keeps it.
        penalty: Weight of lambda^2, at least 0.
        num_samples, labels, per_class, exchange_every: As in :class:`FeedbackAlgorithm`.
    """

    @checked(
        sharpness="[0, inf)",
        learning_rate="[0, inf)",
        penalty="[0, inf)",
        num_samples="[1, inf)",
        exchange_every="[1, inf)",
    )
    def __init__(
        self,
        *,
        sharpness: float = 1.0,
        learning_rate: float = 0.01,
        penalty: float = 0.1,
        num_samples: int = 64,
        labels: Labels = "uniform",
        per_class: bool | None = None,
        exchange_every: int = 1,
    ) -> None:
        super().__init__(num_samples=num_samples, labels=labels, per_class=per_class, exchange_every=exchange_every)
        self.sharpness, self.learning_rate, self.penalty = float(sharpness), float(learning_rate), float(penalty)

    def server_state(self, context: ClientContext) -> State:
        return {SHARPNESS: torch.tensor(self.sharpness, dtype=torch.float64)}

    def combined(self, logits: Tensor, log_weights: Tensor, sharpness: Tensor | None = None) -> Tensor:
        own = logits.new_tensor(self.sharpness) if sharpness is None else sharpness
        return mean_logit(logits, torch.log_softmax(own * logits.sigmoid() + log_weights, 0))

    def learn(self, server: ServerModule, logits: Tensor, log_weights: Tensor) -> Tensor:
        model: Any = server.model
        before = server.algorithm_state[SHARPNESS]
        found, slope = slopes(model.loss, self.combined, logits, log_weights, before)
        if bool(torch.isfinite(log_weights).any()):
            moved = before - self.learning_rate * (slope + 2 * self.penalty * before)
            server.algorithm_state[SHARPNESS] = moved.clamp(min=0.0)
        return found
