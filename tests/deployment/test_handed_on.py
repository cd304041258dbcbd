"""Networks that sites hand on to each other by way of the server: as in simulation, and what is believed of them."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main
from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.deployment.apps import serve_over
from fedgan_lightning.deployment.handed_on import HANDED, check_handed, exchanged
from fedgan_lightning.errors import UpdateError
from fedgan_lightning.federation.policy import resolve
from tests.conftest import ROOT, adam, assert_states_equal, ring_gan, slow
from tests.deployment.loopback import LoopbackGrid
from tests.deployment.test_sites import quoted
from tests.test_cli import small

pytestmark = pytest.mark.flower

MD_GAN = ["MDGAN", "--federation.algorithm.num_samples", "32", "--federation.algorithm.num_batches", "2"]
MD_GAN += ["--federation.sync", "{generator: server, discriminator: exchange}"]
FED_GAN = ["FedGAN", "--federation.sync", "{discriminator: exchange}", "--federation.optimizer_state", "keep"]


def options_of(method: list[str], *more: str, every: int = 2, rounds: int = 5) -> tuple[str, list[str]]:
    _, config, *options = small("digits")
    options += ["--data.num_clients", "3", "--federation.algorithm", *method]
    options += ["--federation.algorithm.exchange_every", str(every), "--federation.rounds", str(rounds)]
    options += ["--evaluation.every_n_rounds", "100", "--pictures.every_n_rounds", "100"]
    return config, [*options, "--federation.executor", "SequentialExecutor", *more]


def grid_of(folder, config, options) -> LoopbackGrid:
    told = {"config": config, "options": " ".join(quoted(options))}
    return LoopbackGrid({100 + k: {"client-id": k, "state": str(folder / "state")} for k in range(3)}, run_config=told)


@pytest.fixture
def serve(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)

    def run(grid, config, options):
        serve_over(grid, ["--config", config, *options, "--run_dir", str(tmp_path / "run")])
        return read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")

    return run


def names_in(message) -> set[str]:
    """Return the names of all tensors of a message."""
    facts = message.content["facts"]
    layouts = [json.loads(own) for name, own in facts.items() if name.startswith("layout|")]
    return {row[0] for layout in layouts for row in zip(*layout.values())} if layouts else set()


@pytest.mark.parametrize("method", [MD_GAN, slow(FED_GAN)], ids=["MD-GAN", "FedGAN"])
def test_discriminators_go_round_the_sites_as_in_simulation(method, tmp_path, serve):
    config, options = options_of(method)
    mine = serve(grid_of(tmp_path, config, options), config, options)
    assert main(["fit", "--config", config, *options, "--run_dir", str(tmp_path / "simulated")]) == 0
    theirs = read_checkpoint(tmp_path / "simulated" / "checkpoints" / "last.ckpt")
    generator = {name for name in mine["state_dict"] if not name.startswith("discriminator")}
    states = [{n: own["state_dict"][n] for n in generator} for own in (mine, theirs)]
    assert_states_equal(*states, atol=1e-6, rtol=1e-5)
    costs = [json.loads((tmp_path / folder / "summary.json").read_text()) for folder in ("run", "simulated")]
    assert costs[0]["bytes_between"] == costs[1]["bytes_between"]
    assert sum(costs[0]["bytes_between"].values()) > 0
    never = options_of(method, every=100)[1]
    assert main(["fit", "--config", config, *never, "--run_dir", str(tmp_path / "never")]) == 0
    other = read_checkpoint(tmp_path / "never" / "checkpoints" / "last.ckpt")["state_dict"]
    assert any(bool((other[n] != states[0][n]).any()) for n in generator), "a positive control"


def test_networks_travel_only_when_they_change_hands(tmp_path, serve, monkeypatch):
    config, options = options_of(MD_GAN, every=3, rounds=5)
    grid, sent, received = grid_of(tmp_path, config, options), [], []
    push = grid.push_messages

    def keep(messages):
        listed = list(messages)
        sent.extend(own for own in listed if own.metadata.message_type == "train")
        return push(listed)

    monkeypatch.setattr(grid, "push_messages", keep)
    grid.edit = lambda node, kind, reply: received.append(reply) if kind == "train" else None
    serve(grid, config, options)
    down = [any(HANDED in str(own) for own in message.content["facts"].values()) for message in sent]
    up = [any(HANDED in str(own) for own in message.content["facts"].values()) for message in received]
    assert down == [False] * 9 + [True] * 3 + [False] * 3
    assert up == [False] * 6 + [True] * 3 + [False] * 6


def test_a_server_that_starts_again_hands_on_what_it_had(tmp_path, serve):
    """The checkpoint holds what has come and was not delivered yet."""
    config, options = options_of(MD_GAN, "--checkpoint.every_n_rounds", "1", every=3, rounds=5)
    grid = grid_of(tmp_path, config, options)
    serve(grid, config, [*options, "--federation.rounds", "3"])
    whole = serve(grid_of(tmp_path, config, options), config, options)
    assert main(["fit", "--config", config, *options, "--run_dir", str(tmp_path / "simulated")]) == 0
    theirs = read_checkpoint(tmp_path / "simulated" / "checkpoints" / "last.ckpt")["state_dict"]
    generator = {name for name in theirs if not name.startswith("discriminator")}
    states = [{n: own[n] for n in generator} for own in (whole["state_dict"], theirs)]
    assert_states_equal(*states, atol=1e-6, rtol=1e-5)


def test_a_site_that_hands_on_no_network_is_left_out_by_name(tmp_path, serve, caplog):
    """Not a number in a discriminator would end whoever goes on with it."""
    config, options = options_of(MD_GAN, "--federation.rules.min_report_fraction", "0.5", every=1, rounds=3)
    grid = grid_of(tmp_path, config, options)

    def spoil(node, kind, reply):
        if node == 101 and kind == "train":
            for record in reply.content.array_records.values():
                for name, array in record.items():
                    numbers = array.numpy()
                    if name.startswith("extras") and numbers.size > 10_000:
                        changed = numbers.copy()
                        changed[-5:] = float("nan")
                        record[name] = type(array)(changed)

    grid.edit = spoil
    found = serve(grid, config, options)
    assert "client 1: " in caplog.text
    assert "handed on, is not finite" in caplog.text
    assert all(bool(v.isfinite().all()) for v in found["state_dict"].values() if v.is_floating_point())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda own: {n: v for n, v in own.items() if not n.endswith("bias")}, "hands on no discriminator"),
        (lambda own: {**own, "generator.layers.0.weight": torch.zeros(2)}, "is none of what clients hand on"),
        (lambda own: {**own, "\x1b[31m": torch.zeros(2)}, "is none of what clients hand on"),
        (lambda own: {n: v.double() for n, v in own.items()}, "float64"),
        (lambda own: {n: v[:1] for n, v in own.items()}, "shape"),
        (lambda own: {n: v * 1e30 for n, v in own.items()}, "beyond what any network learns with"),
        (lambda own: {**own, "optimizer/1/discriminator.x/exp_avg": torch.zeros(3)}, "is none of what"),
        (lambda own: {**own, f"optimizer/1/{next(iter(own))}/exp_avg": torch.zeros(3)}, "shape"),
    ],
)
def test_what_is_no_network_is_refused(change, words):
    gan = ring_gan(optimizer=adam)
    policy = resolve(gan, sync={"discriminator": "exchange"}, optimizer_state=None, buffers="merge")
    own = exchanged(gan.state_dict(), policy)
    check_handed("client 3", own, module=gan, policy=policy)
    with pytest.raises(UpdateError, match=f"client 3: .*{words}"):
        check_handed("client 3", change(own), module=gan, policy=policy)
