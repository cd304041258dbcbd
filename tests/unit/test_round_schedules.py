"""Hyper-parameters as functions of the round: closed forms, what they change on clients, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from fedgan_lightning import ConfigurationError, SequentialExecutor, VectorizedExecutor
from fedgan_lightning.algorithms import FedGAN, FedProx
from fedgan_lightning.federation.round_schedules import set_hyperparameters
from fedgan_lightning.losses import R1
from fedgan_lightning.schedules import CosineRounds, ExponentialRounds, LinearRounds, StepRounds
from tests.conftest import federate, ring_data, ring_gan, sgd


def values(schedule, rounds=3):
    return [schedule.value(round, rounds) for round in range(rounds)]


def test_closed_forms():
    assert values(LinearRounds(start=1.0, end=0.5)) == pytest.approx([1, 0.75, 0.5])
    assert values(ExponentialRounds(start=1.0, end=0.01)) == pytest.approx([1, 0.1, 0.01])
    assert values(CosineRounds(start=2.0, end=0.0)) == pytest.approx([2, 1, 0])
    assert values(StepRounds({0: 3.0, 2: 1.0}), 4) == [3, 3, 1, 1]
    assert LinearRounds(start=1.0, end=0.5).value(9, 3) == 0.5, "a run that goes on keeps the end"
    assert values(ExponentialRounds(start=1.0, end=0.5), 1) == [1.0]


def weights(executor=None, *, optimizer=sgd, gan=None, **options):
    gan = ring_gan(optimizer=optimizer) if gan is None else gan
    executor = SequentialExecutor() if executor is None else executor
    server, orchestrator, _ = federate(
        gan, ring_data(), executor=executor, **{"rounds": 3, "local_steps": 2, **options}
    )
    return server.model.state_dict(), orchestrator


def assert_equal(first, second):
    assert all(torch.equal(first[name], second[name]) for name in first)


def scaled(factor):
    return lambda parameters: torch.optim.SGD(parameters, lr=0.01 * factor)


def test_a_factor_on_learning_rates_is_another_rate():
    found, _ = weights(optimizer=scaled(1.0), schedules={"learning_rate": StepRounds({0: 0.5})})
    assert_equal(found, weights(optimizer=scaled(0.5))[0])


def test_a_factor_for_one_network_leaves_the_other_alone():
    gan = ring_gan(optimizer=scaled(1.0))
    gan.generator_optimizer = scaled(0.25)
    found, _ = weights(optimizer=scaled(1.0), schedules={"learning_rate.generator": StepRounds({0: 0.25})})
    assert_equal(found, weights(gan=gan)[0])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_rates_are_put_back_after_every_step(kind):
    """After three steps a factor of one half is still one half, and no eighth; powers of two are exact."""

    def at(rate):
        return lambda parameters: kind(parameters, lr=rate)

    half, _ = weights(optimizer=at(0.125), local_steps=4, schedules={"learning_rate": StepRounds({0: 0.5})})
    assert_equal(half, weights(optimizer=at(0.0625), local_steps=4)[0])


def test_local_steps_follow_the_schedule_and_no_minibatch_is_skipped():
    _, orchestrator = weights(schedules={"local_steps": StepRounds({0: 1, 1: 3, 2: 2})})
    assert orchestrator.ledger.client_steps == 4 * (1 + 3 + 2)
    same, _ = weights(schedules={"local_steps": StepRounds({0: 2})})
    assert_equal(same, weights()[0])
    seen = []

    class Watch(SequentialExecutor):
        def run(self, tasks):
            for task in tasks:
                seen.append(task.span(steps_per_epoch=5))
                yield from super().run([task])

    weights(Watch(), schedules={"local_steps": StepRounds({0: 1, 1: 3, 2: 2})})
    assert seen[::4] == [(0, 1), (1, 3), (4, 2)]


def test_a_penalty_may_fade():
    def gan(weight):
        made = ring_gan(optimizer=sgd)
        made.penalties = (R1(weight),)
        return made

    found, _ = weights(gan=gan(1.0), schedules={"penalties.0.gamma": StepRounds({0: 0.25})})
    assert_equal(found, weights(gan=gan(0.25))[0])


@pytest.mark.parametrize(
    "schedules",
    [
        {"learning_rate": LinearRounds(start=1.0, end=0.1), "learning_rate.discriminator": StepRounds({0: 0.5})},
        {"algorithm.mu": LinearRounds(start=1.0, end=0.1), "local_steps": StepRounds({0: 1, 1: 4})},
        {"penalties.0.gamma": ExponentialRounds(start=1.0, end=0.1)},
    ],
    ids=["rates", "mu and K", "penalty"],
)
def test_stacked_clients_follow_them_too(schedules):
    def gan():
        made = ring_gan(optimizer=sgd)
        made.penalties = (R1(1.0),)
        return made

    options = {"schedules": schedules, "algorithm": FedProx(mu=0.5)}
    alone, _ = weights(gan=gan(), **options)
    stacked, _ = weights(VectorizedExecutor(), gan=gan(), **options)
    for name in alone:
        torch.testing.assert_close(stacked[name], alone[name], rtol=1e-4, atol=1e-6)


def test_whole_numbers_of_a_module_are_rounded_half_up():
    class Every(torch.nn.Module):
        every_n_steps = 4

    module = Every()
    set_hyperparameters(module, {"every_n_steps": 2.5})
    assert module.every_n_steps == 3
    set_hyperparameters(module, {"every_n_steps": 1.49})
    assert module.every_n_steps == 1


def test_a_number_that_the_algorithm_never_reads_by_round_is_refused():
    with pytest.raises(ConfigurationError, match="federation.schedules must name local_steps.*got algorithm.exchange"):
        weights(algorithm=FedGAN(exchange_every=2), schedules={"algorithm.exchange_every": StepRounds({0: 1.0})})


def test_steps_by_schedule_beside_epochs_are_refused():
    with pytest.raises(ConfigurationError, match="in steps or in epochs; got federation.local_epochs beside"):
        weights(local_steps=None, local_epochs=1, schedules={"local_steps": StepRounds({0: 1.0})})


@pytest.mark.parametrize("name", ["learning_rate.encoder", "algorithm.mu", "generator.temperature", "", "."])
def test_a_name_of_nothing_is_refused(name):
    with pytest.raises(ConfigurationError, match="federation.schedules must name local_steps, learning_rate"):
        weights(schedules={name: StepRounds({0: 1.0})})


def test_what_is_no_schedule_is_refused():
    with pytest.raises(ConfigurationError, match="StepRounds.values"):
        StepRounds({1: 1.0})
    with pytest.raises(ConfigurationError, match="end of ExponentialRounds .* above 0"):
        ExponentialRounds(end=0.0)
    assert math.isclose(CosineRounds().value(0, 10), 1.0)
