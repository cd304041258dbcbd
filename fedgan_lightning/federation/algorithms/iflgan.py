"""Weights from how well each client's generator does on its own data, and clients that may keep what they have."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedgan_lightning.errors import ConfigurationError, message, refuse_first
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.client_update import Visit
from fedgan_lightning.federation.discrepancy import LARGEST, maximum_mean_discrepancy
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.rules import RoundRules
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import Aggregate, Aggregator, State, UpdateEntry
from fedgan_lightning.seeding import derive_seed

DISCREPANCY, THRESHOLD, KEPT = "discrepancy", "threshold", "kept/"
#: What a client has that has trained never: further off than anybody, so that it takes what the server sends.
NEVER = 2 * LARGEST


class IFLGAN(FederatedAlgorithm):
    """Client i weighs w_i exp(min(MMD_i, log r)), and takes the server's networks unless its MMD is below the mean.

    MMD_i is between samples of the client's generator after its steps, raw and of the labels of its data, and
    minibatches of its own (:func:`~fedgan_lightning.federation.discrepancy.maximum_mean_discrepancy`); w_i is the
    aggregator's weight. Whoever is far from its data gains, and whoever was nearer than the mean of the last round goes
    on with the parameters that it had, and with the server's buffers. A client may claim any MMD up to sqrt(2), and so
    at most r times the weight of another one; but one that claims a large one lifts the mean, so that others keep what
    they have: take the median where clients may lie. One number per client goes up beside its update, and says how well
    its generator does on its data.

    Source: Li, Chen, Wang, Shen, Ma, Cui 2023 (IFL-GAN), whose weights have no largest ratio.

    Args:
        max_ratio: r, the largest weight of a client over another's at equal w_i; 1 is the aggregator's own mean.
        num_samples: Samples on each side, from the round's first minibatch on; at least 2.
        threshold: Below what a client keeps its own: the ``mean`` of all, as published, or their ``median``, which less
            than half of them cannot lift.
    """

    @checked(max_ratio="[1, inf)", num_samples="[2, inf)")
    def __init__(
        self, *, max_ratio: float = 3.0, num_samples: int = 64, threshold: Literal["mean", "median"] = "mean"
    ) -> None:
        self.max_ratio, self.num_samples, self.threshold = float(max_ratio), num_samples, threshold

    # ------------------------------------------------------------------ before the first round

    def check(self, *, policy: Policy, aggregator: Aggregator, rules: RoundRules) -> None:
        super().check(policy=policy, aggregator=aggregator, rules=rules)
        if not aggregator.additive:
            raise ConfigurationError(
                message(
                    "IFLGAN must have an aggregator that weighs clients",
                    received=f"{type(aggregator).__name__}, which treats all alike",
                    fix="set federation.aggregator to WeightedMean, or use FedGAN",
                )
            )

    def server_optimizers(self, server: ServerModule) -> dict[str, Optimizer]:
        """Return none.

        Raises:
            ConfigurationError: If the module cannot sample what its clients hold, or promises not to tell of it.
        """
        model: Any = server.model
        asked = "have a module whose samples are compared with data"
        known = inspect.signature(model.sample).parameters if hasattr(model, "sample") else {}
        wrong = [
            (
                not {"labels", "generator", "raw"} <= {*known},
                asked,
                f"{type(model).__name__} without sample(num_samples, *, labels, generator, raw)",
                "give it one, or use FedGAN",
            ),
            (getattr(model, "condition", None) is not None, asked, "one that needs conditions", "use FedGAN"),
            (getattr(model, "codec", None) is not None, asked, "one that samples words", "use FedGAN"),
            (
                getattr(model, "privacy", None) is not None,
                "have no privacy to keep: the MMD is computed from samples as they are",
                "model.privacy",
                "use FedGAN, or set model.privacy to null",
            ),
        ]
        refuse_first(wrong, prefix="IFLGAN must ")
        return {}

    def entries(self, context: ClientContext) -> Mapping[str, UpdateEntry]:
        return {DISCREPANCY: UpdateEntry((), torch.float64, rule="collect", bound=LARGEST + 1e-9)}

    def client_state(self, context: ClientContext) -> State:
        state = context.model.state_dict()
        kept = {f"{KEPT}{name}": torch.zeros_like(state[name]) for name in context.policy.shared_parameters}
        return {DISCREPANCY: torch.tensor(NEVER, dtype=torch.float64), **kept}

    def server_state(self, context: ClientContext) -> State:
        return {THRESHOLD: torch.zeros((), dtype=torch.float64)}

    # ------------------------------------------------------------------ a round

    def task(self, server: ServerModule, round: int) -> State:
        return {THRESHOLD: server.algorithm_state[THRESHOLD]}

    def work(self, visit: Visit) -> None:
        parameters, private = visit.parameters, visit.private
        stays = private[DISCREPANCY] < visit.task[THRESHOLD]
        for name in visit.context.policy.shared_parameters:
            value, own = parameters[name], private[f"{KEPT}{name}"]
            rows = stays.reshape(-1, *[1] * (value.dim() - 1)) if visit.is_stacked else stays
            value.copy_(torch.where(rows.to(value.device), own.to(value), value))
        visit.fit()

    def answer(self, visit: Visit) -> State:
        with torch.no_grad():
            if not visit.is_stacked:
                return {DISCREPANCY: self._discrepancy(visit, 0, visit.module)}
            module, state = copy.deepcopy(visit.context.model).to(visit.context.device), visit.state
            own, found = {*module.state_dict()}, list[Tensor]()
            for row in range(len(visit.tasks)):
                module.load_state_dict({name: value[row] for name, value in state.items() if name in own}, strict=False)
                found.append(self._discrepancy(visit, row, module))
        return {DISCREPANCY: torch.stack(found)}

    def settle(self, private: State, sent: State, parameters: State) -> State:
        names = [name for name in private if name.startswith(KEPT)]
        kept = {name: parameters[name.removeprefix(KEPT)].detach().clone() for name in names}
        return {DISCREPANCY: sent[DISCREPANCY], **kept}

    def credit(self, answer: State) -> float:
        below = max(float(answer[DISCREPANCY]), 0.0) - math.log(self.max_ratio)
        return math.exp(min(below, 0.0))

    def server_step(self, server: ServerModule, total: Aggregate) -> None:
        super().server_step(server, total)
        name = f"{namespaces.ALGORITHM}{DISCREPANCY}"
        told = [own[name].double() for own in total.collected.values()]
        if told:
            middle = torch.stack(told).mean() if self.threshold == "mean" else torch.stack(told).quantile(0.5)
            server.algorithm_state[THRESHOLD] = middle.to(server.algorithm_state[THRESHOLD])

    # ------------------------------------------------------------------ on a client

    def _discrepancy(self, visit: Visit, row: int, module: Any) -> Tensor:
        """Return the MMD between data of a client of the visit and samples of its generator, which is the module's."""
        context, task, info = visit.context, visit.tasks[row], visit.infos[row]
        reals, labels = self._reals(context, task.client_id, first_step=info.first_step)
        draws = torch.Generator().manual_seed(derive_seed(task.seed, "discrepancy"))
        fakes = module.sample(len(reals), labels=labels, generator=draws, raw=True)
        return maximum_mean_discrepancy(reals.to(fakes.device), fakes).cpu()

    def _reals(self, context: ClientContext, client_id: int, *, first_step: int) -> tuple[Tensor, Any]:
        """Return samples of a client, from the first minibatch of its round on, and their labels, if they are classes.

        Minibatches go on without end: a round of few small ones borrows from the next.
        """
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        for x, y in context.data.client_batches(client_id, first_step=first_step, num_steps=self.num_samples):
            xs.append(x)
            ys.append(y)
            if sum(map(len, xs)) >= self.num_samples:
                break
        x, y = torch.cat(xs)[: self.num_samples], torch.cat(ys)[: self.num_samples]
        is_class = bool(getattr(context.model, "num_classes", 0)) and y.dim() == 1
        return x, y.long() if is_class else None
