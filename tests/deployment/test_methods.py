"""Methods whose generator stays at the server, between sites: equal to simulation, and no discriminator on the way."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main
from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.deployment.apps import serve_over
from tests.conftest import ROOT, assert_states_equal, slow
from tests.deployment.loopback import LoopbackGrid
from tests.deployment.test_sites import quoted
from tests.test_cli import small

pytestmark = pytest.mark.flower

METHODS = {
    "MD-GAN": ["MDGAN", "--federation.algorithm.num_batches", "2"],
    "MD-GAN, one batch": ["MDGAN", "--federation.algorithm.num_batches", "1"],
    "UA-GAN": ["UAGAN"],
    "UA-GAN, summed": ["UAGAN", "--federation.algorithm.summed", "true"],
    "F2U": ["F2U"],
}


def numbers(message) -> list[np.ndarray]:
    """Return all arrays of a message."""
    return [array.numpy() for record in message.content.array_records.values() for array in record.values()]


def weights(run_dir):
    """Return the server's networks at the end of a run."""
    return read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize("name", ["MD-GAN", slow("MD-GAN, one batch"), "UA-GAN", slow("UA-GAN, summed"), slow("F2U")])
def test_a_deployment_is_the_simulation_and_carries_samples_alone(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)
    _, config, *options = small("digits")
    options += ["--data.num_clients", "3", "--federation.algorithm", *METHODS[name]]
    options += ["--federation.algorithm.num_samples", "32", "--federation.rounds", "3"]
    options += ["--federation.sync", "{generator: server, discriminator: local}"]
    options += ["--federation.executor", "SequentialExecutor"]  # as sites train: stacks round otherwise
    told = {"config": config, "options": " ".join(quoted(options))}
    grid = LoopbackGrid(
        {100 + k: {"client-id": k, "state": str(tmp_path / "state")} for k in range(3)}, run_config=told
    )
    sent, received = [], []
    push = grid.push_messages

    def keep(messages):
        messages = list(messages)
        sent.extend(own for own in messages if own.metadata.message_type == "train")
        return push(messages)

    monkeypatch.setattr(grid, "push_messages", keep)
    grid.edit = lambda node, kind, reply: received.append(reply) if kind == "train" else None
    serve_over(grid, ["--config", config, *options, "--run_dir", str(tmp_path / "run")])
    assert main(["fit", "--config", config, *options, "--run_dir", str(tmp_path / "simulated")]) == 0
    mine, theirs = (
        read_checkpoint(tmp_path / folder / "checkpoints" / "last.ckpt")["state_dict"]
        for folder in ("run", "simulated")
    )
    generator = {key for key in mine if not key.startswith("discriminator")}
    assert_states_equal({k: mine[k] for k in generator}, {k: theirs[k] for k in generator}, atol=1e-6, rtol=1e-5)
    assert len(sent) == len(received) == 9
    sizes = {value.numel() for value in mine.values() if value.dim() > 1}
    for message in [*sent, *received]:
        for array in numbers(message):
            count = array.size
            assert count not in sizes, "a weight of a network is on the way"
            assert count <= 2 * 32 * 64 + 2 * 32, "a network has more numbers: the discriminator alone 85 000"
    costs = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not {"generator", "discriminator", "optimizer"} & {*costs["bytes_up"], *costs["bytes_down"]}


def test_codes_travel_between_sites(tmp_path, monkeypatch):
    """A deployment with stochastic codes and error feedback is the simulation, to the bit."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)
    _, config, *options = small("digits")
    codecs = "[{class_path: TopK, init_args: {share: 0.05}}, {class_path: Int8}]"
    options += ["--data.num_clients", "3", "--federation.transforms", codecs, "--federation.rounds", "3"]
    options += ["--federation.executor", "SequentialExecutor"]
    told = {"config": config, "options": " ".join(quoted(options))}
    grid = LoopbackGrid(
        {100 + k: {"client-id": k, "state": str(tmp_path / "state")} for k in range(3)}, run_config=told
    )
    serve_over(grid, ["--config", config, *options, "--run_dir", str(tmp_path / "run")])
    assert main(["fit", "--config", config, *options, "--run_dir", str(tmp_path / "simulated")]) == 0
    mine, theirs = (
        read_checkpoint(tmp_path / folder / "checkpoints" / "last.ckpt")["state_dict"]
        for folder in ("run", "simulated")
    )
    assert_states_equal(mine, theirs)
    up = [json.loads((tmp_path / folder / "summary.json").read_text())["bytes_up"] for folder in ("run", "simulated")]
    assert up[0] == up[1]
    assert all(isinstance(value, torch.Tensor) for value in mine.values())
