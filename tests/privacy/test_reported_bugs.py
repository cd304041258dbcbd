"""Faults that others reported in their noise: twice or nowhere, of an ordinary generator, before the clip.

Tolerances are five standard errors of what is estimated: the standard deviation of n normal numbers has one of
1 / sqrt(2 n) of its value.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fedgan_lightning import SecureAggregation
from fedgan_lightning.algorithms import FedGAN
from fedgan_lightning.dp.randomness import SecretStream
from fedgan_lightning.federation.distributed_noise import NoiseShares
from fedgan_lightning.federation.privacy_keeper import private_parts
from fedgan_lightning.packing import Layout
from fedgan_lightning.privacy import ClientLevelPrivacy, ExampleLevelPrivacy
from fedgan_lightning.protocol import Aggregate, ClientUpdate
from fedgan_lightning.update_transform import RoundFacts
from tests.conftest import assert_states_equal, federate, ring_data, ring_gan, sgd
from tests.privacy.parts import answer, chain, length, private_gan, received
from tests.privacy.parts import settings as private_settings
from tests.privacy.test_client_level import keeper_of, released

CLIENTS = 4


def five_errors(count: int) -> float:
    return 5 / (2 * count) ** 0.5


def moved(**options) -> dict[str, torch.Tensor]:
    """Return by how much one private round moved the parameters of a federation of four."""
    before = ring_gan(optimizer=sgd).state_dict()
    own = {**private_settings(**options), "rounds": 1, "local_steps": 3}
    server, _, _ = federate(ring_gan(optimizer=sgd), ring_data(num_clients=CLIENTS), **own)
    after = server.model.state_dict()
    return {n: v.double() - before[n] for n, v in after.items() if n.startswith(("generator.", "discriminator."))}


def flat(state) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in state.values()])


def difference(first, second) -> dict[str, torch.Tensor]:
    return {name: first[name] - second[name] for name in first}


# ---------------------------------------------------------------------- fedbiomed#1443


def test_noise_comes_once_in_a_run_and_not_at_the_clients_too():
    """fedbiomed#1443: noise was added locally and centrally: a release of twice the variance that was accounted for.

    The seed of the run is the same with noise and without, so that the noise is all that differs.
    """
    clip, z = 1e-3, 2.0
    noise = flat(difference(moved(clip=clip, noise_multiplier=z), moved(clip=clip, noise_multiplier=0.0)))
    std = z * clip / CLIENTS
    tolerance = five_errors(len(noise))
    assert tolerance < 2**0.5 - 1, "wide enough to tell noise from noise that comes twice"
    assert float(noise.std()) == pytest.approx(std, rel=tolerance + 1e-3)  # and rounding of float32 parameters


def test_central_noise_is_none_of_a_client_s_business():
    """fedbiomed#1443: what a client does to its update is a clip, which is the same each time."""
    settings = {"privacy": ClientLevelPrivacy(clip=0.5, noise_multiplier=3.0), "keeper": None, "algorithm": FedGAN()}
    federation = type("Federation", (), settings)
    (at_client,) = private_parts(federation)
    by, own = chain(clip=0.5), answer(3, scale=2.0)
    entries = by.stages_of({}, Layout.of(own.delta), Layout.of(own.extras))[0]
    first, second = (
        at_client.client(dict(own.delta), entries=entries, private={}, facts=RoundFacts())[0] for _ in range(2)
    )
    assert_states_equal(first, second)
    factor = 0.5 / length(own.delta)
    for name, value in own.delta.items():
        torch.testing.assert_close(first[name], value * factor, rtol=1e-5, atol=0.0)


def test_distributed_noise_is_none_of_the_server_s_business():
    """fedbiomed#1443: the sum is noised under the masks already; the server adds nothing."""
    by, total = keeper_of(), Aggregate({"discriminator.w": torch.randn(1000)}, {}, 0, 0)
    by.begin_round(0)
    assert not torch.equal(by.noised(total).delta["discriminator.w"], total.delta["discriminator.w"])
    by.client = ClientLevelPrivacy(clip=0.3, noise_multiplier=1.5, delta=1e-4, noise="distributed")
    assert_states_equal(dict(by.noised(total).delta), dict(total.delta))


@pytest.mark.parametrize("parts", [1, 30])
def test_the_bound_is_on_all_parameters_together(parts):
    """fedbiomed#1443: a clip per parameter lets an update of p parameters be sqrt(p) times as long."""
    delta = {f"discriminator.{k}.weight": torch.full((25,), 0.1) for k in range(parts)}  # 0.5 long, each
    own = ClientUpdate(0, 10, delta, {}, {}, round=0)
    found = received(own, chain(clip=0.7))
    assert length(found.delta) == pytest.approx(min(0.7, 0.5 * parts**0.5), rel=1e-5)


def reseeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def states_of_generators() -> tuple:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def central() -> np.ndarray:
    by = keeper_of()
    by.begin_round(0)
    return flat(by.noised(Aggregate({"discriminator.w": torch.zeros(100)}, {}, 0, 0)).delta).numpy()


def distributed() -> np.ndarray:
    own = ClientLevelPrivacy(clip=0.3, noise_multiplier=1.5, noise="distributed")
    layout = Layout.of({"d.w": torch.zeros(100)})
    return NoiseShares(own, SecureAggregation()).shares(layout, num_members=3, purpose=0)


def of_records() -> np.ndarray:
    return ExampleLevelPrivacy(noise_multiplier=1.0).stream("noise", 0, 0).normals(100)


