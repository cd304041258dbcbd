"""Kill the server of a deployment with SIGKILL at random instants, start it again, and compare the weights.

    python -m benchmarks.kill_server [--kills 5] [--seed 0]

Two sites over TLS on loopback; they stay up all the time. Killed is everything that ``deploy server`` started: the
SuperLink, the process that runs the rounds, and those between. The same command is then started again. Discriminators
are local and moments are kept, so that private state at the sites has to follow the server.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.kill_resume import same
from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.deployment.programs import free_port
from fedgan_lightning.provenance import described

ROOT = Path(__file__).parents[1]
ROUNDS = 6


class Deployment:
    """The processes of a federation on this machine, each started by the documented command.

    Args:
        home: Folder for keys, logs and state.
        config: The configuration that server and sites share.
        sites: Number of sites.
    """

    def __init__(self, home: Path, config: dict[str, Any], *, sites: int) -> None:
        self.home, self.port, self._ports = home, free_port(), [free_port() for _ in range(sites)]
        home.mkdir(parents=True, exist_ok=True)
        self.config = home / "federation.yaml"
        self.config.write_text(yaml.safe_dump(config))
        self.processes: list[subprocess.Popen] = []
        self.run("keys", str(home / "keys"), "--sites", str(sites)).wait()

    def run(self, *arguments: str, log: str = "keys.log") -> subprocess.Popen:
        """Start ``federation ...``."""
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FEDGAN_CACHE": str(self.home / "cache")}
        command = [sys.executable, "-W", "ignore", "-m", "fedgan_lightning", "deploy", *arguments]
        with (self.home / log).open("ab") as file:
            process = subprocess.Popen(
                command, env={**os.environ, **own}, cwd=self.home, stdout=file, stderr=file, start_new_session=True
            )
        self.processes.append(process)
        return process

    def server(self, run_dir: Path) -> subprocess.Popen:
        """Start the server; the same call continues a run that was cut off."""
        told = ["--keys", str(self.home / "keys"), "--config", str(self.config), "--run_dir", str(run_dir)]
        home = ["--home", str(self.home / "server"), "--port", str(self.port)]
        return self.run("server", *told, *home, log="server.log")

    def site(self, number: int, *, overlay: Path | None = None) -> subprocess.Popen:
        """Start a site."""
        keys, state = self.home / "keys", self.home / f"site{number}"
        told = ["--superlink", f"127.0.0.1:{self.port}", "--ca", str(keys / "ca.crt"), "--key", f"{keys}/site{number}"]
        own = ["--client-id", str(number), "--config", str(self.config), "--state", str(state)]
        extra = ["--site", str(overlay)] if overlay is not None else []
        return self.run("site", *told, *own, *extra, "--port", str(self._ports[number]), log=f"site{number}.log")

    def log(self, name: str) -> str:
        """Return what a process has said."""
        path = self.home / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def tried(self, number: int) -> list[tuple[str, int]]:
        """Return (Flower's run, round) of all tasks that a site was sent."""
        return [
            (run, int(round)) for run, round in re.findall(r"\[RUN (\d+), ROUND (\d+)\]", self.log(f"site{number}"))
        ]

    def close(self) -> None:
        """End everything."""
        for process in self.processes:
            kill(process)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those that they started."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found, new = [], [pid]
    while new:
        new = [child for child, parent in pairs if parent in new]
        found += new
    return found


def kill(process: subprocess.Popen) -> None:
    """Send SIGKILL to a process and to everything that it started."""
    if process.poll() is None:
        send_kill([process.pid, *descendants(process.pid)])
    process.wait()


def send_kill(pids: Sequence[int]) -> None:
    """Send SIGKILL to these processes."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], object], *, seconds: float) -> bool:
    """Return whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


def rounds_done(run_dir: Path) -> int:
    """Return how many rounds the last checkpoint holds."""
    last = run_dir / "checkpoints" / "last.ckpt"
    return int(read_checkpoint(last)["global_step"]) if last.exists() else 0


def settings(**federation: Any) -> dict[str, Any]:
    """Return ``configs/digits.yaml`` with two clients and without evaluation, and these settings of the federation."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())
    config["data"]["num_clients"] = 2
    config["federation"] = {"local_steps": 5, **federation}
    config["evaluation"], config["best"] = {"metrics": []}, {"monitor": None}
    return config


def finish(process: subprocess.Popen, deployment: Deployment, *, seconds: float = 900) -> None:
    """Wait for a server.

    Raises:
        RuntimeError: If its run did not come to its end.
    """
    ended = wait_for(lambda: process.poll() is not None, seconds=seconds)
    if not ended or process.returncode:
        raise RuntimeError(f"the server gave {process.poll()}: {deployment.log('server')[-3000:]}")


def trial(deployment: Deployment, run_dir: Path, *, after: float) -> tuple[int, list[int]]:
    """Kill the server so many seconds after its start, start it again; return rounds kept, and those done again."""
    for number in range(2):  # as at first: private state of another trial would be the same
        shutil.rmtree(deployment.home / f"site{number}" / f"client{number:05d}", ignore_errors=True)
    seen = len(deployment.tried(0))
    server = deployment.server(run_dir)
    wait_for(lambda: server.poll() is not None, seconds=after)
    kill(server)
    kept = rounds_done(run_dir)
    finish(deployment.server(run_dir), deployment)
    rounds = [round for _, round in dict.fromkeys(deployment.tried(0)[seen:])]
    return kept, sorted({round for round in rounds if rounds.count(round) > 1})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    config = settings(rounds=ROUNDS, sync={"discriminator": "local"}, optimizer_state="keep")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        deployment = Deployment(Path(folder), config, sites=2)
        stack.callback(deployment.close)
        for number in range(2):
            deployment.site(number)
        begun = time.monotonic()
        finish(deployment.server(Path(folder) / "whole"), deployment)
        whole, expected = time.monotonic() - begun, read_checkpoint(Path(folder) / "whole/checkpoints/last.ckpt")
        print(f"{described()}\n\nundisturbed: {ROUNDS} rounds in {whole:.0f} s\n")
        print(
            "| killed after | rounds kept | done again | weights equal | s, both starts |\n|---|---|---|---|---|",
            flush=True,
        )
        for number in range(options.kills):
            run_dir, instant = Path(folder) / f"killed{number}", chance.uniform(0, whole)
            begun = time.monotonic()
            kept, again = trial(deployment, run_dir, after=instant)
            found = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
            equal = all(same(expected[part], found[part]) for part in ("state_dict", "optimizer_states", "global_step"))
            cells = (
                f"{instant:.1f} s",
                kept,
                again or "none",
                "yes" if equal else "NO",
                f"{time.monotonic() - begun:.0f}",
            )
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
