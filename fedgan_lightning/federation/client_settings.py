"""What clients are given beside their task, from the settings of a federation: on the server, and at a site alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from fedgan_lightning.data.poisson import PoissonClients
from fedgan_lightning.federation.checks import check_client_trainer
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.client_data import ClientDataModule
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.preparation import is_foreign, prepare, validates, warn_of_loaders
from fedgan_lightning.federation.privacy_keeper import private_parts
from fedgan_lightning.federation.round_schedules import steps_of
from fedgan_lightning.federation.round_trainer import RoundTrainer, clock_of
from fedgan_lightning.federation.store import ClientStore
from fedgan_lightning.federation.transform_chain import TransformChain
from fedgan_lightning.protocol import ClientTask, FederatedData, RoundInfo

#: What a module of somebody else's finds as its Trainer outside of a round, and the hooks that were called.
Begun = tuple[L.Trainer | None, frozenset[str]]


def client_options(federation: Any, root: torch.device, *, precision: Any) -> dict[str, Any]:
    """Return the options of clients' Trainers on a device.

    Args:
        federation: The orchestrator.
        root: The device.
        precision: The server's Trainer's.
    """
    options: dict[str, Any] = {"accelerator": root.type, "precision": precision}
    options["devices"] = 1 if root.index is None else [root.index]
    return {**options, **federation.client_trainer}


def begin(federation: Any, trainer: L.Trainer, module: L.LightningModule, data: FederatedData, stage: str) -> Begun:
    """Call the hooks that Lightning calls once in a fit, on the global module.

    Args:
        federation: The orchestrator.
        trainer: The server's; its device and precision are the clients'.
        module: The global module.
        data: The clients' data.
        stage: ``fit``, ``test``, ...

    Raises:
        ConfigurationError: If the module cannot be prepared, or has no use for the settings of clients' Trainers.
    """
    check_client_trainer(federation.client_trainer, module)
    if not is_foreign(module):
        return None, frozenset()
    of_schedule: dict[str, Any] = steps_of(federation.schedules, 0, federation.rounds)
    work = {"steps": federation.local_steps, "epochs": federation.local_epochs, **of_schedule}
    task, per_epoch = ClientTask(0, 0, 0, {}, rounds=federation.rounds, **work), data.steps_per_epoch(0)
    info = RoundInfo(0, (0,), num_steps=task.span(steps_per_epoch=per_epoch)[1])
    options = client_options(federation, trainer.strategy.root_device, precision=trainer.precision)
    clock = clock_of(task, info, planned=task.planned(steps_per_epoch=per_epoch), options=options)
    preview = RoundTrainer(options).preview(clock, ClientDataModule(data))
    prepared = prepare(module, stage=stage, trainer=preview)
    if stage == "fit":
        warn_of_loaders(module, validates=validates(data))
    return preview, prepared


def context_of(
    federation: Any,
    model: L.LightningModule,
    data: Any,
    *,
    policy: Policy,
    store: ClientStore,
    options: dict[str, Any],
    begun: Begun,
    logs: Path,
) -> ClientContext:
    """Return what an executor needs to run clients of a federation.

    Args:
        federation: The orchestrator.
        model: The global module.
        data: The clients' data.
        policy: What travels and what stays.
        store: Private state by client.
        options: Those of clients' Trainers.
        begun: What :func:`begin` returned.
        logs: Folder of what clients log.
    """
    preview, prepared = begun
    example = getattr(model, "privacy", None)
    if example is not None:
        data = PoissonClients(data, example, draws=int(getattr(model, "d_steps", 1)))
    return ClientContext(
        model=model,
        data=data,
        policy=policy,
        store=store,
        algorithm=federation.algorithm,
        transforms=TransformChain([*private_parts(federation), *federation.transforms]),
        trainer_options=options,
        prepared=prepared,
        preview=preview,
        callbacks=federation.client_callbacks,
        attributes=federation.client_attributes,
        logs=None if federation.privacy is not None else logs,
        num_logged=federation.client_logs,
        secure=federation.secure,
        privacy=federation.privacy,
        keeper=federation.keeper,
    )
