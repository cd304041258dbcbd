"""The mean cosine between clients' updates, against all pairs."""

from __future__ import annotations

import itertools

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan_lightning.federation.drift import ClientDrift, Drift
from fedgan_lightning.federation.ranks import Ranks
from fedgan_lightning.federation.report import norms
from tests.conftest import federate, ring_data, ring_gan

NETWORKS = ["generator", "discriminator"]


def update(seed: int, *, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "generator.a": torch.randn(3, 4, generator=generator),
        "discriminator.a": torch.randn(5, generator=generator) + 1,
        "generator.b": torch.randn(2, generator=generator).to(dtype),
    }


def over_all_pairs(updates, network):
    flat = [torch.cat([v.double().flatten() for n, v in own.items() if n.startswith(network)]) for own in updates]
    pairs = [torch.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(flat, 2)]
    return float(torch.stack(pairs).mean())


@settings(max_examples=20, deadline=None)
@given(seeds=st.lists(st.integers(0, 1000), min_size=2, max_size=8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_mean_over_all_pairs(seeds, dtype):
    updates, drift = [update(seed, dtype=dtype) for seed in seeds], Drift()
    for own in updates:
        drift.add(own, norms(own, NETWORKS))
    values = drift.values(Ranks())
    assert values == pytest.approx({f"drift/{n}": over_all_pairs(updates, n) for n in NETWORKS}, abs=1e-5)


def test_agreement_is_one_opposition_is_negative_and_one_client_says_nothing():
    own = update(0)
    for others, expected in (([own, own], 1.0), ([own, {k: -v for k, v in own.items()}], -1.0)):
        drift = Drift()
        for one in others:
            drift.add(one, norms(one, NETWORKS))
        assert drift.values(Ranks())["drift/generator"] == pytest.approx(expected, abs=1e-5)
    drift = Drift()
    drift.add(own, norms(own, NETWORKS))
    zero = {name: torch.zeros_like(value) for name, value in own.items()}
    drift.add(zero, norms(zero, NETWORKS))
    assert drift.values(Ranks()) == {}


def test_a_federation_logs_it():
    found = []

    class Listen(L.Callback):
        def on_round_end(self, trainer, server, info, metrics):
            found.append(dict(drift.latest))

    drift = ClientDrift()
    federate(ring_gan(), ring_data(), drift, Listen(), rounds=2, local_steps=3)
    assert len(found) == 2
    assert all(-1 <= metrics[f"drift/{network}"] <= 1 for metrics in found for network in NETWORKS)
