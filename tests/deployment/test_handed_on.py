"""Networks that sites hand on to each other by way of the server: as in simulation, and what is believed of them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main
from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.deployment import wire
from fedgan_lightning.deployment.apps import serve_over
from fedgan_lightning.deployment.flower import FlowerExecutor
from fedgan_lightning.deployment.handed_on import HANDED, check_handed, exchanged
from fedgan_lightning.deployment.site_policy import SitePolicy
from fedgan_lightning.errors import ConfigurationError, FedGANError, UpdateError
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.policy import resolve
from fedgan_lightning.federation.store import ClientStore
from fedgan_lightning.federation.update_schema import expected_moments
from tests.conftest import ROOT, adam, assert_states_equal, ring_data, ring_gan, slow
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


def made(**changes):
    """Return a network as a client hands it on, after a step, and the context that knows it."""
    gan = ring_gan(optimizer=changes.pop("optimizer", adam))
    for name, parameter in gan.discriminator.named_parameters():
        parameter.requires_grad_(name not in changes.get("frozen", ()))
    policy = resolve(gan, sync={"discriminator": "exchange"}, optimizer_state="average", buffers="merge")
    context = ClientContext(model=gan, data=ring_data(), policy=policy, store=ClientStore())
    moments = expected_moments(context)
    own = exchanged({name: gan.state_dict()[name] for name in policy.private} | moments, policy)
    return own, context, moments


WEIGHT = "discriminator.features.1.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda own: {n: v for n, v in own.items() if n != WEIGHT}, f"hands on no {WEIGHT}"),
        (lambda own: {**own, "generator.layers.0.weight": torch.zeros(2)}, "is none of what clients hand on"),
        (lambda own: {**own, "\x1b[31m": torch.zeros(2)}, "is none of what clients hand on"),
        (lambda own: {**own, WEIGHT: own[WEIGHT].double()}, "float64"),
        (lambda own: {**own, WEIGHT: own[WEIGHT][:1]}, "shape"),
        (lambda own: {**own, WEIGHT: own[WEIGHT] * 1e30}, "beyond what any network learns with"),
        (lambda own: {**own, f"optimizer/1/{WEIGHT}/exp_avg": torch.zeros(3)}, "shape"),
        (lambda own: {**own, f"optimizer/1/{WEIGHT}/foo": torch.zeros(3)}, "is none of what clients hand on"),
        (lambda own: {**own, f"optimizer/77/{WEIGHT}/exp_avg": own[WEIGHT]}, "is none of what clients hand on"),
        (lambda own: {**own, f"optimizer/1/{WEIGHT}/exp_avg_sq": -own[WEIGHT].abs() - 1}, "negative"),
        (lambda own: {**own, f"optimizer/1/{WEIGHT}/step": torch.tensor(-1.0)}, "negative"),
        (lambda own: {**own, f"optimizer/1/{WEIGHT}/exp_avg": own[WEIGHT].to(torch.complex64)}, "complex64"),
    ],
)
def test_what_is_no_network_is_refused(change, words):
    own, context, moments = made()
    check_handed("client 3", own, context, moments=moments)
    with pytest.raises(UpdateError, match=f"client 3: .*{words}"):
        check_handed("client 3", change(dict(own)), context, moments=moments)


def test_what_does_not_move_is_not_handed_on():
    """Frozen parts are the same everywhere: in simulation they stay where they are, too."""
    own, context, moments = made(frozen=("features.1.weight",))
    assert WEIGHT not in own
    check_handed("client 3", own, context, moments=moments)


def test_an_optimizer_that_the_server_cannot_step_has_whatever_moments_it_has():
    own, context, _ = made()
    check_handed("client 3", own, context, moments={})
    with pytest.raises(UpdateError, match="shape"):
        check_handed("client 3", {**own, f"optimizer/1/{WEIGHT}/odd": torch.zeros(3)}, context, moments={})


def test_a_network_that_is_of_no_use_costs_its_heir_one_round(tmp_path, serve, caplog):
    """Weights of 1e17 are believed; whoever fails on them goes on with its own, by name."""
    config, options = options_of(MD_GAN, "--federation.rules.min_report_fraction", "0.3", every=1, rounds=5)
    grid = grid_of(tmp_path, config, options)
    spoilt = []

    def spoil(node, kind, reply):
        if node == 101 and kind == "train" and not spoilt:
            spoilt.append(node)
            update = wire.to_update(reply.content, client_id=1)
            weights = {n: v + 9e17 for n, v in update.extras.items() if n.startswith(f"{HANDED}discriminator")}
            reply.content = wire.from_update(dataclasses.replace(update, extras={**update.extras, **weights}))

    grid.edit = spoil
    serve(grid, config, options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    failed = [own["client_id"] for own in summary["incidents"]]
    assert spoilt
    assert len(failed) == 1, "who got it, once"
    assert f"client {failed[0]} goes on without the network that was handed to it" in caplog.text


def test_a_site_hands_on_nothing_after_other_rounds_than_its_own_settings_name(tmp_path, serve, monkeypatch, caplog):
    config, options = options_of(MD_GAN, "--federation.rules.max_attempts", "1", every=3, rounds=2)
    grid = grid_of(tmp_path, config, options)
    monkeypatch.setattr(FlowerExecutor, "_hands_on", lambda self, round: True)
    with pytest.raises(FedGANError, match="fewer in each of 1 attempts"):
        serve(grid, config, options)
    refused = [line for line in caplog.text.splitlines() if "that this site's own configuration names" in line]
    assert {f"client {k}" for k in range(3)} == {word for line in refused for word in [line.split("round 0: ")[1][:8]]}


def test_a_site_s_policy_keeps_networks_that_would_change_hands():
    _, context, _ = made()
    with pytest.raises(ConfigurationError, match="got discriminator, with networks: \\['generator'\\]"):
        SitePolicy(networks=["generator"]).check_networks(context.policy.leaving_networks)
