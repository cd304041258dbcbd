"""A federation of real processes in which everything goes wrong at once: SuperLink, SuperNodes, TLS, keys.

One federation of four sites and three rounds serves all tests here. Sites 0 and 1 are honest; the SuperNode of site 1
is killed in the middle of round 1. Site 2 answers NaN, then hangs past the timeout. Site 3 answers other shapes, then
an update a million times as long, then a round long past. Beside them two SuperNodes try to get in that have no
business there.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

flwr = pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from benchmarks.kill_server import Deployment, descendants, finish, send_kill, settings  # noqa: E402
from fedgan_lightning.__main__ import main  # noqa: E402
from fedgan_lightning.checkpoints import read_checkpoint  # noqa: E402
from fedgan_lightning.deployment import programs  # noqa: E402
from fedgan_lightning.deployment.keys import make_authority, make_node_key  # noqa: E402
from tests.conftest import assert_states_equal  # noqa: E402
from tests.deployment import hostile  # noqa: E402
from tests.processes import eventually  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(2400)]  # four minutes
ROUNDS = 3
BAD = {2: ["nan", "hang", "nan"], 3: ["wrong_shape", "huge_norm", "stale"]}


def seconds_for_a_round() -> float:
    """A killed site is let in again after a minute, at its next try, both of which its round has to last."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return max(90.0, 25 * (time.monotonic() - begun))  # busy machines take longer for all


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Let it happen; return what is left."""
    folder = tmp_path_factory.mktemp("faults")
    seconds = seconds_for_a_round()
    rules = {"class_path": "RoundRules", "init_args": {"min_report_fraction": 0.25, "timeout": seconds}}
    validator = {"class_path": "UpdateValidator", "init_args": {"max_norm": 100.0}}
    config = settings(rounds=ROUNDS, optimizer_state="keep", rules=rules, validator=validator)
    config["data"]["num_clients"] = 4
    with contextlib.ExitStack() as stack:
        deployment = Deployment(folder / "home", config, sites=4)
        stack.callback(deployment.close)
        server = deployment.server(folder / "run")
        sites = []
        for number in range(4):
            overlay = folder / f"site{number}.yaml" if number in BAD else None
            if overlay is not None:
                overlay.write_text(hostile.settings(BAD[number], hang_seconds=seconds))
            sites.append(deployment.site(number, overlay=overlay))
        strangers = turned_away(deployment, stack.enter_context(programs.processes()))
        middle = eventually(lambda: any(round == 1 for _, round in deployment.tried(1)), seconds=900)
        assert middle, deployment.log("server")[-2000:] + deployment.log("site1")[-2000:]
        send_kill(descendants(sites[1].pid))
        finish(server, deployment, seconds=900)
        assert all(eventually(lambda p=process: p.poll() is not None) for process in strangers)
        found = json.loads((folder / "run" / "summary.json").read_text())
        yield SimpleNamespace(folder=folder, deployment=deployment, summary=found, strangers=strangers)


def turned_away(deployment, started) -> list[subprocess.Popen]:
    """Start a SuperNode with a key that nobody knows, and one that trusts another authority."""
    keys, other = deployment.home / "keys", deployment.home / "stranger"
    make_node_key(other / "site0")
    make_authority(other)
    assert eventually(lambda: "Successfully started run" in deployment.log("server"), seconds=900)
    for name, key, ca in (("key", other / "site0", keys / "ca.crt"), ("ca", keys / "site0", other / "ca.crt")):
        command = programs.supernode(
            superlink=f"127.0.0.1:{deployment.port}", ca=ca, key=key, port=programs.free_port(), node={"client-id": 0}
        )
        started.append(programs.start(command, other / name, log="log"))
    return started


@pytest.fixture(scope="module")
def simulated(story):
    """The same rounds in one process, with those clients only whose answers counted, according to the summary."""
    missing = {(own["round"], own["client_id"]) for own in story.summary["incidents"] if own["kind"] != "late"}
    with (story.folder / "trace.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["client", "first_round", "last_round"])
        rows.writerows((k, r, r) for k in range(4) for r in range(ROUNDS) if (r, k) not in missing)
    options = [
        "--federation.clients",
        "AvailableClients",
        "--federation.clients.trace",
        str(story.folder / "trace.csv"),
    ]
    run_dir = story.folder / "simulated"
    common = [
        "--config",
        str(story.deployment.config),
        "--run_dir",
        str(run_dir),
        "--trainer.enable_progress_bar=false",
    ]
    assert main(["fit", *common, *options, "--federation.executor", "SequentialExecutor"]) == 0
    return read_checkpoint(run_dir / "checkpoints" / "last.ckpt")


def test_the_run_ends_and_every_fault_is_named_with_client_and_reason(story):
    found = story.summary
    assert (found["status"], found["rounds"]) == ("finished", ROUNDS)
    told = {(own["round"], own["client_id"], own["kind"]): own["reason"] for own in found["incidents"]}
    expected = {
        (0, 2, "rejected"): "client 2: delta .* is not finite",
        (0, 3, "rejected"): r"client 3: delta .* has shape \[",
        (1, 1, "failed"): "reply: (Flower error 5|no answer within)",
        (1, 2, "failed"): "reply: no answer within",
        (1, 3, "rejected"): r"client 3: the update's norm is .*, above the bound of 100",
        (2, 2, "late"): "answers round 1",
        (2, 3, "rejected"): "client 3: answers round 0 in round 2",
    }
    # Busy with round 1 for so long, site 2 may have no time left for round 2.
    assert [place for place in told if place[:2] == (2, 2)][1:] in ([(2, 2, "rejected")], [(2, 2, "failed")])
    assert told.keys() - {(2, 2, "rejected"), (2, 2, "failed")} == expected.keys()
    for place, pattern in expected.items():
        assert re.match(pattern, told[place]), told[place]


def test_the_honest_sites_result_is_that_of_a_federation_without_the_bad_ones(story, simulated):
    """To the bit: same machine, same threads."""
    found = read_checkpoint(story.folder / "run" / "checkpoints" / "last.ckpt")
    assert_states_equal(found["state_dict"], simulated["state_dict"])


def test_a_killed_site_comes_back_by_itself_with_its_private_state(story, simulated):
    answered = {round for _, round in story.deployment.tried(1)}
    assert answered == {0, 1, 2}
    assert story.deployment.log("site1").count("the SuperNode ended (-9)") == 1
    assert (2, 1) not in {(own["round"], own["client_id"]) for own in story.summary["incidents"]}
    found = read_checkpoint(story.folder / "run" / "checkpoints" / "last.ckpt")
    seed = int(orchestrator_of(found)["store"]["1"]["accepted/seed"])
    kept = load_file(story.deployment.home / "site1" / "client00001" / f"{seed}.safetensors")
    expected = orchestrator_of(simulated)["store"]["1"]
    assert len(expected) > 8, "two moments of every parameter"
    assert_states_equal(kept, dict(expected))


def test_strangers_are_turned_away(story):
    assert all(process.returncode for process in story.strangers)
    home = story.deployment.home
    assert "Failed to activate SuperNode" in (home / "stranger" / "key" / "log").read_text()
    assert "CERTIFICATE_VERIFY_FAILED" in (home / "stranger" / "ca" / "log").read_text()
    assert oct((home / "keys" / "site0").stat().st_mode)[-3:] == "600"


def orchestrator_of(checkpoint):
    return checkpoint["callbacks"]["FederatedOrchestrator"]
