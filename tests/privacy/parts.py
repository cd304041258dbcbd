"""A small private federation, and its parts."""

from __future__ import annotations

from functools import partial

import torch

from fedgan_lightning.aggregators import WeightedMean
from fedgan_lightning.algorithms import ServedGenerator
from fedgan_lightning.federation.transform_chain import TransformChain
from fedgan_lightning.federation.transforms.private import PrivateUpdates
from fedgan_lightning.packing import Layout, Packed
from fedgan_lightning.privacy import ClientLevelPrivacy, ExampleLevelPrivacy
from fedgan_lightning.protocol import ClientUpdate
from fedgan_lightning.samplers import PoissonSampling
from fedgan_lightning.update_transform import RoundFacts
from tests.conftest import ring_gan, sgd

PUBLIC = {"aggregator": WeightedMean("uniform"), "optimizer_state": "reset", "local_steps": 1}


def settings(**options):
    """Return the settings of a federation with client-level privacy whose noise can be drawn again."""
    chosen = {"clip": 0.1, "noise_multiplier": 1.0, "delta": 1e-3, "testing_seed": 1, **options}
    return {**PUBLIC, "rounds": 3, "privacy": ClientLevelPrivacy(**chosen)}


def served(**options):
    """Return the same with the generator at the server."""
    own = {"algorithm": ServedGenerator(num_samples=16), "sync": {"generator": "served"}}
    return {**settings(**options), **own, "clients": PoissonSampling(0.5, secret=True)}


def private_gan(**options):
    """Return a GAN with example-level privacy whose noise can be drawn again."""
    chosen = {"clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3, "batch_size": 8, "testing_seed": 1, **options}
    penalties = {"penalties": []} if chosen.get("clipping") == "two_pass" else {}
    return ring_gan(optimizer=sgd, privacy=ExampleLevelPrivacy(**chosen), **penalties)


def answer(seed=0, *, scale=1.0, size=10, client_id=0):
    generator = torch.Generator().manual_seed(seed)
    delta = {
        "generator.w": scale * torch.randn(30, 5, generator=generator),
        "discriminator.w": scale * torch.randn(70, generator=generator),
    }
    return ClientUpdate(client_id, size, Packed.of(delta), {}, Packed.of({}), round=0)


def chain(clip=1.0, **options):
    return TransformChain([PrivateUpdates(clip=clip, divisor=5.0, **options)])


def received(own, by, *, hyperparameters=None):
    """Return an update as the server has it, whatever the client did: it is clipped there again."""
    stages = by.stages_of({}, Layout.of(own.delta), Layout.of(own.extras))
    return by.decoded("client 0", own, stages, facts=RoundFacts(0, hyperparameters or {}))


def length(state, scales=None):
    """Return the length of all tensors together, each over its scale."""
    parts = [v.double().flatten() / (scales or {}).get(n.split(".")[0], 1.0) for n, v in state.items()]
    return float(torch.cat(parts).norm())


adam = partial(torch.optim.Adam, lr=1e-2)
