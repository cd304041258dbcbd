"""Every network family: shapes, ranges, conditioning, gradients to every parameter."""

from __future__ import annotations

import pytest
import torch

from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.gan import networks as nets
from fedgan_lightning.gan.networks.dcgan import plan
from fedgan_lightning.gan.networks.resnet import ConditionalBatchNorm2d
from fedgan_lightning.gan.networks.spectral import spectral_norm
from fedgan_lightning.gan.objectives import auxiliary_classifier, non_saturating_generator
from fedgan_lightning.gan.steps import shares_passes, split_heads

PAIRS = {
    "mlp": lambda c, how: (
        nets.MLPGenerator(8, (1, 8, 8), num_classes=c),
        nets.MLPDiscriminator((1, 8, 8), num_classes=c, conditioning=how),
    ),
    "dcgan28": lambda c, how: (
        nets.DCGANGenerator(28, 1, latent_dim=8, width=8, num_classes=c),
        nets.DCGANDiscriminator(28, 1, width=8, num_classes=c, conditioning=how),
    ),
    "dcgan64": lambda c, how: (
        nets.DCGANGenerator(64, 3, latent_dim=8, width=4, num_classes=c, norm="group"),
        nets.DCGANDiscriminator(64, 3, width=4, num_classes=c, conditioning=how, norm="spectral"),
    ),
    "dcgan48": lambda c, how: (
        nets.DCGANGenerator(48, 3, latent_dim=8, width=4, num_classes=c, norm="none"),
        nets.DCGANDiscriminator(48, 3, width=4, num_classes=c, conditioning=how, norm="batch"),
    ),
    "resnet32": lambda c, how: (
        nets.ResNetGenerator(32, 3, latent_dim=8, width=8, num_classes=c),
        nets.ResNetDiscriminator(32, 3, width=8, num_classes=c, conditioning=how),
    ),
    "r3gan28": lambda c, how: (
        nets.R3GANGenerator(28, 1, latent_dim=8, width=8, num_classes=c, group_size=4),
        nets.R3GANDiscriminator(28, 1, width=8, num_classes=c, conditioning=how, group_size=4),
    ),
    "profile": lambda c, how: (
        # Of four ReLUs a position, all are dead in one draw of fifty.
        nets.ProfileGenerator(8, 2, width=8, blocks=2, num_classes=c, output="tanh"),
        nets.ProfileDiscriminator(8, 2, width=8, blocks=2, num_classes=c),
    ),
    "acgan": lambda c, how: (
        nets.ACGANGenerator(28, 1, latent_dim=8, num_classes=c, width=4),
        nets.ACGANDiscriminator(28, 1, num_classes=c, width=4),
    ),
}
CASES = [(name, 0, "none") for name in PAIRS if name != "acgan"]
LACKING = {("acgan", "projection"), ("profile", "projection"), ("profile", "auxiliary")}
CASES += [(name, 3, how) for name in PAIRS for how in ("projection", "auxiliary") if (name, how) not in LACKING]
CASES += [("profile", 3, "channels")]


@pytest.mark.parametrize("name, classes, conditioning", CASES)
def test_shapes_ranges_and_gradients(name, classes, conditioning):
    generator, discriminator = PAIRS[name](classes, conditioning)
    z, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 0]) if classes else torch.zeros(4, dtype=torch.int64)
    samples = generator(z, y)
    assert tuple(samples.shape[1:]) == tuple(generator.sample_shape) == tuple(discriminator.sample_shape)
    assert samples.abs().max() <= 1
    logits, class_logits = split_heads(discriminator(samples, y))
    assert logits.shape == (4, 1)
    assert (class_logits is not None) == (conditioning == "auxiliary")
    loss = non_saturating_generator(logits)
    if class_logits is not None:
        assert class_logits.shape == (4, classes)
        loss = loss + auxiliary_classifier(class_logits, y)
    loss.backward()
    for network in (generator, discriminator):
        for parameter_name, parameter in network.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert torch.isfinite(parameter.grad).all(), parameter_name
    assert sum(float(p.grad.abs().sum()) for p in generator.parameters()) > 0


