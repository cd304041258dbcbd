"""Optimizers of torch, whatever they keep: executors agree, precisions run, a resumed run is an uninterrupted one."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fedgan_lightning import FederatedOrchestrator, SequentialExecutor, ServerModule, VectorizedExecutor
from tests.conftest import assert_states_equal, quiet_trainer, ring_data, ring_gan

OPTIMIZERS = {
    "NAdam": partial(torch.optim.NAdam, lr=1e-3),
    "ASGD": partial(torch.optim.ASGD, lr=1e-2, t0=2),
    "RAdam": partial(torch.optim.RAdam, lr=1e-3),
    "AdamW, amsgrad": partial(torch.optim.AdamW, lr=1e-3, amsgrad=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "Adadelta": partial(torch.optim.Adadelta, lr=1e-1),
    "RMSprop, centred": partial(torch.optim.RMSprop, lr=1e-3, centered=True, momentum=0.5),
    "Rprop": partial(torch.optim.Rprop, lr=1e-3),
}
PRECISIONS = {"32-true": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16}


def run(name, *, moments="average", executor=None, rounds=3, precision="32-true", double=True, resumed=None):
    """Return (server, orchestrator, trainer) of a run with this optimizer; ``double`` has networks in float64."""
    federation = FederatedOrchestrator(
        rounds=rounds, local_steps=2, optimizer_state=moments,
        executor=SequentialExecutor() if executor is None else executor,
    )  # fmt: skip
    gan = ring_gan(optimizer=OPTIMIZERS[name], seed=0 if resumed is None else 7)
    server, trainer = ServerModule(gan.double() if double else gan), quiet_trainer(federation, precision=precision)
    trainer.fit(server, datamodule=ring_data(), ckpt_path=resumed)
    return server, federation, trainer


def everything(result):
    server, orchestrator, _ = result
    private = {f"{k} {n}": v for k, own in orchestrator.store.state_dict().items() for n, v in own.items()}
    return {**server.model.state_dict(), **server.moments, **private}


@pytest.mark.parametrize("moments", ["average", "keep"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_clients_are_each_alone(name, moments):
    found = [everything(run(name, moments=moments, executor=own())) for own in (SequentialExecutor, VectorizedExecutor)]
    assert_states_equal(*found, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_numbers_that_are_no_moments_keep_their_digits(name, precision):
    """NAdam's product and ASGD's rates are as precise in the third round as in the first."""
    server, _, _ = run(name, precision=precision, double=False)
    assert next(server.model.parameters()).dtype == PRECISIONS[precision]
    numbers = {key: own for key, own in server.moments.items() if not own.dim() and not key.endswith("/step")}
    wide = torch.float64 if precision == "64-true" else torch.float32
    assert numbers
    assert {own.dtype for own in numbers.values()} == {wide}


@pytest.mark.parametrize("moments", ["average", "keep"])
@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_a_resumed_run_ends_with_the_same_bits(name, moments, tmp_path):
    """In float64, whose numbers a checkpoint must not pass through another dtype."""
    whole = run(name, moments=moments, rounds=4)
    _, _, trainer = run(name, moments=moments, rounds=2)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    again = run(name, moments=moments, rounds=4, resumed=tmp_path / "cut.ckpt")
    assert_states_equal(everything(again), everything(whole))
