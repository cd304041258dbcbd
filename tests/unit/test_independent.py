"""Every metric against an implementation that is not ours, on real digits: one table of tolerances.

torch-fidelity (Obukhov et al.) for Fréchet and kernel distance, Inception Score, and precision and recall after
Kynkaanniemi; prdc, the authors' own code of Naeem et al. 2020; scikit-learn for neighbours, areas under curves,
rankings and mean squares.
"""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_squared_error, ndcg_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.partition import IID
from fedgan_lightning.data.sources import Digits
from fedgan_lightning.evaluation.audit import _auc
from fedgan_lightning.evaluation.completion import similarity
from fedgan_lightning.evaluation.features import FrozenNet
from fedgan_lightning.evaluation.fid import feature_sums, frechet_distance
from fedgan_lightning.evaluation.fidelity import ClassifierScore
from fedgan_lightning.evaluation.kernel import kernel_distance, kernel_sums
from fedgan_lightning.evaluation.neighbours import nearest, precision_recall
from fedgan_lightning.evaluation.ranking import ranking_values

K = 5


@pytest.fixture(scope="module")
def digits() -> FederatedDataModule:
    data = FederatedDataModule(Digits(), partition=IID(), num_clients=3, batch_size=32)
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def pixels(digits) -> tuple[torch.Tensor, torch.Tensor]:
    """Real digits, and digits of the test split under noise, as 64 pixels."""
    real, _ = digits.train_samples.take(torch.arange(600))
    fake, _ = digits.test_samples.take(torch.arange(len(digits.test_samples)))
    noise = torch.randn(fake.shape, generator=torch.Generator().manual_seed(0))
    return real.flatten(1), (fake + 0.3 * noise).clamp(-1, 1).flatten(1)


@pytest.fixture(scope="module")
def fidelity():
    return pytest.importorskip("torch_fidelity", reason="needs torch-fidelity, of the extra 'test'")


def _identity(width: int) -> FrozenNet:
    return FrozenNet(torch.nn.Identity(), num_features=width, name="id", digest="id")


def test_frechet_distance_is_torch_fidelity_s(pixels, fidelity):
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    ours = frechet_distance(*(feature_sums(_identity(64), own.split(100)) for own in pixels))
    moments = [{"mu": own.double().numpy().mean(0), "sigma": np.cov(own.double().numpy().T)} for own in pixels]
    theirs = fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(float(theirs), rel=1e-6)


def test_kernel_distance_is_torch_fidelity_s(pixels, fidelity):
    from torch_fidelity.metric_kid import kid_features_to_metric

    real, fake = (own[:300].double() for own in pixels)
    ours = kernel_distance(*(kernel_sums(own.split(70), num_features=64) for own in (real, fake)))
    settings = {"kid_subsets": 1, "kid_subset_size": 300, "verbose": False}  # one subset: all, in another order
    theirs = kid_features_to_metric(real, fake, **settings)["kernel_inception_distance_mean"]
    assert ours == pytest.approx(float(theirs), rel=1e-9)


def test_classifier_score_is_torch_fidelity_s(digits, fidelity):
    from torch_fidelity.metric_isc import isc_features_to_metric

    metric = ClassifierScore()
    metric.prepare(digits, device=torch.device("cpu"))
    x, _ = digits.test_samples.take(torch.arange(len(digits.test_samples)))
    with torch.no_grad():
        logits = metric.net.logits(x)
    theirs = isc_features_to_metric(logits.double(), splits=1)["inception_score_mean"]
    assert metric.compute(x, None)["classifier_score"] == pytest.approx(float(theirs), rel=1e-6)


def test_precision_and_recall_are_torch_fidelity_s(pixels, fidelity):
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = (own[:300].double() for own in pixels)
    ours = precision_recall(real, fake, k=3)
    theirs = prc_features_to_metric(fake, real, prc_neighborhood=3, prc_batch_size=100, verbose=False)
    for name in ("precision", "recall"):
        assert ours[name] == pytest.approx(float(theirs[name]), abs=1 / 300), "one sample on the edge of a ball"
    assert 0 < ours["recall"] < 1


