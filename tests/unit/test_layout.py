"""Convolutions keep their channels last while they train, and nobody outside sees it."""

from __future__ import annotations

import pytest
import torch

from fedgan_lightning import GAN
from fedgan_lightning.federation import optimizer_state
from fedgan_lightning.gan import networks
from tests.conftest import adam, digits_data, quiet_trainer
from tests.contracts.test_executors import SequentialExecutor, assert_same, updates


def fused(parameters):
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.5, 0.999), fused=True)


def small(optimizer=adam, **options):
    torch.manual_seed(0)
    return GAN(
        networks.DCGANGenerator(8, 1, latent_dim=4, width=8),
        networks.DCGANDiscriminator(8, 1, width=8),
        generator_optimizer=optimizer,
        discriminator_optimizer=optimizer,
        **options,
    )


def with_channels_last(module):
    return [p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) for p in module.parameters()]


def is_plain(tensors):
    return all(tensor.is_contiguous() for tensor in tensors)


def test_a_plain_trainer_trains_with_channels_last_and_saves_plain_weights(tmp_path):
    gan = small()
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(gan, datamodule=digits_data().pooled(num_steps=2))
    assert any(with_channels_last(gan.generator))
    assert any(with_channels_last(gan.discriminator))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert is_plain(torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"].values())


@pytest.mark.parametrize("optimizer", [adam, fused], ids=["plain", "fused"])
@pytest.mark.parametrize("policy", ["average", "keep"])
def test_what_clients_send_and_keep_is_plain_and_right(monkeypatch, optimizer, policy):
    """A fused optimizer takes weights and moments as flat memory, so both must lie in the same order."""
    options = {"rounds": 3, "work": {"steps": 3}, "optimizer_state": policy}
    found = updates(SequentialExecutor(), small(optimizer).double(), digits_data(num_clients=3), **options)
    assert all(is_plain(update.delta.values()) for update in found[0].values())
    assert is_plain(found[2].values())
    for client in range(3):
        assert is_plain(found[1].read(client).values())
    monkeypatch.setattr(GAN, "lay_out", lambda self: None)
    expected = updates(SequentialExecutor(), small(optimizer).double(), digits_data(num_clients=3), **options)
    assert_same(found, expected, rtol=1e-9)


def test_a_moment_takes_the_layout_of_its_parameter():
    parameter = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    moment = torch.randn(4, 3, 2, 2)
    found = optimizer_state.laid_out_like(parameter, moment)
    assert found.stride() == parameter.stride()
    assert torch.equal(found, moment)


def test_only_networks_that_say_so_of_themselves_are_laid_out_anew():
    """A subclass may have a forward that takes a view of a convolution's maps."""

    class Own(networks.DCGANDiscriminator):
        def forward(self, x, y=None):
            return self.head(self.features[0](x).view(len(x), -1)[:, : self.head.logit.in_features], y)

    gan = small()
    gan.discriminator = Own(8, 3, width=8)
    gan.lay_out()
    assert not any(with_channels_last(gan.discriminator))
    assert gan.discriminator(torch.randn(2, 3, 8, 8)).shape == (2, 1)


IMAGES = {
    "DCGAN": lambda: (
        networks.DCGANGenerator(28, 3, latent_dim=4, width=4),
        networks.DCGANDiscriminator(28, 3, width=4),
    ),
    "ResNet": lambda: (
        networks.ResNetGenerator(32, 3, latent_dim=4, width=4),
        networks.ResNetDiscriminator(32, 3, width=4),
    ),
    "R3GAN": lambda: (
        networks.R3GANGenerator(32, 3, latent_dim=4, width=4, blocks=1, group_size=4),
        networks.R3GANDiscriminator(32, 3, width=4, blocks=1, group_size=4),
    ),
    "ACGAN": lambda: (networks.ACGANGenerator(32, 3, width=2), networks.ACGANDiscriminator(32, 3, width=2)),
    "inpainting": lambda: (networks.InpaintingGenerator(32, 3, width=4), networks.PatchDiscriminator(32, 3, width=4)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_networks_that_say_so_compute_the_same_with_channels_last(name):
    results = []
    for last in (False, True):
        torch.manual_seed(0)
        generator, discriminator = (network.double() for network in IMAGES[name]())
        if last:
            generator, discriminator = (own.to(memory_format=torch.channels_last) for own in (generator, discriminator))
        y = torch.tensor([0, 1, 1])
        x = torch.randn(3, 3, generator.sample_shape[-1], generator.sample_shape[-1], dtype=torch.float64)
        told = torch.cat([x, x[:, :1]], dim=1) if name == "inpainting" else y
        z = torch.randn(3, generator.latent_dim, dtype=torch.float64)
        fake = generator(z, told)
        out = discriminator(fake, told)
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()
        results.append(
            (fake, [p.grad for n in (generator, discriminator) for p in n.parameters() if p.grad is not None])
        )
    (plain, gradients), (fast, others) = results
    torch.testing.assert_close(fast, plain, atol=1e-12, rtol=1e-10)
    for own, other in zip(others, gradients, strict=True):
        torch.testing.assert_close(own, other, atol=1e-10, rtol=1e-8)
