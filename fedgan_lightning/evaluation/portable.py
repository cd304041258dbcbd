"""Feature networks that travel to where the data lives: plain facts and tensors, and nothing that is executed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.features import Classifier, ClassifierFeatures, FrozenNet
from fedgan_lightning.evaluation.fid import FeatureSums
from fedgan_lightning.protocol import State


def to_facts(net: FrozenNet) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a client needs to make the network anew, or to know which of its own is meant, and its weights."""
    if isinstance(net.net, Classifier) and net.name == "classifier":
        return {"kind": "classifier", "num_classes": net.net.head.out_features}, dict(net.net.state_dict())
    if net.name.startswith("pixels"):
        pools = [layer for layer in net.net.modules() if isinstance(layer, nn.AdaptiveAvgPool2d)]
        return {"kind": "pixels", "side": int(pools[0].output_size) if pools else 0}, {}  # type: ignore[arg-type]
    return {"kind": "own", "name": net.name, "hash": net.digest}, {}


def from_facts(facts: Mapping[str, Any], state: State, *, sample_shape: tuple[int, ...], is_image: bool) -> FrozenNet:
    """Return the network that :func:`to_facts` described.

    Raises:
        ConfigurationError: If its weights are not in ``state``, because every client has them.
    """
    if facts["kind"] == "own":
        raise ConfigurationError(
            message(
                "a feature network must be one of those that a client's own settings name",
                received=f"{facts['name']} with hash {facts['hash']}",
                fix="give all of them the same evaluation.metrics",
            )
        )
    if facts["kind"] == "classifier":
        net = Classifier(sample_shape, int(facts["num_classes"]), is_image=is_image)
        net.load_state_dict(dict(state))
        return FrozenNet(net, num_features=ClassifierFeatures.num_features, name="classifier", digest="")
    side = int(facts["side"])
    layers = [nn.AdaptiveAvgPool2d(side), nn.Flatten()] if side else [nn.Flatten()]
    size = sample_shape[0] * side**2 if side else math.prod(sample_shape)
    return FrozenNet(nn.Sequential(*layers), num_features=size, name="pixels", digest="")


def sums_to_state(sums: FeatureSums) -> dict[str, Tensor]:
    """Return the sums as tensors."""
    return {"total": sums.total, "outer": sums.outer, "count": torch.tensor(sums.count)}


def sums_of_state(state: State) -> FeatureSums:
    """Undo :func:`sums_to_state`."""
    return FeatureSums(total=state["total"].double(), outer=state["outer"].double(), count=int(state["count"]))
