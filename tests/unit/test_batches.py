"""What data loaders give to a GAN in a plain Trainer: any usual structure is read, and what cannot be is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fedgan_lightning import GAN, FederatedDataModule
from fedgan_lightning.errors import ConfigurationError, DataError
from fedgan_lightning.gan.batches import output_range
from fedgan_lightning.networks import DCGANGenerator, MLPDiscriminator, MLPGenerator, R3GANGenerator, ResNetGenerator
from fedgan_lightning.sources import Digits
from tests.conftest import assert_states_equal, quiet_trainer, sgd

SHAPE, CLASSES = (1, 4, 4), 5


def small_gan(num_classes: int = 0, *, shape=SHAPE, output="tanh", **options) -> GAN:
    torch.manual_seed(0)
    kind = "projection" if num_classes else "none"
    generator = MLPGenerator(3, shape, hidden=(8,), num_classes=num_classes, output=output)
    discriminator = MLPDiscriminator(shape, hidden=(8,), num_classes=num_classes, conditioning=kind)
    return GAN(generator, discriminator, generator_optimizer=sgd, discriminator_optimizer=sgd, **options)


def pictures(count: int = 16):
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.rand(count, *SHAPE, generator=generator) - 1
    return x, torch.arange(count) % CLASSES


class Named(Dataset):
    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


def trained(gan: GAN, data) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    quiet_trainer(max_epochs=1).fit(gan, DataLoader(data, batch_size=8))
    return gan.state_dict()


X, Y = pictures()
ONE_HOT = nn.functional.one_hot(Y, CLASSES)
PAIRS = {
    "(N, 1)": TensorDataset(X, Y[:, None]),
    "one-hot": TensorDataset(X, ONE_HOT),
    "one-hot floats": TensorDataset(X, ONE_HOT.float()),
    "int32": TensorDataset(X, Y.int()),
    "image and label": Named(image=X, label=Y),
    "pixel_values and labels": Named(pixel_values=X, labels=Y),
    "x and y": Named(x=X, y=Y.int()),
    "img, label and more": Named(img=X, label=Y, path=Y),
}
ALONE = {"x": X, "(x,)": TensorDataset(X), "a mapping": Named(image=X), "three": TensorDataset(X, Y, Y)}
ALONE |= {"odd labels": TensorDataset(X, ONE_HOT[:, :3].float())}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("num_classes", [0, CLASSES])
def test_every_usual_structure_trains_like_a_pair(name, num_classes):
    expected = trained(small_gan(num_classes), TensorDataset(X, Y))
    assert_states_equal(trained(small_gan(num_classes), PAIRS[name]), expected)


@pytest.mark.parametrize("name", ALONE)
def test_images_alone_train_an_unconditional_gan(name):
    assert_states_equal(trained(small_gan(), ALONE[name]), trained(small_gan(), TensorDataset(X, Y)))


@pytest.mark.parametrize(
    "data, words",
    [
        (X, "got no labels"),
        (Named(image=X), "got no labels"),
        (TensorDataset(X, ONE_HOT[:, :3]), r"got labels \[8, 3\], int64, for 8 images"),
        (TensorDataset(X, ONE_HOT + ONE_HOT.flip(1)), "got rows of 5 with none or several entries"),
        (TensorDataset(X, Y + 1), "or one-hot .N, 5.; got labels from 1 to 5"),
        (TensorDataset(X, Y - 1), "got labels from -1 to 3"),
        (TensorDataset(X, Y.float()), r"got labels \[8\], float32, for 8 images. Give one integer per image"),
        (TensorDataset(X, torch.cat([Y[:8], Y[8:] + 3])), "got labels from 3 to 7"),  # in the second minibatch
        (TensorDataset(X, Y, Y), "a minibatch must be images x .* got a list of 3"),
        (
            Named(picture=X, label=Y),
            "a mapping with image, x, .* got a mapping with picture, label",
        ),
    ],
)
def test_labels_that_are_none_are_refused_by_what_came(data, words):
    with pytest.raises(ConfigurationError, match=words):
        trained(small_gan(CLASSES), data)


@pytest.mark.parametrize(
    "x, error, words",
    [
        (X / 2 + 0.5, ConfigurationError, r"must lie in \[-1, 1\]; got images from .* to .* Add Normalize"),
        (127.5 * X + 127.5, ConfigurationError, r"to 255. Add ToTensor\(\) and Normalize\(.5, .5\)"),
        (X.where(X < 0.9, torch.nan), DataError, "samples must be finite; got NaN among them: .* of 128 numbers"),
        (X.where(X < 0.9, torch.inf), DataError, "got infinite numbers among them"),
        (X[..., :3], ConfigurationError, r"networks' \[1, 4, 4\]; got samples of shape \[1, 4, 3\]"),
        (X[:, 0], ConfigurationError, r"got samples of shape \[4, 4\] .* x.unsqueeze\(1\)"),
        (X.expand(-1, 3, 4, 4).permute(0, 2, 3, 1), ConfigurationError, "these are channels last"),
    ],
)
def test_images_of_another_range_or_shape_are_refused_with_the_fix(x, error, words):
    with pytest.raises(error, match=words):
        trained(small_gan(), TensorDataset(x, Y))


def test_bytes_become_images_in_the_generators_range():
    pixels = (127.5 * X + 127.5).round().byte()
    floats = pixels.float() / 127.5 - 1
    found = trained(small_gan(), TensorDataset(pixels, Y))
    assert_states_equal(found, trained(small_gan(), TensorDataset(floats, Y)), atol=1e-6)
    with pytest.raises(ConfigurationError, match="images of bytes must come with a generator that says in which range"):
        trained(small_gan(output="linear"), TensorDataset(pixels, Y))


def test_a_generator_without_bounds_takes_images_of_any_range():
    trained(small_gan(output="linear"), TensorDataset(X / 2 + 0.5, Y))


@pytest.mark.parametrize("make", [DCGANGenerator, ResNetGenerator, R3GANGenerator, MLPGenerator])
def test_our_generators_of_images_say_where_their_images_lie(make):
    assert output_range(make()) == (-1.0, 1.0)


class Foreign(nn.Module):
    latent_dim = 3

    def __init__(self, inputs: int, *shape: int):
        super().__init__()
        self.layer, self.shape = nn.Linear(inputs, torch.Size(shape).numel()), shape

    def forward(self, x, y=None):
        return self.layer(x.flatten(1)).view(-1, *self.shape)


def test_networks_that_state_no_shape_are_tried_before_the_first_step():
    with pytest.raises(ConfigurationError, match=r"got \[2, 3, 3\] from the generator, \[1, 4, 4\] in the data"):
        trained(GAN(Foreign(3, 2, 3, 3), Foreign(18, 1)), TensorDataset(X, Y))
    trained(GAN(Foreign(3, *SHAPE), Foreign(16, 1)), TensorDataset(X, Y))


def test_the_data_of_a_federation_are_refused_in_words():
    data = FederatedDataModule(Digits(), num_clients=2)
    words = "a FederatedDataModule must be trained with a FederatedOrchestrator, or pooled; .*num_steps"
    gan = small_gan(shape=(1, 8, 8))
    with pytest.raises(ConfigurationError, match=words):
        quiet_trainer(max_epochs=1).fit(gan, datamodule=data)
    with pytest.raises(ConfigurationError, match=words):
        quiet_trainer(max_epochs=1).fit(gan, data.train_dataloader())
    with pytest.raises(ConfigurationError, match=words):
        quiet_trainer().predict(gan, datamodule=data)


def test_only_the_first_minibatch_of_a_fit_is_looked_at(monkeypatch):
    gan, seen = small_gan(), []
    monkeypatch.setattr(gan, "check_minibatch", lambda x, y: seen.append(len(x)))
    for _ in range(2):
        trained(gan, TensorDataset(X, Y))
    assert seen == [8, 8]
