"""Metrics: exact over clients, repeatable, and right."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance

from fedgan_lightning import GAN, Evaluation, FederatedDataModule, FederatedOrchestrator, ServerModule
from fedgan_lightning.data.samples import ClientSamples, Samples, quantise
from fedgan_lightning.errors import ConfigurationError, DataError
from fedgan_lightning.evaluation import modes
from fedgan_lightning.evaluation.features import FrozenNet
from fedgan_lightning.evaluation.federated_queries import chunks
from fedgan_lightning.evaluation.fid import feature_sums, frechet_distance
from fedgan_lightning.evaluation.modalities import default_metrics
from fedgan_lightning.metrics import (
    ClassCoverage,
    ClassifierFeatures,
    FrechetDistance,
    InceptionFeatures,
    ModeCoverage,
    ModuleFeatures,
    PixelFeatures,
    SlicedWasserstein,
)
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.sources import Digits, Ring
from fedgan_lightning.visuals.pictures import grid
from tests.conftest import digits_data, quiet_trainer, ring_data
from tests.fakes import RandomImages

CPU = torch.device("cpu")


def net(num_features: int = 6) -> FrozenNet:
    torch.manual_seed(0)
    return FrozenNet(torch.nn.Linear(4, num_features), num_features=num_features, name="linear", digest="x")


class TestFrechetDistance:
    @settings(max_examples=30, deadline=None)
    @given(cuts=st.lists(st.integers(1, 299), min_size=0, max_size=6), seed=st.integers(0, 100))
    def test_sums_of_clients_give_the_pooled_distance(self, cuts, seed):
        generator = torch.Generator().manual_seed(seed)
        real, fake = (torch.randn(300, 4, generator=generator) * s for s in (1.0, 1.5))
        bounds = [0, *sorted(set(cuts)), 300]
        identity = FrozenNet(torch.nn.Identity(), num_features=4, name="id", digest="x")
        #: A float32 network rounds by batch size, at 1e-7; the sums themselves do not.
        for features, tolerance in ((identity, 1e-9), (net(), 1e-6)):
            parts = [feature_sums(features, [real[a:b]]) for a, b in pairwise(bounds)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            pooled, other = feature_sums(features, [real]), feature_sums(features, fake.split(77))
            assert total.count == 300
            assert frechet_distance(total, other) == pytest.approx(frechet_distance(pooled, other), abs=tolerance)

    def test_equals_torchmetrics_on_the_pooled_data(self):
        real, fake = torch.randn(500, 4), torch.randn(400, 4) + 0.3
        metric = FrechetInceptionDistance(feature=net())
        metric.update(real, real=True)
        metric.update(fake, real=False)
        ours = frechet_distance(feature_sums(net(), [real]), feature_sums(net(), [fake]))
        assert ours == pytest.approx(float(metric.compute()), rel=1e-5)

    def test_closed_form_for_gaussians(self):
        """||m||^2 + tr(S1 + S2 - 2 (S1 S2)^1/2): means 0 and 3, deviations 1 and 2, give 9 + (2 - 1)^2 in 1-D."""
        identity = FrozenNet(torch.nn.Identity(), num_features=1, name="id", digest="x")
        line = torch.linspace(-1, 1, 2001).unsqueeze(1)
        line = line / line.std()
        value = frechet_distance(feature_sums(identity, [line]), feature_sums(identity, [3 + 2 * line]))
        assert value == pytest.approx(10.0, rel=1e-4)

    def test_of_a_set_with_itself_is_zero(self):
        sums = feature_sums(net(), [torch.randn(200, 4)])
        assert frechet_distance(sums, sums) == pytest.approx(0.0, abs=1e-6)

    def test_the_mean_over_clients_is_another_number(self):
        real = torch.cat([torch.randn(100, 4) + shift for shift in (-3.0, 3.0)])
        fake = feature_sums(net(), [torch.randn(200, 4)])
        clients = [feature_sums(net(), [part]) for part in real.split(100)]
        exact = frechet_distance(clients[0] + clients[1], fake)
        mean = np.mean([frechet_distance(client, fake) for client in clients])
        assert abs(mean - exact) > 0.2 * exact

    def test_one_sample_is_too_few(self):
        with pytest.raises(DataError, match="at least two samples on both sides; got 1 real"):
            frechet_distance(feature_sums(net(), [torch.randn(1, 4)]), feature_sums(net(), [torch.randn(5, 4)]))

    def test_metric_reports_floor_count_and_hash_and_ranks_damage(self):
        metric = FrechetDistance()
        facts = metric.prepare(digits_data(), device=CPU)
        assert facts["fid_num_reals"] == 1438
        assert facts["fid_features"] == "classifier (d=64)"
        assert len(facts["fid_features_hash"]) == 12
        test = digits_data().test_samples
        clean = test.take(torch.arange(len(test)))[0]
        noisy = (clean + 0.6 * torch.randn_like(clean)).clamp(-1, 1)
        lost = clean[test.y < 5]
        values = [metric.compute(samples, None)["fid"] for samples in (clean, noisy, lost, torch.zeros_like(clean))]
        assert values[0] == pytest.approx(facts["fid_floor"], rel=1e-6)
        assert values[0] < values[1] < values[2] < values[3]


class TestFeatures:
    def test_the_classifier_is_trained_once_and_repeatable(self, tmp_path):
        data = digits_data(max_samples=300)
        builds = [
            ClassifierFeatures(epochs=1, cache=str(tmp_path / name)).build(data.train_samples, num_classes=10)
            for name in ("a", "b", "a")
        ]
        assert len({build.digest for build in builds}) == 1
        assert len(list((tmp_path / "a").iterdir())) == 1
        other = ClassifierFeatures(epochs=1, seed=1, cache=str(tmp_path / "a")).build(
            data.train_samples, num_classes=10
        )
        assert other.digest != builds[0].digest

    def test_is_frozen_whatever_happens(self):
        frozen = net()
        frozen.train()
        assert not frozen.training
        assert all(not parameter.requires_grad for parameter in frozen.parameters())

    def test_user_modules_and_pixels(self):
        data = digits_data(max_samples=200)
        for features, width in (
            (PixelFeatures(), 64),
            (PixelFeatures(4), 16),
            (ModuleFeatures(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)), 5), 5),
        ):
            metric = FrechetDistance(features)
            facts = metric.prepare(data, device=CPU)
            assert f"d={width}" in facts["fid_features"]
            assert metric.compute(torch.randn(50, 1, 8, 8), None)["fid"] > facts["fid_floor"]

    def test_inception_without_weights_says_what_to_do(self):
        with pytest.raises(ConfigurationError, match="set weights_path to a local file"):
            InceptionFeatures("nowhere.pth").build(digits_data(max_samples=50).train_samples, num_classes=10)
        with pytest.raises(ConfigurationError, match="InceptionFeatures must have images"):
            InceptionFeatures().build(ring_data().train_samples, num_classes=8)
        with pytest.raises(ConfigurationError, match=r"of 1 or 3 channels; got torch.uint8 data of shape \[5"):
            InceptionFeatures().build(RandomImages([5, 8, 8], num_samples=4).load("train"), num_classes=0)

    @pytest.mark.parametrize("shape", [[2, 8, 12], [5, 13, 8]])
    def test_images_need_not_be_square_nor_grey_nor_of_three_colours(self, shape, tmp_path):
        """Lines of a spectrogram, or bands of a satellite; of these the first three are shown."""
        samples = RandomImages(shape, classes=3, num_samples=90).load("train")
        built = ClassifierFeatures(epochs=1, cache=str(tmp_path)).build(samples, num_classes=3)
        assert built(samples.take(torch.arange(6))[0]).shape == (6, 64)
        assert built.classify(samples.take(torch.arange(6))[0]).shape == (6,)
        assert grid(samples.take(torch.arange(6))[0], columns=3).shape[2] == 3

    def test_the_classifier_needs_labels(self):
        with pytest.raises(ConfigurationError, match="labelled data of at least two classes; got 0"):
            ClassifierFeatures().build(digits_data(max_samples=50).train_samples, num_classes=0)


class TestModes:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])

    def test_counts_quality_and_balance(self):
        samples = torch.cat([self.centres[0] + 0.01 * torch.randn(60, 2), self.centres[1] + 0.01 * torch.randn(20, 2)])
        samples = torch.cat([samples, torch.full((20, 2), 5.0)])
        found = modes.mode_statistics(samples, centres=self.centres, sigma=0.1)
        assert found["modes"] == 2
        assert found["high_quality"] == pytest.approx(0.8)
        p, q = np.array([0.75, 0.25, 0, 0]), np.full(4, 0.25)
        m = (p + q) / 2
        entropy = lambda a: float(np.sum(a[a > 0] * np.log(a[a > 0] / m[a > 0])))  # noqa: E731
        assert found["mode_divergence"] == pytest.approx((entropy(p) + entropy(q)) / 2)

    def test_perfect_and_hopeless(self):
        perfect = modes.mode_statistics(self.centres.repeat(5, 1), centres=self.centres, sigma=0.1)
        balanced = {"modes": 4.0, "high_quality": 1.0, "mode_divergence": pytest.approx(0.0, abs=1e-12)}
        assert perfect == {**balanced, "mode_spread": 0.0}, "what is no perfect sample of a Gaussian"
        hopeless = modes.mode_statistics(torch.full((9, 2), 99.0), centres=self.centres, sigma=0.1)
        assert hopeless["modes"] == hopeless["high_quality"] == 0
        assert hopeless["mode_divergence"] == pytest.approx(math.log(2)), "nothing is as far as one can be"
        collapsed = modes.mode_statistics(self.centres[:1].repeat(9, 1), centres=self.centres, sigma=0.1)
        assert collapsed["mode_divergence"] < hopeless["mode_divergence"]

    @given(width=st.floats(0.05, 0.4), shift=st.floats(-0.5, 0.5))
    def test_spread_is_that_of_samples_within_their_mode_wherever_they_are(self, width, shift):
        noise = torch.randn(4, 500, 2, generator=torch.Generator().manual_seed(0)).double()
        samples = (self.centres.unsqueeze(1) + shift + width * noise).flatten(0, 1)
        found = modes.mode_statistics(samples, centres=self.centres, sigma=1.0)
        assert found["high_quality"] == 1
        expected = np.sqrt(np.mean([np.cov(own.T.numpy()).diagonal() for own in width * noise]))
        assert found["mode_spread"] == pytest.approx(expected, rel=1e-9)

    def test_spread_of_the_modes_own_samples_is_what_the_cut_leaves(self):
        noise = torch.randn(4, 20000, 2, generator=torch.Generator().manual_seed(0))
        samples = (self.centres.unsqueeze(1) + 0.1 * noise).flatten(0, 1)
        found = modes.mode_statistics(samples, centres=self.centres, sigma=0.1)
        cut = math.exp(-4.5)
        assert found["mode_spread"] == pytest.approx(math.sqrt((1 - 5.5 * cut) / (1 - cut)), abs=0.005)
        alone = modes.mode_statistics(self.centres[:1], centres=self.centres, sigma=0.1)
        assert alone["mode_spread"] == 0, "one sample has none"

    @pytest.mark.parametrize("num_samples", [1, 2, 3, 777, 2500])
    def test_quantiles_are_those_of_torch(self, num_samples):
        values, levels = (
            torch.randn(num_samples, 7, dtype=torch.float64),
            torch.linspace(0, 1, 101, dtype=torch.float64),
        )
        torch.testing.assert_close(
            modes.quantiles(values, levels), torch.quantile(values, levels, dim=0), rtol=0, atol=0
        )

    def test_quantiles_of_more_numbers_than_torch_takes(self, monkeypatch):
        """The limit is a refusal by ``torch.quantile`` (16 million), which is not called."""

        def refuse(*arguments, **options):
            raise RuntimeError("quantile() input tensor is too large")

        monkeypatch.setattr(torch, "quantile", refuse)
        x = torch.arange(5.0).repeat(2, 1).T
        assert modes.sliced_wasserstein(x, x + 1, torch.eye(2)) == pytest.approx(1.0)
        largest = torch.arange(17_000_000, dtype=torch.float64).unsqueeze(1)
        assert modes.quantiles(largest, torch.tensor([0.0, 1.0])).flatten().tolist() == [0, 16_999_999]

    def test_sliced_wasserstein_of_a_shift_along_one_axis(self):
        directions = torch.tensor([[1.0], [0.0]])
        x = torch.randn(4000, 2)
        assert modes.sliced_wasserstein(x, x + torch.tensor([2.0, 7.0]), directions) == pytest.approx(2.0, abs=1e-5)
        assert modes.sliced_wasserstein(x, x, directions) == 0

    def test_metrics_on_real_data_meet_their_floors(self):
        data = ring_data(num_samples=4000)
        metric = ModeCoverage()
        assert metric.prepare(data, device=CPU)["num_modes"] == 8
        values = metric.compute(data.test_samples.x, None)
        assert values["modes"] == 8
        assert values["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.01)
        sliced = SlicedWasserstein()
        floor = sliced.prepare(data, device=CPU)["sliced_wasserstein_floor"]
        assert sliced.compute(torch.zeros(500, 2), None)["sliced_wasserstein"] > 10 * floor
        with pytest.raises(ConfigurationError, match="known modes; got Digits"):
            ModeCoverage().prepare(digits_data(), device=CPU)


def test_pictures_in_floats_are_averaged_like_those_in_bytes():
    """A source of one's own may give floats; 256 pixels would be too many for a kernel distance over clients."""
    floats = PixelFeatures().build(Samples(torch.rand(10, 1, 16, 16) * 2 - 1), num_classes=0)
    assert floats.num_features == 64
    assert PixelFeatures().build(Samples(torch.rand(10, 16)), num_classes=0).num_features == 16
    assert PixelFeatures().build(Samples(torch.rand(10, 2, 24)), num_classes=0).num_features == 48


