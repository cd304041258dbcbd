"""Time series: the source, its errors, and the metrics of that literature."""

from __future__ import annotations

import math
from datetime import datetime, timedelta

import numpy as np
import pytest
import torch

from fedgan_lightning import FederatedDataModule
from fedgan_lightning.errors import ConfigurationError, DataError
from fedgan_lightning.evaluation.modalities import default_metrics
from fedgan_lightning.evaluation.series import _sequences, centroids, matched_distance
from fedgan_lightning.metrics import DiscriminativeScore, PredictiveScore, ProfileCentroids
from fedgan_lightning.partitions import Natural
from fedgan_lightning.sources import CSVProfiles
from tests.fakes import RandomSeries

CPU = torch.device("cpu")


def write(path, *, days: int = 20, header: str = "date,load,temperature", broken: int | None = None):
    lines = [header]
    for row in range(24 * days):
        day, hour = divmod(row, 24)
        when = datetime(2024, 1, 1) + timedelta(hours=row)
        value = "much" if row == broken else f"{math.sin(hour / 4) + 0.1 * day:.4f}"
        lines.append(f"{when},{value},{hour + 10 * day}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


class TestSource:
    def test_rare_events_stay_in_range_and_a_constant_is_refused(self, tmp_path):
        path = tmp_path / "rain.csv"
        for rain in (5, 0):
            hours = [
                f"2024-01-{1 + row // 24:02d} {row % 24:02d}:00:00,{rain * (row == 100)}" for row in range(24 * 20)
            ]
            path.write_text("\n".join(["date,rain", *hours]) + "\n")
            source = CSVProfiles(str(path))
            if rain:
                x = source.load("train").x
                assert float(x.min()) == -1
                assert float(x.max()) <= 1
            else:
                with pytest.raises(DataError, match="a variable must vary.*got rain"):
                    source.load("train")

    def test_profiles_are_days_of_one_variable_with_their_dates(self, tmp_path):
        source = CSVProfiles(write(tmp_path / "a.csv", days=40), label="month")
        train, test = source.load("train"), source.load("test")
        assert tuple(train.x.shape) == (72, 1, 24)
        assert tuple(test.x.shape) == (8, 1, 24)
        assert sorted(set(train.columns["variable"])) == ["load", "temperature"]
        assert set(train.y.tolist()) == {0, 1}
        assert (train.columns["month"] == train.y.numpy()).all()
        temperature = train.x[train.columns["variable"] == "temperature"]
        steps = temperature.diff(dim=2)
        torch.testing.assert_close(steps, steps[:1, :, :1].expand_as(steps), atol=1e-5, rtol=1e-5)

    def test_the_variable_may_be_the_class(self, tmp_path):
        path = write(tmp_path / "a.csv")
        source = CSVProfiles(path, variables=["temperature", "load"], label="variable")
        assert source.class_names == ("temperature", "load")
        train = source.load("train")
        assert (np.array(source.class_names)[train.y.numpy()] == train.columns["variable"]).all()
        with pytest.raises(DataError, match="must be listed; got data.source.label=variable with"):
            CSVProfiles(path, label="variable")

    def test_days_are_held_out_for_all_variables_alike(self, tmp_path):
        source = CSVProfiles(write(tmp_path / "a.csv"), variables=["load"], label=None)
        assert source.num_classes == 0
        train, test = source.load("train"), source.load("test")
        assert train.y is None
        assert len(train) + len(test) == 20
        both = torch.cat([train.x, test.x]).flatten(1)
        assert len(both.unique(dim=0)) == 20

    def test_the_scale_is_the_variable_s_own_and_of_training_profiles(self, tmp_path):
        train = CSVProfiles(write(tmp_path / "a.csv")).load("train")
        for name in ("load", "temperature"):
            own = train.x[train.columns["variable"] == name].numpy()
            low, high = np.quantile(own, (0.005, 0.995))
            assert (low, high) == (pytest.approx(-1, abs=1e-4), pytest.approx(1, abs=1e-4))

    def test_seasons_are_those_of_the_north(self, tmp_path):
        train = CSVProfiles(write(tmp_path / "a.csv", days=100)).load("train")
        assert {train.columns["month"][i] // 1: int(train.y[i]) for i in range(len(train))} == {0: 0, 1: 0, 2: 1, 3: 1}

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"header": "day,load,temperature"}, "must have the columns date"),
            ({"days": 1}, "two profiles of 24 rows or more; got 24 rows"),
            ({"broken": 30}, r"load in .* must be a finite number.*; got 'much' in line 32"),
        ],
    )
    def test_files_that_do_not_fit_are_refused(self, tmp_path, change, words):
        path = write(tmp_path / "a.csv", **change)
        with pytest.raises(DataError, match=words):
            CSVProfiles(path, variables=["load"]).load("train")

    def test_a_missing_file_or_variable_is_named(self, tmp_path):
        with pytest.raises(DataError, match="must be a CSV file that can be read; got"):
            CSVProfiles(str(tmp_path / "none.csv")).load("train")
        with pytest.raises(DataError, match=r"must have the columns wind; got date, load, temperature"):
            CSVProfiles(write(tmp_path / "a.csv"), variables=["wind"]).load("train")

    def test_the_real_file(self, shared):
        data = FederatedDataModule(
            CSVProfiles(str(shared / "energy" / "ETTh1.csv"), variables=["HUFL", "MUFL", "OT"]),
            partition=Natural("variable"),
            num_clients=3,
        )
        assert [data.num_examples(k) for k in range(3)] == [653, 653, 653]
        assert data.label_counts().min() > 100


