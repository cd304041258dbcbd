"""UA-GAN: the server makes of all clients' discriminators the one that the mixture of their data would have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.client_update import Visit
from fedgan_lightning.federation.feedback.algorithm import BOUND
from fedgan_lightning.federation.feedback.ensemble import EnsembleFeedback, per_sample
from fedgan_lightning.federation.feedback.samples import Inputs, Labels
from fedgan_lightning.federation.known_data import own_class_shares
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import Aggregate, State, UpdateEntry

ODDS, ODDS_GRADIENT, SHIFT = "odds", "odds_gradient", "shift"


class UAGAN(EnsembleFeedback):
    """l(x, y) = log sum_i pi_i(y) e^{l_i(x, y)}: odds of real against generated add up, as densities do.

    With every D_i optimal it is the optimal discriminator against sum_i pi_i p_i, so that the generator learns the
    mixture however unlike the clients are. Weights are pi_i(y), client i's share of the samples of class y, or of all
    samples without classes. A client without a class has no say on it. Coefficients: L'(l) softmax_i(l_i + log pi_i).

    Source: Zhang, Qu, Chang, Liu, Metaxas, Chen 2021, equations 2 and 3; in logits, so that a sure discriminator does
    not overflow.

    Args:
        summed: Have clients send pi_i e^{l_i} and pi_i e^{l_i} dl_i/dx, of which the server needs only sums R and R':
            F = L'(log R) R'/R. Masks of secure aggregation then hide every single client's; and no client's logits are
            seen. Logits further than ``max_logit`` from the last round's mean are cut to that.
        max_logit: Bound on logits under ``summed``, in (0, 20]; secure aggregation holds e^max_logit up to its
            ``max_value``.
        num_samples, labels, per_class, exchange_every: As in :class:`FeedbackAlgorithm`; ``per_class`` is on where
            there are classes.
    """

    @checked(max_logit="(0, 20]", num_samples="[1, inf)", exchange_every="[1, inf)")
    def __init__(
        self,
        *,
        summed: bool = False,
        max_logit: float = 20.0,
        num_samples: int = 64,
        labels: Labels = "uniform",
        per_class: bool | None = None,
        exchange_every: int = 1,
    ) -> None:
        super().__init__(num_samples=num_samples, labels=labels, per_class=per_class, exchange_every=exchange_every)
        self.summed, self.max_logit = summed, float(max_logit)

    def combined(self, logits: Tensor, log_weights: Tensor) -> Tensor:
        return torch.logsumexp(logits + log_weights, 0)

    # ------------------------------------------------------------------ sums in place of single answers

    def entries(self, context: ClientContext) -> Mapping[str, UpdateEntry]:
        if not self.summed:
            return super().entries(context)
        shape, dtype = self.shape_of(context)
        secure = context.secure
        if secure is not None and math.exp(self.max_logit) > secure.max_value:
            raise ConfigurationError(
                message(
                    f"max_logit must be at most log(secure.max_value) = {math.log(secure.max_value):.3g}, or masks "
                    "cannot hold the odds",
                    received=self.max_logit,
                    fix="lower max_logit, with room for gradients, or raise federation.secure.max_value",
                )
            )
        most = math.exp(self.max_logit) * 1.01
        vector: dict[str, Any] = {"kind": "vector", "persists": False, "bound": most * BOUND}
        return {ODDS: UpdateEntry(shape[:1], dtype, bound=most), ODDS_GRADIENT: UpdateEntry(shape, dtype, **vector)}

    def server_state(self, context: ClientContext) -> State:
        return {SHIFT: torch.zeros((), dtype=torch.float64)} if self.summed else {}

    def task(self, server: ServerModule, round: int) -> State:
        found = dict(super().task(server, round))
        return {**found, SHIFT: server.algorithm_state[SHIFT].clone()} if self.summed else found

    def answer(self, visit: Visit) -> State:
        if not self.summed:
            return super().answer(visit)
        leading = 2 if visit.is_stacked else 1
        samples, labels = self.asked(visit)
        logits, gradients = per_sample(*visit.feedback(samples, labels), leading=leading)
        cut = (logits - visit.task[SHIFT].to(logits)).clamp(-self.max_logit, self.max_logit)
        odds = cut.exp() * self._own_shares(visit, labels).to(cut)
        return {ODDS: odds, ODDS_GRADIENT: odds.view(*odds.shape, *(1,) * (gradients.dim() - leading)) * gradients}

    def _own_shares(self, visit: Visit, labels: Tensor) -> Tensor:
        """Return the share of each sample's class at its client, (b,) or (clients, b); 1 where classes do not count.

        A client counts its own labels. Shares from a server could be 0 for all clients but one, whose single answer
        would then be the sum.
        """
        by_class = bool(visit.context.model.num_classes) if self.per_class is None else self.per_class
        if not by_class:
            return torch.ones_like(labels)
        rows = [own_class_shares(visit.context.data, task.client_id).to(labels.device) for task in visit.tasks]
        found = [row[own] for row, own in zip(rows, labels if visit.is_stacked else [labels])]
        return torch.stack(found) if visit.is_stacked else found[0]

    def sample_gradients(
        self, server: ServerModule, total: Aggregate, batches: Sequence[Inputs]
    ) -> Mapping[int, Tensor]:
        if not self.summed:
            return super().sample_gradients(server, total, batches)
        own = namespaces.inside(namespaces.ALGORITHM, total.extras)
        if ODDS not in own:
            return {}
        odds, gradients = own[ODDS].double(), own[ODDS_GRADIENT].double()
        model, shift, heard = server.model, server.algorithm_state[SHIFT], odds > 0
        ratios = self._mean_ratio(server, total, batches[0].labels).to(odds)
        logits = torch.where(heard, (odds / ratios).log() + shift.to(odds), 0.0).detach().requires_grad_()
        with torch.enable_grad():
            loss: Any = model.loss
            (slopes,) = torch.autograd.grad(loss.generator(logits[heard]) * heard.double().mean(), logits)
        factors = torch.where(heard, slopes / odds.clamp(min=1e-300), 0.0)
        if bool(heard.any()):
            server.algorithm_state[SHIFT] = logits.detach()[heard].mean().to(shift)
        return {0: factors.view(-1, *(1,) * (gradients.dim() - 1)) * gradients}

    def _mean_ratio(self, server: ServerModule, total: Aggregate, labels: Tensor) -> Tensor:
        """Return the mean of the ratios of those who answered, which makes their weights of a class add up to 1."""
        if not self.is_by_class(server):
            return torch.ones(len(labels))
        counts = self._counts(server)
        assert counts is not None
        clients = sorted(total.weights)
        held = counts[clients].double()
        shares = held / held.sum(1, keepdim=True).clamp(min=1.0)
        weights = torch.tensor([total.weights[k] for k in clients], dtype=torch.float64)
        return ((weights / weights.sum()) @ shares)[labels.cpu()].clamp(min=1e-300)