def test_precision_recall_density_and_coverage_are_the_authors(pixels):
    prdc = pytest.importorskip("prdc", reason="needs prdc, of the extra 'test'")
    real, fake = (own.double() for own in pixels)
    ours = precision_recall(real, fake, k=K)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = prdc.compute_prdc(real_features=real.numpy(), fake_features=fake.numpy(), nearest_k=K)
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert all(0 < value < 1 for value in ours.values()), "none of them is trivial here"


def test_nearest_neighbours_are_scikit_learn_s(pixels):
    real, fake = (own.double() for own in pixels)
    distances, places = nearest(fake, real)
    theirs, indices = NearestNeighbors(n_neighbors=1).fit(real.numpy()).kneighbors(fake.numpy())
    np.testing.assert_allclose(distances.numpy(), theirs[:, 0], rtol=1e-9)
    np.testing.assert_array_equal(places.numpy(), indices[:, 0])


def test_the_area_under_a_curve_is_scikit_learn_s():
    generator = torch.Generator().manual_seed(0)
    inside = (torch.randn(200, generator=generator) + 0.3).round(decimals=1)  # ties included
    outside = torch.randn(300, generator=generator).round(decimals=1)
    theirs = roc_auc_score([1] * 200 + [0] * 300, torch.cat([inside, outside]).numpy())
    assert _auc(inside, outside) == pytest.approx(theirs, abs=1e-6)


def test_peak_signal_to_noise_is_that_of_scikit_learn_s_mean_squares(pixels):
    first, second = (own[:50].reshape(50, 1, 8, 8) for own in pixels)
    error = mean_squared_error(first.flatten().numpy(), second.flatten().numpy())
    assert similarity(first, second)["psnr"] == pytest.approx(10 * math.log10(2.0**2 / error), rel=1e-5)


def test_rankings_are_scikit_learn_s():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 60, generator=generator)
    wanted = (torch.rand(40, 60, generator=generator) < 0.1).float()
    wanted[:, 0] = 1.0  # somebody wants something
    ours = ranking_values(scores, seen=torch.zeros(40, 60), wanted=wanted)["ndcg20"]
    assert ours == pytest.approx(ndcg_score(wanted.numpy(), scores.numpy(), k=20), rel=1e-5)


class TestSampleCount:
    """FID(N) = FID + c / N: Chong and Forsyth 2020, section 3. A score without its N says nothing."""

    @pytest.fixture(scope="class")
    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts = np.array([100, 200, 400, 800])
        pool = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
        whole = feature_sums(_identity(8), [pool])
        fids, kids = [], []
        for count in counts.tolist():
            draws = [
                torch.randn(count, 8, generator=torch.Generator().manual_seed(1000 + 7 * count + i)) for i in range(30)
            ]
            fids.append(np.mean([frechet_distance(whole, feature_sums(_identity(8), [x])) for x in draws]))
            few = kernel_sums([pool], num_features=8)
            kids.append(np.mean([kernel_distance(few, kernel_sums([x], num_features=8)) for x in draws]))
        return counts, np.array(fids), np.array(kids)

    def test_the_frechet_distance_of_equal_distributions_falls_as_one_over_n(self, curve):
        counts, fids, _ = curve
        slope, intercept = np.polyfit(1 / counts, fids, 1)
        residuals = fids - (slope / counts + intercept)
        assert 1 - residuals.var() / fids.var() > 0.999
        assert fids[0] > 6 * fids[-1]
        assert abs(intercept) < 0.05 * fids[0]

    def test_the_kernel_distance_has_no_such_bias(self, curve):
        _, fids, kids = curve
        assert abs(kids[0]) < 0.05 * fids[0]
