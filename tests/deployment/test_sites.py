"""A deployment computes what a simulation does, and bad sites change nothing: Flower's apps without its processes."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

flwr = pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main  # noqa: E402
from fedgan_lightning.checkpoints import read_checkpoint  # noqa: E402
from fedgan_lightning.deployment import wire  # noqa: E402
from fedgan_lightning.deployment.apps import serve_over  # noqa: E402
from fedgan_lightning.deployment.replies import checked_facts  # noqa: E402
from fedgan_lightning.deployment.sites import Sites  # noqa: E402
from fedgan_lightning.errors import ConfigurationError, QuorumError  # noqa: E402
from fedgan_lightning.packing import Layout  # noqa: E402
from fedgan_lightning.protocol import ClientTask, ClientUpdate  # noqa: E402
from tests.conftest import ROOT, assert_states_equal  # noqa: E402
from tests.deployment.hostile import settings as hostile_settings  # noqa: E402
from tests.deployment.loopback import LoopbackGrid  # noqa: E402

pytestmark = pytest.mark.flower

CONFIG = str(ROOT / "configs" / "digits.yaml")
SHORT = [
    *("--data.num_clients", "3", "--federation.rounds", "3", "--federation.local_steps", "2"),
    *("--evaluation.num_samples", "50", "--trainer.enable_progress_bar", "false"),
]
LOCAL = ["--federation.sync", "{discriminator: local}"]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody has to be waited for."""
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)


def grid_of(tmp_path, options, *, told=None, sites: int = 3) -> LoopbackGrid:
    nodes = {
        100 + k: {"client-id": k, "state": str(tmp_path / "state"), **(told or {}).get(k, {})} for k in range(sites)
    }
    return LoopbackGrid(nodes, run_config={"config": CONFIG, "options": " ".join(quoted(options))})


def quoted(options):
    import shlex

    return [shlex.quote(option) for option in options]


def deploy(tmp_path, *options, told=None, grid=None, name: str = "deployed"):
    options = [*SHORT, *options]
    grid = grid if grid is not None else grid_of(tmp_path, options, told=told)
    serve_over(grid, ["--config", CONFIG, *options, "--run_dir", str(tmp_path / name)])
    return grid


def simulate(tmp_path, *options, name: str = "simulated"):
    arguments = ["--config", CONFIG, *SHORT, *options, "--run_dir", str(tmp_path / name)]
    assert main(["fit", *arguments, "--federation.executor", "SequentialExecutor"]) == 0


def hostile(tmp_path, *faults, **options):
    """Return what makes a site misbehave: the path of a settings file of its own."""
    path = tmp_path / "hostile.yaml"
    path.write_text(hostile_settings(faults, **options))
    return {"site": str(path)}


def digest_at(grid) -> str:
    from fedgan_lightning.deployment.apps import _site

    return _site(grid.contexts[100]).digest


SGD = [
    part
    for network in ("generator", "discriminator")
    for part in (f"--model.init_args.{network}_optimizer", "{class_path: torch.optim.SGD, init_args: {lr: 0.02}}")
]
CLIPPED_SIGNS = "[{class_path: ClipUpdates, init_args: {max_norm: 0.5}}, {class_path: SignCompression}]"
FALLING = (
    "{learning_rate: {class_path: StepRounds, init_args: {values: {0: 1.0, 1: 0.1}}}, "
    "local_steps: {class_path: StepRounds, init_args: {values: {0: 2, 1: 1}}}, "
    "algorithm.mu: {class_path: LinearRounds, init_args: {start: 1.0, end: 0.0}}}"
)


def weights(tmp_path, name):
    return read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"]


def summary(tmp_path, name):
    return json.loads((tmp_path / name / "summary.json").read_text())


