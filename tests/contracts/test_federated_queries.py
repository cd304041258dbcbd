"""Queries that clients answer with sums: their sum is the pooled answer, and survives the way to a site and back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fedgan_lightning import Evaluation, FederatedDataModule
from fedgan_lightning.data.samples import ClientSamples
from fedgan_lightning.deployment.data import RemoteDataModule
from fedgan_lightning.deployment.site_queries import QUERIES
from fedgan_lightning.errors import ConfigurationError, QuorumError
from fedgan_lightning.evaluation.federated_queries import FeatureMoments, QueryContext, answers, summed
from fedgan_lightning.evaluation.fidelity import ThirdPowers
from fedgan_lightning.evaluation.kernel import KernelSums, kernel_sums
from fedgan_lightning.evaluation.metrics import Metric
from fedgan_lightning.evaluation.modalities import default_metrics
from fedgan_lightning.evaluation.ranking import ItemCounts, Rankings, histories, preferences, ranking_values
from fedgan_lightning.metrics import KernelDistance, PixelFeatures, RankingQuality
from fedgan_lightning.partitions import IID
from fedgan_lightning.sources import Interactions
from tests.conftest import digits_data, federate, ring_data, ring_gan
from tests.unit.test_recommendation import gan

CPU = torch.device("cpu")
RATINGS = str(Path(__file__).parents[1] / "data" / "ratings.csv")


def users_data(*, num_clients: int = 3) -> FederatedDataModule:
    source = Interactions(RATINGS, num_items=30, min_user=5, min_item=3)
    return FederatedDataModule(source, partition=IID(), num_clients=num_clients, batch_size=8)


class Survey:
    """Sites in this process: queries are read from what is sent, by clients that have no more than their samples."""

    def __init__(self, data, *, sums_only=False, module=None) -> None:
        self.data, self.sums_only, self.module, self.asked = data, sums_only, module, []

    def facts(self):
        counts = self.data.label_counts()
        sizes = {k: self.data.num_examples(k) for k in range(self.data.num_clients)}
        told = {"is_image": self.data.train_samples.is_image}
        return {k: {"client_id": k, "num_examples": n, "label_counts": counts[k], **told} for k, n in sizes.items()}

    def sums(self, facts, state, *, check):
        self.asked.append(facts["query"])
        kind = QUERIES[facts["query"]]
        who = [QueryContext(self.data.client_samples(k), self.data, self.module) for k in range(self.data.num_clients)]
        found = [kind.read(facts, state, own).answer(own) for own in who]
        if not self.sums_only:
            for k, own in enumerate(found):
                check(k, own)
            return found
        return [{name: sum(own[name] for own in found) for name in found[0]}]


def surveyed(data, **options) -> tuple[RemoteDataModule, Survey]:
    survey = Survey(data, **options)
    module = RemoteDataModule(data, survey)
    module.setup("fit")
    return module, survey


def pixels(data, side: int = 8):
    return PixelFeatures(side).build(data.train_samples, num_classes=data.num_classes)


QUERIES_BY_NAME = {
    "feature moments": lambda: (digits_data(), lambda data: FeatureMoments(pixels(data))),
    "third powers": lambda: (digits_data(), lambda data: ThirdPowers(pixels(data, 4))),
    "item counts": lambda: (users_data(), lambda data: ItemCounts(30)),
    "rankings": lambda: (users_data(), lambda data: Rankings(30, scores=torch.arange(30.0).double())),
    "rankings by a model": lambda: (users_data(), lambda data: Rankings(30, model=gan())),
}


def test_every_question_that_a_site_answers_is_tested():
    assert {name.removesuffix(" by a model") for name in QUERIES_BY_NAME} == {*QUERIES}


@pytest.mark.parametrize("name", QUERIES_BY_NAME)
def test_the_sum_of_all_answers_is_the_answer_of_the_pooled_samples(name):
    data, make = QUERIES_BY_NAME[name]()
    query = make(data)
    found = summed(data, query)
    everybody = torch.cat([data.client_samples(k).indices for k in range(data.num_clients)]).sort().values
    pooled = query.answer(QueryContext(ClientSamples(samples=data.train_samples, indices=everybody), data))
    assert found.keys() == pooled.keys() == {*query.shapes(), "count"}
    for entry, value in pooled.items():
        torch.testing.assert_close(found[entry], value, rtol=1e-12, atol=1e-12)
    assert int(found["count"]) > 30
    parts = list(answers(data, query))
    assert len(parts) == data.num_clients
    first = next(iter(query.shapes()))
    assert not torch.allclose(parts[0][first], found[first]), "one client's is not all's"


@pytest.mark.parametrize("name", QUERIES_BY_NAME)
def test_an_answer_from_a_site_is_the_same_and_a_wrong_one_is_refused(name):
    data, make = QUERIES_BY_NAME[name]()
    query, other = make(data), gan()
    own = QueryContext(data.client_samples(1), data, other)
    answer = query.read(query.facts(), query.state(), own).answer(own)
    for entry, value in query.answer(own).items():
        torch.testing.assert_close(answer[entry], value, rtol=0, atol=0)
    query.check(answer)
    first = next(iter(query.shapes()))
    spoiled = {
        "NaN": {**answer, first: answer[first] * torch.nan},
        "shape": {**answer, first: torch.zeros(7)},
        "more": {**answer, "samples": torch.zeros(3)},
        "none": {**answer, "count": torch.tensor(0)},
        "1e300": {**answer, first: answer[first] * 0 + 1e300},
        "1e15": {**answer, first: answer[first] * 0 + 1e15},
        "below zero": {**answer, first: answer[first] - 1e9},
        "a negative count": {**answer, "count": torch.tensor(-5)},
        "a count of NaN": {**answer, "count": torch.tensor(math.nan)},
        "a count of 1.5": {**answer, "count": torch.tensor(1.5)},
        "a count of several numbers": {**answer, "count": torch.tensor([3, 4])},
        "more than it has": {**answer, "count": torch.tensor(10**6)},
        "integers": {**answer, first: answer[first].long()},
        "complex": {**answer, first: answer[first].to(torch.complex64)},
        "nothing": {},
    }
    sizes = [data.num_examples(1)]
    query.check(answer, who="client 1", sizes=sizes)
    for wrong in spoiled.values():
        with pytest.raises(ConfigurationError, match=f"sites must answer {query.kind} with finite sums.*from client 1"):
            query.check(wrong, who="client 1", sizes=sizes)


def test_products_that_no_samples_have_are_refused():
    data = digits_data()
    query = FeatureMoments(pixels(data))
    answer = query.answer(QueryContext(data.client_samples(1), data))
    crooked, large = answer["outer"].clone(), answer["outer"].clone()
    crooked[0, 1] += 5.0
    large[20, 21] = large[21, 20] = 1e6
    for outer, reason in (
        (crooked, "not symmetric"),
        (large, "larger than squares allow"),
        (0 * large, "smaller than"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            query.check({**answer, "outer": outer})


def test_third_powers_travel_once_each():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    sums = kernel_sums([features], num_features=5)
    state = sums.to_state()
    assert len(state["third"]) == 6 * 7 * 8 // 6
    back = KernelSums.of_state(state)
    torch.testing.assert_close(back.third, sums.third, rtol=1e-12, atol=1e-12)
    assert (back.own, back.count) == (sums.own, sums.count)


# ---------------------------------------------------------------------- metrics


def scored(metric: Metric, data, model, samples, labels):
    facts = metric.prepare(data, device=CPU)
    return {**facts, **metric.compute(samples, labels), **metric.inspect(model)}


def digits_samples():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(200, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(200) % 10


QUICK = [own for own in default_metrics(digits_data()) if type(own).__name__ != "SyntheticTraining"]


@pytest.mark.parametrize("sums_only", [False, True], ids=["single sums", "one sum"])
@pytest.mark.parametrize("metric", QUICK, ids=lambda own: type(own).__name__)
def test_a_metric_over_sites_is_that_of_the_simulation_or_says_that_it_needs_samples(metric, sums_only):
    """For all that are measured of images by default; what says nothing and looks at samples would be refused."""
    kind, data, (samples, labels) = type(metric), digits_data(), digits_samples()
    module, _ = surveyed(data, sums_only=sums_only)
    if kind.needs_client_samples:
        with pytest.raises(ConfigurationError, match="samples of clients must stay where they are"):
            kind().prepare(module, device=CPU)
        return
    if kind.__name__ == "ClientDistances" and sums_only:
        with pytest.raises(ConfigurationError, match="sums of features client by client"):
            kind().prepare(module, device=CPU)
        return
    model = torch.nn.Linear(1, 1)
    expected = scored(kind(), data, model, samples, labels)
    found = scored(kind(), module, model, samples, labels)
    words = {name for name, value in expected.items() if isinstance(value, str)}
    assert {name: found.pop(name) for name in words} == {name: expected.pop(name) for name in words}
    assert found == pytest.approx(expected, rel=1e-7)
    assert expected


@pytest.mark.parametrize("sums_only", [False, True], ids=["single sums", "one sum"])
def test_rankings_over_sites_are_those_of_the_simulation(sums_only):
    """By the weights that are asked about, whatever a site's own module has; and what is sent holds no user."""
    data, model, other = users_data(), gan(), gan()
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(-1)
    module, survey = surveyed(data, sums_only=sums_only, module=other)
    nothing = torch.empty(0)
    expected = scored(RankingQuality(), data, model, nothing, None)
    assert scored(RankingQuality(), module, model, nothing, None) == pytest.approx(expected, rel=1e-9)
    assert survey.asked == ["item counts", "rankings", "rankings"]
    seen, wanted = histories(data)
    pooled = ranking_values(preferences(model, seen), seen=seen, wanted=wanted)
    assert {name: expected[name] for name in pooled} == pytest.approx(pooled, rel=1e-12)
    assert scored(RankingQuality(), data, other, nothing, None)["ndcg20"] != pytest.approx(expected["ndcg20"])


