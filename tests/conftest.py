"""Shared fixtures: a tiny federation, the real data where it is at hand, and no traces outside the test's folder."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import lightning as L
import numpy as np
import pytest
import torch

from fedgan_lightning import GAN, FederatedDataModule, FederatedOrchestrator, SequentialExecutor, ServerModule
from fedgan_lightning.losses import R1
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.partitions import ClassesPerClient
from fedgan_lightning.sources import Digits, Ring

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"

# Examples are the same in every run; HYPOTHESIS_PROFILE=default searches on.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def slow(value):
    """Return a parameter whose test runs with ``-m slow`` alone."""
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Small operations are faster on one thread; trained feature networks stay in the session's folder."""
    os.environ["FEDGAN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)
    yield
    del os.environ["FEDGAN_CACHE"]


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _same_draws() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Fixtures draw the same numbers whatever ran before them."""
    _same_draws()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Tests draw the same numbers whatever their fixtures drew."""
    _same_draws()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests of one file in one process, and those that look at one recorded federation too."""
    for item in items:
        recorded = item.path.parent.name == "deployment" and "federation" in getattr(item, "fixturenames", ())
        own = item.nodeid if item.get_closest_marker("notebooks") else item.path.stem  # notebooks share nothing
        item.add_marker(pytest.mark.xdist_group("recorded" if recorded else own))


@pytest.fixture
def shared() -> Path:
    """The folder of real data beside the project."""
    if not SHARED.is_dir():
        pytest.skip("needs the real data in ../shared/data, which is not part of the project")
    return SHARED


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.5, 0.999))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def ring_gan(*, optimizer=adam, seed: int = 0, **options) -> GAN:
    torch.manual_seed(seed)
    generator = MLPGenerator(4, (2,), hidden=(16,), output="linear")
    discriminator = MLPDiscriminator((2,), hidden=(16,))
    options = {
        "generator_optimizer": optimizer,
        "discriminator_optimizer": optimizer,
        "penalties": [R1(0.01)],
        **options,
    }
    return GAN(generator, discriminator, **options)


def ring_data(*, num_clients: int = 4, batch_size: int = 16, num_samples: int = 640, **options) -> FederatedDataModule:
    options.setdefault("partition", ClassesPerClient(2))
    return FederatedDataModule(Ring(num_samples=num_samples), num_clients=num_clients, batch_size=batch_size, **options)


def digits_data(**options) -> FederatedDataModule:
    options = {"partition": ClassesPerClient(2), "num_clients": 5, "batch_size": 16, **options}
    return FederatedDataModule(Digits(), **options)


def quiet_trainer(*callbacks: L.Callback, **options) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "max_epochs": -1,
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def federate(model: L.LightningModule, data: FederatedDataModule, *callbacks: L.Callback, server=None, **federation):
    """Run a federation without any frills; return (server module, orchestrator, trainer)."""
    federation.setdefault("executor", SequentialExecutor())  # the reference; others are compared with it
    orchestrator = FederatedOrchestrator(**federation)
    module = server if server is not None else ServerModule(model)
    trainer = quiet_trainer(orchestrator, *callbacks)
    trainer.fit(module, datamodule=data)
    return module, orchestrator, trainer


def assert_states_equal(first, second, *, atol: float = 0.0, rtol: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], atol=atol, rtol=rtol, msg=lambda text, n=name: f"{n}: {text}"
        )


def finish(aggregator, updates):
    """Return the aggregate of all updates in one pass."""
    accumulator = aggregator.init()
    for update in updates:
        accumulator = aggregator.accumulate(accumulator, update)
    return aggregator.finalize(accumulator)
