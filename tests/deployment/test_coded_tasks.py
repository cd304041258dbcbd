"""Codes of what the server sends, between machines: the simulation to the bit, bytes, and codes that are none."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main
from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.deployment import wire
from fedgan_lightning.deployment.apps import serve_over
from fedgan_lightning.deployment.coded_tasks import decoded
from fedgan_lightning.errors import UpdateError
from fedgan_lightning.federation.policy import resolve
from fedgan_lightning.federation.transform_chain import TransformChain
from fedgan_lightning.protocol import ClientTask
from fedgan_lightning.transforms import BFloat16, Int8, LogMoments
from fedgan_lightning.update_transform import RoundFacts
from tests.conftest import ROOT, adam, assert_states_equal, ring_gan, slow
from tests.deployment.loopback import LoopbackGrid
from tests.deployment.test_sites import quoted
from tests.test_cli import small

pytestmark = pytest.mark.flower

CHAINS = {
    "as the configuration has it": "[Int8, LogMoments]",
    "everything halved": "[{class_path: BFloat16, init_args: {down: true}}]",
    "updates halved, moments in nine bits": (
        "[{class_path: BFloat16, init_args: {sections: [updates], down: true}}, LogMoments]"
    ),
    "no means": "[{class_path: LogMoments, init_args: {mean_bits: 0}}, {class_path: TopK, init_args: {share: 0.1}}]",
}


@pytest.mark.parametrize("name", ["updates halved, moments in nine bits", *map(slow, sorted(CHAINS))])
def test_a_deployment_is_the_simulation_to_the_bit(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)
    _, config, *options = small("digits")
    options += ["--data.num_clients", "3", "--federation.transforms", CHAINS[name], "--federation.rounds", "3"]
    options += ["--federation.executor", "SequentialExecutor"]
    told = {"config": config, "options": " ".join(quoted(options))}
    grid = LoopbackGrid(
        {100 + k: {"client-id": k, "state": str(tmp_path / "state")} for k in range(3)}, run_config=told
    )
    sizes, push = [], grid.push_messages

    def keep(messages):
        listed = list(messages)
        sizes.extend(wire.size_of(own.content) for own in listed if own.metadata.message_type == "train")
        return push(listed)

    monkeypatch.setattr(grid, "push_messages", keep)
    serve_over(grid, ["--config", config, *options, "--run_dir", str(tmp_path / "run")])
    assert main(["fit", "--config", config, *options, "--run_dir", str(tmp_path / "simulated")]) == 0
    mine, theirs = (
        read_checkpoint(tmp_path / folder / "checkpoints" / "last.ckpt")["state_dict"]
        for folder in ("run", "simulated")
    )
    assert_states_equal(mine, theirs)
    costs = [json.loads((tmp_path / folder / "summary.json").read_text()) for folder in ("run", "simulated")]
    assert costs[0]["bytes_down"] == costs[1]["bytes_down"]
    counted = sum(costs[0]["bytes_down"].values())
    assert counted < sum(sizes) < 1.1 * counted + 9 * 20_000, "what is counted is what travels, and names beside it"


def made(*transforms):
    """Return a task in codes, its state as the server knows it, and a client's context."""
    torch.manual_seed(0)
    gan = ring_gan(optimizer=adam)
    policy = resolve(gan, sync=None, optimizer_state="average", buffers="merge")
    state = {name: value.detach().clone() for name, value in gan.state_dict().items()}
    for name, value in list(state.items()):
        state[f"optimizer/0/{name}/exp_avg"] = torch.randn_like(value) * 1e-3
        state[f"optimizer/0/{name}/exp_avg_sq"] = torch.rand_like(value) * 1e-4 + 1e-4
        state[f"optimizer/0/{name}/step"] = torch.tensor(7.0)
    chain = TransformChain(transforms)
    sent, seen = chain.broadcast(state, is_parameter=policy.is_parameter, facts=RoundFacts(3, {}, seed=5))
    task = ClientTask(client_id=0, round=3, seed=1, state={}, coded=sent, steps=1)
    return task, seen, SimpleNamespace(model=gan, policy=policy, transforms=chain)


@pytest.mark.parametrize(
    "transforms",
    [
        [LogMoments()],
        [LogMoments(mean_bits=0)],
        [BFloat16(down=True)],
        [BFloat16(sections=["updates"], down=True), LogMoments()],
        [LogMoments(), BFloat16(sections=["updates"], down=True)],
        [Int8(), BFloat16(sections=["updates"], down="only")],
        [BFloat16(sections=["moments", "updates"]), LogMoments(down="only")],
    ],
)
def test_what_a_site_makes_of_it_is_what_the_server_took_it_for(transforms):
    task, seen, context = made(*transforms)
    found = decoded(task, context)
    assert found.coded is None
    assert found.state.keys() == seen.keys()
    assert_states_equal(dict(found.state), {name: seen[name] for name in found.state})


def test_a_task_without_codes_is_itself():
    task, seen, context = made(LogMoments())
    plain = dataclasses.replace(task, state=seen, coded=None)
    assert decoded(plain, context) is plain


MOMENT = "optimizer/0/generator.layers.0.weight/exp_avg_sq"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda own: {n: v for n, v in own.items() if n != f"{MOMENT}/scale"}, "scale"),
        (lambda own: {**own, f"{MOMENT}/codes": own[f"{MOMENT}/codes"][:-1]}, "shape"),
        (lambda own: {**own, f"{MOMENT}/codes": own[f"{MOMENT}/codes"].long()}, "int64"),
        (lambda own: {**own, f"{MOMENT}/scale": torch.tensor(float("nan"))}, "not finite"),
        (lambda own: {**own, f"{MOMENT}/more": torch.zeros(3)}, "is the code of nothing that travels"),
        (lambda own: {**own, f"{MOMENT}/codes": [1, 2]}, "is no tensor"),
    ],
)
def test_codes_that_are_none_are_refused_before_anything_is_made_of_them(change, words):
    task, _, context = made(LogMoments())
    with pytest.raises(UpdateError, match=f"the server: .*{words}"):
        decoded(dataclasses.replace(task, coded=change(dict(task.coded))), context)
