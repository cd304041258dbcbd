"""Modules of other people send what is right for them, and are let in."""

from __future__ import annotations

import pickle

import lightning as L
import numpy as np
import pytest
import torch

from fedgan_lightning import GAN
from fedgan_lightning.aggregators import WeightedMean
from fedgan_lightning.gan.average import IMAGES_SEEN
from fedgan_lightning.partitions import Dirichlet
from tests.conftest import federate, ring_data, ring_gan


class Regression(L.LightningModule):
    """A network, a target that follows it, and a value that some clients do not have."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.network, self.target = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.network(x) - self.target(x).detach() - 1).square().mean()
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        with torch.no_grad():
            for own, other in zip(self.target.parameters(), self.network.parameters()):
                own.lerp_(other, 0.1)
        self.log("recall_of_class_7", loss.detach() * 0 + (1.0 if (y == 7).any() else float("nan")))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_a_target_that_moves_without_gradients_has_no_moments():
    server, _, _ = federate(Regression(), ring_data(), rounds=2, local_steps=3)
    assert any("network" in name for name in server.moments)
    assert not any("target" in name for name in server.moments)


def test_a_value_that_a_client_does_not_have_is_left_out():
    server, orchestrator, _ = federate(Regression(), ring_data(), rounds=2, local_steps=3)
    assert orchestrator.ledger.client_runs == 8
    assert all(value.isfinite().all() for value in server.state_dict().values())


class KeepsLater(torch.optim.SGD):
    """Begins to keep something at its second step."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                if state["count"] > 1 and "slow" not in state:
                    state["slow"] = parameter.detach().clone()
        return super().step(closure)


def test_an_optimizer_that_keeps_things_from_its_second_step_on(caplog):
    gan = ring_gan(optimizer=lambda parameters: KeepsLater(parameters, lr=0.01))
    server, _, _ = federate(gan, ring_data(), rounds=2, local_steps=3)
    assert any(name.endswith("/slow") for name in server.moments)
    assert "only KeepsLater knows" in caplog.text


class LearnsInSetup(Regression):
    """Its schedule's length is known when it is set up."""

    steps = None

    def setup(self, stage):
        self.steps = 100

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=self.steps)]


def test_a_schedule_whose_length_is_known_later():
    server, _, _ = federate(LearnsInSetup(), ring_data(), rounds=1, local_steps=2)
    assert server.model.steps == 100


def test_a_gan_with_an_average_goes_into_a_pickle():
    gan = ring_gan(ema_half_life_images=10.0)
    gan.update_ema(num_images=4)
    copied = pickle.loads(pickle.dumps(gan.generator_ema))
    assert type(copied) is type(gan.generator_ema)
    assert float(getattr(copied, IMAGES_SEEN)) == 4
    assert copied.to(torch.bfloat16).images_seen.dtype == torch.float64


@pytest.mark.parametrize("word", [np.str_("uniform"), "uniform"])
def test_words_and_numbers_of_other_libraries_are_taken(word):
    assert WeightedMean(word).weight(7) == 1.0
    gan = ring_gan()
    assert GAN(gan.generator, gan.discriminator, d_steps=np.int64(2)).d_steps == 2


class Warming(Regression):
    """Counts its steps, and remembers that it has begun."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("by_class", torch.zeros(3, dtype=torch.int32))
        self.register_buffer("has_begun", torch.zeros((), dtype=torch.bool))

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.steps += 1
        self.by_class[1] += 2
        self.has_begun.fill_(True)


@pytest.mark.parametrize("buffers", ["merge", "local"])
def test_counters_go_on_from_round_to_round(buffers):
    """They began anew in every round: a warm-up never ended."""
    seen = []

    class Watched(Warming):
        def on_train_end(self):
            seen.append(int(self.steps))

    server, _, _ = federate(Watched(), ring_data(), rounds=4, local_steps=3, buffers=buffers)
    assert seen == [3] * 4 + [6] * 4 + [9] * 4 + [12] * 4
    if buffers == "merge":
        state = server.model.state_dict()
        assert state["steps"] == 12
        assert state["steps"].dtype == torch.int64
        assert state["by_class"].tolist() == [0, 24, 0]
        assert state["by_class"].dtype == torch.int32
        assert bool(state["has_begun"])


def test_counters_that_differ_have_their_mean():
    data = ring_data(partition=Dirichlet(0.5, min_samples=16))
    server, _, _ = federate(Warming(), data, rounds=1, local_epochs=1)
    sizes = [data.num_examples(k) for k in range(4)]
    steps = [data.steps_per_epoch(k) for k in range(4)]
    mean = sum(n * k for n, k in zip(sizes, steps)) / sum(sizes)
    assert len(set(steps)) > 1
    assert int(server.model.steps) == round(mean)
