"""Kernel distance, precision and recall, classifier score, usefulness and memorisation: against other code, and exact
over clients."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from fedgan_lightning import GAN, Evaluation, FederatedDataModule, Federation, SequentialExecutor
from fedgan_lightning.errors import ConfigurationError, DataError
from fedgan_lightning.evaluation import neighbours
from fedgan_lightning.evaluation.kernel import kernel_distance, kernel_sums
from fedgan_lightning.evaluation.modalities import default_metrics
from fedgan_lightning.metrics import (
    ClassifierScore,
    IntraClassDistance,
    KernelDistance,
    Memorisation,
    ModuleFeatures,
    PixelFeatures,
    PrecisionRecall,
    SyntheticTraining,
)
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.partitions import ClassesPerClient
from fedgan_lightning.sources import Digits, Samples
from tests.conftest import digits_data, ring_data

CPU = torch.device("cpu")


def features(count: int, *, seed: int, shift: float = 0.0, dim: int = 5) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.fixture(scope="module")
def data() -> FederatedDataModule:
    module = FederatedDataModule(Digits(), partition=ClassesPerClient(2), num_clients=5, batch_size=32)
    module.setup("fit")
    return module


def real_digits(data, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    samples = data.train_samples if split == "train" else data.test_samples
    return samples.take(torch.arange(len(samples)))


class TestKernelDistance:
    @pytest.mark.parametrize("dim", [1, 5, 64])
    def test_equals_the_formula_over_all_pairs(self, dim):
        real, fake = features(300, seed=0, dim=dim), features(200, seed=1, shift=0.2, dim=dim)
        ours = kernel_distance(*(kernel_sums([own], num_features=dim) for own in (real, fake)))
        assert ours == pytest.approx(_unbiased(real, fake, dim), rel=1e-9)

    def test_equals_that_of_torchmetrics_at_equal_sizes(self):
        real, fake = features(250, seed=0), features(250, seed=1, shift=0.2)
        ours = kernel_distance(*(kernel_sums([own], num_features=5) for own in (real, fake)))
        theirs = poly_mmd(real.double(), fake.double(), degree=3, gamma=1 / 5, coef=1.0)
        assert ours == pytest.approx(float(theirs), rel=1e-9)

    @settings(max_examples=30, deadline=None)
    @given(cuts=st.lists(st.integers(1, 199), max_size=5), seed=st.integers(0, 50))
    def test_sums_of_clients_give_the_pooled_distance(self, cuts, seed):
        real, fake = features(200, seed=seed), features(100, seed=seed + 1, shift=0.3)
        parts = [kernel_sums([real[a:b]], num_features=5) for a, b in pairwise([0, *sorted(set(cuts)), 200])]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        other = kernel_sums(fake.split(17), num_features=5)
        pooled = kernel_distance(kernel_sums([real], num_features=5), other)
        assert kernel_distance(total, other) == pytest.approx(pooled, rel=1e-9, abs=1e-12)

    def test_is_zero_in_the_mean_for_one_distribution_whatever_the_sample_size(self):
        values = [
            kernel_distance(
                *(kernel_sums([features(40, seed=2 * i + j)], num_features=5) for j in range(2)),
            )
            for i in range(200)
        ]
        assert abs(np.mean(values)) < 3 * np.std(values) / len(values) ** 0.5

    def test_refuses_many_features_and_single_samples(self):
        with pytest.raises(ConfigurationError, match="at most 64 features; got 65"):
            kernel_sums([], num_features=65)
        one = kernel_sums([features(1, seed=0)], num_features=5)
        with pytest.raises(DataError, match="got 1 real, 1 to compare with"):
            kernel_distance(one, one)

    def test_metric_on_real_digits(self, data):
        metric = KernelDistance()
        facts = metric.prepare(data, device=CPU)
        x, _ = real_digits(data, "test")
        values = metric.compute(x, None)
        assert values["kid"] == pytest.approx(facts["kid_floor"], rel=1e-6)
        noise = metric.compute(torch.rand(300, 1, 8, 8) * 2 - 1, None)
        assert noise["kid"] > 100 * abs(values["kid"])
        assert facts["kid_num_reals"] == len(data.train_samples)


def _unbiased(real, fake, dim):
    kernel = lambda a, b: (a.double() @ b.double().T / dim + 1) ** 3  # noqa: E731
    within = [
        float((kernel(own, own).sum() - kernel(own, own).diag().sum()) / (len(own) * (len(own) - 1)))
        for own in (real, fake)
    ]
    return sum(within) - 2 * float(kernel(real, fake).mean())


class TestNeighbours:
    def test_radii_are_those_of_scikit_learn(self):
        points = features(1500, seed=0)
        theirs, _ = NearestNeighbors(n_neighbors=6).fit(points.numpy()).kneighbors(points.numpy())
        torch.testing.assert_close(
            neighbours.radii(points, k=5), torch.from_numpy(theirs[:, -1]).float(), rtol=2e-3, atol=2e-3
        )

    def test_nearest_is_that_of_scikit_learn(self):
        points, queries = features(700, seed=0), features(1300, seed=1)
        theirs, indices = NearestNeighbors(n_neighbors=1).fit(points.numpy()).kneighbors(queries.numpy())
        distances, found = neighbours.nearest(queries, points)
        torch.testing.assert_close(distances, torch.from_numpy(theirs[:, 0]).float(), rtol=2e-3, atol=2e-3)
        assert (found == torch.from_numpy(indices[:, 0])).float().mean() > 0.99

    def test_formulas_of_the_papers(self):
        reals, fakes, k = features(120, seed=0).double(), features(90, seed=1, shift=0.5).double(), 5
        to_real, to_fake = (
            np.sort(np.linalg.norm(own[:, None].numpy() - own[None].numpy(), axis=-1), axis=1)[:, k]
            for own in (reals, fakes)
        )
        distance = np.linalg.norm(reals[:, None].numpy() - fakes[None].numpy(), axis=-1)
        expected = {
            "precision": (distance <= to_real[:, None]).any(0).mean(),
            "recall": (distance <= to_fake[None]).any(1).mean(),
            "density": (distance <= to_real[:, None]).sum(0).mean() / k,
            "coverage": (distance.min(1) <= to_real).mean(),
        }
        assert neighbours.precision_recall(reals, fakes, k=k) == pytest.approx(expected, rel=1e-12)

    @settings(max_examples=20, deadline=None)
    @given(cuts=st.lists(st.integers(1, 199), max_size=5))
    def test_recall_is_exact_over_clients(self, cuts):
        reals, fakes = features(200, seed=0), features(150, seed=1, shift=0.7)
        reach = neighbours.radii(fakes, k=3)
        bounds = [0, *sorted(set(cuts)), 200]
        parts = [neighbours.count_covered(reals[a:b], fakes, reach) for a, b in pairwise(bounds)]
        assert sum(parts) == neighbours.count_covered(reals, fakes, reach)

    def test_a_single_point_has_no_neighbour(self):
        assert neighbours.radii(torch.zeros(1, 2), k=1).tolist() == [float("inf")]


class TestPrecisionRecall:
    def test_recall_falls_with_lost_classes_and_precision_with_noise(self, data):
        metric = PrecisionRecall(PixelFeatures(), k=3)
        facts = metric.prepare(data, device=CPU)
        assert facts == {"recall_num_reals": len(data.train_samples), "recall_k": 3}
        x, y = real_digits(data, "train")
        everything, half = metric.compute(x, None), metric.compute(x[y < 5], None)
        assert everything["recall"] == 1
        assert half["recall"] < 0.7
        noisy = metric.compute((x[:600] + 0.7 * torch.randn(600, 1, 8, 8)).clamp(-1, 1), None)
        assert noisy["precision_test"] < 0.2 < everything["precision_test"]
        assert set(everything) == {"recall", "precision_test", "recall_test", "density_test", "coverage_test"}

    def test_settings(self, data):
        with pytest.raises(ConfigurationError, match="k of PrecisionRecall .* at least 1; got 0"):
            PrecisionRecall(k=0)
        with pytest.raises(ConfigurationError, match="more than k samples; got 3"):
            PrecisionRecall(PixelFeatures(), k=3).compute(torch.zeros(3, *data.sample_shape), None)
        with pytest.raises(ConfigurationError, match="more than k test samples"):
            PrecisionRecall(PixelFeatures(), k=400).prepare(data, device=CPU)


class TestClassifierScore:
    @pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all extracted features")
    @pytest.mark.filterwarnings("ignore:.*degrees of freedom is <= 0")
    def test_equals_torchmetrics(self, data):
        metric = ClassifierScore()
        facts = metric.prepare(data, device=CPU)
        x, _ = real_digits(data, "test")

        class Logits(torch.nn.Module):
            num_features = 10

            def forward(self, x):
                return metric.net.logits(x)

        theirs = InceptionScore(feature=Logits(), normalize=False, splits=1)
        theirs.update(x)
        assert metric.compute(x, None)["classifier_score"] == pytest.approx(float(theirs.compute()[0]), rel=1e-4)
        assert facts["classifier_score_of_reals"] == pytest.approx(metric.compute(x, None)["classifier_score"])

    def test_one_class_gives_one(self, data):
        metric = ClassifierScore()
        metric.prepare(data, device=CPU)
        x, _ = real_digits(data, "test")
        assert metric.compute(x[:1].expand(50, -1, -1, -1), None)["classifier_score"] == pytest.approx(1.0, abs=1e-6)


class TestByClass:
    def test_mixed_up_classes_are_seen(self, data):
        metric = IntraClassDistance()
        facts = metric.prepare(data, device=CPU)
        x, y = real_digits(data, "test")
        right, wrong = metric.compute(x, y)["intra_fid"], metric.compute(x, (y + 1) % 10)["intra_fid"]
        assert right == pytest.approx(facts["intra_fid_floor"], rel=1e-6)
        assert wrong > 5 * right
        assert metric.compute(x, None) == {}

    def test_needs_labels(self):
        module = ring_data()
        module.setup("fit")
        with pytest.raises(ConfigurationError, match="must have labelled data"):
            SyntheticTraining().prepare(FederatedDataModuleWithoutLabels(module), device=CPU)


class FederatedDataModuleWithoutLabels:
    """A ring whose labels are hidden."""

    num_classes = 0

    def __init__(self, module):
        self.train_samples = self.test_samples = module.train_samples


class TestSyntheticTraining:
    def test_real_samples_are_as_good_as_real_samples_and_noise_is_not(self, data):
        metric = SyntheticTraining(epochs=6)
        metric.prepare(data, device=CPU)
        x, y = real_digits(data, "train")
        values = metric.compute(x[:800], y[:800])
        assert values["trtr_accuracy"] > 0.85
        assert values["tstr_accuracy"] > 0.85
        assert metric.compute(torch.rand(400, 1, 8, 8) * 2 - 1, y[:400])["tstr_accuracy"] < 0.4
        assert metric.compute(x, None) == {}
        assert metric.compute(x[:800], y[:800]) == values, "the same seed gives the same classifier"


class TestMemorisation:
    def test_copies_are_seen_and_unseen_samples_are_not(self, data):
        metric = Memorisation()
        metric.prepare(data, device=CPU)
        train, test = real_digits(data, "train")[0], real_digits(data, "test")[0]
        copies, unseen = metric.compute(train[:300], None), metric.compute(test, None)
        assert copies["nearest_distance_ratio"] < 0.01
        assert copies["authenticity_within_clients"] < 0.01
        assert unseen["nearest_distance_ratio"] == pytest.approx(1.0)
        assert unseen["authenticity_within_clients"] > 0.3

    def test_does_not_depend_on_who_holds_what(self):
        values = []
        for clients in (1, 6):
            module = FederatedDataModule(Digits(), num_clients=clients, batch_size=32)
            module.setup("fit")
            metric = Memorisation()
            metric.prepare(module, device=CPU)
            values.append(metric.compute(real_digits(module, "test")[0][:100] * 0.9, None)["nearest_distance_ratio"])
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_defaults_for_images_have_everything_and_training_only_what_is_quick():
    module = digits_data()
    module.setup("fit")
    full = {type(metric).__name__ for metric in default_metrics(module) if metric.test_only}
    named = {"PrecisionRecall", "Memorisation", "IntraClassDistance", "SyntheticTraining", "MembershipInference"}
    assert full == named | {"ClassBreakdown", "ClientDistances"}


def test_only_test_makes_the_full_evaluation(tmp_path):
    gan = GAN(
        MLPGenerator(4, (1, 8, 8), num_classes=10),
        MLPDiscriminator((1, 8, 8), num_classes=10, conditioning="projection"),
    )
    federation = Federation(
        gan,
        digits_data(),
        rounds=1,
        local_steps=1,
        run_dir=str(tmp_path / "run"),
        executor=SequentialExecutor(),
        evaluation=Evaluation(num_samples=100),
        trainer={"accelerator": "cpu", "enable_progress_bar": False},
    )
    trained = federation.fit()
    assert {"fid", "kid", "classes", "classifier_score"} <= set(trained)
    assert not {"recall", "tstr_accuracy", "intra_fid", "nearest_distance_ratio"} & set(trained)
    tested = federation.test()
    assert {"fid", "kid", "recall", "tstr_accuracy", "trtr_accuracy", "intra_fid", "nearest_distance_ratio"} <= set(
        tested
    )
    summary = json.loads(federation.summary_path.read_text())
    assert summary["test"]["tstr_accuracy"] == tested["tstr_accuracy"]
    assert summary["final"]["fid"] == trained["fid"], "what training wrote stays"


def test_a_module_of_many_features_is_refused_by_name(data):
    wide = ModuleFeatures(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 100)), 100)
    with pytest.raises(ConfigurationError, match="at most 64 features; got 100"):
        KernelDistance(wide).prepare(data, device=CPU)


@pytest.mark.parametrize("channels, features", [(1, 64), (3, 48)])
def test_kernel_distance_of_unlabelled_images_takes_pixels_that_fit(channels, features):
    class Pictures(Digits):
        """Digits without labels, in so many channels."""

        def load(self, split):
            found = super().load(split)
            return Samples(x=found.x.repeat(1, channels, 2, 2))

    source = Pictures()
    source.sample_shape, source.class_names = (channels, 16, 16), ()
    module = FederatedDataModule(source, num_clients=2, batch_size=32)
    module.setup("fit")
    metric = KernelDistance()
    metric.prepare(module, device=CPU)
    assert metric.net.num_features == features