# ---------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(LOCAL, marks=pytest.mark.slow),
        ["--federation.optimizer_state", "keep"],
        pytest.param(["--federation.local_epochs", "1", "--federation.local_steps", "null"], marks=pytest.mark.slow),
        [*SGD, "--federation.algorithm", "Scaffold", "--federation.transforms", CLIPPED_SIGNS],
        ["--federation.algorithm", "{class_path: FedProx, init_args: {mu: 0.1}}", "--federation.schedules", FALLING],
        ["--federation.sync", "{'discriminator.features.1.*': local}"],
    ],
    ids=["fedgan", "local discriminators", "kept moments", "epochs", "scaffold", "schedules", "a local layer"],
)
def test_a_deployment_computes_what_the_simulation_computes(tmp_path, options):
    """To the bit: same machine, same threads."""
    deploy(tmp_path, *options)
    simulate(tmp_path, *options)
    assert_states_equal(weights(tmp_path, "deployed"), weights(tmp_path, "simulated"))
    mine, theirs = summary(tmp_path, "deployed"), summary(tmp_path, "simulated")
    assert mine["bytes_up"] == theirs["bytes_up"]
    assert mine["client_steps"] == theirs["client_steps"]
    for name in ("fid_floor", "kid_floor"):
        assert mine["evaluation"][name] == pytest.approx(theirs["evaluation"][name], rel=1e-9)
    assert mine["final"].keys() == theirs["final"].keys(), "what fit measures in simulation it measures here"


def test_only_sums_and_parameters_come_from_sites(tmp_path):
    """Everything a site sends, byte by byte, holds none of its images."""
    from fedgan_lightning.sources import Digits

    sent = []

    grid = grid_of(tmp_path, SHORT)
    grid.edit = lambda node, kind, reply: sent.extend(array.data for array in reply.content["arrays"].values())
    deploy(tmp_path, grid=grid)
    stream = b"".join(sent)
    assert len(stream) > 1_000_000
    for image in Digits().load("train").x[:200]:
        if image.unique().numel() > 8:
            assert image.numpy().tobytes() not in stream
            assert (image.float() / 127.5 - 1).numpy().tobytes() not in stream


def test_a_killed_server_continues_and_sites_go_back_with_it(tmp_path):
    """Private state at the sites goes on from the last round that the server kept, not from the last that was run."""
    deploy(tmp_path, *LOCAL, "--federation.rounds", "5", name="whole")
    options = [*LOCAL, "--checkpoint.every_n_rounds", "2"]
    first = deploy(tmp_path / "b", *options, "--federation.rounds", "3", name="cut")
    # Round 3 ran, and is in no checkpoint but the last one, which a kill would have lost:
    last = tmp_path / "b" / "cut" / "checkpoints" / "last.ckpt"
    done = read_checkpoint(last)["global_step"]
    assert done == 3
    serve_over(
        first, ["--config", CONFIG, *SHORT, *options, "--federation.rounds", "5", "--run_dir", str(last.parents[1])]
    )
    assert_states_equal(weights(tmp_path, "whole"), weights(tmp_path / "b", "cut"))


def test_a_restarted_server_goes_on_without_a_site_it_knows_and_takes_it_back(tmp_path, monkeypatch, caplog):
    """What it must know of a site lies in the run directory, and so do the sums that sites have told: once in a run."""
    monkeypatch.setattr("fedgan_lightning.deployment.sites.RETURN_SECONDS", 0.0)
    options = [*SAFE, "--federation.rounds", "5", "--evaluation.every_n_rounds", "1"]
    grid = deploy(tmp_path, *SAFE, "--evaluation.every_n_rounds", "1")
    known = json.loads((tmp_path / "deployed" / "sites.json").read_text())["sites"]
    assert {own["client_id"] for own in known.values()} == {0, 1, 2}
    assert set(known["1"]) == {"client_id", "num_examples", "label_counts", "is_image", "data"}

    class Late(LoopbackGrid):
        """Client 1 is back when the others have trained once."""

        def get_node_ids(self):
            self.away = set() if any(kind == "train" for _, kind in self.asked) else {101}
            return super().get_node_ids()

    grid = grid_of(tmp_path, [*SHORT, *options])
    grid.__class__ = Late
    with caplog.at_level("WARNING", logger="fedgan_lightning"):
        deploy(tmp_path, *options, grid=grid)
    told = [record.message for record in caplog.records]
    assert any("going on without client 1, not back within" in own for own in told)
    found = summary(tmp_path, "deployed")
    assert [(own["round"], own["client_id"], own["reason"]) for own in found["incidents"]] == [
        (3, 1, "connect: its site is not connected")
    ]
    scored = {entry["rounds"]: "fid" in entry for entry in found["history"]}
    assert scored == dict.fromkeys(range(6), True)
    # Without it being known, the same server waits for it:
    (tmp_path / "deployed" / "sites.json").unlink()
    monkeypatch.setattr("fedgan_lightning.deployment.sites.JOIN_SECONDS", 0.0)
    grid = grid_of(tmp_path, [*SHORT, *options])
    grid.away = {101}
    with pytest.raises(QuorumError, match=r"none for clients \[1\]"):
        deploy(tmp_path, *options[:-4], "--federation.rounds", "6", grid=grid)