def test_sliced_distance_of_images_is_in_the_generator_s_units():
    """They are kept as bytes: real images would otherwise be a hundred times as far away as the floor."""
    data = digits_data()
    metric = SlicedWasserstein()
    floor = metric.prepare(data, device=CPU)["sliced_wasserstein_floor"]
    train = data.train_samples
    x = train.take(torch.arange(len(train)))[0]
    assert (
        metric.compute(x, None)["sliced_wasserstein"] < 1.5 * floor < metric.compute(0 * x, None)["sliced_wasserstein"]
    )


def test_some_reals_are_drawn_by_chance_and_not_the_first_ones():
    """Folders come class by class; both ways of asking for some see the same samples."""
    samples = Digits().load("train")
    assert samples.y is not None
    order = samples.y.argsort(stable=True)
    ordered = Samples(samples.x[order], samples.y[order])
    view = ClientSamples(samples=ordered, indices=torch.arange(len(ordered)))
    some = torch.cat(list(chunks(view, 200)))
    assert len(some) == 200
    places = [int((view.take(torch.arange(len(view)))[0] == x).flatten(1).all(1).nonzero()[0]) for x in some]
    assert set(ordered.y[places].tolist()) == set(range(10))
    assert torch.equal(some, torch.cat(list(chunks(view, 200))))
    assert len(torch.cat(list(chunks(view, 10**6)))) == len(view)


