"""The interface of federated algorithms: what goes down, what a client does, what comes up, what the server does.

An algorithm is written once. The sequential trainer calls its hooks with the tensors of one client, the stacked one
with tensors that have a leading dimension of clients; both hand it a :class:`~.client_update.Visit`, which holds every
tensor that differs by client and nothing else does. The class itself is federated averaging; subclasses change parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.protocol import Aggregate, Aggregator, State, UpdateEntry

if TYPE_CHECKING:
    from fedgan_lightning.federation.client_context import ClientContext
    from fedgan_lightning.federation.client_update import Visit
    from fedgan_lightning.federation.rules import RoundRules
    from fedgan_lightning.federation.server import ServerModule


class FederatedAlgorithm:
    """Federated averaging: clients train the networks that travel, the server steps on the mean of their updates.

    What travels and what stays follows from the placement of the networks; an algorithm adds entries of its own. Their
    names are its business, such as ``control/generator.0.weight``: tasks, updates and private states keep them apart
    from those of the module. A client's private state is written only if its update counts.

    Attributes:
        scheduled: Hyper-parameters that ``federation.schedules`` may change, as ``algorithm.NAME``: those that hooks
            read by :meth:`Visit.hyperparameter`.
        trains: Placements of networks that this algorithm can serve, beside ``average``, ``local`` and ``server``; with
            ``server`` among them it trains at the server what is only there.
        covered: Names of its own entries that client-level privacy cuts and noises as it does parameter updates;
            entries that are not among them do not go with it.
    """

    scheduled: frozenset[str] = frozenset()
    trains: frozenset[str] = frozenset()
    covered: frozenset[str] = frozenset()

    # ------------------------------------------------------------------ before the first round

    def check(self, *, policy: Policy, aggregator: Aggregator, rules: RoundRules) -> None:
        """Refuse settings that this algorithm cannot go with.

        Raises:
            ConfigurationError: If nothing comes up, or a network's placement needs another algorithm.
        """
        for name, placement in {**policy.sync, **policy.placements}.items():  # of networks, and of entries inside one
            if placement in ("served", "exchange") and placement not in self.trains:
                raise ConfigurationError(
                    message(
                        f"federation.algorithm must be one that knows the placement {placement}",
                        received=f"{type(self).__name__} with sync.{name}: {placement}",
                        fix=f"set sync.{name} to average or local",
                    )
                )
        handed_on = [own for own, placement in policy.placements.items() if placement == "exchange"]
        if handed_on and rules.counts_late:
            raise ConfigurationError(
                message(
                    "a network that clients hand on must be with nobody who is still at work",
                    received=f"{rules.late_setting} with sync.{handed_on[0].split('.')[0]}: exchange",
                    fix=f"{rules.late_remedy}, or set it to average or local",
                )
            )
        if not policy.shared_parameters and type(self).entries is FederatedAlgorithm.entries:
            raise ConfigurationError(
                message(
                    "something must come up from clients",
                    received=f"federation.sync={dict(policy.sync)}",
                    fix="set one network to average",
                )
            )

    def check_schedules(self, names: Collection[str]) -> None:
        """Refuse what ``federation.schedules`` would change without effect, by a ConfigurationError."""

    def check_optimizers(self, optimizers: list[Optimizer]) -> None:
        """Refuse optimizers of clients that this algorithm cannot go with.

        Raises:
            ConfigurationError: If there is one.
        """

    # ------------------------------------------------------------------ declarations, known without any answer

    def entries(self, context: ClientContext) -> Mapping[str, UpdateEntry]:
        """Return what comes up beside the entries that follow from placement; nothing unless overridden."""
        return {}

    def client_state(self, context: ClientContext) -> State:
        """Return the private state of a client that has none yet; nothing unless overridden."""
        return {}

    def server_state(self, context: ClientContext) -> State:
        """Return the server's tensors before the first round, which ride in checkpoints; nothing unless overridden."""
        return {}

    # ------------------------------------------------------------------ down

    def task(self, server: ServerModule, round: int) -> State:
        """Return what all clients of a round receive beside the entries that follow from placement."""
        return {}

    def own_task(self, server: ServerModule, round: int, client_id: int) -> State:
        """Return what only this client receives; all clients of a round receive the same names."""
        return {}

    # ------------------------------------------------------------------ on a client

    def work(self, visit: Visit) -> None:
        """Train; the module's own ``fit`` for the steps of the round, unless overridden.

        It calls ``visit.fit``, or what calls it, exactly once: clients of a stack answer when their last step is done.
        """
        visit.fit()

    def before_step(self, visit: Visit, gradients: Mapping[str, Tensor]) -> None:
        """Change named gradients in place, after all clipping and before an optimizer steps.

        What is not elementwise goes through :meth:`Visit.norms` and :meth:`Visit.scale_`.
        """

    def answer(self, visit: Visit) -> State:
        """Return what comes up beside the entries that follow from placement."""
        return {}

    def settle(self, private: State, sent: State, parameters: State) -> State:
        """Return one client's private state after the round.

        Args:
            private: Its state before.
            sent: What the server receives of it, after all transforms: parameter updates by name, and this algorithm's
                own entries.
            parameters: The client's own after its last step, whatever becomes of its update; to be copied if kept.
        """
        return private

    # ------------------------------------------------------------------ on the server

    def server_optimizers(self, server: ServerModule) -> dict[str, Optimizer]:
        """Return optimizers of networks that the server trains itself, by name; none unless overridden."""
        return {}

    def credit(self, answer: State) -> float:
        """Return the factor in (0, 1] on the weight of an update, from what came beside it; 1 unless overridden."""
        return 1.0

    def server_step(self, server: ServerModule, total: Aggregate) -> None:
        """Change the server's networks and this algorithm's server state by the total of a round."""
        server.step_on(total.delta)

    def hand_on(self, *, round: int, clients: Sequence[int], seed: int) -> Mapping[int, int]:
        """Return for every client whose exchanged networks it goes on with after this round; none unless overridden.

        It is a permutation of those that have answered, and a pure function of its arguments: every rank computes its
        own. Whether there is one follows from the round alone, where two have answered.
        """
        return {}

    @property
    def sees_steps(self) -> bool:
        """Whether :meth:`before_step` does anything."""
        return type(self).before_step is not FederatedAlgorithm.before_step

    @property
    def keeps_state(self) -> bool:
        """Whether clients have a private state of this algorithm's."""
        return type(self).settle is not FederatedAlgorithm.settle
