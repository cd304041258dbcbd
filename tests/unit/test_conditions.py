"""Conditions made from the data, and codecs: the seams for uses beyond classes of images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedgan_lightning import GAN, SequentialExecutor, VectorizedExecutor
from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.losses import R1, RelativisticPairing
from fedgan_lightning.networks import Codec, Condition
from tests.conftest import adam, quiet_trainer, ring_data, ring_gan, sgd
from tests.contracts.test_executors import assert_same, updates

STACKED = VectorizedExecutor()


class Hidden(Condition):
    """Hides one coordinate of a point, chosen by chance, and asks for it back."""

    num_random = 1

    def make(self, x, y, u):
        seen = torch.cat([(u < 0.5), (u >= 0.5)], dim=-1).to(x.dtype)
        return torch.cat([x * seen, seen], dim=-1)

    def extra_losses(self, fake, x, condition):
        return {"reconstruction": 3.0 * (fake - x).square().mean()}


class Pair(nn.Module):
    """A network of two inputs: generator (z, c) -> point, or discriminator (x, c) -> logit."""

    num_classes, latent_dim = 0, 4

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs + 4, 16), nn.ReLU(), nn.Linear(16, outputs))

    def forward(self, x, c):
        return self.net(torch.cat([x, c], dim=-1))


def hidden_gan(**options) -> GAN:
    torch.manual_seed(0)
    settings = {"generator_optimizer": adam, "discriminator_optimizer": adam, "penalties": [R1()], **options}
    return GAN(Pair(4, 2), Pair(2, 1), condition=Hidden(), **settings)


def test_both_executors_agree_with_conditions():
    options = {"loss": RelativisticPairing(), "generator_optimizer": sgd, "discriminator_optimizer": sgd}
    one, other = (updates(executor, hidden_gan(**options), ring_data()) for executor in (STACKED, SequentialExecutor()))
    assert_same(one, other, rtol=1e-5)
    assert all("reconstruction" in update.metrics for update in one[0].values())


def test_terms_train_the_generator_and_are_logged():
    """With its term the generator gives back what is hidden better than without."""
    errors = {}
    for weight in (0.0, 3.0):
        gan = hidden_gan(penalties=[])
        gan.condition.extra_losses = lambda fake, x, c, weight=weight: {
            "reconstruction": weight * (fake - x).square().mean()
        }
        trainer = quiet_trainer(max_epochs=1)
        torch.manual_seed(1)
        trainer.fit(gan, datamodule=ring_data().pooled(num_steps=400))
        assert "reconstruction" in trainer.callback_metrics
        x = ring_data().test_samples.x
        c = gan.condition.make(x, None, torch.rand(len(x), 1, generator=torch.Generator().manual_seed(0)))
        made = gan.sample(len(x), conditions=c, generator=torch.Generator().manual_seed(0))
        errors[weight] = float((made - x).square().mean())
    assert errors[3.0] < 0.7 * errors[0.0]


def test_sampling_asks_for_conditions_exactly_if_there_are_any():
    with pytest.raises(ConfigurationError, match="no conditions"):
        hidden_gan().sample(3)
    with pytest.raises(ConfigurationError, match="no conditions"):
        hidden_gan().recalibrate()
    with pytest.raises(ConfigurationError, match="conditions without one"):
        ring_gan().sample(3, conditions=torch.zeros(3, 4))


def test_labels_and_augmentation_are_refused_beside_a_condition():
    with pytest.raises(ConfigurationError, match="fake_labels"):
        hidden_gan(fake_labels="all")


def test_networks_that_do_not_take_the_condition_are_refused_before_training():
    class Wide(Hidden):
        def make(self, x, y, u):
            return torch.cat([super().make(x, y, u), u], dim=-1)

    gan = hidden_gan()
    gan.condition = Wide()
    with pytest.raises(ConfigurationError, match="condition"):
        gan.check_data((2,), 0)


class Sign(Codec):
    """Writes points as signs."""

    def encode(self, x):
        return x.to(torch.float32) * 2 - 1

    def decode(self, samples):
        return (samples > 0).long()


class Watching(nn.Module):
    """A discriminator that keeps what it sees of real samples."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = nn.Linear(2, 1), []

    def forward(self, x, y):
        self.seen.append(x.detach().clone())
        return self.net(x)


class Plain(nn.Module):
    """A generator without labels."""

    num_classes, latent_dim = 0, 4

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, z, y):
        return self.net(z)


def test_a_codec_stands_between_the_data_and_the_networks():
    data = ring_data()
    points = data.train_samples
    data.__dict__["train_samples"] = type(points)(x=(points.x > 0).long(), y=points.y, columns=points.columns)
    gan = GAN(Plain(), Watching(), codec=Sign())
    gan.check_data((2,), 0)
    gan.discriminator.seen.clear()
    quiet_trainer(max_epochs=1).fit(gan, datamodule=data.pooled(num_steps=2))
    real = gan.discriminator.seen[0]
    assert real.dtype == torch.float32
    assert set(real.flatten().tolist()) == {-1.0, 1.0}
    made = gan.sample(50, generator=torch.Generator().manual_seed(0))
    assert set(made.flatten().tolist()) == {0, 1}
    assert made.dtype == torch.int64