def test_a_site_that_comes_back_with_other_samples_is_refused_until_it_has_its_own(tmp_path, monkeypatch, caplog):
    """The checkpoint is about those that the federation began with."""
    monkeypatch.setattr("fedgan_lightning.deployment.sites.JOIN_SECONDS", 0.0)
    grid = grid_of(tmp_path, SHORT)
    digest, memory = digest_at(grid), tmp_path / "sites.json"
    sites = Sites(grid, num_clients=3, digest=digest, memory=memory)
    begun, written = sites.facts(), memory.read_text()
    other = tmp_path / "other.yaml"
    other.write_text("data: {num_clients: 7}\n")
    changed = grid_of(tmp_path, SHORT, told={1: {"site": str(other)}})
    sites = Sites(changed, num_clients=3, digest=digest, memory=memory, needed=3)
    with caplog.at_level("WARNING", logger="fedgan_lightning"), pytest.raises(QuorumError, match=r"clients \[1\]"):
        sites.facts()
    assert "a run that this site began with other samples" in caplog.text, "it knows by itself"
    assert memory.read_text() == written
    # The operator mends it and starts its SuperNode again, which has the same number:
    changed.away = {101}
    sites.refresh()
    changed.away, changed.contexts = set(), grid.contexts
    assert sites.facts() == begun


@pytest.mark.parametrize("text", ["{", "[]", '{"digest": "x", "sites": 3}', '{"digest": "x", "sites": {"a": {}}}'])
def test_a_memory_that_is_none_is_not_believed(tmp_path, monkeypatch, caplog, text):
    monkeypatch.setattr("fedgan_lightning.deployment.sites.JOIN_SECONDS", 0.0)
    (tmp_path / "sites.json").write_text(text)
    sites = Sites(LoopbackGrid({}, run_config={}), num_clients=1, digest="x", memory=tmp_path / "sites.json", needed=1)
    assert "cannot be read, so all sites are waited for" in caplog.text
    with pytest.raises(QuorumError, match=r"none for clients \[0\]"):
        sites.facts()


def test_a_new_run_waits_for_all_its_sites_whatever_file_it_finds(tmp_path, monkeypatch):
    """As does one whose server was killed before its first checkpoint."""
    monkeypatch.setattr("fedgan_lightning.deployment.sites.RETURN_SECONDS", 0.0)
    monkeypatch.setattr("fedgan_lightning.deployment.sites.JOIN_SECONDS", 0.5)
    deploy(tmp_path, *SAFE, name="first")
    (tmp_path / "deployed").mkdir()
    shutil.copy(tmp_path / "first" / "sites.json", tmp_path / "deployed")
    grid = grid_of(tmp_path, [*SHORT, *SAFE])
    grid.away = {101}
    with pytest.raises(QuorumError, match=r"none for clients \[1\]"):
        deploy(tmp_path, *SAFE, grid=grid)


def test_private_state_follows_the_task_that_was_let_in(tmp_path):
    from fedgan_lightning.deployment.site import Site

    site = Site(["--config", CONFIG, *SHORT, *LOCAL], client_id=1, state_dir=tmp_path, part=1)
    shared = {n: v for n, v in site.module.state_dict().items() if n.startswith("generator.")}

    def task(round, seed):
        return ClientTask(client_id=1, round=round, seed=seed, state=shared, steps=2)

    first = site.train(task(0, 11), accepted=-1, digest=site.digest)
    second = site.train(task(1, 12), accepted=11, digest=site.digest)
    again = site.train(task(1, 12), accepted=11, digest=site.digest)
    afresh = site.train(task(1, 12), accepted=-1, digest=site.digest)
    assert all(torch.equal(second.delta[n], again.delta[n]) for n in second.delta)
    assert any(not torch.equal(second.delta[n], afresh.delta[n]) for n in second.delta)
    assert first.num_examples == second.num_examples
    with pytest.raises(ConfigurationError, match="share the settings of model and federation"):
        site.train(task(2, 13), accepted=12, digest="another")


