"""Clients with fewer samples than a minibatch: they train, alone as in stacks, and weigh what they hold."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from fedgan_lightning import (
    GAN,
    AutoExecutor,
    DataError,
    FederatedDataModule,
    FederatedOrchestrator,
    SequentialExecutor,
    ServerModule,
    VectorizedExecutor,
)
from fedgan_lightning.aggregators import WeightedMean
from fedgan_lightning.data.partition import Partition
from fedgan_lightning.executors import AutotunedExecutor
from fedgan_lightning.losses import R1, GradientPenalty
from fedgan_lightning.privacy import ExampleLevelPrivacy
from fedgan_lightning.sources import Digits, Ring
from tests.conftest import adam, federate, quiet_trainer, ring_gan, sgd
from tests.contracts.test_executors import assert_same, dcgan, gentle, updates
from tests.foreign import SomebodysGAN

PRIVATE = ExampleLevelPrivacy(clip=0.5, noise_multiplier=1.0, delta=1e-3, batch_size=4, testing_seed=1)
SIZES = (1, 3, 30, 3000)


class Sizes:
    """Takes so many samples for each client, in order."""

    min_samples = 1

    def __init__(self, sizes):
        self.sizes = sizes

    def split(self, samples, *, num_clients, seed):
        ends = np.cumsum(self.sizes)
        return [np.arange(end - size, end) for size, end in zip(self.sizes, ends)]

    def shifts(self, *, num_clients, seed):
        return [None] * num_clients


Partition.register(Sizes)


def sized(*sizes, **options):
    options = {"batch_size": 64, **options}
    return FederatedDataModule(
        Ring(num_samples=8 * -(-sum(sizes) // 8)), partition=Sizes(sizes), num_clients=len(sizes), **options
    )


WORK = {
    "steps": {"work": {"steps": 5}},
    "epochs": {"work": {"epochs": 1}, "rounds": 2},
    "incomplete minibatches": {"work": {"epochs": 1}, "rounds": 2, "data": {"drop_last": False}},
    "penalties": {
        "work": {"steps": 7},
        "gan": {"penalties": [R1(1.0, interval=2), GradientPenalty(0.1, interval=3)]},
        "rounds": 2,
    },
    "moments kept": {
        "work": {"steps": 4},
        "gan": {"optimizer": adam},
        "policy": {"optimizer_state": "keep"},
        "rounds": 2,
    },
}


@pytest.mark.parametrize("name", WORK)
def test_stacked_clients_of_any_size_agree_with_those_trained_alone(name):
    case = WORK[name]
    data = case.get("data", {})
    options = {**{key: case[key] for key in ("work", "rounds") if key in case}, **case.get("policy", {})}
    gan = ring_gan(**{"optimizer": sgd, **case.get("gan", {})}).double()
    sizes = (1, 3, 30, 700, 1, 3, 710, 640)
    stacks = VectorizedExecutor(chunk_size=2 if name == "epochs" else 64)
    results = [updates(own, gan, sized(*sizes, **data), **options) for own in (stacks, SequentialExecutor())]
    assert_same(*results, rtol=1e-11)


def test_statistics_of_batchnorm_are_those_of_the_smaller_minibatch():
    torch.manual_seed(0)
    gan = GAN(*dcgan("batch", "batch")("none"), generator_optimizer=gentle, discriminator_optimizer=gentle).double()
    sizes = (1, 5, 1, 5, 80)
    data = FederatedDataModule(Digits(), partition=Sizes(sizes), num_clients=len(sizes), batch_size=64)
    results = [
        updates(executor(), gan, data, work={"steps": 3}) for executor in (VectorizedExecutor, SequentialExecutor)
    ]
    assert_same(*results, rtol=1e-11)


@pytest.mark.parametrize("work", [{"local_steps": 4}, {"local_epochs": 1}], ids=["steps", "epochs"])
@pytest.mark.parametrize("executor", [SequentialExecutor, VectorizedExecutor, AutoExecutor, AutotunedExecutor])
def test_sizes_weigh_the_clients_and_steps_are_the_same_for_everybody(executor, work):
    seen = {}

    def remember(name, executor):
        inner = executor.run

        def run(tasks):
            for update in inner(tasks):
                seen[update.client_id] = update
                yield update

        executor.run = run
        return executor

    gan, data = ring_gan(optimizer=sgd, penalties=[R1(1.0)]).double(), sized(*SIZES)
    before = {name: value.clone() for name, value in gan.named_parameters()}
    server, _, _ = federate(gan, data, rounds=1, executor=remember("run", executor()), **work)
    steps = [4] * 4 if "local_steps" in work else [1, 1, 1, 46]
    assert [seen[k].metrics["steps"] for k in range(4)] == steps
    assert [seen[k].metrics["images"] for k in range(4)] == [n * min(64, size) for n, size in zip(steps, SIZES)]
    for name, after in server.model.named_parameters():
        by_hand = before[name] + sum(size / 3034 * seen[k].delta[name] for k, size in enumerate(SIZES))
        torch.testing.assert_close(after.detach(), by_hand, rtol=1e-12, atol=1e-14)


def test_clients_of_whom_no_two_are_alike_are_trained_one_after_the_other(caplog):
    caplog.set_level(logging.INFO, logger="fedgan_lightning")
    federate(ring_gan(), sized(*SIZES), rounds=1, local_steps=2, executor=AutoExecutor())
    assert (
        "one client after the other, 1 thread (no two clients whose minibatches are of the same sizes)" in caplog.text
    )


def test_a_minibatch_that_the_discriminator_s_steps_do_not_divide_is_refused_before_training():
    """Though it is of a client that nobody asks in the first rounds."""
    with pytest.raises(DataError, match=r"d_steps=2 .*got 7 samples of client 2.*every client has samples for"):
        federate(ring_gan(optimizer=sgd, d_steps=2), sized(64, 64, 7, batch_size=16), local_steps=1, rounds=1)
    federate(ring_gan(optimizer=sgd, d_steps=2), sized(64, 64, 8, batch_size=16), local_steps=1, rounds=1)


def test_other_uses_of_the_name_and_of_the_module_are_left_alone():
    """Critic steps of somebody's module, validation, and private minibatches, which are drawn for the steps."""
    somebodys = SomebodysGAN()
    somebodys.d_steps = 3
    data = sized(64, 64, 7, batch_size=16)
    federate(somebodys, data, local_steps=1, rounds=1)
    federation = FederatedOrchestrator(rounds=1, local_steps=1)
    quiet_trainer(federation).validate(ServerModule(ring_gan(optimizer=sgd, d_steps=3)), datamodule=data, verbose=False)
    private = ring_gan(optimizer=sgd, d_steps=3, penalties=[], privacy=PRIVATE)
    federate(private, data, local_steps=1, rounds=1, optimizer_state="reset", aggregator=WeightedMean("uniform"))
