"""Rules that need every client's logit on the same samples: one discriminator made of many."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.client_update import Visit
from fedgan_lightning.federation.feedback.algorithm import BOUND, FeedbackAlgorithm, collected
from fedgan_lightning.federation.feedback.samples import Inputs
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.gan.objectives import Minimax, NonSaturating
from fedgan_lightning.protocol import Aggregate, State, UpdateEntry

LOGIT, GRADIENT = "logit", "gradient"


class EnsembleFeedback(FeedbackAlgorithm):
    """The generator learns from one logit per sample that is made of all clients': L(h(l_1, ..., l_B)).

    Clients send l_i(x_s) and dl_i/dx_s, b (d + 1) numbers; the server's coefficients are c_i(s) = dL/dl_i(s).
    """

    counts_by_class: ClassVar[bool] = True
    #: Whether the rule reads logits as odds of real against generated, which other losses do not have.
    needs_odds: ClassVar[bool] = True

    def check_model(self, model: Any) -> None:
        name = type(self).__name__
        if self.needs_odds and not isinstance(model.loss, (Minimax, NonSaturating)):
            raise ConfigurationError(
                message(
                    f"{name} reads D / (1 - D) from logits, and must have a loss under which they are that",
                    received=type(model.loss).__name__,
                    fix="set model.loss to NonSaturating or Minimax",
                )
            )
        if _has_classes(model):
            raise ConfigurationError(
                message(
                    f"{name} makes one logit of all discriminators', and must have such that classify nothing",
                    received="a discriminator with an auxiliary classifier",
                    fix="set model.discriminator.conditioning to projection",
                )
            )

    @abstractmethod
    def combined(self, logits: Tensor, log_weights: Tensor) -> Tensor:
        """Return the one logit h of every sample, (b,).

        Args:
            logits: Those of clients, (clients, b), in float64.
            log_weights: log pi_i(y_s), (clients, b), normalised over clients; -inf for those without a say.
        """

    def coefficients(self, loss: Any, logits: Tensor, log_weights: Tensor) -> Tensor:
        """Return c_i(s) = d/dl_i(s) of the generator's mean loss at the one logit, (clients, b).

        Args:
            loss: The adversarial loss.
            logits: As in :meth:`combined`.
            log_weights: As there, but they need not be normalised.
        """
        return slopes(loss, self.combined, logits, log_weights)[0]

    # ------------------------------------------------------------------ what travels

    def entries(self, context: ClientContext) -> Mapping[str, UpdateEntry]:
        shape, dtype = self.shape_of(context)
        return {
            LOGIT: UpdateEntry(shape[:1], dtype, rule="collect", bound=BOUND),
            GRADIENT: UpdateEntry(shape, dtype, rule="collect", kind="vector", bound=BOUND, persists=False),
        }

    def answer(self, visit: Visit) -> State:
        logits, gradients = per_sample(*visit.feedback(*self.asked(visit)), leading=2 if visit.is_stacked else 1)
        return {LOGIT: logits, GRADIENT: gradients}

    def sample_gradients(
        self, server: ServerModule, total: Aggregate, batches: Sequence[Inputs]
    ) -> Mapping[int, Tensor]:
        if not total.collected:
            return {}
        logits, weights = collected(total, LOGIT).double(), self.log_weights(server, total, batches[0].labels)
        return {0: weighed(self.learn(server, logits, weights), collected(total, GRADIENT).double())}

    def learn(self, server: ServerModule, logits: Tensor, log_weights: Tensor) -> Tensor:
        """Return the coefficients of a round; a rule that learns something moves it here."""
        model: Any = server.model
        return self.coefficients(model.loss, logits, log_weights)


def slopes(
    loss: Any, combined: Callable[..., Tensor], logits: Tensor, log_weights: Tensor, *learned: Tensor
) -> tuple[Tensor, ...]:
    """Return the slopes of the generator's mean loss at one logit made of all clients', in the logits and in more.

    Args:
        loss: The adversarial loss.
        combined: (logits, normalised log weights, *learned) -> the one logit.
        logits: Those of clients, (clients, b).
        log_weights: (clients, b); they need not be normalised.
        learned: What else the one logit depends on.
    """
    total = torch.logsumexp(log_weights, 0)
    heard = torch.isfinite(total)  # of some classes nobody who answered has any
    found = torch.zeros_like(logits)
    if not bool(heard.any()):
        return found, *map(torch.zeros_like, learned)
    points = [own.detach().requires_grad_() for own in (logits[:, heard], *learned)]
    with torch.enable_grad():
        one = combined(points[0], log_weights[:, heard] - total[heard], *points[1:])
        value = loss.generator(one) * (int(heard.sum()) / logits.shape[1])
        found[:, heard], *others = torch.autograd.grad(value, points)
    return found, *others


def weighed(coefficients: Tensor, gradients: Tensor) -> Tensor:
    """Return F_s = sum_i c_i(s) g_i(x_s), (b, ...)."""
    return (coefficients.view(*coefficients.shape, *(1,) * (gradients.dim() - 2)) * gradients).sum(0)


def per_sample(logits: Tensor, gradients: Tensor, *, leading: int) -> tuple[Tensor, Tensor]:
    """Return one logit for every sample: where a discriminator has several, of patches, their mean.

    Args:
        logits: (..., patches) or (...), with ``leading`` dimensions of clients and samples.
        gradients: Those of the sum over patches.
        leading: How many.
    """
    patches = logits.flatten(leading) if logits.dim() > leading else logits.unsqueeze(-1)
    return patches.mean(-1), gradients / patches.shape[-1]


def mean_logit(logits: Tensor, log_weights: Tensor) -> Tensor:
    """Return the logit of sum_i pi_i sigmoid(l_i), without leaving the log domain."""
    real = torch.logsumexp(log_weights + logsigmoid(logits), 0)
    return real - torch.logsumexp(log_weights + logsigmoid(-logits), 0)


def _has_classes(model: Any) -> bool:
    """Whether the discriminator says classes beside logits, by a pass over two samples that changes nothing."""
    like, network = next(model.discriminator.parameters()), model.discriminator
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            x = torch.zeros((2, *model.sample_shape), device=like.device, dtype=like.dtype)
            output = network(x, torch.zeros(2, dtype=torch.long, device=like.device))
    finally:
        network.train(training)
    return isinstance(output, tuple)