def test_what_a_site_says_of_its_data_counts(tmp_path):
    """Its own source, whatever options the server was started with."""
    own = tmp_path / "site.yaml"
    own.write_text(
        "data:\n  source: {class_path: tests.fakes.RandomImages, init_args: {shape: [1, 8, 8], classes: 10}}\n"
    )
    options = [*SHORT, "--data.source", "Digits"]
    grid, told = grid_of(tmp_path, options, told={2: {"site": str(own)}}), {}

    def listen(node, kind, reply):
        facts = wire.facts_of(reply.content)
        if "num_examples" in facts and kind == "query":
            told[node] = facts["num_examples"]

    grid.edit = listen
    serve_over(grid, ["--config", CONFIG, *options, "--run_dir", str(tmp_path / "own")])
    assert told[102] == 700
    assert max(told[100], told[101]) < 400


def test_a_site_that_cannot_answer_is_waited_for_and_named_once(monkeypatch, caplog):
    monkeypatch.setattr("fedgan_lightning.deployment.sites.JOIN_SECONDS", 0.5)
    sites = Sites(LoopbackGrid({100: {"client-id": 0}}, run_config={}), num_clients=1, digest="")
    with caplog.at_level("WARNING", logger="fedgan_lightning"), pytest.raises(QuorumError, match=r"clients \[0\]"):
        sites.facts()
    assert sites.grid.asked.count((100, "query")) > 1
    assert [record.message for record in caplog.records] == ["site 100 could not answer: KeyError: 'options'"]


# ---------------------------------------------------------------------- bad sites


SAFE = [
    *("--federation.rules", "RoundRules", "--federation.rules.min_report_fraction", "0.5"),
    *("--federation.validator", "UpdateValidator", "--federation.validator.max_norm", "100"),
]


@pytest.mark.parametrize(
    "fault",
    ["nan", "wrong_shape", "wrong_keys", "stale", "huge_norm", "wrong_size", "wrong_counts", "wrong_moments"],
)
def test_a_site_that_answers_wrongly_is_named_and_left_out(tmp_path, fault):
    deploy(tmp_path, *SAFE, told={1: hostile(tmp_path, fault)})
    simulate(tmp_path, "--federation.clients", "SelectedClients", "--federation.clients.clients", "[0, 2]")
    assert_states_equal(weights(tmp_path, "deployed"), weights(tmp_path, "simulated"))
    found = summary(tmp_path, "deployed")
    assert found["events"] == {"rejected": 3}
    assert {incident["client_id"] for incident in found["incidents"]} == {1}


LIES = [
    ({"num_examples": math.inf}, "rejected", "counts inf examples, which is no whole number"),
    ({"num_examples": "12"}, "rejected", "counts 12 examples, which is no whole number"),
    ({"num_examples": True}, "rejected", "counts True examples"),
    ({"round": math.inf}, "rejected", "answers round inf in round"),
    ({"round": math.nan}, "rejected", "answers round nan in round"),
    ({"metric|seconds": "long"}, "rejected", "metric seconds is a str"),
    ({"metric|loss_d": [1.0, 2.0]}, "rejected", "metric loss_d is a list"),
    ({"layout|delta": "[" * 100_000}, "rejected", "an answer that is no update"),
    ({"layout|delta": '{"names": ["a"], "shapes": [[Infinity]], "dtypes": ["float32"]}'}, "rejected", "no update"),
    ({"layout|delta": "7"}, "rejected", "an answer that is no update"),
    ({"error": "x\x1b[2J" * 10_000}, "failed", "x"),
]


