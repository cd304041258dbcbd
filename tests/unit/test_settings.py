"""What objects were made of, in plain values that two runs can be compared by."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from fedgan_lightning import R1, Hinge
from fedgan_lightning.errors import CheckpointError
from fedgan_lightning.federation.settings import check_unchanged, described, described_module, differences
from tests.conftest import adam, quiet_trainer, ring_data, ring_gan
from tests.foreign import SomebodysGAN


class Slotted:
    __slots__ = ("_hidden", "size")

    def __init__(self):
        self.size, self._hidden = 3, 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (0.5, 0.5),
        ({"b", "a"}, ["a", "b"]),
        (partial(torch.optim.SGD, lr=0.5), {"type": "SGD", "lr": 0.5}),
        (partial(adam, 1), {"type": "adam", "arguments": [1]}),
        (torch.optim.Adam, "Adam"),
        (torch.zeros(3), "Tensor"),
        (Hinge(), "Hinge"),
        ([R1(0.1)], [{"type": "R1", "interval": 1, "gamma": 0.1}]),
        (Slotted(), {"type": "Slotted", "size": 3}),
        ({1: {"_private": 2, "own": [3]}}, {"1": {"own": [3]}}),
        (list(range(40)), [40, *range(32)]),
    ],
)
def test_objects_are_described_by_their_settings(value, expected):
    found = described(value)
    assert found == expected
    assert json.loads(json.dumps(found)) == found


def test_an_optimizer_is_described_by_what_it_computes_and_not_how():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    one = torch.optim.Adam(parameters, lr=0.1, foreach=False)
    two = torch.optim.Adam(parameters, lr=0.1, foreach=True)
    assert described(one) == described(two)
    assert differences(described(one), described(torch.optim.Adam(parameters, lr=0.2))) == [
        "groups.0.lr was 0.1, is 0.2"
    ]


@pytest.mark.parametrize("module", [partial(ring_gan, ema_half_life_images=50.0), SomebodysGAN], ids=["GAN", "foreign"])
def test_training_changes_nothing_of_it(module):
    trained = module()
    before = described_module(trained)
    quiet_trainer(max_epochs=1).fit(trained, datamodule=ring_data(num_clients=1, partition=None).pooled(num_steps=3))
    assert described_module(trained) == before == described_module(module())


def test_two_networks_are_told_apart_by_their_layers():
    found = differences(described_module(ring_gan()), described_module(SomebodysGAN()))
    assert "type was GAN, is SomebodysGAN" in found
    assert "[0.5, 0.999]" in str(described_module(ring_gan())["optimizers"])
    assert any(line.startswith("layers.decoder.0 was None, is Linear(") for line in found)


def test_no_more_than_three_differences_are_named_and_equal_settings_pass():
    before = {"a": 1, "b": {"c": [1, 2]}, "d": 3, "e": 4}
    check_unchanged(before, {**before, "b": {"c": [1, 2]}})
    with pytest.raises(CheckpointError, match=r"a was 1, is 0; b.c.1 was 2, is 5; d was 3, is 0\. Fix"):
        check_unchanged(before, {"a": 0, "b": {"c": [1, 5]}, "d": 0, "e": 0})
    assert differences([1], [1, 2]) == [" was [1], is [1, 2]"]
