"""A GAN as anybody's LightningModule: called, validated, tested, predicted from, exported and compiled."""

from __future__ import annotations

import copy
import pickle
from importlib.util import find_spec

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from fedgan_lightning import GAN
from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.gan.inpainting_mask import InpaintingMask
from fedgan_lightning.losses import R1, Augmentation, GradientPenalty, LeCam
from fedgan_lightning.networks import DCGANDiscriminator, DCGANGenerator, InpaintingGenerator, PatchDiscriminator
from tests.conftest import assert_states_equal, quiet_trainer
from tests.unit.test_batches import CLASSES, SHAPE, X, Y, small_gan

LOADER = {"batch_size": 8}


def fit(gan: GAN, *callbacks, validated: bool = False, shuffled: bool = True, **options):
    defaults = {"max_epochs": 2, "limit_val_batches": 1.0, "num_sanity_val_steps": 2}
    trainer = quiet_trainer(*callbacks, **{**defaults, **options})
    torch.manual_seed(3)
    data = TensorDataset(X, Y)
    train = DataLoader(data, shuffle=shuffled, **LOADER)
    trainer.fit(gan, train, DataLoader(data, **LOADER) if validated else None)
    return trainer


def batchnorm_gan(**options) -> GAN:
    torch.manual_seed(0)
    return GAN(DCGANGenerator(8, 1, latent_dim=3, width=4), DCGANDiscriminator(8, 1, width=4), **options)


def inpainting_gan() -> GAN:
    torch.manual_seed(0)
    generator = InpaintingGenerator(8, latent_dim=2, width=4, halvings=1)
    return GAN(generator, PatchDiscriminator(8, width=4, halvings=1), condition=InpaintingMask())


class TestForward:
    @pytest.mark.parametrize("half_life", [None, 50.0])
    def test_is_the_generator_that_is_sampled(self, half_life):
        gan = batchnorm_gan(ema_half_life_images=half_life)
        gan.train()
        gan.generator(torch.randn(16, 3))  # statistics that differ from those of the four below
        gan.update_ema(num_images=100)
        z = torch.randn(4, 3)
        assert torch.equal(gan(z), gan.sample(4, latents=z))
        assert torch.allclose(gan(z)[:1], gan(z[:1]), atol=1e-6), "a sample does not depend on others"
        assert gan.training
        assert gan.generator.training

    def test_has_gradients(self):
        z = torch.randn(4, 3, requires_grad=True)
        small_gan(ema_half_life_images=10.0)(z).sum().backward()
        assert float(z.grad.abs().sum()) > 0

    def test_takes_labels_of_any_form_and_says_if_they_are_missing(self):
        gan, z, y = small_gan(CLASSES), torch.randn(3, 3), torch.tensor([0, 2, 4])
        expected = gan.sample(3, latents=z, labels=y)
        for labels in (y, y.int(), y[:, None], torch.nn.functional.one_hot(y, CLASSES)):
            assert torch.equal(gan(z, labels), expected)
        with pytest.raises(ConfigurationError, match="got no labels"):
            gan(z)

    def test_takes_conditions(self):
        gan, z, condition = inpainting_gan(), torch.randn(2, 2), torch.randn(2, 2, 8, 8)
        assert torch.equal(gan(z, condition), gan.sample(2, latents=z, conditions=condition))
        with pytest.raises(ConfigurationError, match="sampled with conditions"):
            gan(z)


class TestValidation:
    @pytest.mark.parametrize(
        "options",
        [
            dict,
            lambda: {
                "augment": Augmentation(target=0.6),
                "anchor": LeCam(start_step=0),
                "penalties": [R1(0.1, interval=2), GradientPenalty(1.0)],
                "fake_labels": "all",
            },
        ],
        ids=["plain", "everything"],
    )
    def test_does_not_change_training(self, options):
        runs = [small_gan(CLASSES, ema_half_life_images=30.0, **options()) for _ in range(2)]
        fit(runs[0])
        trainer = fit(runs[1], validated=True, val_check_interval=1)
        assert "val_loss_g" in trainer.callback_metrics
        assert_states_equal(runs[0].state_dict(), runs[1].state_dict())
        assert runs[0].local_step == runs[1].local_step

    def test_logs_losses_and_beliefs_the_same_every_time(self):
        gan = batchnorm_gan(penalties=[R1(10.0)])
        before = copy.deepcopy(gan.state_dict())
        x = torch.rand(16, 1, 8, 8) * 2 - 1
        for run in ("validate", "test"):
            first, second = (
                getattr(quiet_trainer(limit_val_batches=1.0), run)(gan, DataLoader(x, **LOADER), verbose=False)[0]
                for _ in range(2)
            )
            prefix = run[:3] if run == "validate" else run
            assert set(first) == {f"{prefix}_{name}" for name in ("loss_d", "loss_g", "d_real", "d_fake")}
            assert first == second
        assert_states_equal(gan.state_dict(), before)

    def test_is_the_loss_of_training_in_evaluation_mode(self):
        gan = small_gan(penalties=[R1(10.0)]).eval()
        found = gan.evaluated(X, Y, seed=5)
        z = gan.prior.draw(len(X), 3, generator=torch.Generator().manual_seed(5), dtype=X.dtype, device="cpu")
        real, fake = gan.discriminator(X), gan.discriminator(gan.generator(z))
        torch.testing.assert_close(found["loss_d"], gan.loss.discriminator(real, fake))
        torch.testing.assert_close(found["loss_g"], gan.loss.generator(fake))
        torch.testing.assert_close(found["d_real"], real.sigmoid().mean())

    def test_conditions_and_their_losses_are_validated(self):
        trainer = quiet_trainer(limit_val_batches=1.0)
        x = torch.rand(8, 1, 8, 8) * 2 - 1
        (found,) = trainer.validate(inpainting_gan(), DataLoader(x, **LOADER), verbose=False)
        assert {"val_loss_g", "val_hole_l1"} <= set(found)

    def test_serves_early_stopping_and_the_best_checkpoint(self, tmp_path):
        best = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss_g")
        stop = EarlyStopping("val_loss_g", min_delta=1e9, patience=1)
        trainer = fit(small_gan(), best, stop, validated=True, max_epochs=9, enable_checkpointing=True)
        assert trainer.current_epoch == 2, "nothing improves by so much"
        assert "val_loss_g" in trainer.callback_metrics
        assert best.best_model_path

    def test_a_fit_without_a_loader_for_it_is_not_warned(self, recwarn):
        fit(small_gan())
        assert not [warning for warning in recwarn if "val_dataloader" in str(warning.message)]