def test_a_site_may_say_anything_and_is_named(tmp_path):
    """Another lie in every round."""
    told = iter(LIES)

    def lie(node, kind, reply):
        if (node, kind) == (101, "train"):
            reply.content["facts"].update(next(told)[0])

    options = [*SAFE, "--federation.rounds", str(len(LIES)), "--federation.local_steps", "1"]
    grid = grid_of(tmp_path, [*SHORT, *options])
    grid.edit = lie
    deploy(tmp_path, *options, grid=grid)
    incidents = summary(tmp_path, "deployed")["incidents"]
    for incident, (_, kind, reason) in zip(incidents, LIES, strict=True):
        assert (incident["client_id"], incident["kind"]) == (1, kind)
        assert reason in incident["reason"]
        assert incident["reason"].isprintable()
        assert len(incident["reason"]) < 800


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"num_examples": 2**62}, "examples, not between 1 and"),
        ({"num_examples": 0}, "0 examples, not between 1 and"),
        ({"num_examples": 12.5}, "sizes are whole numbers"),
        ({"num_examples": math.inf}, "sizes are whole numbers"),
        ({"num_examples": True}, "sizes are whole numbers"),
        ({"label_counts": [-1, 13]}, "labels of 12 examples"),
        ({"label_counts": [1] * 10}, "labels of 10 examples"),
        ({"label_counts": [5.5, 6.5]}, "sizes are whole numbers"),
        ({"client_id": 1.0}, "sizes are whole numbers"),
    ],
    ids=str,
)
def test_what_a_site_says_of_itself_can_be(facts, reason):
    honest = {"client_id": 1, "num_examples": 12, "label_counts": [5, 7], "is_image": True, "data": "a1"}
    assert checked_facts(honest) == honest
    with pytest.raises(ValueError, match=reason):
        checked_facts({**honest, **facts})


def test_a_site_that_says_of_itself_what_cannot_be_is_refused_when_it_joins(tmp_path, monkeypatch):
    monkeypatch.setattr("fedgan_lightning.deployment.sites.JOIN_SECONDS", 0.0)

    def lie(node, kind, reply):
        if node == 101 and "num_examples" in wire.facts_of(reply.content):
            reply.content["facts"]["num_examples"] = 2**62

    grid = grid_of(tmp_path, SHORT)
    grid.edit = lie
    with pytest.raises(
        QuorumError, match=r"clients \[1\] within 0 s, and 1 refused: answers with no facts .*examples, "
    ):
        deploy(tmp_path, grid=grid)


def test_a_site_of_other_labels_is_named_and_its_counts_are_not_used(tmp_path, caplog):
    def lie(node, kind, reply):
        if node == 101 and "num_examples" in wire.facts_of(reply.content):
            reply.content["facts"]["label_counts"] = [int(reply.content["facts"]["num_examples"]), 0]

    grid = grid_of(tmp_path, SHORT)
    grid.edit = lie
    deploy(tmp_path, "--federation.rounds", "1", "--evaluation.metrics", "[]", grid=grid)
    assert "client 1 counts 2 labels, not 10: its counts are not used" in caplog.text


def test_sums_that_cannot_be_right_are_left_out_by_name(tmp_path, caplog):
    """Metrics and the run go on without them."""

    def lie(node, kind, reply):
        if (node, kind) == (101, "query") and "num_examples" not in wire.facts_of(reply.content):
            sums = wire.state_of(reply.content, "sums")
            reply.content = wire.content({}, sums={**sums, "total": sums["total"] * 1e6})

    options = ["--evaluation.metrics", "[FrechetDistance]"]
    grid = grid_of(tmp_path, [*SHORT, *options])
    grid.edit = lie
    with caplog.at_level("WARNING", logger="fedgan_lightning"):
        deploy(tmp_path, *options, grid=grid)
    assert caplog.text.count("feature moments are summed up without client 1") == 1
    assert "squares that are smaller than those of their mean from client 1" in caplog.text
    found = summary(tmp_path, "deployed")
    assert all("fid" in entry for entry in found["history"])
    known = json.loads((tmp_path / "deployed" / "sites.json").read_text())["sites"]
    assert found["evaluation"]["fid_num_reals"] == known["0"]["num_examples"] + known["2"]["num_examples"]


def test_a_site_that_is_silent_or_away_is_named_and_left_out(tmp_path):
    options = [*SHORT, *SAFE, "--federation.rules.timeout", "0.01"]
    grid = grid_of(tmp_path, options)
    grid.silent = {101}
    serve_over(grid, ["--config", CONFIG, *options, "--run_dir", str(tmp_path / "silent")])
    found = summary(tmp_path, "silent")
    assert found["events"] == {"failed": 3}
    assert "reply: no answer within" in found["incidents"][0]["reason"]

    class Leaving(LoopbackGrid):
        def push_messages(self, messages):
            if sum(kind == "train" for _, kind in self.asked) >= 3:
                self.away = {101}
            return super().push_messages(messages)

    grid = grid_of(tmp_path, options)
    grid.__class__ = Leaving
    serve_over(grid, ["--config", CONFIG, *options, "--run_dir", str(tmp_path / "away")])
    assert "connect: its site is not connected" in {own["reason"] for own in summary(tmp_path, "away")["incidents"]}