def test_metrics_and_callbacks_that_are_used_again_forget_the_first_data(tmp_path):
    def facts(evaluation, data):
        torch.manual_seed(0)
        gan = GAN(MLPGenerator(8, (1, 8, 8), hidden=(16,)), MLPDiscriminator((1, 8, 8), hidden=(16,)))
        module, trainer = ServerModule(gan), quiet_trainer(FederatedOrchestrator(rounds=1, local_steps=1), evaluation)
        trainer.fit(module, datamodule=data)
        return dict(evaluation.facts), dict(evaluation.latest)

    def made():
        return Evaluation(metrics=[FrechetDistance(PixelFeatures())], num_samples=20)

    first, second = digits_data(max_samples=200), digits_data(max_samples=300)
    expected = facts(made(), second)
    again = made()
    facts(again, first)
    assert facts(again, second) == expected


def test_class_coverage_counts_missing_classes_and_obedience():
    data = digits_data()
    metric = ClassCoverage()
    assert metric.prepare(data, device=CPU)["classifier_accuracy"] > 0.9
    test = data.test_samples
    x = test.take(torch.arange(len(test)))[0]
    everything = metric.compute(x, test.y)
    assert everything["classes"] == 10
    assert everything["class_accuracy"] > 0.9
    assert everything["class_distance"] < 0.1
    half = metric.compute(x[test.y < 5], None)
    assert half["classes"] <= 6
    assert "class_accuracy" not in half
    assert half["class_distance"] == pytest.approx(0.5, abs=0.07)


