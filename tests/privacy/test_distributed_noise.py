"""Noise that clients add under masks: whole numbers, the variance of the sum, the room it needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedgan_lightning import ConfigurationError, SecureAggregation
from fedgan_lightning.dp.randomness import SecretStream, new_key, sum_is_normal
from fedgan_lightning.federation.distributed_noise import NoiseShares, check_range
from fedgan_lightning.federation.secure import Summand
from fedgan_lightning.packing import Layout
from fedgan_lightning.privacy import ClientLevelPrivacy


def privacy(**options):
    return ClientLevelPrivacy(**{"clip": 0.5, "noise_multiplier": 1.0, "noise": "distributed", **options})


def noised_sum(own, secure, *, members, survivors, size=4000):
    """Return the sum of so many clients' masked updates of zero, as the server decodes it."""
    state, noise = {"d.w": torch.zeros(size, dtype=torch.float64)}, NoiseShares(own, secure)
    total, share = None, 1.0 / members
    for client in range(survivors):
        one = Summand.of({"delta": state}, shares={"delta": share}, secure=secure)
        drawn = noise.shares(Layout.of(state), num_members=members, purpose=client)
        one = one.plus(drawn, np.zeros(0, np.uint64))
        total = one if total is None else total.plus(one.narrow, one.wide)
    mean = total.means({"delta": share * survivors}, secure=secure)["delta"]["d.w"]
    return mean * survivors


@pytest.mark.parametrize("survivors, colluding, factor", [(6, 0, 1.0), (6, 2, 1.5), (10, 0, 10 / 6)])
def test_the_sum_has_the_variance_promised_and_more_survivors_more(survivors, colluding, factor):
    secure = SecureAggregation(threshold=0.6)
    assert secure.needed(10) == 6
    found = noised_sum(privacy(colluding=colluding), secure, members=10, survivors=survivors)
    assert float(found.var()) == pytest.approx(0.5**2 * factor, rel=0.08)
    assert abs(float(found.mean())) < 0.05


def test_shares_of_two_clients_differ_and_a_testing_seed_repeats_them():
    layout = Layout.of({"d.w": torch.zeros(50)})
    noise = NoiseShares(privacy(), SecureAggregation())
    assert not np.array_equal(*(noise.shares(layout, num_members=3, purpose=0) for _ in range(2)))
    seeded = NoiseShares(privacy(testing_seed=1), SecureAggregation())
    first, again, other = (seeded.shares(layout, num_members=3, purpose=k) for k in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_scales_and_no_noise():
    layout = Layout.of({"generator.w": torch.zeros(3000), "d.w": torch.zeros(3000)})
    noise = NoiseShares(privacy(scales={"generator": 4.0}), SecureAggregation())
    first, second = np.split(noise.shares(layout, num_members=3, purpose=0).view(np.int32).astype(float), 2)
    assert first.std() / second.std() == pytest.approx(4.0, rel=0.1)
    assert (
        not NoiseShares(privacy(noise_multiplier=0.0), SecureAggregation())
        .shares(layout, num_members=3, purpose=0)
        .any()
    )


@pytest.mark.parametrize("sigma", [1, 2, 5, 1_000_003])
def test_discrete_normals_have_their_distribution(sigma):
    drawn = SecretStream(new_key(0, sigma)).discrete_normals(sigma, 4000)
    assert drawn.dtype == np.int64
    assert drawn.std() == pytest.approx(sigma, rel=0.05)
    if sigma <= 2:
        support = np.arange(-8, 9)
        weights = np.exp(-(support**2) / (2 * sigma**2))
        shares = np.array([(drawn == value).mean() for value in support])
        assert np.abs(shares - weights / weights.sum()).max() < 0.03


def test_a_sum_of_discrete_normals_is_nearly_one():
    """Kairouz, Liu, Steinke 2021: values for ten clients."""
    found = [sum_is_normal(sigma, 10) for sigma in (0.5, 1.0, 1.5)]
    assert found == pytest.approx([2.35, 5.4e-4, 2.3e-9], rel=0.02)


def test_the_ring_must_have_room():
    with pytest.raises(ConfigurationError, match=r"must leave room for a clipped update and its noise, 3.5; got 1.0"):
        check_range(privacy(), SecureAggregation(max_update=1.0), num_clients=4)
    with pytest.raises(
        ConfigurationError, match="fewer clients may collude than must survive; got colluding=3 of at least 3"
    ):
        check_range(privacy(colluding=3), SecureAggregation(), num_clients=4)


def test_noise_of_less_than_a_step_or_two_is_none():
    with pytest.raises(ConfigurationError, match="must be so small that a client's noise is many of its steps"):
        check_range(privacy(clip=1e-6), SecureAggregation(max_update=1e4), num_clients=10)
    check_range(privacy(), SecureAggregation(), num_clients=10)


def test_sums_wait_for_the_survivors_that_the_noise_counts_on():
    assert SecureAggregation().of_at_least(7).needed(8) == 7
    assert SecureAggregation().of_at_least(0).needed(4) == 3
