"""BatchNorm statistics made from noise, and labels drawn evenly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedgan_lightning import GAN
from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.gan.sampling import RECALIBRATION_SAMPLES, estimate_statistics, inputs
from fedgan_lightning.networks import DCGANDiscriminator, DCGANGenerator
from fedgan_lightning.seeding import make_generator
from tests.conftest import assert_states_equal, digits_data, federate
from tests.foreign import SomebodysGAN


class Doubling(nn.Module):
    """BatchNorm over twice the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=0.1)

    def forward(self, z, y=None):
        return self.norm(2 * z + 1)


class Told(nn.Module):
    """Whatever is told (z, y) and looks at z only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z, y):
        return self.network(z)


def test_statistics_are_the_means_over_chunks_and_everything_else_is_restored():
    network = Doubling().eval()
    z = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    estimate_statistics(network, z, torch.zeros(1000, dtype=torch.int64), chunk_size=250)
    seen = 2 * z + 1
    torch.testing.assert_close(network.norm.running_mean, seen.mean(0))
    variances = torch.stack([chunk.var(0) for chunk in seen.split(250)])
    torch.testing.assert_close(network.norm.running_var, variances.mean(0))
    assert network.norm.momentum == 0.1
    assert not network.training
    assert not network.norm.training


def convolutional(num_classes=0, **options) -> GAN:
    torch.manual_seed(0)
    sizes = {"image_size": 28, "channels": 1, "width": 4, "num_classes": num_classes}
    told = {"conditioning": "projection"} if num_classes else {}
    return GAN(DCGANGenerator(latent_dim=8, **sizes), DCGANDiscriminator(**sizes, **told), **options)


@pytest.fixture
def mnist_like():
    from fedgan_lightning import FederatedDataModule
    from fedgan_lightning.sources import Samples, Source

    class Noise(Source):
        sample_shape, num_classes, class_names = (1, 28, 28), 0, ()

        def load(self, split):
            generator = torch.Generator().manual_seed(0)
            return Samples(x=torch.randint(256, (64, 1, 28, 28), generator=generator, dtype=torch.uint8))

    return FederatedDataModule(Noise(), num_clients=2, batch_size=8)


def test_the_server_s_statistics_come_from_its_own_samples(mnist_like):
    server, orchestrator, _ = federate(convolutional(), mnist_like, rounds=2, local_steps=2, buffers="estimate")
    generator = server.model.generator
    means = {name: value.clone() for name, value in generator.named_buffers() if name.endswith("running_mean")}
    server.model.recalibrate()
    for name, value in generator.named_buffers():
        if name in means:
            torch.testing.assert_close(value, means[name])
            assert value.abs().sum() > 0
    assert any("running_mean" in name for name in orchestrator.store.read(0)), "clients keep their own"


def statistics(network):
    return {name: value.clone() for name, value in network.named_buffers() if "running" in name}


@pytest.mark.parametrize("num_classes", [0, 10])
def test_the_moving_average_has_statistics_of_its_own_activations(num_classes):
    """Those of the raw weights, which it copies, are of other activations."""
    gan = convolutional(ema_half_life_images=100.0, num_classes=num_classes)
    with torch.no_grad():
        for parameter in gan.generator.parameters():
            parameter.mul_(1.5)
        gan.generator.train()(torch.randn(64, 8), torch.zeros(64, dtype=torch.int64))
    gan.update_ema(num_images=50)
    copied, drawn = statistics(gan.generator), torch.get_rng_state()
    assert_states_equal(statistics(gan.generator_ema), copied)

    sampled = gan.sample(20, generator=torch.Generator().manual_seed(1))
    expected = copy.deepcopy(gan.generator_ema)
    noise = make_generator(0, "statistics")
    estimate_statistics(expected, *inputs(gan, expected, RECALIBRATION_SAMPLES, generator=noise))
    assert_states_equal(statistics(gan.generator_ema), statistics(expected))
    assert any(not torch.allclose(value, copied[name]) for name, value in statistics(expected).items())
    z, y = inputs(gan, expected, 20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sampled, expected.eval()(z, y))
    assert torch.equal(torch.get_rng_state(), drawn), "training draws what it would have drawn"
    assert_states_equal(statistics(gan.generator), copied)


def test_statistics_of_the_moving_average_are_estimated_once_for_its_weights():
    gan = convolutional(ema_half_life_images=100.0)
    passes = []
    layer = next(own for own in gan.generator_ema.modules() if isinstance(own, nn.BatchNorm2d))
    layer.register_forward_hook(lambda own, *_: passes.append(own.training))

    def estimated():
        passes.clear()
        gan.sample(4)
        return any(passes)

    assert estimated()
    assert not estimated()
    gan.update_ema(num_images=10)
    assert estimated()
    gan.load_state_dict(convolutional(ema_half_life_images=100.0).state_dict())
    assert estimated()
    next(gan.generator_ema.parameters()).data.mul_(2)
    assert estimated()
    with torch.inference_mode():
        assert not estimated()
    gan.sample(4, raw=True)
    assert not estimated()
    assert gan.sampling_generator() is gan.generator_ema
    assert gan.sampling_generator(raw=True) is gan.generator


def test_the_check_before_training_leaves_the_moving_average_alone():
    """It is made at every start, and by a site for every message."""
    gan = convolutional(ema_half_life_images=100.0)
    before = statistics(gan.generator_ema)
    gan.check_data((1, 28, 28), num_classes=0)
    assert_states_equal(statistics(gan.generator_ema), before)


def test_statistics_are_estimated_with_all_other_layers_as_in_evaluation():
    network = nn.Sequential(
        nn.Dropout(0.5), Doubling(), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    ).train()
    before, drawn = copy.deepcopy(network[2].state_dict()), torch.get_rng_state()
    z = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    estimate_statistics(Told(network), z, torch.zeros(100, dtype=torch.int64))
    torch.testing.assert_close(network[1].norm.running_mean, (2 * z + 1).mean(0))
    assert_states_equal(network[2].state_dict(), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert network.training


def test_buffers_that_are_estimated_do_not_travel(mnist_like):
    def sent(buffers):
        _, orchestrator, _ = federate(convolutional(), mnist_like, rounds=1, local_steps=1, buffers=buffers)
        return sum(orchestrator.ledger.bytes_up.values())

    with pytest.warns(UserWarning, match="initial statistics"):
        local = sent("local")
    assert sent("estimate") == local < sent("merge")


def test_modules_that_cannot_recalibrate_are_refused():
    with pytest.raises(ConfigurationError, match=r"recalibrate\(\).*SomebodysGAN without it"):
        federate(SomebodysGAN(), digits_data(), rounds=1, local_steps=1, buffers="estimate")


def test_balanced_labels_take_the_classes_of_the_minibatch_evenly():
    sizes = {"image_size": 28, "channels": 1, "width": 4, "num_classes": 10}
    networks = DCGANGenerator(latent_dim=8, **sizes), DCGANDiscriminator(conditioning="projection", **sizes)
    y = torch.tensor([2] * 990 + [7] * 10)
    for choice, expected in (
        ("held", {2: 990, 7: 10}),
        ("balanced", {2: 500, 7: 500}),
        ("all", dict.fromkeys(range(10), 100)),
    ):
        gan = GAN(*networks, fake_labels=choice)
        drawn = gan.draw(y, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).y
        assert set(drawn.tolist()) == set(expected)
        for label, count in expected.items():
            assert abs(int((drawn == label).sum()) - count) <= 60
