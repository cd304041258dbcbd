"""What every client sampler promises."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from fedgan_lightning.errors import ConfigurationError, DataError
from fedgan_lightning.federation import sampling
from fedgan_lightning.federation.asynchronous import Asynchronous
from fedgan_lightning.federation.label_balance import BalancedClients
from fedgan_lightning.federation.virtual_clock import ArrivingClients, VirtualArrivals
from fedgan_lightning.protocol import ClientSampler
from tests.conftest import ROOT

SAMPLERS = [sampling.AllClients(), sampling.FractionOfClients(0.3), sampling.PoissonSampling(0.3)]
TRACE = str(ROOT / "tests" / "data" / "trace.csv")
SAMPLERS += [sampling.SelectedClients([4, 1]), sampling.AvailableClients(TRACE)]
SAMPLERS += [BalancedClients(fraction=0.3)]
SAMPLERS += [ArrivingClients(VirtualArrivals(Asynchronous(buffer_size=3), num_clients=10, seed=0))]
SAMPLERS[-2].prepare(SimpleNamespace(label_counts=lambda: np.eye(10) * 20 + 1))
CONSTANT = (sampling.AllClients, sampling.SelectedClients)


def test_every_sampler_is_covered():
    assert {type(sampler) for sampler in SAMPLERS} == set(ClientSampler.__subclasses__())


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda value: type(value).__name__)
def test_pure_in_seed_and_round_distinct_and_sorted(sampler):
    seen = set()
    for number in range(20):
        cohort = sampler.sample(num_clients=10, round=number, seed=3)
        assert cohort == sampler.sample(num_clients=10, round=number, seed=3)
        assert list(cohort) == sorted(set(cohort))
        assert set(cohort) <= set(range(10))
        seen.add(cohort)
    assert (len(seen) == 1) if isinstance(sampler, CONSTANT) else (len(seen) > 5)


def test_fraction_takes_its_share_of_everybody_in_the_long_run():
    counts = [0] * 10
    for number in range(500):
        cohort = sampling.FractionOfClients(0.3).sample(num_clients=10, round=number, seed=0)
        assert len(cohort) == 3
        for client_id in cohort:
            counts[client_id] += 1
    assert max(abs(count / 500 - 0.3) for count in counts) < 0.08
    assert len(sampling.FractionOfClients(0.01).sample(num_clients=10, round=0, seed=0)) == 1


def test_poisson_has_its_inclusion_probability_and_empty_cohorts():
    sizes = [len(sampling.PoissonSampling(0.1).sample(num_clients=10, round=r, seed=0)) for r in range(1000)]
    assert sum(sizes) / 10_000 == pytest.approx(0.1, abs=0.012)
    assert 0 in sizes


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_shares_outside_the_unit_interval_are_refused(share):
    for make in (sampling.FractionOfClients, sampling.PoissonSampling):
        with pytest.raises(ConfigurationError, match=rf"in \(0, 1\]; got {share}"):
            make(share)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda value: type(value).__name__)
def test_the_cohort_is_of_the_population(sampler):
    """Those who stand by for a cohort are of the population, too: nobody is asked whom the sampler excludes."""
    for number in range(20):
        population = sampler.population(num_clients=10, round=number)
        assert {*sampler.sample(num_clients=10, round=number, seed=3)} <= {*population} <= {*range(10)}
    assert [*sampling.SelectedClients([4, 1]).population(num_clients=9, round=0)] == [1, 4]


def test_a_trace_and_named_clients_do_not_go_together():
    with pytest.raises(ConfigurationError, match="got SelectedClients, which names them"):
        sampling.AvailableClients(TRACE, among=sampling.SelectedClients([1]))


def test_selected_clients_are_those_that_were_named():
    assert sampling.SelectedClients([4, 1]).sample(num_clients=5, round=7, seed=0) == (1, 4)
    with pytest.raises(ConfigurationError, match="below the number of clients, 4; got 4"):
        sampling.SelectedClients([4]).sample(num_clients=4, round=0, seed=0)
    for wrong, words in (([], "distinct"), ([1, 1], "distinct"), ([-1], "at least 0")):
        with pytest.raises(ConfigurationError, match=words):
            sampling.SelectedClients(wrong)


def test_only_those_that_are_there_are_chosen_and_may_stand_by():
    there = sampling.AvailableClients(TRACE)
    assert there.sample(num_clients=10, round=0, seed=0) == (0,)
    assert there.sample(num_clients=10, round=8, seed=0) == tuple(range(2, 9))
    assert there.sample(num_clients=10, round=99, seed=0) == ()
    half = sampling.AvailableClients(TRACE, among=sampling.FractionOfClients(0.5))
    cohorts = {half.sample(num_clients=10, round=8, seed=seed) for seed in range(20)}
    assert len(cohorts) > 5
    assert all(len(cohort) == 4 and set(cohort) <= set(range(2, 9)) for cohort in cohorts)
    assert list(there.population(num_clients=10, round=8)) == list(range(2, 9))
    assert list(sampling.AllClients().population(num_clients=3, round=8)) == [0, 1, 2]


def test_traces_that_are_none_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"AvailableClients.trace must be a CSV file that can be read; got .*missing"):
        sampling.AvailableClients(str(tmp_path / "missing.csv"))
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("client,first_round\n1,2\n")
    with pytest.raises(DataError, match="got client, first_round. .*last_round is missing"):
        sampling.AvailableClients(str(wrong))
    with pytest.raises(ConfigurationError, match=r"clients in \[0, 5\); got 5"):
        sampling.AvailableClients(TRACE).sample(num_clients=5, round=5, seed=0)


class TestBalanced:
    """FeGAN's cohorts: classes add up evenly."""

    COUNTS = np.array([[90, 10, 0], [80, 0, 0], [0, 30, 0], [0, 0, 40], [70, 0, 0], [0, 20, 5]])

    def made(self, fraction, counts=None):
        sampler = BalancedClients(fraction=fraction)
        sampler.prepare(SimpleNamespace(label_counts=lambda: self.COUNTS if counts is None else counts))
        return sampler

    def test_every_class_is_in_every_cohort_and_rare_holders_are_asked_more(self):
        sampler, asked = self.made(0.5), np.zeros(6)
        for number in range(200):
            cohort = sampler.sample(num_clients=6, round=number, seed=0)
            assert len(cohort) == 3
            assert (self.COUNTS[list(cohort)].sum(0) > 0).all()
            asked[list(cohort)] += 1
        assert asked[3] > asked[[0, 1, 4]].max()

    def test_a_cohort_by_hand(self):
        """A class of zero so far is next; with all taken the least counted is."""
        counts = np.array([[10, 0], [0, 1], [0, 9]])
        for number in range(20):
            assert {0} < {*self.made(0.67, counts).sample(num_clients=3, round=number, seed=0)}

    def test_data_without_labels_are_refused(self):
        with pytest.raises(ConfigurationError, match="must know how many labels .* got SimpleNamespace"):
            BalancedClients().prepare(SimpleNamespace())
