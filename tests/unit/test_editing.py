"""Editing with a trained generator: projection, the way between two samples, directions of attributes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedgan_lightning.data.samples import Samples
from fedgan_lightning.editing import direction, edited, interpolate, project
from fedgan_lightning.errors import ConfigurationError, DataError
from fedgan_lightning.gan.priors import Uniform
from fedgan_lightning.metrics import PixelFeatures
from fedgan_lightning.networks import DCGANGenerator, MLPGenerator


class Affine(nn.Module):
    """G(z) = W z + b: what a projection finds is known."""

    def __init__(self) -> None:
        super().__init__()
        self.latent_dim, self.map = 3, nn.Linear(3, 5)

    def forward(self, z, y=None):
        return self.map(z)


def affine() -> Affine:
    torch.manual_seed(0)
    return Affine()


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_generated_image_is_recovered():
    torch.manual_seed(0)
    generator = MLPGenerator(4, (1, 8, 8), hidden=(32,))
    x = generator(torch.randn(6, 4, generator=noise(1))).detach()
    found = project(generator, x, steps=200, noise=noise())
    assert found.latents.shape == (6, 4)
    assert (found.error < found.start_error / 20).all(), "the error falls by a factor of 20 and more"
    torch.testing.assert_close(found.samples, generator(found.latents))
    torch.testing.assert_close(found.error, (found.samples - x).square().mean((1, 2, 3)))


def test_the_projection_on_an_affine_generator_is_least_squares():
    generator = affine()
    x = torch.randn(4, 5, generator=noise(1))
    matrix, bias = generator.map.weight.detach(), generator.map.bias.detach()
    wanted = torch.linalg.lstsq(matrix, (x - bias).T).solution.T
    found = project(generator, x, steps=500, lr=0.05, noise=noise())
    torch.testing.assert_close(found.latents, wanted, atol=2e-3, rtol=0)


def test_only_known_values_count():
    generator, known = affine(), torch.tensor([1.0, 1, 1, 1, 0])
    z = torch.randn(3, 3, generator=noise(1))
    whole = generator(z).detach()
    x = torch.where(known == 1, whole, torch.tensor(100.0))
    found = project(generator, x, known=known, steps=400, lr=0.1, noise=noise())
    torch.testing.assert_close(found.samples[:, 4], whole[:, 4], atol=1e-2, rtol=0)
    assert found.error.max() < 1e-4


def test_features_pull_the_projection_towards_what_they_see():
    generator, x = affine(), torch.randn(4, 5, generator=noise(1))

    def last(samples):
        return samples[:, 4:]

    apart = [
        float((last(project(generator, x, steps=200, noise=noise(), **options).samples) - last(x)).square().mean())
        for options in ({}, {"features": last, "feature_weight": 30.0})
    ]
    assert apart[1] < 0.1 * apart[0]
    net = PixelFeatures().build(Samples(x=torch.zeros(3, 5)), num_classes=0)
    assert project(generator, x, steps=2, features=net, noise=noise()).error.shape == (4,)


def test_more_starts_begin_nearer_and_the_prior_decides_where():
    generator, x = affine(), torch.randn(50, 5, generator=noise(1))
    few, many = (project(generator, x, steps=1, starts=starts, noise=noise()).start_error for starts in (1, 32))
    assert many.mean() < 0.7 * few.mean()
    near = project(generator, x, steps=1, starts=1, prior=Uniform(), lr=1e-9, noise=noise()).latents
    assert near.abs().max() <= 1 + 1e-6


def test_samples_are_projected_one_by_one_and_the_generator_is_left_as_it_was():
    torch.manual_seed(0)
    generator = DCGANGenerator(8, 1, latent_dim=4, width=4, num_classes=3).train()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    x, labels = torch.rand(3, 1, 8, 8) * 2 - 1, torch.tensor([0, 1, 2])
    together = project(generator, x, labels=labels, steps=5, starts=1, noise=noise())
    first = project(generator, x[:1], labels=labels[:1], steps=5, starts=1, noise=noise())
    torch.testing.assert_close(first.latents, together.latents[:1], atol=1e-4, rtol=1e-4)
    assert generator.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in generator.parameters())
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


def test_the_way_has_both_ends_and_is_the_prior_s():
    generator = affine()
    first, second = torch.randn(2, 4, 3, generator=noise(1)).unbind(0)
    way = interpolate(generator, first, second, steps=5)
    assert way.shape == (4, 5, 5)
    torch.testing.assert_close(way[:, 0], generator(first), atol=1e-5, rtol=0)
    torch.testing.assert_close(way[:, -1], generator(second), atol=1e-5, rtol=0)
    straight = interpolate(generator, first, second, steps=3, prior=Uniform())
    torch.testing.assert_close(straight[:, 1], generator((first + second) / 2), atol=1e-5, rtol=0)
    assert not torch.allclose(way[:, 2], straight[:, 1])
    conditional = MLPGenerator(3, (2,), hidden=(8,), num_classes=2)
    ways = [interpolate(conditional, first, second, labels=torch.full((4,), label)) for label in (0, 1)]
    assert not torch.equal(*ways)


def test_a_direction_is_the_difference_of_means_and_adds_the_attribute():
    generator = affine()
    latents = torch.randn(400, 3, generator=noise(1))
    attribute = generator(latents)[:, 0].detach() > 0
    found = direction(latents, attribute)
    torch.testing.assert_close(found, latents[attribute].mean(0) - latents[~attribute].mean(0))
    without = latents[~attribute]
    moved = edited(generator, without, found, amounts=torch.tensor([0.0, 1.0, 2.0]))
    assert moved.shape == (len(without), 3, 5)
    torch.testing.assert_close(moved[:, 0], generator(without))
    shares = (moved[:, :, 0] > 0).float().mean(0).tolist()
    assert shares[0] == 0
    assert shares[0] < shares[1] <= shares[2]
    assert shares[2] > 0.9


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g: project(g, torch.zeros(2, 4)), DataError, r"got \[4\], of the generator's \[5\]"),
        (
            lambda g: project(g, torch.zeros(2, 5), steps=0),
            ConfigurationError,
            "steps of project .* at least 1; got 0",
        ),
        (lambda g: project(g, torch.zeros(2, 5), lr=0), ConfigurationError, "lr of project .* above 0; got 0"),
        (
            lambda g: interpolate(g, torch.zeros(1, 3), torch.ones(1, 3), steps=1),
            ConfigurationError,
            "steps of interpolate .* at least 2; got 1",
        ),
        (lambda g: direction(torch.zeros(3, 2), torch.ones(3)), DataError, "got 3 of 3 with it"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(affine())
