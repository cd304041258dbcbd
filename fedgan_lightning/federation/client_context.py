"""What clients of a run are run with, and which entries come up from every one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fedgan_lightning import states
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.arrivals import Arrivals
from fedgan_lightning.federation.client_privacy import ClientLevelPrivacy
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.ranks import Ranks
from fedgan_lightning.federation.round_trainer import device_of
from fedgan_lightning.federation.secure import SecureAggregation
from fedgan_lightning.federation.store import ClientStore
from fedgan_lightning.federation.transform_chain import TransformChain
from fedgan_lightning.packing import Layout
from fedgan_lightning.protocol import FederatedData, State, UpdateEntry


def never() -> bool:
    """Return False: nobody asks to stop."""
    return False


@dataclass(frozen=True)
class ClientContext:
    """What an executor needs to run clients.

    Attributes:
        model: The global module, from which clients are copied; it is not changed.
        data: Minibatches by client.
        policy: What travels and what stays.
        store: Private state by client.
        algorithm: What differs from federated averaging.
        transforms: What becomes of an update before it is sent.
        trainer_options: Accelerator, devices and precision of per-round Trainers.
        stop_requested: Asked between minibatches; when true, the round is given up.
        ranks: The processes that share the run.
        prepared: Hooks of the module that were called before the first round, and are not called on clients.
        preview: What a module finds as its Trainer outside of a round; ``None`` for none.
        callbacks: The user's callbacks on clients.
        attributes: Dotted names of plain attributes of the module that every client keeps.
        logs: Folder of what clients log; ``None`` for nothing.
        num_logged: Clients that log: those with smaller numbers.
        secure: Bounds of secure aggregation; ``None`` without.
        privacy: Client-level privacy; ``None`` without.
        keeper: What a private run has spent, at the server.
        arrivals: Who is at work, and from which networks.
    """

    model: L.LightningModule
    data: FederatedData
    policy: Policy
    store: ClientStore
    algorithm: FederatedAlgorithm = field(default_factory=FederatedAlgorithm)
    transforms: TransformChain = field(default_factory=TransformChain)
    trainer_options: Mapping[str, Any] = field(default_factory=dict)
    stop_requested: Callable[[], bool] = never
    ranks: Ranks = field(default_factory=Ranks)
    prepared: frozenset[str] = frozenset()
    preview: L.Trainer | None = None
    callbacks: Sequence[L.Callback] = ()
    attributes: Sequence[str] = ()
    logs: Path | None = None
    num_logged: int = 0
    secure: SecureAggregation | None = None
    privacy: ClientLevelPrivacy | None = None
    keeper: Any = None
    arrivals: Arrivals = field(default_factory=Arrivals)

    @property
    def device(self) -> torch.device:
        """Where clients are trained."""
        return device_of(self.trainer_options)

    @cached_property
    def entries(self) -> dict[str, UpdateEntry]:
        """What the algorithm and the transforms have come up beside the networks, by names of the algorithm."""
        return {**self.algorithm.entries(self), **self.transforms.own_entries()}

    @cached_property
    def new_client(self) -> dict[str, Tensor]:
        """What the algorithm and the transforms keep of a client that has no state yet, on its device."""
        found = namespaces.under(namespaces.ALGORITHM, self.algorithm.client_state(self))
        found |= self.transforms.client_state(shared_entries_of(self))
        return {name: value.to(self.device) for name, value in found.items()}


def shared_deltas(policy: Policy, state: State, start: State) -> dict[str, Tensor]:
    """Return the updates of the parameters that come up: ``state`` after minus ``start`` before local training."""
    return {name: state[name].detach() - start[name].to(state[name].device) for name in policy.shared_parameters}


def shared_buffers(policy: Policy, state: State) -> dict[str, Tensor]:
    """Return the buffers that come up, in the form that may be averaged."""
    return states.encode_statistics({name: state[name] for name in policy.shared_buffers}, policy.entries)


def shared_entries_of(context: ClientContext) -> dict[str, UpdateEntry]:
    """Return the entries, moments aside, that come up from every client."""
    state = context.model.state_dict()
    delta = Layout.of({name: state[name] for name in context.policy.shared_parameters})
    extras = Layout.of(shared_buffers(context.policy, state))
    return context.transforms.entries(context.entries, delta, extras)
