"""A run that stops at any boundary between rounds and goes on elsewhere ends with the same bits, with every executor.

Everything that trains is made anew for the second part, as a second process makes it: what the first part has recorded,
measured or counted is gone. Processes that are really killed are in ``tests/test_kill.py``.
"""

from __future__ import annotations

import itertools

import lightning as L
import pytest
import torch

from fedgan_lightning import (
    GAN,
    AutoExecutor,
    FederatedOrchestrator,
    RoundRules,
    SequentialExecutor,
    ServerModule,
    VectorizedExecutor,
)
from fedgan_lightning.executors import FaultyExecutor
from fedgan_lightning.losses import R1, Augmentation, GradientPenalty
from fedgan_lightning.partitions import Dirichlet
from tests.conftest import adam, digits_data, quiet_trainer
from tests.contracts.test_executors import FAMILIES, big_digits, digit_series

ROUNDS = 3
EXECUTORS = {
    "sequential": SequentialExecutor,
    "vectorized": VectorizedExecutor,
    "stacks of two": lambda: VectorizedExecutor(chunk_size=2),
    "auto": AutoExecutor,
    "faulty": lambda: FaultyExecutor(VectorizedExecutor(), slow=0.3),
}
CASES = [
    (executor, family, condition)
    for executor, family in itertools.product(EXECUTORS, FAMILIES)
    for condition in FAMILIES[family][1]
]
#: Every executor meets a network of another kind; the large families run with the full product.
SMALL = ("MLP", "DCGAN batch batch", "DCGAN none spectral", "DCGAN group none", "profile")
FEW = [(executor, family, FAMILIES[family][1][-1]) for executor, family in zip(EXECUTORS, SMALL)]


class Keep(L.Callback):
    """Writes a checkpoint at every boundary."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def made(family, condition):
    torch.manual_seed(0)
    return GAN(
        *FAMILIES[family][0](condition),
        penalties=[R1(0.1, interval=2), GradientPenalty(0.1, interval=3)],
        generator_optimizer=adam,
        discriminator_optimizer=adam,
        fake_labels="all",
        ema_half_life_images=100.0,
        augment=Augmentation(probability=0.5, target=0.6, images_to_full=300) if "DCGAN" in family else None,
    )


def run(case, folder, *, start=None, **options):
    """Train three rounds, or those after the boundary ``start``; return everything that a checkpoint holds of it."""
    executor, family, condition = case
    data = {"ACGAN": big_digits, "profile": digit_series}.get(family, lambda: digits_data(num_clients=4))()
    orchestrator = FederatedOrchestrator(
        rounds=ROUNDS,
        executor=EXECUTORS[executor](),
        rules=RoundRules(min_report_fraction=0.25, stale_updates="discount"),
        **options,
    )
    trainer = quiet_trainer(orchestrator, Keep(folder))
    server = ServerModule(made(family, condition))
    trainer.fit(server, datamodule=data, ckpt_path=None if start is None else folder / f"{start}.ckpt")
    store = {k: dict(orchestrator.store.read(k)) for k in range(4)}
    return {"weights": server.state_dict(), "moments": server.moments, "clients": store}


def differing(first, second, prefix=""):
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [prefix]
    assert first.keys() == second.keys(), prefix
    return [name for key in first for name in differing(first[key], second[key], f"{prefix}/{key}")]


def check(case, folder, **options):
    whole = run(case, folder, **options)
    for boundary in range(1, ROUNDS):
        assert differing(whole, run(case, folder, start=boundary, **options)) == [], f"resumed after {boundary}"


def identify(case):
    return "-".join(case)


@pytest.mark.parametrize("case", FEW, ids=identify)
def test_a_resumed_run_ends_with_the_same_bits(case, tmp_path):
    check(case, tmp_path, local_steps=4)


@pytest.mark.parametrize("executor, policy", [("vectorized", "keep"), ("auto", "reset")])
def test_whatever_becomes_of_moments(executor, policy, tmp_path):
    sync = {"discriminator": "local"} if policy == "keep" else None
    check((executor, "DCGAN batch batch", "projection"), tmp_path, local_steps=4, optimizer_state=policy, sync=sync)


@pytest.mark.parametrize("executor", ["auto", "stacks of two"])
def test_clients_of_unequal_sizes(executor, tmp_path, monkeypatch):
    """Their stacks shrink while a round goes on: a process meets sizes that the one before it has recorded long ago."""
    whole = digits_data
    monkeypatch.setattr(
        "tests.contracts.test_resume.digits_data", lambda **own: whole(partition=Dirichlet(0.5, min_samples=16), **own)
    )
    check((executor, "MLP", "projection"), tmp_path, local_epochs=1, clients=None)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in FEW], ids=identify)
def test_the_full_product_ends_with_the_same_bits(case, tmp_path):
    check(case, tmp_path, local_steps=4)


def test_every_executor_and_every_family_is_covered():
    assert {case[0] for case in FEW} == set(EXECUTORS)
    assert {case[1] for case in CASES} == set(FAMILIES)