def test_defaults_suit_the_data():
    assert [type(metric).__name__ for metric in default_metrics(ring_data())] == ["ModeCoverage"]
    assert type(default_metrics(digits_data())[0]).__name__ == "FrechetDistance"
    from fedgan_lightning.sources import SwissRoll

    assert [type(m).__name__ for m in default_metrics(FederatedDataModule(SwissRoll()))] == ["SlicedWasserstein"]
    assert isinstance(Ring().centres, torch.Tensor)


def test_quantise_rounds_to_bytes():
    levels = torch.arange(256) / 127.5 - 1
    torch.testing.assert_close(quantise(levels), levels)
    torch.testing.assert_close(quantise(levels + 0.003), levels)
    assert quantise(torch.tensor([-3.0, 3.0])).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("options, words", [({"num_samples": 1}, "got 1"), ({"every_n_rounds": 0}, "got 0")])
def test_evaluation_settings(options, words):
    with pytest.raises(ConfigurationError, match=words):
        Evaluation(**options)


def test_the_best_value_is_the_largest_where_the_metric_says_so(tmp_path):
    from fedgan_lightning.recorder import best_values

    history = [{"rounds": 0.0, "modes": 3.0, "fid": 9.0}, {"rounds": 5.0, "modes": 7.0, "fid_raw": 2.0, "fid": 4.0}]
    best = best_values(history, larger_is_better={"modes"})
    assert best["modes"] == {"value": 7.0, "rounds": 5.0}
    assert best["fid"] == {"value": 4.0, "rounds": 5.0}
    assert best_values(history, larger_is_better=())["modes"] == {"value": 3.0, "rounds": 0.0}


def test_metrics_name_values_of_theirs_as_better_when_larger():
    data, metric = ring_data(), ModeCoverage()
    metric.prepare(data, device=torch.device("cpu"))
    assert set(metric.larger_is_better) <= set(metric.compute(data.test_samples.x, None))
