"""The same federation on the CPU and on the second device, and how far apart they end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from fedgan_lightning import (
    FederatedDataModule,
    FederatedOrchestrator,
    SequentialExecutor,
    ServerModule,
    VectorizedExecutor,
)
from tests.conftest import quiet_trainer
from tests.device import second_device
from tests.device.second_device import Rules

EXECUTORS = {"one by one": SequentialExecutor(), "stacked": VectorizedExecutor()}


class _StaysThere(L.Callback):
    """The server's module and moments are where its Trainer is; step counts are read on the CPU."""

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        values = {**pl_module.state_dict(), **{n: v for n, v in pl_module.moments.items() if v.dim()}}
        away = {name for name, value in values.items() if value.device != trainer.strategy.root_device}
        assert not away
        assert {value.device.type for value in pl_module.moments.values() if not value.dim()} <= {"cpu"}


def federate(
    model: Any,
    data: FederatedDataModule,
    *,
    on: str,
    server: dict[str, Any] | None = None,
    precision: str = "32-true",
    callbacks: Sequence[L.Callback] = (),
    **federation,
) -> tuple[ServerModule, FederatedOrchestrator]:
    """Run a federation on the CPU or on the device; whatever has state begins anew."""
    torch.manual_seed(0)
    settings = {"rounds": 2, "local_steps": 2, "executor": SequentialExecutor(), **copy.deepcopy(federation)}
    orchestrator, module = FederatedOrchestrator(**settings), ServerModule(copy.deepcopy(model), **(server or {}))
    options = second_device.trainer_options() if on == "device" else {}
    trainer = quiet_trainer(orchestrator, _StaysThere(), *callbacks, precision=precision, **options)
    trainer.fit(module, datamodule=data)
    return module, orchestrator


def on_both(device: Callable, model: Any, data: FederatedDataModule, *, rtol: float = 2e-6, **options) -> Rules:
    """Assert that a run on the device ends where one on the CPU does; return what it has waited for.

    Args:
        device: The fixture.
        model: The clients' module; it is copied.
        data: The clients' data.
        rtol: Largest distance of an entry's values from the CPU's, over their length.
        options: Of the federation, of the server's module, and the Trainer's precision.
    """
    expected = everything(*federate(model, data, on="cpu", **options))
    with device() as rules:
        found = everything(*federate(model, data, on="device", **options))
    assert expected.keys() == found.keys()
    far = {name: distance(found[name], value) for name, value in expected.items()}
    beyond = {name: own for name, own in far.items() if not own <= rtol}
    assert not beyond, beyond
    return rules


def everything(server: ServerModule, orchestrator: FederatedOrchestrator) -> dict[str, Tensor]:
    """Return what a run leaves: the server's module and moments, and its clients' states."""
    found = {**server.model.state_dict(), **server.moments}
    for client in range(64):
        found |= {f"client {client}: {name}": value for name, value in orchestrator.store.read(client).items()}
    return {name: value.cpu() for name, value in found.items()}


def distance(first: Tensor, second: Tensor) -> float:
    """Return |first - second| / |second|."""
    away = torch.linalg.vector_norm(first.double() - second.double())
    return float(away / torch.linalg.vector_norm(second.double()).clamp_min(1e-6))


def executors() -> pytest.MarkDecorator:
    """Run a test with clients one after the other, and stacked."""
    return pytest.mark.parametrize("executor", EXECUTORS.values(), ids=EXECUTORS)
