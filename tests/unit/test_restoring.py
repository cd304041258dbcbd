"""A checkpoint alone makes a GAN anew, and nothing in it is executed."""

from __future__ import annotations

import io
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from fedgan_lightning import GAN
from fedgan_lightning.errors import CheckpointError, ConfigurationError
from fedgan_lightning.gan.construction import CONSTRUCTION, arguments_from, describe
from fedgan_lightning.gan.inpainting_mask import InpaintingMask
from fedgan_lightning.gan.priors import MidpointNodes
from fedgan_lightning.gan.text import LanguageModel, OneHot
from fedgan_lightning.losses import R1, Augmentation, GradientPenalty, Hinge, LeCam
from fedgan_lightning.networks import (
    ACGANDiscriminator,
    ACGANGenerator,
    CFGANCondition,
    CFGANDiscriminator,
    CFGANGenerator,
    Gumbel,
    InpaintingGenerator,
    MLPDiscriminator,
    MLPGenerator,
    PatchDiscriminator,
    ProfileDiscriminator,
    ProfileGenerator,
    R3GANDiscriminator,
    R3GANGenerator,
    ResNetDiscriminator,
    ResNetGenerator,
    TextDiscriminator,
    TextGenerator,
)
from tests.conftest import assert_states_equal, quiet_trainer
from tests.unit.test_batches import CLASSES, Foreign, X, Y, small_gan

ADAM = partial(torch.optim.Adam, lr=3e-3, betas=(0.0, 0.9))


def saved(module: L.LightningModule, path, *, data=None, **options):
    """Train a little, and write a checkpoint with a plain Trainer."""
    trainer = quiet_trainer(max_epochs=1, **options)
    trainer.fit(module, DataLoader(TensorDataset(X, Y) if data is None else data, batch_size=8))
    trainer.save_checkpoint(path)
    return path


def made_again(module: GAN) -> GAN:
    """Return what the description of a GAN makes, by way of a file."""
    file = io.BytesIO()
    torch.save({CONSTRUCTION: describe(module, type(module).__init__)}, file)
    file.seek(0)
    return GAN(**arguments_from(torch.load(file, weights_only=True), GAN.__init__, owner="GAN", given={}))


def test_a_plain_trainers_checkpoint_needs_no_arguments(tmp_path):
    gan = small_gan(
        CLASSES,
        loss=Hinge(),
        penalties=[R1(0.3, interval=2), GradientPenalty()],
        prior=MidpointNodes(4),
        augment=Augmentation(["colour"], target=0.5),
        anchor=LeCam(0.2),
        ema_half_life_images=40.0,
        d_steps=2,
        generator_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
    )
    gan.generator_optimizer = gan.discriminator_optimizer = ADAM
    path = saved(gan, tmp_path / "a.ckpt")
    loaded = GAN.load_from_checkpoint(path)
    assert_states_equal(loaded.state_dict(), gan.state_dict())
    assert isinstance(loaded.loss, Hinge)
    assert [(type(own), own.interval) for own in loaded.penalties] == [(R1, 2), (GradientPenalty, 1)]
    assert (loaded.penalties[0].gamma, loaded.prior.num_nodes, loaded.d_steps, loaded.local_step) == (0.3, 4, 2, 2)
    assert (loaded.augment.operations, loaded.augment.target, loaded.anchor.weight) == (("colour",), 0.5, 0.2)
    assert loaded.generator_optimizer.keywords == {"lr": 3e-3, "betas": [0.0, 0.9]}
    quiet_trainer(max_epochs=2).fit(loaded, DataLoader(TensorDataset(X, Y), batch_size=8), ckpt_path=path)
    assert loaded.local_step == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: GAN(ACGANGenerator(width=4), ACGANDiscriminator(width=4)),
        lambda: GAN(ProfileGenerator(width=4), ProfileDiscriminator(width=4)),
        lambda: GAN(R3GANGenerator(width=4), R3GANDiscriminator(width=4)),
        lambda: GAN(ResNetGenerator(8, width=4), ResNetDiscriminator(8, width=4), ema_half_life_images=9.0),
        lambda: GAN(
            InpaintingGenerator(8, width=4), PatchDiscriminator(8, width=4), condition=InpaintingMask(area=(0.2, 0.3))
        ),
        lambda: GAN(CFGANGenerator(9), CFGANDiscriminator(9), condition=CFGANCondition(9, alpha=0.3)),
        lambda: GAN(TextGenerator(5, 4), TextDiscriminator(5, 4, widths=[2]), prior=Gumbel(), codec=OneHot(5)),
    ],
    ids=["ACGAN", "profiles", "R3GAN", "ResNet", "inpainting", "CFGAN", "text"],
)
def test_all_our_parts_are_described(make):
    gan = make()
    again = made_again(gan)
    again.load_state_dict(gan.state_dict())
    assert describe(again, GAN.__init__) == describe(gan, GAN.__init__)


