"""What releases cost: the values of an independent computation, closed forms, and what must not be mixed up."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fedgan_lightning import ConfigurationError
from fedgan_lightning.dp.accounting import (
    Release,
    check_accountant,
    delta_at,
    epsilon_of,
    gaussian_delta,
    most_releases,
    noise_for,
)


def poisson(rate, z, count):
    return [Release("client", "poisson", z, count, rate)]


def fixed_size(size, population, z, count):
    return [Release("client", "fixed_size", z, count, size / population, population, size)]


#: q, z, T, delta, epsilon by privacy loss distributions, and by Renyi divergences.
TABLE = [
    (0.01, 1, 1000, 1e-5, 1.828244, 2.101367),
    (0.01, 1, 10000, 1e-5, 6.187745, 6.712757),
    (0.1, 1, 100, 1e-5, 7.046603, 7.903850),
    (0.02, 1.5, 2000, 1e-6, 3.232830, 3.483266),
    (1, 1, 1, 1e-5, 4.377178, 4.728507),
    (1, 10, 100, 1e-5, 4.377178, 4.728507),
    (0.1, 2, 200, 1e-3, 2.302822, 2.647232),
    (0.3, 2, 200, 1e-2, 7.036414, 8.267083),
    (128 / 60000, 1, 450000, 1e-5, 9.2786, 9.9697),
    (512 / 60000, 2, 174000, 1e-5, 9.3857, 10.0791),
    (128 / 60000, 5, 325000, 1e-5, 0.9139, 0.9941),
    (2048 / 182339, 4, 385000, 1e-6, 9.5032, 10.1114),
]


@pytest.mark.parametrize("rate, z, count, delta, pld, rdp", TABLE)
def test_the_reference_table(rate, z, count, delta, pld, rdp):
    assert epsilon_of(poisson(rate, z, count), delta=delta) == pytest.approx(pld, abs=1e-3)
    assert epsilon_of(poisson(rate, z, count), delta=delta, accountant="rdp") == pytest.approx(rdp, abs=1e-3)


@pytest.mark.parametrize("z, count", [(1.0, 1), (2.0, 4), (10.0, 100)])
def test_gaussians_without_sampling_have_a_closed_form(z, count):
    spent = epsilon_of([Release("client", "all", z, count)], delta=1e-5)
    assert gaussian_delta(spent, noise_multiplier=z, count=count) == pytest.approx(1e-5, rel=2e-3)
    assert delta_at([Release("client", "all", z, count)], epsilon=spent) == pytest.approx(1e-5, rel=1e-3)


def test_charging_in_parts_is_charging_at_once():
    whole = epsilon_of(poisson(0.01, 1, 1000), delta=1e-5)
    assert epsilon_of([*poisson(0.01, 1, 400), *poisson(0.01, 1, 600)], delta=1e-5) == pytest.approx(whole, abs=1e-8)
    clipped = [dataclasses.replace(own, clip=c) for own, c in zip(poisson(0.01, 1, 500) * 2, (0.1, 0.2))]
    assert epsilon_of(clipped, delta=1e-5) == pytest.approx(whole, abs=1e-8), "where the bound lies costs nothing"


def test_nothing_costs_nothing_and_no_noise_everything():
    assert epsilon_of([], delta=1e-5) == 0.0
    assert epsilon_of(poisson(0.01, 1, 0), delta=1e-5) == 0.0
    assert epsilon_of(poisson(0.01, 0, 1), delta=1e-5) == math.inf


@pytest.mark.parametrize(
    "size, population, z, count, delta, expected",
    [(10, 1000, 2, 1000, 1e-5, 3.576), (10, 1000, 1, 1000, 1e-5, 20.99), (10, 100, 2, 200, 1e-3, 16.11)],
)
def test_a_replaced_record_in_a_sample_of_fixed_size_counts_twice(size, population, z, count, delta, expected):
    """google/differential-privacy#378: its Renyi accountant takes z over the distance of neighbours, which is 2 C."""
    spent = epsilon_of(fixed_size(size, population, z, count), delta=delta, accountant="rdp")
    assert spent == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("most, expected", [(10, 9.60), (15, 6.18), (20, 3.83), (30, 1.8285)])
def test_a_sample_that_is_cut_costs_more(most, expected):
    release = Release("example", "truncated_poisson", 1, 1000, 0.01, 1000, most)
    assert epsilon_of([release], delta=1e-5) == pytest.approx(expected, abs=5e-3)


def test_accountants_that_understate_or_have_no_bound_are_refused():
    with pytest.raises(ConfigurationError, match="the CLT accountant understates epsilon; got accountant=gdp"):
        check_accountant("gdp")
    with pytest.raises(ConfigurationError, match=r"must have a bound for 10 of 100 without .*; got accountant=pld"):
        epsilon_of(fixed_size(10, 100, 1, 1), delta=1e-5)
    with pytest.raises(ConfigurationError, match="must have the same neighbours"):
        epsilon_of([*poisson(0.1, 1, 1), *fixed_size(10, 100, 1, 1)], delta=1e-5, accountant="rdp")


@pytest.mark.parametrize("accountant, expected", [("pld", 1.4147), ("rdp", 1.5132)])
def test_calibration_comes_back_to_its_target(accountant, expected):
    z = noise_for(lambda noise: poisson(0.01, noise, 1000), epsilon=1.0, delta=1e-5, accountant=accountant)
    assert z == pytest.approx(expected, rel=1e-3)
    assert 1.0 - 3e-3 < epsilon_of(poisson(0.01, z, 1000), delta=1e-5, accountant=accountant) <= 1.0


def test_calibration_without_sampling():
    z = noise_for(lambda noise: poisson(1, noise, 200), epsilon=10.0, delta=1e-3, accountant="rdp")
    assert epsilon_of(poisson(1, z, 200), delta=1e-3, accountant="rdp") == pytest.approx(10, abs=3e-3)


def test_the_most_rounds_of_a_budget():
    counted = {"epsilon": 3.5, "delta": 1e-5, "most": 100_000, "accountant": "rdp"}
    most = most_releases(lambda count: poisson(0.01, 1, count), **counted)
    assert epsilon_of(poisson(0.01, 1, most), delta=1e-5, accountant="rdp") <= 3.5
    assert epsilon_of(poisson(0.01, 1, most + 1), delta=1e-5, accountant="rdp") > 3.5
    assert most_releases(lambda count: poisson(0.01, 1, count), **{**counted, "most": 5}) == 5
    assert most_releases(lambda count: poisson(1, 0.1, count), **counted) == 0
