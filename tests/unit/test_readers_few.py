"""Few samples: they can be trained on, and what cannot be measured is left out and said."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from fedgan_lightning import GAN, Evaluation, FederatedDataModule, ServerModule
from fedgan_lightning.errors import ConfigurationError, DataError
from fedgan_lightning.evaluation.audit import MembershipInference
from fedgan_lightning.evaluation.fidelity import PrecisionRecall
from fedgan_lightning.evaluation.series import centroids
from fedgan_lightning.metrics import FrechetDistance, KernelDistance, ProfileCentroids
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.sources import CSVProfiles, ImageFolder
from tests.conftest import adam, federate
from tests.unit.test_series import write

CPU = torch.device("cpu")


def pictures(tmp_path, count: int) -> FederatedDataModule:
    draws = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(draws.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / f"{index:02d}.png")
    return FederatedDataModule(ImageFolder(str(tmp_path), image_size=8), num_clients=1, batch_size=1)


def gan() -> GAN:
    networks = MLPGenerator(4, (3, 8, 8), hidden=(8,)), MLPDiscriminator((3, 8, 8), hidden=(8,))
    return GAN(*networks, generator_optimizer=adam, discriminator_optimizer=adam)


@pytest.mark.parametrize("count", [2, 3, 8, 12, 14])
def test_a_folder_of_a_few_pictures_is_trained_on_measured_and_tested(tmp_path, count, caplog):
    caplog.set_level(logging.WARNING, "fedgan_lightning")
    data, evaluation = pictures(tmp_path, count), Evaluation(num_samples=16, every_n_rounds=1)
    module, _, trainer = federate(gan(), data, evaluation, rounds=1, local_steps=1)
    trainer.test(module, datamodule=data, verbose=False)
    floors = {"fid_floor", "kid_floor"} & {*evaluation.facts}
    assert floors == set(), "one picture is held out"
    assert ("fid" in evaluation.latest) is (count > 2)
    assert "fid_test" not in evaluation.latest
    assert ({"FrechetDistance", "KernelDistance"} <= {*evaluation.left_out}) is (count == 2)
    assert {"PrecisionRecall", "MembershipInference"} <= {*evaluation.left_out}
    said = "at least 2 samples in the training split; got 1" if count == 2 else "the test split has 1 of the 2 samples"
    assert said in caplog.text
    assert "test_fraction" in caplog.text


def test_a_larger_share_gives_the_floor(tmp_path):
    data = pictures(tmp_path, 12)
    data.source.test_fraction = 0.25
    facts = FrechetDistance().prepare(data, device=CPU)
    assert facts["fid_floor_num_samples"] == 3
    assert facts["fid_floor"] > 0
    assert KernelDistance().prepare(data, device=CPU)["kid_num_reals"] == 9


def test_a_metric_that_was_asked_for_is_refused_by_name(tmp_path):
    data = pictures(tmp_path, 12)
    for metric, said in (
        (PrecisionRecall(), "more than k test samples; got 1 in the test split, k=5. .*test_fraction"),
        (
            MembershipInference(),
            "at least 2 samples in the test split; got 1. Raise the source's test_fraction",
        ),
    ):
        with pytest.raises(DataError, match=said):
            metric.prepare(data, device=CPU)
        module, evaluation = ServerModule(gan()), Evaluation(metrics=[metric], num_samples=16)
        with pytest.raises(ConfigurationError, match=said):
            _, _, trainer = federate(None, data, evaluation, server=module, rounds=1, local_steps=1)
            trainer.test(module, datamodule=data, verbose=False)


def test_profiles_of_a_fortnight(tmp_path):
    data = FederatedDataModule(CSVProfiles(write(tmp_path / "a.csv", days=14)), num_clients=1, batch_size=1)
    with pytest.raises(ConfigurationError, match="9 centroids must have as many test samples; got 2. .*fraction"):
        ProfileCentroids().prepare(data, device=CPU)


def test_fewer_kinds_of_profiles_than_centroids_are_no_warning():
    same = torch.zeros(20, 24)
    assert tuple(centroids(same, 3).shape) == (3, 24)
