"""A federation of real processes on this machine: SuperLink, SuperNodes, TLS, keys, a kill, and who is turned away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

flwr = pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.deployment import launch  # noqa: E402
from fedgan_lightning.deployment.keys import make_authority, make_node_key  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]
CONFIG = ROOT / "configs" / "digits.yaml"


@pytest.fixture(autouse=True)
def _as_installed(monkeypatch, tmp_path):
    """Processes find the package where this one did, and use one thread each."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def site_command(keys: Path, number: int, *, port: int, home: Path, ca: Path | None = None) -> list[str]:
    node = {"client-id": number, "state": str(home / f"site{number}")}
    return launch.supernode(
        superlink=f"127.0.0.1:{port}",
        ca=ca or keys / "ca.crt",
        key=keys / f"site{number}",
        port=launch.free_port(),
        node=node,
    )


def wait_for(condition, *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.3)
    return False


def test_a_federation_survives_the_loss_of_a_site_and_turns_strangers_away(tmp_path):
    home, keys, run_dir, port = tmp_path / "home", tmp_path / "keys", tmp_path / "run", launch.free_port()
    make_authority(keys, hosts=["localhost", "127.0.0.1"])
    for number in range(2):
        make_node_key(keys / f"site{number}")
    stranger = tmp_path / "stranger"
    make_node_key(stranger / "site2")
    make_authority(stranger, hosts=["localhost"])
    with launch._processes() as started:
        started.append(launch.superlink(home, keys=keys, host="127.0.0.1", port=port))
        launch._await(port, keys, started[-1])
        launch._register(home, keys, port)

        # An unknown key, and a server that another authority vouches for, end the SuperNode at once.
        unknown = [*site_command(keys, 0, port=port, home=home)]
        unknown[unknown.index("--auth-supernode-private-key") + 1] = str(stranger / "site2")
        wrong_ca = [*site_command(keys, 0, port=port, home=home, ca=stranger / "ca.crt"), "--max-retries", "1"]
        refused = [launch._start(c, tmp_path / f"refused{i}", log="log") for i, c in enumerate((unknown, wrong_ca))]
        started += refused

        nodes = [
            launch._start(site_command(keys, k, port=port, home=home), home / f"site{k}", log="log") for k in range(2)
        ]
        started += nodes
        options = [
            *("--config", str(CONFIG), "--run_dir", str(run_dir), "--home", str(home)),
            *("--data.num_clients", "2", "--federation.rounds", "6", "--federation.local_steps", "5"),
            *(
                "--evaluation.num_samples",
                "100",
                "--evaluation.every_n_rounds",
                "3",
                "--federation.rules",
                "RoundRules",
            ),
            *("--federation.rules.minimum", "0.5", "--federation.rules.timeout", "45"),
        ]
        code = (
            "import sys; from pathlib import Path; from fedgan_lightning.deployment import launch as l\n"
            "home, config, run_dir, *others = sys.argv[1:]\n"
            "sys.exit(l._run(Path(home), Path(config), Path(run_dir), others))"
        )
        command = [sys.executable, "-c", code, str(home), str(CONFIG), str(run_dir), *options[6:]]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        last = run_dir / "checkpoints" / "last.ckpt"
        assert wait_for(last.exists, seconds=180), (home / "superlink.log").read_text()[-2000:]
        os.killpg(nodes[1].pid, signal.SIGKILL)
        assert wait_for(lambda: running.poll() is not None, seconds=300)
        assert running.returncode == 0
        assert all(wait_for(lambda p=process: p.poll() is not None, seconds=30) for process in refused)
        assert all(process.returncode for process in refused)
    found = json.loads((run_dir / "summary.json").read_text())
    assert (found["status"], found["rounds"]) == ("finished", 6)
    assert found["events"]["failed"] >= 1
    assert {incident["client_id"] for incident in found["incidents"]} == {1}
    assert found["client_runs"] >= 6 + 1
    assert oct((keys / "site0").stat().st_mode)[-3:] == "600"