def test_what_the_caller_gives_wins(tmp_path):
    path = saved(small_gan(d_steps=2, ema_half_life_images=40.0), tmp_path / "a.ckpt")
    loaded = GAN.load_from_checkpoint(path, d_steps=4, loss=Hinge(), generator_optimizer=ADAM)
    assert (loaded.d_steps, type(loaded.loss), loaded.generator_optimizer) == (4, Hinge, ADAM)


def test_somebody_elses_network_is_asked_for_by_name(tmp_path):
    path = saved(GAN(Foreign(3, 1, 4, 4), Foreign(16, 1)), tmp_path / "a.ckpt")
    words = "must be given generator=...; got Foreign, whose arguments no checkpoint holds. Pass generator=Foreign"
    with pytest.raises(ConfigurationError, match=words):
        GAN.load_from_checkpoint(path)
    loaded = GAN.load_from_checkpoint(path, generator=Foreign(3, 1, 4, 4), discriminator=Foreign(16, 1))
    assert_states_equal(loaded.state_dict(), torch.load(path, weights_only=True)["state_dict"])


def test_a_function_that_makes_an_optimizer_is_missed_in_training_alone(tmp_path):
    loaded = GAN.load_from_checkpoint(saved(small_gan(), tmp_path / "a.ckpt"))
    assert loaded.sample(3).shape == (3, 1, 4, 4)
    with pytest.raises(ConfigurationError, match="must be given generator_optimizer=... to train on; .* with sgd"):
        saved(loaded, tmp_path / "b.ckpt")


class OfWidth(GAN):
    def __init__(self, width: int, loss: str = "hinge") -> None:
        super().__init__(MLPGenerator(3, (1, 4, 4), hidden=(width,)), MLPDiscriminator((1, 4, 4), hidden=(width,)))
        self.save_hyperparameters()


class OfNetworks(GAN):
    def __init__(self, generator, discriminator, loss: str = "hinge") -> None:
        super().__init__(generator, discriminator, d_steps=2)
        self.name = loss


class Renamed(GAN):
    pass


def test_heirs_are_restored_by_their_own_constructors(tmp_path):
    loaded = OfWidth.load_from_checkpoint(saved(OfWidth(7), tmp_path / "a.ckpt"))
    assert loaded.generator.layers[0].out_features == 7
    own = small_gan()
    loaded = OfNetworks.load_from_checkpoint(saved(OfNetworks(own.generator, own.discriminator), tmp_path / "b.ckpt"))
    assert (loaded.name, loaded.d_steps) == ("hinge", 2)
    loaded = Renamed.load_from_checkpoint(saved(Renamed(own.generator, own.discriminator, d_steps=4), tmp_path / "c"))
    assert (type(loaded), loaded.d_steps) == (Renamed, 4)


@pytest.mark.parametrize(
    "part, error, words",
    [
        ({"class_path": "subprocess.Popen", "init_args": {"args": "true"}}, ConfigurationError, "got Popen, whose"),
        ({"class_path": "torch.nn.Linear", "init_args": {"in_features": 1}}, ConfigurationError, "got Linear, whose"),
        (
            {"class_path": "fedgan_lightning.files.Path", "init_args": {}},
            CheckpointError,
            "got fedgan_lightning.files.P",
        ),
        (
            {"class_path": "fedgan_lightning.nowhere.A", "init_args": {}},
            CheckpointError,
            "got fedgan_lightning.nowhere",
        ),
        (
            {"class_path": "torch.optim.adam.torch", "init_args": {}, "partial": True},
            CheckpointError,
            "got torch.optim",
        ),
    ],
)
def test_class_paths_of_a_file_are_not_imported_at_will(tmp_path, part, error, words):
    path = saved(small_gan(), tmp_path / "a.ckpt")
    contents = torch.load(path, weights_only=True)
    contents[CONSTRUCTION]["generator"] = part
    torch.save(contents, path)
    with pytest.raises(error, match=words):
        GAN.load_from_checkpoint(path)


