"""The engine of feedback: fakes go down, gradients with respect to them come up, the server steps the generator.

For any networks without coupling across clients every published rule is a choice of coefficients: with the logits
l_i(x_s) of client i's discriminator on sample s, and their gradients g_i(x_s), the server forms F_s = sum_i c_i(s)
g_i(x_s), and takes it through the generator. No parameter of a discriminator travels, and none of the generator.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.client_update import Visit
from fedgan_lightning.federation.exchange import cycle
from fedgan_lightning.federation.feedback.samples import (
    Inputs,
    Labels,
    check_gan,
    draw_inputs,
    generated,
    generator_gradients,
)
from fedgan_lightning.federation.generator_step import step_generator
from fedgan_lightning.federation.known_data import WithoutLabels
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.round_schedules import refuse_server_rates
from fedgan_lightning.federation.rules import RoundRules
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import Aggregate, Aggregator, State

#: Largest logit, and largest gradient with respect to a sample, that is believed.
BOUND = 1e4
#: Names of what travels.
AGAINST, ASKED, LABELS, ASKED_LABELS = "fakes/against", "fakes/asked", "labels/against", "labels/asked"


class Made(NamedTuple):
    """What was generated for a round: by which server, from what, and the samples."""

    server: int
    round: int
    inputs: list[Inputs]
    samples: list[Tensor]


class FeedbackAlgorithm(FederatedAlgorithm):
    """What algorithms have in common whose generator lives and learns at the server, and whose clients keep their D.

    A round: the server generates ``num_batches`` batches. Every client trains its discriminator for the local steps of
    the round against one of them, then answers for one; with a single batch they are the same. The server takes what
    came through the generator, and makes one step of the module's own generator optimizer.

    Place networks with ``sync: {generator: server, discriminator: local}``, or ``exchange`` for the discriminator,
    which then goes on with another client every ``exchange_every`` rounds.

    Args:
        num_samples: Samples b of a batch, at least the size of a minibatch.
        labels: Classes to generate, where the generator takes any: ``uniform`` over those that somebody holds, or as
            often as ``clients`` hold them.
        per_class: Whether a client's word on a sample counts by its share N_i(y) of the sample's class in place of its
            share N_i of all samples; ``None`` is the usual choice of the algorithm.
        exchange_every: Rounds between two exchanges of discriminators.
    """

    trains = frozenset({"server", "exchange"})
    #: Batches of a round.
    num_batches: int = 1
    #: Whether the server needs what the aggregator makes of all answers, and nothing else.
    is_additive: bool = False
    #: Whether a client's word counts by class, unless the user says otherwise.
    counts_by_class: ClassVar[bool] = False

    @checked(num_samples="[1, inf)", exchange_every="[1, inf)")
    def __init__(
        self,
        *,
        num_samples: int = 64,
        labels: Labels = "uniform",
        per_class: bool | None = None,
        exchange_every: int = 1,
    ) -> None:
        self.num_samples, self.labels, self.per_class = num_samples, labels, per_class
        self.exchange_every = exchange_every
        self._made: Made | None = None  # of the round that runs

    # ------------------------------------------------------------------ before the first round

    def check(self, *, policy: Policy, aggregator: Aggregator, rules: RoundRules) -> None:
        super().check(policy=policy, aggregator=aggregator, rules=rules)
        where, name = policy.sync, type(self).__name__
        wanted = {"generator": ("server",), "discriminator": ("local", "exchange")}
        for network, allowed in wanted.items():
            if where.get(network) not in allowed:
                raise ConfigurationError(
                    message(
                        f"{name} must have the {network} at {'the server' if network == 'generator' else 'clients'}",
                        received=f"sync.{network}: {where.get(network)}",
                        fix="set federation.sync to {generator: server, discriminator: local}, or exchange for it",
                    )
                )
        if policy.shared_parameters:
            raise ConfigurationError(
                message(
                    f"{name} must leave parameters where they are",
                    received=f"{policy.shared_parameters[0]}, which is averaged",
                    fix="set federation.sync of what is not in the discriminator to server",
                )
            )
        if not aggregator.additive and not self.is_additive:
            raise ConfigurationError(
                message(
                    f"{name} combines clients' answers itself, so the aggregator must be a weighted mean",
                    received=type(aggregator).__name__,
                    fix="use WeightedMean, or MDGAN with num_batches: 1, whose answers a robust rule can combine",
                )
            )
        if rules.counts_late:
            raise ConfigurationError(
                message(
                    f"{name} must drop late answers, which are about samples of another round",
                    received=rules.late_setting,
                    fix=rules.late_remedy,
                )
            )

    def server_optimizers(self, server: ServerModule) -> dict[str, Optimizer]:
        """Return the module's own generator optimizer.

        Raises:
            ConfigurationError: If the module's generator cannot learn from gradients on its samples.
        """
        model: Any = server.model
        privacy = getattr(model, "privacy", None)  # its minibatches have rows for more records than are expected
        minibatch = getattr(server.data, "batch_size", None) if privacy is None else privacy.rows
        check_gan(model, who=type(self).__name__, num_samples=self.num_samples, minibatch=minibatch)
        self._check_classes(server)
        self.check_model(model)
        return {"generator": model.generator_optimizer(model.generator.parameters())}

    def _check_classes(self, server: ServerModule) -> None:
        """Refuse settings about classes that nobody counts, or that there are not.

        Raises:
            ConfigurationError: If there are such.
        """
        model: Any = server.model
        written = {"per_class: true": self.per_class is True, "labels: clients": self.labels == "clients"}
        asked = [setting for setting, is_set in written.items() if is_set]
        if model.num_classes and self.per_class is None and self.counts_by_class:
            asked.append("per_class: null")
        if asked and self._counts(server) is None:
            rule = f"{type(self).__name__} must know how many labels of every class clients hold"
            none = "a generator without classes"
            if model.num_classes:
                is_private = isinstance(server.data, WithoutLabels)
                none = "privacy, under which they stay with clients" if is_private else "data that does not count them"
            fix = "set per_class to false and labels to uniform, or give classes to the generator and the data"
            raise ConfigurationError(message(rule, received=f"{asked[0]}, and {none}", fix=fix))

    def check_model(self, model: Any) -> None:
        """Refuse a GAN that this rule cannot go with, by a ConfigurationError; goes with all unless overridden."""

    def is_by_class(self, server: ServerModule) -> bool:
        """Whether a client's word counts by class."""
        if self.per_class is not None:
            return self.per_class
        model: Any = server.model
        return self.counts_by_class and bool(model.num_classes) and self._counts(server) is not None

    # ------------------------------------------------------------------ down

    def slots(self, client_id: int) -> tuple[int, int]:
        """Return the batch that a client answers for, and the one that it trains against."""
        return client_id % self.num_batches, (client_id + 1) % self.num_batches

    def batches(self, server: ServerModule, round: int) -> list[Inputs]:
        """Return the inputs of a round's batches; the same whenever they are asked for."""
        return draw_inputs(
            server.model,
            count=self.num_samples,
            num_batches=self.num_batches,
            seed=server.seed,
            round=round,
            labels=self.labels,
            counts=self._counts(server),
        )

    def task(self, server: ServerModule, round: int) -> State:
        """Generate the batches of a round; where there is one, all clients receive it."""
        inputs = self.batches(server, round)
        self._made = Made(id(server), round, inputs, generated(server.model, inputs))
        return {} if self.num_batches > 1 else self._sent(server, round, client_id=0)

    def own_task(self, server: ServerModule, round: int, client_id: int) -> State:
        return self._sent(server, round, client_id=client_id) if self.num_batches > 1 else {}

    def _sent(self, server: ServerModule, round: int, *, client_id: int) -> dict[str, Tensor]:
        made = self._made
        if made is None or (made.server, made.round) != (id(server), round):
            self.task(server, round)
        made = cast(Made, self._made)
        asked, against = self.slots(client_id)
        names = {AGAINST: (LABELS, against)} | ({} if asked == against else {ASKED: (ASKED_LABELS, asked)})
        found = {samples: made.samples[slot] for samples, (_, slot) in names.items()}
        if server.model.num_classes:  # type: ignore[truthy-function]
            found |= {labels: made.inputs[slot].labels for labels, slot in names.values()}
        return found

    # ------------------------------------------------------------------ on a client

    def work(self, visit: Visit) -> None:
        visit.fit_discriminator(_with_labels(visit, AGAINST, LABELS))

    def asked(self, visit: Visit) -> tuple[Tensor, Tensor]:
        """Return the samples that clients answer for, and their labels."""
        own = ASKED in visit.task
        return _with_labels(visit, ASKED if own else AGAINST, ASKED_LABELS if own else LABELS)

    def shape_of(self, context: ClientContext) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of a batch."""
        model: Any = context.model
        return (self.num_samples, *model.sample_shape), next(model.parameters()).dtype

    # ------------------------------------------------------------------ on the server

    def server_step(self, server: ServerModule, total: Aggregate) -> None:
        """Step the generator along what came.

        Raises:
            ConfigurationError: If its gradient is not finite.
        """
        model: Any = server.model
        inputs = self.batches(server, server.rounds_completed)
        found = generator_gradients(model, inputs, self.sample_gradients(server, total, inputs))
        self._made = None
        step_generator(server, found)

    def sample_gradients(
        self, server: ServerModule, total: Aggregate, batches: Sequence[Inputs]
    ) -> Mapping[int, Tensor]:
        """Return F by batch: the gradient of the generator's loss with respect to every sample."""
        raise NotImplementedError(f"{type(self).__name__}.sample_gradients must be implemented")

    def log_weights(self, server: ServerModule, total: Aggregate, labels: Tensor) -> Tensor:
        """Return log pi_i(y_s) of the clients that were collected, (clients, b) in float64; -inf for no say.

        pi_i is the aggregator's weight of client i, and pi_i(y) that times the share of class y among its samples.
        Neither is normalised.
        """
        weights = torch.tensor([total.weights[k] for k in sorted(total.collected)], dtype=torch.float64)
        found = weights.log().unsqueeze(1).expand(-1, len(labels))
        if self.is_by_class(server):
            counts = self._counts(server)
            assert counts is not None
            held = counts[sorted(total.collected)].double()
            shares = held / held.sum(1, keepdim=True).clamp(min=1.0)
            found = found + shares[:, labels.cpu()].log()
        return found

    def check_schedules(self, names: Collection[str]) -> None:
        refuse_server_rates(names, who=type(self).__name__)

    def hand_on(self, *, round: int, clients: Sequence[int], seed: int) -> Mapping[int, int]:
        return cycle(round=round, clients=clients, seed=seed, every=self.exchange_every)

    @staticmethod
    def _counts(server: ServerModule) -> Tensor | None:
        """Return how many samples of every class clients hold, as far as the data says."""
        model: Any = server.model
        counts = getattr(server.data, "label_counts", None)
        if counts is None or not model.num_classes:  # nobody counts them, or privacy keeps them from the server
            return None
        found = torch.as_tensor(counts())
        return found if found.shape[1] >= model.num_classes else None


def collected(total: Aggregate, name: str) -> Tensor:
    """Return what every client sent under a name of an algorithm, (clients, ...), by ascending client."""
    full = f"{namespaces.ALGORITHM}{name}"
    return torch.stack([total.collected[k][full] for k in sorted(total.collected)])


def _with_labels(visit: Visit, samples: str, labels: str) -> tuple[Tensor, Tensor]:
    """Return samples of the task and their labels, with the leading dimension of clients in a stack."""
    x, task, count = visit.task[samples], visit.task, len(visit.tasks)
    is_own = f"{namespaces.ALGORITHM}{samples}" in visit.tasks[0].own
    y = task.get(labels)
    y = (
        torch.zeros(x.shape[: 2 if is_own and visit.is_stacked else 1], dtype=torch.long, device=x.device)
        if y is None
        else y
    )
    if visit.is_stacked and not is_own:  # all clients of the stack were sent the same
        x, y = (own.unsqueeze(0).expand(count, *own.shape) for own in (x, y))
    return x, y
