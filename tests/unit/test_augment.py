"""Augmentation and anchors: closed forms, gradients, adaptation."""

from __future__ import annotations

import pytest
import torch

from fedgan_lightning import GAN
from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.gan.augment import OPERATIONS
from fedgan_lightning.losses import Augmentation, LeCam
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from tests.conftest import digits_data, federate


def images(count=16, size=16, channels=3):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def numbers(count=16, **fixed):
    u = torch.rand(count, Augmentation.num_random, generator=torch.Generator().manual_seed(1))
    for index, value in fixed.items():
        u[:, int(index[1:])] = value
    return u


class TestOperations:
    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_change_images_differentiably_and_not_at_probability_zero(self, operation):
        x = images().double().requires_grad_()
        u = numbers().double()
        changed = Augmentation([operation]).transform(x, u)
        assert changed.shape == x.shape
        assert not torch.equal(changed, x)
        assert torch.equal(Augmentation([operation], probability=0.0).transform(x, u), x)
        (gradient,) = torch.autograd.grad(changed.square().sum(), x)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0
        few, own = images(2, 4, 2).double().requires_grad_(), numbers(2).double()
        assert torch.autograd.gradcheck(lambda x: Augmentation([operation]).transform(x, own), few)

    def test_a_probability_of_a_half_leaves_half_of_the_images(self):
        x = images(400, 8, 1)
        changed = Augmentation(["colour"], probability=0.5).transform(x, numbers(400))
        share = (changed != x).flatten(1).any(1).float().mean()
        assert share == pytest.approx(0.5, abs=0.08)

    def test_neutral_numbers_change_no_colour(self):
        x = images()
        neutral = numbers(u0=0.5, u1=0.5, u2=0.5)
        torch.testing.assert_close(Augmentation(["colour"]).transform(x, neutral), x, atol=1e-6, rtol=1e-6)

    def test_brightness_contrast_and_saturation_are_those_of_the_paper(self):
        x = images()
        brighter = Augmentation(["colour"]).transform(x, numbers(u0=0.9, u1=0.5, u2=0.5))
        torch.testing.assert_close(brighter, x + 0.4)
        grey = Augmentation(["colour"]).transform(x, numbers(u0=0.5, u1=0.0, u2=0.5))
        torch.testing.assert_close(grey, x.mean(1, keepdim=True).expand_as(x), atol=1e-6, rtol=1e-5)
        flat = Augmentation(["colour"]).transform(x, numbers(u0=0.5, u1=0.5, u2=0.0))
        middle = x.mean((1, 2, 3), keepdim=True)
        torch.testing.assert_close(flat, (x - middle) / 2 + middle, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("u, shift", [(0.0, -2), (0.5, 0), (0.999, 2)])
    def test_translation_shifts_by_whole_pixels_and_fills_with_zeros(self, u, shift):
        x = images()
        moved = Augmentation(["translation"]).transform(x, numbers(u3=u, u4=0.5))
        expected = torch.zeros_like(x)
        rows = torch.arange(16)
        inside = (rows + shift >= 0) & (rows + shift < 16)
        expected[:, :, inside] = x[:, :, (rows + shift)[inside]]
        torch.testing.assert_close(moved, expected)

    def test_cutout_takes_a_square_of_half_the_side(self):
        x = torch.ones(4, 1, 16, 16)
        cut = Augmentation(["cutout"]).transform(x, numbers(4, u5=0.5, u6=0.5))
        assert [int((own == 0).sum()) for own in cut] == [7 * 7] * 4
        assert (cut[0, 0, 5:12, 5:12] == 0).all()

    def test_arguments(self):
        with pytest.raises(ConfigurationError, match=r"colour, translation, cutout; got \['rotation'\]"):
            Augmentation(["rotation"])
        with pytest.raises(ConfigurationError, match="got none"):
            Augmentation([])
        with pytest.raises(ConfigurationError, match=r"probability .* in .0, 1.; got 1.5"):
            Augmentation(probability=1.5)


class TestAdaptation:
    def test_follows_the_formula(self):
        augment = Augmentation(probability=0.2, target=0.6, images_to_full=1000)
        augment.adapt(torch.tensor([1.0, 2.0, 3.0, -1.0]), num_images=64)  # E sign = .5 < .6
        assert float(augment.probability) == pytest.approx(0.2 - 0.064)
        augment.adapt(torch.tensor([1.0, 2.0, 3.0, 1.0]), num_images=64)
        assert float(augment.probability) == pytest.approx(0.2)
        for _ in range(20):
            augment.adapt(torch.ones(4), num_images=64)
        assert float(augment.probability) == 1.0

    def test_a_fixed_probability_has_no_state(self):
        assert Augmentation().state_dict() == {}
        assert list(Augmentation(target=0.6).state_dict()) == ["probability"]

    def test_is_averaged_over_clients_or_stays_with_them(self):
        def run(**options):
            torch.manual_seed(0)
            generator, discriminator = MLPGenerator(4, (1, 8, 8)), MLPDiscriminator((1, 8, 8))
            augment = Augmentation(probability=0.5, target=0.6, images_to_full=2000)
            gan = GAN(generator, discriminator, augment=augment)
            return federate(gan, digits_data(), rounds=2, local_steps=3, **options)

        server, orchestrator, _ = run()
        assert float(server.model.augment.probability) != 0.5
        assert len(orchestrator.store) == 0
        server, orchestrator, _ = run(sync={"augment": "local"})
        assert float(server.model.augment.probability) == 0.5
        held = [float(orchestrator.store.read(k)["augment.probability"]) for k in range(5)]
        assert all(value != 0.5 for value in held)


class TestLeCam:
    def test_value_and_anchors_follow_the_formulas(self):
        anchor = LeCam(0.3, decay=0.9, start_step=0)
        real, fake = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])
        anchor.update_(real, fake)
        assert float(anchor.real) == pytest.approx(0.1 * 0.5)
        assert float(anchor.fake) == pytest.approx(0.1 * -1.25)
        value = anchor.value(real, fake, torch.tensor(0.5), torch.tensor(-0.5))
        above = ((2.5**2) + 0.0) / 2  # relu(r - a_F)^2
        below = (3.5**2 + 0.0) / 2  # relu(a_R - f)^2
        assert float(value) == pytest.approx(0.3 * (above + below))

    def test_starts_late(self):
        def gan(start_step):
            anchor = LeCam(1.0, start_step=start_step)
            return GAN(MLPGenerator(4, (1, 8, 8)), MLPDiscriminator((1, 8, 8)), anchor=anchor)

        early, late = gan(0), gan(10)
        x, z = torch.randn(8, 1), torch.randn(8, 1)
        assert float(early.anchored(x, z)) > 0
        assert float(late.anchored(x, z)) == 0
        late.local_step = 10
        assert float(late.anchored(x, z)) == float(early.anchored(x, z))

    def test_arguments(self):
        with pytest.raises(ConfigurationError, match=r"decay of LeCam .* in \[0, 1\); got 1.0"):
            LeCam(decay=1.0)


def test_vectors_are_not_augmented():
    with pytest.raises(ConfigurationError, match=r"what is augmented must be images; got samples of shape \[2\]"):
        GAN(MLPGenerator(4, (2,)), MLPDiscriminator((2,)), augment=Augmentation())
