"""The server of a deployment is killed with all that it started, and the same command continues: real processes."""

from __future__ import annotations

import contextlib
import json
import random
import re
import time

import pytest

flwr = pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from benchmarks.kill_server import Deployment, finish, kill, rounds_done, settings, wait_for  # noqa: E402
from fedgan_lightning.__main__ import main  # noqa: E402
from fedgan_lightning.checkpoints import read_checkpoint  # noqa: E402
from tests.conftest import assert_states_equal  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.timeout(2400)]
STARTED = re.compile(r"Successfully started run (\d+)")


def test_a_server_killed_twice_ends_with_the_weights_of_a_simulation(tmp_path):
    """Once before the run has begun, which Flower would start a second time, and once at a random instant of round 1.

    Discriminators are local and moments are kept, so that what the sites keep to themselves has to go back, too.
    """
    config = settings(rounds=2, sync={"discriminator": "local"}, optimizer_state="keep")
    run_dir = tmp_path / "run"
    with contextlib.ExitStack() as stack:
        deployment = Deployment(tmp_path / "home", config, sites=2)
        stack.callback(deployment.close)

        server = deployment.server(run_dir)
        assert wait_for(lambda: STARTED.search(deployment.log("server")), seconds=300), deployment.log("server")
        kill(server)
        for number in range(2):
            deployment.site(number)

        server = deployment.server(run_dir)
        begun = wait_for(lambda: any(round == 1 for _, round in deployment.tried(0)), seconds=900)
        assert begun, deployment.log("server")[-2000:]
        time.sleep(random.Random(0).uniform(0, 5))
        kill(server)
        kept = rounds_done(run_dir)
        finish(deployment.server(run_dir), deployment)

        first, second, third = STARTED.findall(deployment.log("server"))
        tried = {number: set(deployment.tried(number)) for number in range(2)}
    assert kept == 1
    assert tried[0] | tried[1] == {(second, 0), (second, 1), (third, 1)}, f"{first} has never begun"
    found = json.loads((run_dir / "summary.json").read_text())
    assert (found["status"], found["rounds"], found["client_runs"]) == ("finished", 2, 4)
    assert "incidents" not in found

    arguments = ["--config", str(deployment.config), "--run_dir", str(tmp_path / "simulated")]
    assert main(["fit", *arguments, "--federation.executor", "SequentialExecutor"]) == 0
    ours, theirs = (
        read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
        for folder in (run_dir, tmp_path / "simulated")
    )
    assert_states_equal(ours, theirs)
