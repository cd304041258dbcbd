"""What would void a guarantee is refused before training: the option, the value and the fix, in one line."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from fedgan_lightning import BestCheckpoint, ConfigurationError, RoundRules, UpdateValidator
from fedgan_lightning.aggregators import CoordinateMedian, DivergenceWeightedMean, WeightedMean
from fedgan_lightning.algorithms import IFLGAN, MDGAN, Scaffold
from fedgan_lightning.asynchronous import Asynchronous
from fedgan_lightning.data.order import MinibatchOrder
from fedgan_lightning.federation.privacy_checks import check_choices
from fedgan_lightning.losses import R1, RelativisticPairing
from fedgan_lightning.networks import DCGANDiscriminator, DCGANGenerator, MLPDiscriminator, MLPGenerator
from fedgan_lightning.privacy import ClientLevelPrivacy, ExampleLevelPrivacy
from fedgan_lightning.samplers import BalancedClients, PoissonSampling
from fedgan_lightning.transforms import Int8
from tests.conftest import federate, quiet_trainer, ring_data, ring_gan, sgd
from tests.privacy.parts import adam, private_gan, settings

FEDERATIONS = {
    "needs every client to count the same; got WeightedMean with weights N_k": {"aggregator": WeightedMean()},
    "CoordinateMedian has no bounded sensitivity here": {"aggregator": CoordinateMedian()},
    "covers the clipped update only; what Scaffold sends would travel beside it": {"algorithm": Scaffold()},
    "covers the clipped update only; what IFLGAN sends would travel beside it": {"algorithm": IFLGAN()},
    "covers the clipped update only; what MDGAN sends": {
        "algorithm": MDGAN(),
        "sync": {"generator": "server", "discriminator": "local"},
    },
    "covers the clipped update only; a network that clients hand on": {"sync": {"discriminator": "exchange"}},
    "over-selection chooses clients by what they send; got rules.over_selection=1.5": {
        "rules": RoundRules(over_selection=1.5)
    },
    "counting late updates chooses clients": {"rules": RoundRules(stale_updates="discount")},
    "counting late updates chooses clients by what they send; got rules.asynchronous": {
        "rules": RoundRules(asynchronous=Asynchronous(buffer_size=2))
    },
    "BalancedClients chooses clients by the labels": {"clients": BalancedClients(fraction=0.5)},
    "client-level privacy needs every client to count the same; got Divergence": {
        "aggregator": DivergenceWeightedMean()
    },
    "distributed noise must be added to clipped updates as they are; got federation.transforms=Int8": {
        "privacy": ClientLevelPrivacy(clip=0.1, noise_multiplier=1.0, delta=1e-3, noise="distributed"),
        "transforms": [Int8()],
    },
    "screening chooses clients by what they send; got UpdateValidator": {"validator": UpdateValidator(max_norm=1.0)},
    "the number of local steps must be public; got local_epochs=1": {"local_steps": None, "local_epochs": 1},
    "amplification by sampling needs a secret cohort; got PoissonSampling": {"clients": PoissonSampling(0.5)},
    "distributed noise must be added under masks; got federation.secure=null": {
        "privacy": ClientLevelPrivacy(clip=1.0, noise_multiplier=1.0, noise="distributed")
    },
    "scales must name networks that travel; got nobody": {
        "privacy": ClientLevelPrivacy(clip=1.0, noise_multiplier=1.0, scales={"nobody": 2.0})
    },
    "a cap on rounds must go with cohorts that need no secret": {
        "privacy": ClientLevelPrivacy(clip=1.0, noise_multiplier=1.0, most_rounds=3, expected_clients=2),
        "clients": PoissonSampling(0.5, secret=True),
    },
    "delta must be below one over the number of clients; got 0.3 with 4 clients": {
        "privacy": ClientLevelPrivacy(clip=1.0, noise_multiplier=1.0, delta=0.3)
    },
}


@pytest.mark.parametrize("rule", FEDERATIONS)
def test_federations_without_a_guarantee(rule):
    with pytest.raises(ConfigurationError) as refused:
        federate(ring_gan(optimizer=sgd), ring_data(), **{**settings(), **FEDERATIONS[rule]})
    assert rule in str(refused.value)


def test_moments_would_travel_beside_the_update():
    with pytest.raises(ConfigurationError, match="optimizer moments would travel beside it"):
        federate(ring_gan(optimizer=adam), ring_data(), **{**settings(), "optimizer_state": "average"})


def test_a_secret_cohort_without_privacy_would_be_ignored():
    with pytest.raises(ConfigurationError, match="a secret cohort must belong to client-level privacy"):
        federate(ring_gan(), ring_data(), rounds=1, clients=PoissonSampling(0.5, secret=True))


OPTIONS = {
    "exactly one of federation.privacy.noise_multiplier and federation.privacy.epsilon must be given; got neither": {},
    "must be given; got noise_multiplier=1 and epsilon=2": {"noise_multiplier": 1.0, "epsilon": 2.0},
    "without noise epsilon is infinite; got budget=3 with noise_multiplier=0": {"noise_multiplier": 0.0, "budget": 3.0},
    "a budget must go with a noise multiplier": {"epsilon": 2.0, "budget": 3.0},
    "the CLT accountant understates epsilon; got accountant=gdp": {"noise_multiplier": 1.0, "accountant": "gdp"},
    "survivors must belong to distributed noise": {"noise_multiplier": 1.0, "survivors": 3},
    "adaptive clipping must have a server that adds the noise of its count": {
        "noise_multiplier": 1.0,
        "noise": "distributed",
        "clipping": "adaptive",
    },
    "every client must know the noise multiplier": {"epsilon": 1.0, "noise": "distributed"},
    "federation.privacy.clip of ClientLevelPrivacy must": {"noise_multiplier": 1.0, "clip": 0.0},
}


@pytest.mark.parametrize("rule", OPTIONS)
def test_options_of_clients(rule):
    with pytest.raises(ConfigurationError) as refused:
        ClientLevelPrivacy(**{"clip": 1.0, **OPTIONS[rule]})
    assert rule in str(refused.value)


@pytest.mark.parametrize(
    "options, rule",
    [
        ({}, "exactly one of model.privacy.noise_multiplier and model.privacy.epsilon"),
        ({"noise_multiplier": 0.0, "budget": 1.0}, "without noise epsilon is infinite"),
        ({"epsilon": 2.0, "budget": 1.0}, "a budget must go with a noise multiplier"),
        ({"noise_multiplier": 1.0, "accountant": "gdp"}, "the CLT accountant understates epsilon"),
    ],
)
def test_options_of_records(options, rule):
    with pytest.raises(ConfigurationError, match=rule):
        ExampleLevelPrivacy(**options)


def conditional(**options):
    options = {"fake_labels": "all", "privacy": ExampleLevelPrivacy(noise_multiplier=1.0), **options}
    from fedgan_lightning import GAN

    return GAN(
        MLPGenerator(4, (2,), hidden=(8,), num_classes=3),
        MLPDiscriminator((2,), hidden=(8,), num_classes=3, conditioning="projection"),
        **options,
    )


def pictures(**options):
    from fedgan_lightning import GAN

    generator = DCGANGenerator(latent_dim=4, image_size=16, channels=1, width=4)
    discriminator = DCGANDiscriminator(image_size=16, channels=1, width=4, norm=options.pop("norm", "none"))
    return GAN(generator, discriminator, **{"privacy": ExampleLevelPrivacy(noise_multiplier=1.0), **options})


GANS = {
    "mixes records; got DCGANDiscriminator": lambda: pictures(norm="batch"),
    "RelativisticPairing mixes records": lambda: conditional(loss=RelativisticPairing()),
    "no labels of them; got fake_labels=held": lambda: conditional(fake_labels="held"),
    "no labels of them; got fake_labels=balanced": lambda: conditional(fake_labels="balanced"),
    "a private discriminator must step before its generator": lambda: conditional(updates="simultaneous"),
    "clipping in two passes knows no penalties on real samples; got R1": lambda: conditional(
        penalties=[R1(1.0)], privacy=ExampleLevelPrivacy(noise_multiplier=1.0, clipping="two_pass")
    ),
    "clipping in two passes knows linear layers and embeddings alone; got Conv2d": lambda: pictures(
        privacy=ExampleLevelPrivacy(noise_multiplier=1.0, clipping="two_pass")
    ),
}


@pytest.mark.parametrize("rule", GANS)
def test_networks_and_losses_that_mix_records(rule):
    with pytest.raises(ConfigurationError) as refused:
        GANS[rule]()
    assert rule in str(refused.value)


def test_a_private_gan_is_not_trained_by_itself():
    gan, data = private_gan(), torch.utils.data.DataLoader([(torch.zeros(2), 0)] * 8, batch_size=4)
    with pytest.raises(ConfigurationError, match="must draw every minibatch itself, and count what it releases"):
        quiet_trainer(max_epochs=1).fit(gan, data)


def test_delta_of_records_is_below_one_over_the_smallest_client():
    with pytest.raises(ConfigurationError, match="model.privacy.delta=0.1, and a client with 160 records"):
        federate(private_gan(delta=0.1), ring_data(), rounds=1, optimizer_state="reset")


def test_validation_on_private_records_would_leave():
    with pytest.raises(ConfigurationError, match="must not leave a client; got data.validation_share > 0"):
        federate(private_gan(), ring_data(validation_share=0.2), rounds=1, optimizer_state="reset")


def test_choices_by_private_metrics():
    automatic = BestCheckpoint()
    check_choices([automatic], is_public=False)
    assert automatic.monitor is None
    chosen = BestCheckpoint(monitor="fid")
    with pytest.raises(
        ConfigurationError, match="a choice by private data must be paid for.*; got BestCheckpoint by fid"
    ):
        check_choices([chosen], is_public=False)
    with pytest.raises(ConfigurationError, match="got EarlyStopping by fid. Monitor fid_test"):
        check_choices([EarlyStopping(monitor="fid")], is_public=True)
    check_choices([BestCheckpoint(monitor="fid_test")], is_public=True)


def test_an_order_of_minibatches_is_no_poisson_sample():
    """opacus#813: shuffled minibatches have one size, and no record twice in an epoch."""
    assert set(MinibatchOrder(100, 10, 0, 0).sizes(0, 20)) == {10}
