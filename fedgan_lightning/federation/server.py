"""The server: the global module, and a torch optimizer that steps on the averaged update.

``SGD(lr=1)`` on the negative update is federated averaging; ``Adam`` is FedAdam, ``SGD(momentum=.9)`` FedAvgM
(Reddi et al. 2021, algorithm 2). Server state, schedules and checkpoints are therefore Lightning's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedgan_lightning import states
from fedgan_lightning.checkpoints import rounds_in
from fedgan_lightning.errors import CheckpointError, ConfigurationError, message
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.optimizer_state import only_moments, with_counts_on_cpu
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.sample_source import SampleWith, sampler_of
from fedgan_lightning.hooks import RecalibrationHook, ServerHook, offers
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import Aggregate, State

#: Name of the optimizer that steps on the average of clients' updates.
AVERAGED = "averaged"


def federated_averaging(parameters: Iterable[Any]) -> Optimizer:
    """SGD with learning rate 1: the global parameters become the weighted mean of the clients'."""
    return torch.optim.SGD(parameters, lr=1.0)


class ServerModule(L.LightningModule):
    """The global module under federation; the Trainer that fits it has a ``FederatedOrchestrator`` among its callbacks.

    Args:
        model: A LightningModule; every client trains a copy of it.
        optimizer: Makes the server's optimizer; default federated averaging.
        scheduler: Makes a schedule of the server's learning rate, stepped once per round.
    """

    @checked("server")
    def __init__(
        self,
        model: L.LightningModule,
        *,
        optimizer: Callable[[Iterable], Optimizer] = federated_averaging,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.optimizer, self.scheduler = optimizer, scheduler
        #: Averaged optimizer moments by ``optimizer/...`` name.
        self.moments: dict[str, Tensor] = {}
        self._optimizer_names: list[str] = []
        #: The algorithm's server state.
        self.algorithm_state: dict[str, Tensor] = {}
        self.algorithm = FederatedAlgorithm()
        #: Rounds completed, and to be completed; steps of optimizers may be more or fewer.
        self.rounds_completed, self.rounds_planned = 0, -1
        self._policy: Policy | None = None
        self.seed = 0
        #: The user's way to sample the module, and why samples are of no use here.
        self.sample_with: SampleWith | None = None
        self.cannot_sample = ""
        #: What the server knows of clients: sizes, and labels as far as they are counted.
        self.data: Any = None
        self._pending: Aggregate | None = None

    def attach(
        self,
        policy: Policy,
        algorithm: FederatedAlgorithm | None = None,
        *,
        seed: int = 0,
        data: Any = None,
    ) -> None:
        """Say which entries are shared, by which algorithm, what the server's own randomness follows from, and what it
        knows of clients. The orchestrator does so before optimizers are made.
        """
        self._policy, self.seed, self.data = policy, seed, data
        self.algorithm = algorithm if algorithm is not None else FederatedAlgorithm()

    @property
    def policy(self) -> Policy:
        """What travels and what stays.

        Raises:
            ConfigurationError: Without an orchestrator.
        """
        if self._policy is None:
            raise ConfigurationError(
                message(
                    "a ServerModule must be trained by a FederatedOrchestrator",
                    received="a Trainer without one",
                    fix="add FederatedOrchestrator(...) to the Trainer's callbacks, or fit the inner module itself",
                )
            )
        return self._policy

    def shared_state(self) -> dict[str, Tensor]:
        """Return a copy of what all clients receive: entries of the module, moments, and the algorithm's own."""
        state = self.model.state_dict()
        entries = {name: state[name].detach().clone() for name in self.policy.downlink_entries}
        own = self.algorithm.task(self, self.rounds_completed)
        return {**entries, **self.moments, **namespaces.under(namespaces.ALGORITHM, own)}

    def receive(self, aggregate: Aggregate) -> None:
        """Take the aggregate of a round, for the coming training step."""
        self._pending = aggregate

    # ------------------------------------------------------------------ Lightning

    def configure_optimizers(self) -> Any:
        parameters = dict(self.model.named_parameters())
        shared = [parameters[name] for name in self.policy.shared_parameters]
        made = {AVERAGED: self.optimizer(shared)} if shared else {}
        if not shared and self.optimizer is not federated_averaging:
            raise ConfigurationError(
                message(
                    "server.optimizer must have averaged parameters to step on",
                    received=f"none under {type(self.algorithm).__name__}",
                    fix="leave it out: the generator's is model.generator_optimizer",
                )
            )
        made |= self.algorithm.server_optimizers(self)
        self._optimizer_names = list(made)
        return list(made.values()), [] if self.scheduler is None else [self.scheduler(next(iter(made.values())))]

    def optimizer_of(self, name: str) -> Any:
        """Return one of the server's optimizers: ``averaged``, or one that the algorithm has made."""
        found: Any = self.optimizers()
        listed = found if isinstance(found, list) else [found]
        return listed[self._optimizer_names.index(name)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Step on the pending aggregate by the algorithm; without one (a round given up) change nothing."""
        if self._pending is None:
            return
        aggregate, self._pending = self._pending, None
        self.algorithm.server_step(self, aggregate)
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        self._load_extras(aggregate.extras)
        if self.policy.buffers == "estimate" and offers(self.model, RecalibrationHook):
            self.model.recalibrate()  # type: ignore[operator]
        self.rounds_completed += 1

    def step_on(self, delta: State) -> None:
        """Step the optimizer of averaged parameters with gradient -delta."""
        if AVERAGED not in self._optimizer_names:
            return
        parameters, gradients = dict(self.model.named_parameters()), {}
        for name in self.policy.shared_parameters:
            update = delta.get(name)
            # An empty cohort (Poisson sampling) gives no update: the server still takes its step, on zero.
            gradients[name] = torch.zeros_like(parameters[name]) if update is None else -update.to(parameters[name])
        self.step(AVERAGED, [parameters[name] for name in gradients], list(gradients.values()))

    def step(self, name: str, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Step one of the server's optimizers along these gradients, and forget them."""
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        optimizer = self.optimizer_of(name)
        optimizer.step()
        optimizer.zero_grad()

    def _load_extras(self, extras: Mapping[str, Tensor]) -> None:
        buffers = states.decode_statistics(namespaces.of_module(extras), self.policy.entries)
        states.load_entries(self.model, buffers)
        self.moments.update(with_counts_on_cpu(only_moments(extras)))
        for network, child in self.model.named_children():
            if self.policy.sync.get(network) == "average":
                states.refresh_spectral_norm(child)

    def end_round(self, *, num_images: float) -> None:
        """Tell the module that the server has stepped, so that it can move its average."""
        if offers(self.model, ServerHook):
            self.model.on_server_round_end(num_images=num_images)  # type: ignore[operator]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: callbacks evaluate."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: callbacks evaluate."""

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        """Nothing: callbacks write samples. Lightning wants a value."""
        return batch_idx

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.model.on_save_checkpoint(checkpoint)
        kept = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if kept is not None:  # what is no plain value could not be read without running its code
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {n: own for n, own in kept.items() if _is_plain(own)}
        checkpoint["rounds_completed"] = self.rounds_completed
        checkpoint["server"] = {"moments": dict(self.moments), "algorithm": dict(self.algorithm_state)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the server's state; refuse that of other networks.

        Raises:
            CheckpointError: If entries or shapes differ.
        """
        mine, theirs = self.state_dict(), checkpoint["state_dict"]
        differing = [
            n
            for n in {*mine, *theirs}
            if n not in mine or n not in theirs or getattr(mine[n], "shape", None) != getattr(theirs[n], "shape", None)
        ]
        if differing:
            raise CheckpointError(
                message(
                    "a checkpoint must be loaded into the networks it came from",
                    received=f"one that differs in {', '.join(sorted(differing)[:3])}",
                    fix="restore the model's settings, or use another checkpoint",
                )
            )
        self.model.on_load_checkpoint(checkpoint)
        self.rounds_completed, own = rounds_in(checkpoint), checkpoint.get("server", {})
        self.moments, self.algorithm_state = dict(own.get("moments", {})), dict(own.get("algorithm", {}))

    @classmethod
    def load_from_checkpoint(  # type: ignore[override] # hyper-parameters in it are the global module's
        cls, checkpoint_path: Any, map_location: Any = None, *, model: L.LightningModule, **options: Any
    ) -> ServerModule:
        """Return the server of a checkpoint, with its weights in ``model``; a module's own class loads it as well."""
        checkpoint = torch.load(checkpoint_path, map_location=map_location, weights_only=True)
        server = cls(model, **options)
        server.on_load_checkpoint(checkpoint)
        server.load_state_dict(checkpoint["state_dict"])
        return server

    def begin(self) -> None:
        """Forget rounds, moments and the algorithm's state: a new run begins, from the weights that there are."""
        self.rounds_completed, self.moments, self.algorithm_state = 0, {}, {}

    # ------------------------------------------------------------------ the module that it holds

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Return what the global module makes of this, as callbacks expect of a module that is trained."""
        return self.model(*arguments, **options)

    @property
    def hparams(self) -> Any:
        """The global module's hyper-parameters."""
        return self.model.hparams

    @property
    def _hparams_name(self) -> Any:
        """The argument that they came in, where it was one; Lightning asks for it."""
        return self.model._hparams_name

    @property
    def hparams_initial(self) -> Any:
        """The global module's hyper-parameters as it was built."""
        return self.model.hparams_initial

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Return the global module's: checkpoints of a federation load into the module itself."""
        return self.model.state_dict(*arguments, **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
        """Load the global module's."""
        return self.model.load_state_dict(state_dict, *arguments, **options)

    # ------------------------------------------------------------------ sampling

    @property
    def can_sample(self) -> bool:
        """Whether somebody knows how the module is sampled, and it needs no conditions for it."""
        if getattr(self.model, "condition", None) is not None or self.cannot_sample:
            return False
        return sampler_of(self.model, self.sample_with) is not None

    def sample(
        self,
        num_samples: int,
        *,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Return samples of the global generator; see :meth:`fedgan_lightning.gan.module.GAN.sample`.

        Raises:
            ConfigurationError: If the module cannot be sampled.
        """
        sampler = sampler_of(self.model, self.sample_with)
        if sampler is None:
            raise ConfigurationError(
                message(
                    "a model must have sample(num_samples, labels=None, generator=None) for metrics and pictures",
                    received=f"{type(self.model).__name__} without it",
                    fix="add the method, set evaluation.sample_with, or leave out evaluation and picture callbacks",
                )
            )
        return sampler(num_samples, labels=labels, generator=generator, **options)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(own) for name, own in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Tensor))