def test_a_checkpoint_without_a_description_says_what_to_pass(tmp_path):
    path = saved(small_gan(), tmp_path / "a.ckpt")
    contents = torch.load(path, weights_only=True)
    del contents[CONSTRUCTION]
    torch.save(contents, path)
    with pytest.raises(ConfigurationError, match="must be given generator=..., discriminator=...; got a checkpoint"):
        GAN.load_from_checkpoint(path)


def test_a_file_object_is_loaded_too(tmp_path):
    path = saved(small_gan(), tmp_path / "a.ckpt")
    loaded = GAN.load_from_checkpoint(io.BytesIO(path.read_bytes()))
    assert_states_equal(loaded.state_dict(), torch.load(path, weights_only=True)["state_dict"])


def test_numbers_are_hyperparameters_that_loggers_show_and_no_command_line_meets(tmp_path):
    gan = small_gan(d_steps=2)
    assert {"d_steps": 2, "updates": "alternating", "ema_half_life_images": None}.items() <= dict(gan.hparams).items()
    path = saved(gan, tmp_path / "a.ckpt", logger=CSVLogger(tmp_path, name="log"))
    assert "d_steps: 2" in (tmp_path / "log" / "version_0" / "hparams.yaml").read_text()
    assert "hyper_parameters" not in torch.load(path, weights_only=True)


class Pictures(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(X, Y), batch_size=8)


@pytest.mark.parametrize("is_subclass", [False, True])
def test_the_lightning_cli_trains_saves_and_resumes_a_gan(tmp_path, is_subclass):
    part = "{class_path: fedgan_lightning.networks.%s, init_args: {sample_shape: [1, 4, 4], hidden: [8]}}"
    prefix = "--model.init_args" if is_subclass else "--model"
    arguments = ["--model=fedgan_lightning.GAN"] if is_subclass else []
    arguments += [f"{prefix}.generator={part % 'MLPGenerator'}", f"{prefix}.discriminator={part % 'MLPDiscriminator'}"]
    arguments += [prefix + ".generator_optimizer={class_path: torch.optim.Adam, init_args: {lr: 0.003}}"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    arguments += [
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_checkpointing=false",
    ]
    options = {"save_config_callback": None, "subclass_mode_model": is_subclass, "datamodule_class": Pictures}
    options["model_class"] = L.LightningModule if is_subclass else GAN

    def cli(*more):
        return LightningCLI(args=["fit", *arguments, *more], seed_everything_default=False, **options)

    path = tmp_path / "a.ckpt"
    cli("--trainer.max_epochs=1").trainer.save_checkpoint(path)
    assert GAN.load_from_checkpoint(path).generator_optimizer.keywords["lr"] == 0.003
    again = cli("--trainer.max_epochs=2", f"{prefix}.d_steps=2", f"--ckpt_path={path}").model
    assert (again.local_step, again.d_steps) == (4, 2), "the command line counts"


def test_a_language_model_is_validated_and_restored(tmp_path):
    ids = torch.randint(0, 5, (16, 4))
    model = LanguageModel(TextGenerator(5, 4, embedding=3, hidden=4))
    loader = DataLoader(ids, batch_size=8)
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=1.0)
    trainer.fit(model, DataLoader(TensorDataset(ids), batch_size=8), loader)
    assert "val_loss" in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = LanguageModel.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_states_equal(loaded.state_dict(), model.state_dict())
    (tested,) = quiet_trainer().test(loaded, loader, verbose=False)
    assert tested["test_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert loaded(torch.randn(2, 20)).shape == (2, 4, 5)
