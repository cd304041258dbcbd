"""MD-GAN: the server trains the generator by the gradients that clients' discriminators send of its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.client_update import Visit
from fedgan_lightning.federation.feedback.algorithm import BOUND, FeedbackAlgorithm, collected
from fedgan_lightning.federation.feedback.samples import Inputs, Labels
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import Aggregate, State, UpdateEntry

FEEDBACK = "feedback"


class MDGAN(FeedbackAlgorithm):
    """min_G sum_i pi_i E L(l_i(G(z))): clients send F_i = d/dx of the generator's loss under their own discriminator.

    Of k batches X^(0..k-1) client n (counted from 1) answers for X^(n mod k) and trains against X^((n+1) mod k), for
    the local steps of the round; the gradient is F_i of the trained discriminator, and the generator's

        dw = sum_i pi_i sum_s F_i,s dG(z_s)/dw,

    which is one backward pass a batch. The mean over samples is in F_i. Weights pi_i are the federation's aggregator's:
    N_i / N, or 1 / B with ``WeightedMean(uniform)``, as published. With ``sync: {discriminator: exchange}``
    discriminators, with their moments, go round all clients in a random cycle every ``exchange_every`` rounds.

    It minimises the mean of the clients' divergences, whose optimum under label skew is not the mixture of the clients'
    data: common classes win. :class:`UAGAN` has the mixture.

    With ``num_batches=1`` client-level privacy covers the answers: F_i as a whole is cut to the bound C, and noise is
    added to their sum. ``max_sample_norm`` c cuts every sample's gradient before, so that |F_i| <= c / sqrt(b) (Chen,
    Orekondy, Fritz 2020, equation 8).

    Source: Hardy, Le Merrer, Sericola 2019, algorithm 1, with the 1/b of F once, and a step against the gradient; a
    cycle in place of partners drawn one by one, of whom two may choose the same client. Labels of samples travel with
    them.

    Args:
        num_batches: Batches k of a round: with 1 every client trains against the batch that it answers for, and only
            the sum of all answers is needed, so that masks of secure aggregation and robust aggregators go with it.
        max_sample_norm: Largest norm of one sample's gradient dL(l_i(x_s))/dx_s, > 0; ``None`` cuts none.
        num_samples, labels, per_class, exchange_every: As in :class:`FeedbackAlgorithm`; ``per_class`` is off.
    """

    @checked(num_batches="[1, inf)", max_sample_norm="(0, inf)", num_samples="[1, inf)", exchange_every="[1, inf)")
    def __init__(
        self,
        *,
        num_batches: int = 2,
        max_sample_norm: float | None = None,
        num_samples: int = 64,
        labels: Labels = "uniform",
        per_class: bool | None = None,
        exchange_every: int = 1,
    ) -> None:
        super().__init__(num_samples=num_samples, labels=labels, per_class=per_class, exchange_every=exchange_every)
        self.num_batches, self.max_sample_norm = num_batches, max_sample_norm

    def slots(self, client_id: int) -> tuple[int, int]:
        number = client_id + 1  # the paper counts clients from 1
        return number % self.num_batches, (number + 1) % self.num_batches

    @property
    def is_additive(self) -> bool:  # type: ignore[override] # it follows from the options
        """Whether the server needs the mean of all answers and nothing else."""
        return self.num_batches == 1 and not self.per_class

    @property
    def covered(self) -> frozenset[str]:  # type: ignore[override] # it follows from the options
        """Names of what client-level privacy covers: answers of which the server needs the sum alone."""
        return frozenset({FEEDBACK}) if self.is_additive else frozenset()

    def entries(self, context: ClientContext) -> Mapping[str, UpdateEntry]:
        shape, dtype = self.shape_of(context)
        rule: Any = "aggregator" if self.is_additive else "collect"
        return {FEEDBACK: UpdateEntry(shape, dtype, rule=rule, kind="vector", bound=BOUND, persists=False)}

    def answer(self, visit: Visit) -> State:
        found = visit.generator_feedback(*self.asked(visit))
        if self.max_sample_norm is not None:
            leading = 2 if visit.is_stacked else 1
            norms = found.flatten(leading).norm(dim=-1) * self.num_samples  # 1 / b of the mean is in every gradient
            factors = (self.max_sample_norm / norms.clamp(min=1e-38)).clamp(max=1.0)
            found = found * factors.view(*factors.shape, *(1,) * (found.dim() - leading))
        return {FEEDBACK: found}

    def sample_gradients(
        self, server: ServerModule, total: Aggregate, batches: Sequence[Inputs]
    ) -> Mapping[int, Tensor]:
        if self.is_additive:
            own = total.extras.get(f"{namespaces.ALGORITHM}{FEEDBACK}")
            return {} if own is None else {0: own}
        found: dict[int, Tensor] = {}
        if not total.collected:
            return found
        weights = [self.log_weights(server, total, inputs.labels).exp() for inputs in batches]
        mass = [own.sum(0) for own in weights]  # also of those who answer for other batches
        for row, (client_id, answer) in enumerate(zip(sorted(total.collected), collected(total, FEEDBACK).double())):
            slot = self.slots(client_id)[0]
            share = (weights[slot][row] / mass[slot]).nan_to_num(0.0)
            value = answer * share.view(-1, *(1,) * (answer.dim() - 1))
            found[slot] = found[slot] + value if slot in found else value
        return found