def test_kernel_distance_is_no_longer_left_out():
    module, survey = surveyed(digits_data())
    assert KernelDistance().prepare(module, device=CPU)["kid_num_reals"] == sum(map(module.num_examples, range(5)))
    assert survey.asked == ["third powers"]


class Moody(Metric):
    """Is not answered after the rounds that are named; round 0 is before training."""

    def __init__(self, *rounds: int) -> None:
        self.rounds, self.now = rounds, -1

    def prepare(self, data, *, device):
        return {}

    def compute(self, samples, labels):
        return {}

    def inspect(self, model):
        self.now += 1
        if self.now in self.rounds:
            raise QuorumError("every site must answer what the evaluation asks; got no sums from clients [1]")
        return {"mood": float(self.now)}


def test_a_site_that_is_away_costs_a_value_and_not_the_run(caplog):
    evaluation = Evaluation(metrics=[Moody(2)], every_n_rounds=1, num_samples=10)
    with caplog.at_level("WARNING", logger="fedgan_lightning"):
        federate(ring_gan(), ring_data(), evaluation, rounds=3, local_steps=1)
    assert [(own["rounds"], own.get("mood")) for own in evaluation.history] == [(0, 0), (1, 1), (2, None), (3, 3)]
    assert [r.message for r in caplog.records if "Moody is not measured after round 2: every site" in r.message]
    first = Evaluation(metrics=[Moody(0)], every_n_rounds=1, num_samples=10)  # at the start, too
    federate(ring_gan(), ring_data(), first, rounds=1, local_steps=1)
    assert [own.get("mood") for own in first.history] == [None, 1]