@pytest.mark.parametrize("name", PAIRS)
def test_labels_matter_to_conditional_networks(name):
    torch.manual_seed(0)
    generator, discriminator = PAIRS[name](3, "auxiliary" if name == "acgan" else "projection")
    generator.eval()
    discriminator.eval()
    z = torch.randn(2, 8)
    first, second = (generator(z, torch.full((2,), label)) for label in (0, 1))
    assert not torch.equal(first, second)
    if name != "acgan":
        logits = [discriminator(first, torch.full((2,), label)) for label in (0, 1)]
        assert not torch.equal(*logits)
    with pytest.raises(ValueError, match="must have labels; got None"):
        generator(z)


def test_the_orders_mlp_pair_has_its_layers():
    shapes = [tuple(p.shape) for p in nets.MLPGenerator(100).parameters() if p.dim() == 2]
    assert shapes == [(256, 100), (512, 256), (784, 512)]
    shapes = [tuple(p.shape) for p in nets.MLPDiscriminator().parameters() if p.dim() == 2]
    assert shapes == [(512, 784), (256, 512), (1, 256)]


def test_the_slope_is_that_below_zero():
    inputs = torch.randn(64, 2)
    for slope in (0.0, 0.2):
        network = nets.MLPDiscriminator((2,), hidden=(4,), slope=slope)
        first, phi = network.features[1], network.features(inputs)
        plain = first(inputs)
        torch.testing.assert_close(phi, torch.where(plain > 0, plain, slope * plain))


def test_fedgans_pair_for_time_series():
    generator, discriminator = nets.ProfileGenerator(num_classes=4), nets.ProfileDiscriminator(num_classes=4)
    shapes = [tuple(p.shape) for p in generator.parameters() if p.dim() > 1]
    assert shapes == [(64, 5, 5), *[(64, 64, 5)] * 15, (1, 64, 1)]
    shapes = [tuple(p.shape) for p in discriminator.parameters() if p.dim() > 1]
    assert shapes == [(64, 5, 5), *[(64, 64, 5)] * 15, (1, 64 * 24)]


def test_fedgans_table_of_layers():
    generator, discriminator = nets.ACGANGenerator(32, 3), nets.ACGANDiscriminator(32, 3)
    shapes = [tuple(p.shape) for p in generator.parameters() if p.dim() > 1]
    assert shapes == [(1024, 72), (8192, 1024), (128, 64, 4, 4), (64, 3, 4, 4)]
    shapes = [tuple(p.shape) for p in discriminator.parameters() if p.dim() > 1]
    assert shapes == [(64, 3, 4, 4), (128, 64, 4, 4), (1024, 8192), (1, 1024), (10, 1024)]


@pytest.mark.parametrize("size, expected", [(8, (4, 1)), (28, (7, 2)), (32, (4, 3)), (48, (6, 3)), (64, (4, 4))])
def test_resolution_plans(size, expected):
    assert plan(size) == expected


@pytest.mark.parametrize(
    "make, groups",
    [
        (lambda: nets.DCGANGenerator(28, width=28, norm="group"), [7, 7]),
        (lambda: nets.DCGANDiscriminator(28, width=32, norm="group"), [8]),
        (lambda: nets.R3GANGenerator(8, width=20, blocks=1), [5, 5]),
    ],
)
def test_groups_are_of_the_asked_size_or_smaller_where_it_does_not_divide_the_width(make, groups):
    layers = [layer for layer in make().modules() if getattr(layer, "groups", 0) > 1 or hasattr(layer, "num_groups")]
    assert [getattr(layer, "num_groups", None) or layer.groups for layer in layers] == groups


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: nets.DCGANGenerator(27), "image_size=27"),
        (lambda: nets.DCGANDiscriminator(128), "image_size=128"),
        (lambda: nets.MLPDiscriminator((2,), slope=1.0), r"slope .* in \[0, 1\); got 1"),
        (lambda: nets.ACGANGenerator(48), "image_size=48"),
        (lambda: nets.MLPDiscriminator((2,), num_classes=3), "num_classes=3, conditioning=none"),
        (lambda: nets.MLPDiscriminator((2,), conditioning="projection"), "num_classes=0, conditioning=projection"),
    ],
)
def test_what_cannot_be_built_says_why(make, words):
    with pytest.raises(ConfigurationError, match=words):
        make()