@pytest.mark.parametrize("draw", [central, distributed, of_records])
def test_noise_comes_from_no_generator_that_a_seed_sets(draw):
    """fedbiomed#1443: noise of torch's ordinary generator is known to everybody who knows the seed.

    It neither follows from the generators of torch, NumPy and Python, nor moves them.
    """
    reseeded()
    before = states_of_generators()
    first = draw()
    found = states_of_generators()
    reseeded()
    assert before == states_of_generators(), "a positive control"
    assert not np.array_equal(first, draw())
    if draw is not central:  # whose keeper is made with a GAN, which draws its weights
        assert found == before


# ---------------------------------------------------------------------- NVFlare#343, #462, PR#4470


def test_every_number_of_a_release_has_noise():
    """NVFlare#343: values within the bound passed as they were, and the guarantee with them.

    Zeros and small numbers, and those of a network that did not move, get the same noise as large ones. By chance a
    number gets none that float64 shows beside 1000 once in 10^12.
    """
    by, std = keeper_of(), 1.5 * 0.3 / CLIENTS
    by.begin_round(0)
    count = 20_000
    delta = {
        "generator.idle": torch.zeros(count, dtype=torch.float64),
        "discriminator.small": torch.full((count,), 1e-9, dtype=torch.float64),
        "discriminator.large": torch.linspace(-1e3, 1e3, count, dtype=torch.float64),
    }
    noise = {n: v - delta[n] for n, v in by.noised(Aggregate(delta, {}, 0, 0)).delta.items()}
    for name, own in noise.items():
        assert (own != 0).all(), name
        assert float(own.std()) == pytest.approx(std, rel=five_errors(count)), name


def test_every_number_of_a_masked_update_has_noise():
    """NVFlare#343, under masks: a deviation is millions of steps, so that one number in millions has none."""
    own = ClientLevelPrivacy(clip=0.3, noise_multiplier=1.5, noise="distributed")
    noise, layout = NoiseShares(own, SecureAggregation()), Layout.of({"d.w": torch.zeros(2000), "d.b": torch.zeros(9)})
    drawn = noise.shares(layout, num_members=3, purpose=0).view(np.int32)
    assert noise.std(3) > 1e6
    assert (drawn != 0).all()


def test_every_parameter_of_a_private_step_has_noise():
    """NVFlare#343, for records: those that no record moved, too."""
    gan = private_gan(noise_multiplier=2.0, testing_seed=None).double()
    gan.begin_private_round([(0, 0)])
    gan._backward = lambda optimizer, loss: gan.discriminator.zero_grad()
    gan.backward_privately(None, torch.zeros(8, 2).double(), torch.full((8,), -1))  # an empty minibatch
    for name, parameter in gan.discriminator.named_parameters():
        assert parameter.grad.abs().min() > 0, name
    noise = torch.cat([own.grad.flatten() for own in gan.discriminator.parameters()])
    assert float(noise.std()) == pytest.approx(2.0 * 0.5 / 8, rel=five_errors(len(noise)))


def test_noise_is_added_after_the_clip_and_after_the_sum():
    """NVFlare#462, PR#4470: noise first and then the clip leaves noise that shrinks with the update, and a release that
    is never longer than the bound. The order must be clip, sum, noise.

    Updates of a million times the bound are cut to it first; what is added then has the whole deviation z C / (q K),
    once for the sum, and the release is longer than the sum of any clipped updates could be.
    """
    real, clip, z = keeper_of(noise_multiplier=5.0, clip=0.3), 0.3, 5.0
    by = chain(clip=clip)
    answers = [answer(seed, scale=1e6 * clip) for seed in range(CLIENTS)]
    exact = {name: value * 5 / CLIENTS for name, value in released(answers, by).items()}  # chain() divides by 5
    assert length(exact) <= clip * (1 + 1e-6)
    real.begin_round(0)
    found = real.noised(Aggregate(exact, {}, 0, 0)).delta
    noise, std = flat(difference(found, exact)), z * clip / CLIENTS
    assert float(noise.std()) == pytest.approx(std, rel=five_errors(len(noise)))
    assert length(found) > 10 * clip, "no clip comes after the noise"


def test_noise_does_not_shrink_with_the_updates_of_a_run():
    """NVFlare#462, PR#4470, in a whole run: bounds that differ by a factor make noise that differs by it, also where
    every update is far above the bound, and a joint bound after the noise would leave none of it.
    """
    stds = []
    for clip in (1e-4, 1e-2):
        noise = flat(difference(moved(clip=clip, noise_multiplier=1.0), moved(clip=clip, noise_multiplier=0.0)))
        assert float(noise.norm()) > 1.5 * clip, "longer than any mean of clipped updates"
        stds.append(float(noise.std()))
    assert stds[1] / stds[0] == pytest.approx(100.0, rel=2e-2), "the same normal numbers, by the testing seed"


def test_records_are_clipped_then_summed_then_noised():
    """NVFlare#462, for records: what is added to the clipped sum does not depend on how long gradients are."""
    noises = []
    for scale in (1.0, 1e4):
        steps = []
        for z in (0.0, 3.0):
            gan = private_gan(noise_multiplier=z).double()
            gan._noise_streams = [SecretStream(b"\1" * 32)]
            gan._backward = lambda optimizer, loss, own=gan: own.discriminator.zero_grad()
            torch.manual_seed(0)
            x = scale * torch.randn(8, 2).double()
            gan.backward_privately(None, x, torch.zeros(8, dtype=torch.int64))
            steps.append(torch.cat([own.grad.flatten() for own in gan.discriminator.parameters()]))
        assert float(steps[0].norm()) <= 0.5 * (1 + 1e-9), "eight records of at most C each, over eight"
        noises.append(steps[1] - steps[0])
    torch.testing.assert_close(noises[0], noises[1], atol=1e-12, rtol=0.0)
    assert float(noises[0].std()) == pytest.approx(3.0 * 0.5 / 8, rel=five_errors(len(noises[0])))