def test_an_operator_sees_who_is_connected_and_how_long_answers_take(tmp_path, caplog):
    """On the dashboard after every round, in the journal, and in the log once for every change."""
    from fedgan_lightning.jsonl import entries
    from fedgan_lightning.visuals.runs import read_run

    class Blinking(LoopbackGrid):
        def get_node_ids(self):
            trained = sum(kind == "train" for _, kind in self.asked)
            self.away = {101} if 3 <= trained < 5 else set()  # in the second round of three
            return super().get_node_ids()

    grid = grid_of(tmp_path, [*SHORT, *SAFE])
    grid.__class__ = Blinking
    with caplog.at_level("INFO", logger="fedgan_lightning"):
        deploy(tmp_path, *SAFE, grid=grid)
    told = [record.message for record in caplog.records if "sites connected" in record.message]
    assert told == [
        "3 of 3 sites connected (here: clients 0, 1, 2)",
        "2 of 3 sites connected (gone: client 1)",
        "3 of 3 sites connected (here: client 1)",
    ]
    run = read_run(tmp_path / "deployed")
    assert run.scalars["sites/connected"] == ([1, 2, 3], [3, 2, 3])
    assert len(run.scalars["client/000/round_trip"][0]) == 3
    second = list(entries(tmp_path / "deployed" / "rounds.jsonl"))[1]
    assert second["gauges"] == {"sites/connected": 2}
    lost, answered = second["clients"][1], second["clients"][0]
    assert (lost["outcome"], lost["bytes_down"], lost["reason"]) == ("failed", 0, "connect: its site is not connected")
    assert 0 < answered["seconds"] <= answered["round_trip"] <= second["seconds"]
    assert answered["bytes_down"] > 0
    counted = sum(own.bytes_down for own in run.participation.clients.values())
    assert counted == sum(run.summary["bytes_down"].values()), "nothing was sent to the site that was away"


def test_a_late_answer_is_counted_and_dropped(tmp_path):
    class Slow(LoopbackGrid):
        def push_messages(self, messages):
            keys = super().push_messages(messages)
            if sum(kind == "train" for _, kind in self.asked) > 3:
                self.release()
            return keys

    options = [*SHORT, *SAFE, "--federation.rules.timeout", "0.01"]
    grid = grid_of(tmp_path, options)
    grid.__class__, grid.silent = Slow, {101}
    serve_over(grid, ["--config", CONFIG, *options, "--run_dir", str(tmp_path / "late")])
    events = summary(tmp_path, "late")["events"]
    assert events == {"failed": 1, "late": 1}


def test_a_site_with_other_settings_another_s_number_or_no_facts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fedgan_lightning.deployment.sites.JOIN_SECONDS", 0.0)

    def refused(name, **told):
        grid = grid_of(tmp_path, SHORT, told=told.get("told"))
        grid.edit = told.get("edit", grid.edit)
        serve_over(grid, ["--config", CONFIG, *SHORT, "--run_dir", str(tmp_path / name)])

    with pytest.raises(QuorumError, match=r"clients \[2\] within 0 s, and 1 refused: says that it is client 1, which"):
        refused("number", told={2: {"client-id": 1}})
    other = tmp_path / "other.yaml"
    other.write_text("model:\n  class_path: GAN\n  init_args:\n    d_steps: 2\n")
    with pytest.raises(QuorumError, match=r"clients \[0\] within 0 s, and 1 refused: does not share .* Mend those"):
        refused("settings", told={0: {"site": str(other)}})

    def lie(node, kind, reply):
        if node == 101:
            reply.content = wire.content({"client_id": 1, "num_examples": "many"})

    with pytest.raises(QuorumError, match=r"clients \[1\] within 0 s, and 1 refused: answers with no facts"):
        refused("facts", edit=lie)


