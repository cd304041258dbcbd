"""The server of a deployment is killed with all that it started, and the same command continues: real processes."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys

import pytest

flwr = pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from benchmarks.kill_server import (  # noqa: E402
    Deployment,
    descendants,
    finish,
    kill,
    rounds_done,
    send_kill,
    settings,
)
from fedgan_lightning.__main__ import main  # noqa: E402
from fedgan_lightning.checkpoints import read_checkpoint  # noqa: E402
from fedgan_lightning.deployment import programs  # noqa: E402
from fedgan_lightning.deployment.keys import prepare  # noqa: E402
from tests.conftest import ROOT, assert_states_equal  # noqa: E402
from tests.processes import eventually  # noqa: E402

CONFIG = ROOT / "configs" / "digits.yaml"
pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400)]


@pytest.mark.slow  # two minutes; benchmarks/kill_server.py does it often
def test_a_killed_server_ends_with_the_weights_of_an_undisturbed_simulation(tmp_path):
    """Killed while the sites train round 1; what it started ends with it, and the sites stay.

    Discriminators are local and moments are kept, so that what the sites keep to themselves has to go back, too.
    """
    config = settings(rounds=2, sync={"discriminator": "local"}, optimizer_state="keep")
    run_dir = tmp_path / "run"
    with contextlib.ExitStack() as stack:
        deployment = Deployment(tmp_path / "home", config, sites=2)
        stack.callback(deployment.close)
        server = deployment.server(run_dir)
        for number in range(2):
            deployment.site(number)
        begun = eventually(lambda: any(round == 1 for _, round in deployment.tried(0)), seconds=900)
        assert begun, deployment.log("server")[-2000:]
        started = descendants(server.pid)
        names = " ".join(map(command_of, started))
        assert all(f"/{own}" in names for own in ("flower-superlink", "flower-superexec", "flwr-serverapp", "flwr run"))
        kill_alone(server, started)
        kept = rounds_done(run_dir)
        finish(deployment.server(run_dir), deployment)
        first, second = re.findall(r"Successfully started run (\d+)", deployment.log("server"))
        tried = {*deployment.tried(0), *deployment.tried(1)}
    assert kept == 1
    assert tried == {(first, 0), (first, 1), (second, 1)}
    found = json.loads((run_dir / "summary.json").read_text())
    assert (found["status"], found["rounds"], found["client_runs"]) == ("finished", 2, 4)
    assert "incidents" not in found

    arguments = ["--config", str(deployment.config), "--run_dir", str(tmp_path / "simulated")]
    assert main(["fit", *arguments, "--federation.executor", "SequentialExecutor"]) == 0
    ours, theirs = (
        read_checkpoint(at / "checkpoints" / "last.ckpt")["state_dict"] for at in (run_dir, tmp_path / "simulated")
    )
    assert_states_equal(ours, theirs)


def kill_alone(server, started):
    """Kill the server only; everything else has to end by itself where the system can see to that."""
    server.kill()
    server.wait()
    if sys.platform == "linux":
        assert eventually(lambda: not any(map(command_of, started))), [*map(command_of, started)]
    send_kill(started)


def command_of(pid: int) -> str:
    """Return what a process runs; nothing if it has ended."""
    listed = subprocess.run(["ps", "-o", "stat=,args=", "-p", str(pid)], capture_output=True, text=True).stdout
    state, _, command = listed.strip().partition(" ")
    return "" if state.startswith("Z") else command


def test_a_run_that_had_not_begun_when_its_server_was_killed_does_not_begin_beside_the_next(tmp_path):
    """A SuperLink starts it again, 30 s later, and two servers would write one run directory."""
    keys, home, port = tmp_path / "keys", tmp_path / "home", programs.free_port()
    prepare(keys, sites=0, hosts=["localhost", "127.0.0.1"])
    told = f'config="{CONFIG}" options="--run_dir {tmp_path / "run"}"'
    with programs.processes() as started:
        for _ in range(2):
            started.append(programs.superlink(home, keys=keys, host="127.0.0.1", port=port))
            programs.await_superlink(port, keys, started[-1])
            programs.connect(home, keys, port)
            if len(started) == 1:
                programs.flwr(home, "run", str(programs.APP), "own", "--run-config", told)
                kill(started[-1])
        programs.end_old_runs(home, keys, port)
        assert [own["status"] for own in runs(home)] == ["finished:stopped"]


def runs(home):
    return json.loads(programs.flwr(home, "list", "own", "--format", "json").stdout)["runs"]