def test_a_class_has_its_own_scale_and_shift_and_others_get_no_gradient():
    layer = ConditionalBatchNorm2d(3, num_classes=4)
    x, y = torch.randn(8, 3, 5, 5), torch.tensor([0, 2] * 4)
    plain = torch.nn.BatchNorm2d(3)
    torch.testing.assert_close(layer(x, y), plain(x), rtol=0.1, atol=0.01)  # at first classes are nearly alike
    layer(x, y).square().sum().backward()
    assert [bool(row.any()) for row in layer.scale.weight.grad] == [True, False, True, False]
    with torch.no_grad():
        layer.shift.weight[2] = 7.0
    assert (layer(x, y)[1::2].mean() - layer(x, y)[::2].mean()).item() == pytest.approx(7.0, abs=0.5)
    with pytest.raises(ValueError, match="must have labels"):
        layer(x, None)


def test_the_residual_discriminator_is_normalised_in_every_layer():
    for conditioning in ("none", "projection", "auxiliary"):
        classes = 0 if conditioning == "none" else 3
        network = nets.ResNetDiscriminator(16, 1, width=8, num_classes=classes, conditioning=conditioning)
        network(torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.int64))
        for module in network.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.Embedding)):
                sigma = torch.linalg.matrix_norm(module.weight.flatten(1), 2)
                assert sigma.item() == pytest.approx(1.0, abs=0.1), type(module)


def test_blocks_without_normalisation_start_as_the_identity_and_hold_no_statistics():
    torch.manual_seed(0)  # one draw of the first layer: the spread differs from draw to draw
    generator, discriminator = nets.R3GANGenerator(16, 1, width=8), nets.R3GANDiscriminator(16, 1, width=8)
    for network in (generator, discriminator):
        assert not list(network.buffers())
        blocks = [module for module in network.modules() if type(module).__name__ == "_Block"]
        assert len(blocks) == 2 * 3
        x = torch.randn(2, 8, 4, 4)
        assert torch.equal(blocks[0](x), x)
    assert generator(torch.randn(500, 64)).std().item() == pytest.approx(0.55, abs=0.2)


#: Families whose discriminators have BatchNorm or spectral norm, or do not say that nothing passes between samples.
MINIBATCH = {"dcgan64", "dcgan48", "resnet32", "acgan"}


@pytest.mark.parametrize("name, classes, conditioning", CASES)
def test_samples_that_share_a_pass_do_not_see_each_other(name, classes, conditioning):
    _, discriminator = PAIRS[name](classes, conditioning)
    discriminator.double()
    assert shares_passes(discriminator) == (name not in MINIBATCH)
    x, y = torch.rand(6, *discriminator.sample_shape, dtype=torch.float64), torch.arange(6) % max(classes, 1)
    before = {key: value.clone() for key, value in discriminator.state_dict().items()}
    whole = split_heads(discriminator(x, y))
    parts = [split_heads(discriminator(x[own], y[own])) for own in (slice(0, 2), slice(2, 6))]
    equal = all(
        torch.allclose(value, torch.cat([part[index] for part in parts]), rtol=1e-12, atol=1e-12)
        for index, value in enumerate(whole)
        if value is not None
    )
    kept = all(torch.equal(value, before[key]) for key, value in discriminator.state_dict().items())
    assert (equal and kept) == (name not in MINIBATCH)


def test_layers_that_look_at_minibatches_keep_passes_apart():
    """Also in a network by somebody else, who has not thought of it."""
    layers = [torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.1), spectral_norm(torch.nn.Linear(4, 4)), torch.nn.RReLU()]
    layers += [torch.nn.utils.spectral_norm(torch.nn.Linear(4, 4)), torch.nn.MultiheadAttention(4, 1, dropout=0.1)]
    for layer in layers:
        discriminator = nets.MLPDiscriminator((4,), hidden=(4,))
        assert shares_passes(discriminator)
        discriminator.features.append(layer)
        assert not shares_passes(discriminator)


def test_what_a_network_says_of_its_pass_is_not_said_of_a_subclass_with_another():
    class Spread(nets.MLPDiscriminator):
        def forward(self, x, y=None):
            return super().forward(x, y) + x.std()

    class Renamed(nets.MLPDiscriminator):
        pass

    class SaysSo(Spread):
        per_sample = True

    made = [shares_passes(own((4,), hidden=(4,))) for own in (Spread, Renamed, SaysSo)]
    assert made == [False, True, True]
