"""What objects were made of, in plain values that two runs can be compared by."""

from __future__ import annotations

import json
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fedgan_lightning.aggregators import TrimmedMean
from fedgan_lightning.checkpoints import AtomicCheckpointIO, read_checkpoint
from fedgan_lightning.errors import CheckpointError
from fedgan_lightning.federation.run_fingerprint import check_unchanged, differences, given_to, made_of
from fedgan_lightning.losses import R1, Hinge
from tests.conftest import adam, quiet_trainer, ring_data, ring_gan
from tests.foreign import SomebodysGAN


class Mode(str, Enum):
    FAST = "fast"


class Holder:
    """Keeps one argument under its name, another under a different one, and counts."""

    def __init__(self, own=None, *, renamed=1):
        self.own, self.other, self.count = own, renamed, 0


def nested(levels: int):
    return Holder(nested(levels - 1)) if levels else Holder(3)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (Mode.FAST, "FAST"),
        (Path("a/b"), "a/b"),
        ({"b", "a"}, ["a", "b"]),
        (partial(torch.optim.SGD, lr=0.5, foreach=True), {"type": "SGD", "lr": 0.5}),
        (adam, "function"),
        (lambda: None, "function"),
        (torch.optim.Adam, "Adam"),
        (torch.float32, {"type": "dtype"}),
        (torch.zeros(3), "Tensor"),
        (torch.nn.Linear(2, 2), "Linear"),
        (Hinge(), {"type": "Hinge"}),
        ([R1(np.float64(0.1))], [{"type": "R1", "gamma": 0.1, "interval": 1}]),
        (Holder(Holder([1])), {"type": "Holder", "own": {"type": "Holder", "own": [1]}}),
        ({1: {"own": (3,)}}, {"1": {"own": [3]}}),
    ],
)
def test_objects_are_described_by_what_they_were_given(value, expected):
    found = made_of(value)
    assert found == expected
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("levels", range(8))
def test_every_depth_is_described_and_survives_a_checkpoint(tmp_path, levels):
    """Checkpoints are read with ``weights_only=True``: one type too many and a run cannot be continued."""
    for value in (nested(levels), {"a": [[nested(levels)]]}, TrimmedMean(np.float64(0.25)), partial(Holder, Mode.FAST)):
        found = made_of(value)
        AtomicCheckpointIO().save_checkpoint({"found": found}, tmp_path / "a.ckpt")
        assert read_checkpoint(tmp_path / "a.ckpt")["found"] == found


@pytest.mark.parametrize("module", [partial(ring_gan, ema_half_life_images=50.0), SomebodysGAN], ids=["GAN", "foreign"])
def test_training_changes_nothing_of_it(module):
    trained = module()
    before = made_of(given_to(trained))
    quiet_trainer(max_epochs=1).fit(trained, datamodule=ring_data(num_clients=1, partition=None).pooled(num_steps=3))
    assert made_of(given_to(trained)) == before == made_of(given_to(module()))


def test_no_more_than_three_differences_are_named_and_equal_settings_pass():
    before = {"a": 1, "b": {"c": [1, 2]}, "d": float("nan"), "e": 4}
    check_unchanged(before, {**before, "b": {"c": [1, 2]}, "d": float("nan")})
    with pytest.raises(CheckpointError, match=r"a was 1, is 0; b.c.1 was 2, is 5; d was nan, is 0\."):
        check_unchanged(before, {"a": 0, "b": {"c": [1, 5]}, "d": 0, "e": 0})
    assert differences([1], [1, 2]) == [" was [1], is [1, 2]"]
