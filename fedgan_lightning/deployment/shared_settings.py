"""What server and sites share, as a hash that they compare before they train together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.federation.checks import CLIENT_TRAINER, same_precision
from fedgan_lightning.states import frozen
from fedgan_lightning.version import __version__

#: Settings of ``federation`` that both sides must share.
SHARED: tuple[str, ...] = ("local_steps", "local_epochs", "algorithm", "transforms", "sync", "optimizer_state")
SHARED += ("buffers", "integer_buffers", "client_attributes", "client_callbacks", "client_trainer")


def digest_of(settings: Mapping[str, Any], data: FederatedDataModule, module: nn.Module) -> str:
    """Return a hash of what server and sites share.

    That is the version, the model, local work, policies, batch size, seed and precision, what samples mean (their
    shape, the names of the classes, the words or items), and the weights of frozen networks, which do not travel.

    Args:
        settings: Those of the command line.
        data: Built from them.
        module: The global module as it is built.
    """
    federation = {name: settings["federation"][name] for name in SHARED}
    if (secure := settings["federation"]["secure"]) is not None:  # then a client weights its own update
        federation |= {"secure": secure, "aggregator": settings["federation"]["aggregator"]}
    source = data.build_shared_metadata()
    meaning = [list(source.sample_shape), list(source.class_names), source.shared_metadata()]
    stream = [settings["data"].get(name) for name in ("batch_size", "drop_last", "validation_share")]
    stream.append({name: settings["trainer"].get(name) for name in CLIENT_TRAINER})
    stream.append(hash_of_constants(module))
    work = [settings["model"], federation, *stream, settings["seed_everything"]]
    work.append(same_precision(settings["trainer"]["precision"]))
    shared = [__version__, *work, meaning]
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def hash_of_constants(module: nn.Module) -> str:
    """Return a hash of the entries that nobody trains; nothing where there are none."""
    constants, state = frozen(module), module.state_dict()
    if not constants:
        return ""
    found = hashlib.sha256()
    for name in sorted(constants):
        found.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}".encode())
        value = state[name].detach().cpu()
        value = value if value.layout is torch.strided else value.to_dense()
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