class TestPrediction:
    def test_of_latents_with_and_without_labels(self):
        gan, z, y = small_gan(CLASSES), torch.randn(10, 3), torch.arange(10) % 2
        predict = quiet_trainer().predict
        (in_turn,) = predict(gan, DataLoader(z, batch_size=10))
        assert torch.equal(in_turn, gan.sample(10, latents=z)), "all classes in turn"
        for pair in (TensorDataset(z, y), TensorDataset(z, y[:, None].int())):
            (chosen,) = predict(gan, DataLoader(pair, batch_size=10))
            assert torch.equal(chosen, gan.sample(10, latents=z, labels=y))
        assert torch.equal(predict(gan, DataLoader(TensorDataset(z), batch_size=10))[0], in_turn)

    def test_of_a_number_of_samples(self):
        found = quiet_trainer().predict(small_gan(), DataLoader([3, 5], batch_size=1))
        assert [len(batch) for batch in found] == [3, 5]

    def test_of_conditions(self):
        z, conditions = torch.randn(4, 2), torch.randn(4, 2, 8, 8)
        found = quiet_trainer().predict(inpainting_gan(), DataLoader(TensorDataset(z, conditions), batch_size=4))
        assert found[0].shape == (4, 1, 8, 8)

    def test_of_images_is_refused(self):
        words = r"must be latents \(N, 3\), .* got a tensor of shape \[8, 1, 4, 4\]"
        with pytest.raises(ConfigurationError, match=words):
            quiet_trainer().predict(small_gan(), DataLoader(TensorDataset(X, Y), **LOADER))


class TestExport:
    @pytest.mark.parametrize("make", [lambda: small_gan(CLASSES), lambda: batchnorm_gan(ema_half_life_images=50.0)])
    def test_by_torch_export_and_as_torchscript_gives_the_samples(self, make, tmp_path):
        gan = make()
        gan.update_ema(num_images=10)
        z = torch.randn(4, 3)
        inputs = (z, torch.arange(4)) if gan.num_classes else (z,)
        expected = gan(*inputs)
        close = {"atol": 1e-6, "rtol": 1e-5}
        scripted = gan.to_torchscript(tmp_path / "gan.pt")
        traced = gan.to_torchscript(method="trace", example_inputs=inputs)
        exported = torch.export.export(gan.eval(), inputs).module()
        for module in (scripted, traced, exported, torch.jit.load(tmp_path / "gan.pt")):
            torch.testing.assert_close(module(*inputs), expected, **close)

    def test_as_onnx_without_its_packages_is_refused_by_lightning(self, tmp_path):
        if find_spec("onnx") is not None:
            pytest.skip("onnx is installed")
        gan = small_gan()
        with pytest.raises(ModuleNotFoundError, match="requires `onnx` to be installed"):
            gan.to_onnx(tmp_path / "gan.onnx", torch.randn(2, 3))
        assert gan.training

    def test_as_onnx(self, tmp_path):
        pytest.importorskip("onnx", reason="needs onnx, which is not a dependency")
        pytest.importorskip("onnxscript", reason="needs onnxscript, which is not a dependency")
        small_gan(CLASSES).to_onnx(tmp_path / "gan.onnx")
        assert (tmp_path / "gan.onnx").stat().st_size > 0


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_generator_has_an_average(in_place, tmp_path):
    plain, compiled = small_gan(ema_half_life_images=30.0), small_gan()
    generator = compiled.generator
    if in_place:
        generator.compile(backend="eager")
    else:
        generator = torch.compile(generator, backend="eager")
    options = {"ema_half_life_images": 30.0, "generator_optimizer": compiled.generator_optimizer}
    gan = GAN(generator, compiled.discriminator, discriminator_optimizer=options["generator_optimizer"], **options)
    fit(plain)
    fit(gan).save_checkpoint(tmp_path / "a.ckpt")
    assert_states_equal(gan.generator_ema.state_dict(), plain.generator_ema.state_dict())
    assert torch.equal(gan(torch.ones(2, 3)), plain(torch.ones(2, 3)))
    assert_states_equal(pickle.loads(pickle.dumps(gan.generator_ema)).state_dict(), plain.generator_ema.state_dict())
    loaded = GAN.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_states_equal(loaded.state_dict(), plain.state_dict())
    fit(gan, max_epochs=3)
    quiet_trainer(max_epochs=3).fit(gan, DataLoader(TensorDataset(X, Y), **LOADER), ckpt_path=tmp_path / "a.ckpt")
    assert tuple(gan(torch.ones(2, 3)).shape[1:]) == SHAPE
