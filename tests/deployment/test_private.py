"""Privacy between machines: what a private federation computes over its wire is what it computes in one process."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from tests.conftest import assert_states_equal
from tests.deployment.test_sites import deploy, simulate, summary, weights

pytestmark = pytest.mark.flower

PRIVATE = [
    *("--federation.aggregator", "WeightedMean", "--federation.aggregator.weighting", "uniform"),
    *("--federation.optimizer_state", "reset", "--federation.privacy.clip", "0.05"),
    *("--federation.privacy.delta", "0.1", "--federation.privacy.testing_seed", "1"),
]
SECURE = ["--federation.secure", "SecureAggregation"]


def test_central_noise_is_that_of_a_simulation(tmp_path):
    options = [*PRIVATE, "--federation.privacy.noise_multiplier", "1"]
    deploy(tmp_path, *options)
    simulate(tmp_path, *options)
    assert_states_equal(weights(tmp_path, "deployed"), weights(tmp_path, "simulated"))
    assert summary(tmp_path, "deployed")["privacy"]["client"]["releases"] == 3


def test_distributed_noise_is_under_the_masks_and_costs_what_central_noise_does(tmp_path):
    noised = [*PRIVATE, *SECURE, "--federation.privacy.noise", "distributed"]
    deploy(tmp_path, *noised, "--federation.privacy.noise_multiplier", "1", name="noised")
    deploy(tmp_path, *noised, "--federation.privacy.noise_multiplier", "0", name="plain")
    simulate(tmp_path, *PRIVATE, "--federation.privacy.noise_multiplier", "0")
    plain, exact = weights(tmp_path, "plain"), weights(tmp_path, "simulated")
    assert_states_equal(plain, exact, atol=1e-6)
    moved = [
        (weights(tmp_path, "noised")[n] - plain[n]).flatten()
        for n in plain
        if plain[n].is_floating_point() and "ema" not in n
    ]
    assert float(torch.cat(moved).std()) > 0.5 * 0.05 / 3  # three rounds of noise of std 0.05 / 3, and what it leads to
    (release,) = json.loads((tmp_path / "noised" / "privacy.json").read_text())["releases"]
    assert 0.999 < release["noise_multiplier"] < 1.0, "rounding lengthens an update by a little"
    (guarantee,) = [summary(tmp_path, "noised")["privacy"]["client"]]
    assert guarantee["noise"] == "distributed"


def test_records_are_hidden_by_their_own_site(tmp_path):
    options = [
        *("--model.fake_labels", "all", "--model.privacy.noise_multiplier", "1", "--model.privacy.delta", "1e-3"),
        *("--model.privacy.batch_size", "16", "--model.privacy.testing_seed", "1"),
    ]
    deploy(tmp_path, *options)
    simulate(tmp_path, *options)
    assert_states_equal(weights(tmp_path, "deployed"), weights(tmp_path, "simulated"), atol=1e-5)
    assert summary(tmp_path, "deployed")["privacy"]["example"]["releases"] == 6
