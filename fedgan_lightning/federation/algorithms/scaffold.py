"""SCAFFOLD: control variates take the drift of clients out of their steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.client_update import Visit
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.rules import RoundRules
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.protocol import Aggregate, Aggregator, State, UpdateEntry

#: Names of control variates: this, then the parameter's.
CONTROL = "control/"


class Scaffold(FederatedAlgorithm):
    """Every client steps along g - c_i + c, with its own control c_i and the server's c = sum_i pi_i c_i.

    Per round, for every parameter that travels, with w_t as the server sent it, w_K after K steps, and the sum of the
    learning rates of these steps in place of K times the rate:

    * a step's gradient becomes g + c - c_i, after all clipping;
    * c_i+ = c_i - c + (w_t - w_K) / sum of rates (option II), and dc_i = c_i+ - c_i goes up beside the update;
    * the server adds sum_i pi_i dc_i to c, with pi_i client i's share of the weight of **all** clients of the
      federation, so that c stays the mean of the c_i of those that were asked and those that were not.

    Weights of controls are those of the updates (N_i, or 1 where the aggregator is uniform): with others the fixed
    point is that of another federation. A client settles its c_i from what the server received after transforms, and
    only if its update counts. Controls are gradients, so that clients step by plain SGD; for K = 1 it is FedGAN.

    Source: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, algorithm 1; for a GAN both networks have controls.
    """

    # ------------------------------------------------------------------ before the first round

    def check(self, *, policy: Policy, aggregator: Aggregator, rules: RoundRules) -> None:
        super().check(policy=policy, aggregator=aggregator, rules=rules)
        if not aggregator.additive:
            raise ConfigurationError(
                message(
                    "Scaffold weighs controls like updates, so the aggregator must be a weighted mean",
                    received=type(aggregator).__name__,
                    fix="use WeightedMean, or another algorithm",
                )
            )
        if rules.counts_late:
            raise ConfigurationError(
                message(
                    "Scaffold must not count a late update whose client has gone back to its old control",
                    received=rules.late_setting,
                    fix=rules.late_remedy,
                )
            )

    def check_optimizers(self, optimizers: list[Optimizer]) -> None:
        for optimizer in optimizers:
            name = type(optimizer).__name__
            for group in optimizer.param_groups:
                if type(optimizer) is torch.optim.SGD and not group["momentum"] and not group["maximize"]:
                    continue
                raise ConfigurationError(
                    message(
                        "clients under Scaffold must step by SGD without momentum: controls are gradients, and steps "
                        f"of {name} are none",
                        received=f"{name} with momentum {group['momentum']}" if name == "SGD" else name,
                        fix="set the client's optimizers to torch.optim.SGD with momentum 0, and maximize to false",
                    )
                )

    # ------------------------------------------------------------------ declarations

    def entries(self, context: ClientContext) -> Mapping[str, UpdateEntry]:
        return {
            name: UpdateEntry(tuple(value.shape), value.dtype, rule="sum", weight="population", kind="vector")
            for name, value in _controls(context).items()
        }

    def client_state(self, context: ClientContext) -> State:
        return _controls(context)

    def server_state(self, context: ClientContext) -> State:
        return _controls(context)

    def task(self, server: ServerModule, round: int) -> State:
        return {name: value.detach().clone() for name, value in server.algorithm_state.items()}

    # ------------------------------------------------------------------ on a client

    def before_step(self, visit: Visit, gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            control = f"{CONTROL}{name}"
            if control in visit.task:
                gradient.add_(visit.task[control] - visit.private[control])

    def answer(self, visit: Visit) -> State:
        """Return dc_i = (w_t - w_K) / sum of rates - c; 0 where no step was taken."""
        current, found = visit.parameters, {}
        for name, start in visit.start.items():
            control, path = f"{CONTROL}{name}", visit.path.get(name, 0.0)
            if path:
                found[control] = (start - current[name]) / path - visit.task[control]
            else:
                found[control] = torch.zeros_like(current[name])
        return found

    def settle(self, private: State, sent: State, parameters: State) -> State:
        return {name: value + sent[name].to(value) for name, value in private.items()}

    # ------------------------------------------------------------------ on the server

    def server_step(self, server: ServerModule, total: Aggregate) -> None:
        super().server_step(server, total)
        changes = namespaces.inside(namespaces.ALGORITHM, total.extras)
        for name, control in server.algorithm_state.items():
            server.algorithm_state[name] = control + changes[name].to(control)


def _controls(context: ClientContext) -> dict[str, Tensor]:
    """Return controls of zero for every parameter that travels."""
    parameters = dict(context.model.named_parameters())
    return {
        f"{CONTROL}{name}": torch.zeros_like(
            parameters[name], requires_grad=False, memory_format=torch.contiguous_format
        )
        for name in context.policy.shared_parameters
    }