def test_sums_that_are_none_are_refused_by_name(tmp_path, caplog):
    def lie(node, kind, reply):
        if node == 102 and "num_examples" not in wire.facts_of(reply.content):
            reply.content = wire.content({})

    grid = grid_of(tmp_path, SHORT)
    grid.edit = lie
    with caplog.at_level("WARNING", logger="fedgan_lightning"):
        deploy(tmp_path, grid=grid)
    assert "feature moments are summed up without client 2: no sums ('layout|sums')" in caplog.text
    assert summary(tmp_path, "deployed")["status"] == "finished"


def test_a_metric_that_looks_at_samples_is_left_out_and_one_that_tries_anyway_is_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(ROOT))
    own = tmp_path / "metrics.yaml"
    own.write_text("evaluation:\n  metrics: [FrechetDistance, Memorisation]\n")
    with caplog.at_level("INFO", logger="fedgan_lightning"):
        deploy(tmp_path, "--config", str(own), name="left_out")
    assert "elsewhere: Memorisation" in caplog.text
    assert "fid" in summary(tmp_path, "left_out")["final"]
    own.write_text("evaluation:\n  metrics: [tests.fakes.Curious]\n")
    with pytest.raises(ConfigurationError, match="samples of clients must stay where they are"):
        deploy(tmp_path, "--config", str(own), name="refused")


# ---------------------------------------------------------------------- records


def test_tasks_and_updates_survive_the_wire():
    state = {"g.w": torch.randn(3, 2), "optimizer/0/g.w/step": torch.tensor(3.0), "g.n": torch.tensor(2)}
    state["g.var"] = torch.rand(2, dtype=torch.float64)
    numbers = {"algorithm.mu": 0.5}
    task = ClientTask(
        client_id=2, round=5, seed=2**63 - 1, state=state, epochs=2, schedule_positions=(4, 5), hyperparameters=numbers
    )
    back, accepted, hands_on = wire.to_task(wire.from_task(task, accepted=17, digest="d", hands_on=True))
    assert hands_on
    assert (back.client_id, back.round, back.seed, back.epochs, back.steps, accepted) == (2, 5, 2**63 - 1, 2, None, 17)
    assert (back.schedule_positions, dict(back.hyperparameters)) == ((4, 5), {"algorithm.mu": 0.5})
    assert_states_equal(dict(back.state), state)
    assert {n: v.dtype for n, v in back.state.items()} == {n: v.dtype for n, v in state.items()}
    update = ClientUpdate(2, 7, {"g.w": state["g.w"]}, {"loss_d": 0.25}, {"g.var": state["g.var"]}, round=5)
    other = wire.to_update(wire.from_update(update), client_id=2)
    assert (other.num_examples, other.round, dict(other.metrics)) == (7, 5, {"loss_d": 0.25})
    assert_states_equal(dict(other.delta), dict(update.delta))
    assert_states_equal(dict(other.extras), dict(update.extras))


def test_an_answer_that_is_no_update_is_a_failure(tmp_path):
    def lie(node, kind, reply):
        if (node, kind) == (101, "train"):
            reply.content = wire.content({"num_examples": 3})

    grid = grid_of(tmp_path, [*SHORT, *SAFE])
    grid.edit = lie
    deploy(tmp_path, *SAFE, grid=grid)
    reasons = {own["reason"] for own in summary(tmp_path, "deployed")["incidents"]}
    assert any("an answer that is no update" in reason for reason in reasons)


def test_arrays_that_do_not_fit_their_layout_are_refused():
    from flwr.app import Array

    records = wire.content({}, delta={"g.w": torch.zeros(3, 2), "g.b": torch.zeros(2)})
    assert len(records["arrays"]) == 1, "one array per dtype, not per parameter"
    records["arrays"]["delta|torch.float32"] = Array(torch.zeros(7).numpy())
    with pytest.raises(ValueError, match=r"an array of shape \(7,\), .* not 8 of torch.float32"):
        wire.state_of(records, "delta")
    for changed in ({"dtypes": ["load"]}, {"names": ["a", "a"]}, {"shapes": [[-1]]}, {"shapes": []}):
        with pytest.raises(ValueError, match="a layout has distinct names"):
            Layout.from_plain({"names": ["a"], "shapes": [[1]], "dtypes": ["float32"], **changed})