def module() -> FederatedDataModule:
    return FederatedDataModule(RandomSeries(), num_clients=2, batch_size=8)


class TestMetrics:
    @pytest.mark.slow  # trains two networks of judgement for every metric
    def test_real_series_score_as_the_floor_and_noise_far_worse(self):
        data = module()
        real = data.train_samples.x[torch.randperm(240, generator=torch.Generator().manual_seed(1))]
        noise = torch.randn(240, 1, 24, generator=torch.Generator().manual_seed(2))
        for metric, name, factor in (
            (ProfileCentroids(4), "centroid_distance", 1.5),  # phases are uniform: clusters are cut anywhere
            (DiscriminativeScore(steps=300), "discriminative_score", 2),
            (PredictiveScore(steps=300), "predictive_error", 2),
        ):
            facts = metric.prepare(data, device=CPU)
            good, bad = metric.compute(real, None)[name], metric.compute(noise, None)[name]
            assert bad > factor * good, name
            if f"{name}_floor" in facts:
                assert good <= facts[f"{name}_floor"] + 0.15

    def test_fewer_generated_than_real_series_are_compared_with_some_of_all_kinds(self):
        """Series of a folder come kind by kind: the first of them are another law than all."""

        def two_kinds(count: int, seed: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed)
            return torch.cat([torch.randn(count, 1, 8, generator=generator) + shift for shift in (-2.0, 2.0)])

        metric = DiscriminativeScore(steps=300)
        metric.real = _sequences(two_kinds(200, 0))
        fakes = two_kinds(100, 1)
        assert metric.compute(fakes, None)["discriminative_score"] < 0.15
        assert metric.compute(fakes[:100], None)["discriminative_score"] > 0.2, "a positive control: one kind alone"

    def test_a_copy_is_at_no_distance_and_cannot_be_told_apart(self):
        data = module()
        metric = ProfileCentroids(4)
        metric.prepare(data, device=CPU)
        assert metric.compute(data.test_samples.x, None)["centroid_distance"] == pytest.approx(0, abs=1e-6)

    def test_centroids_are_found_and_matched_in_any_order(self):
        points = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]).repeat_interleave(20, dim=0)
        found = centroids(points, 3)
        torch.testing.assert_close(found.sort(dim=0).values.sum(), torch.tensor(20.0, dtype=torch.float64))
        assert matched_distance(found, found.flip(0)) == 0
        assert matched_distance(found, found + 1) == pytest.approx(1.0)

    def test_series_have_their_metrics_by_default(self):
        names = {type(metric).__name__ for metric in default_metrics(module())}
        assert names == {"SlicedWasserstein", "ProfileCentroids", "DiscriminativeScore", "PredictiveScore"}

    def test_more_centroids_than_samples_are_refused(self):
        with pytest.raises(ConfigurationError, match="500 centroids must have as many test samples; got 240"):
            ProfileCentroids(500).prepare(module(), device=CPU)
        with pytest.raises(ConfigurationError, match="k of ProfileCentroids .* at least 1; got 0"):
            ProfileCentroids(0)
        metric = ProfileCentroids(9)
        metric.prepare(module(), device=CPU)
        with pytest.raises(ConfigurationError, match="as many generated samples; got 5. Raise evaluation"):
            metric.compute(torch.zeros(5, 1, 24), None)
