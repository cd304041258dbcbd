"""Flower's simulation engine against the sequential executor: ``flwr run`` must give the same weights; what it costs.

    pip install -e ".[simulation]"
    python -m benchmarks.engine [--clients 16] [--rounds 4]

``configs/digits.yaml`` with so many clients, once as a Flower app with as many SuperNodes (Ray, a process for each
core), once one client after another in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.kill_resume import same
from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.deployment import programs

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits.yaml"


def options_of(clients: int, rounds: int, run_dir: Path) -> list[str]:
    """Return the options that both runs share."""
    count = ["--data.num_clients", str(clients), "--federation.rounds", str(rounds)]
    return [*count, "--data.batch_size", "16", "--run_dir", str(run_dir)]


def superlink(home: Path, started: list[subprocess.Popen]) -> None:
    """Start a SuperLink for simulations, tell ``flwr`` of it, and return when it answers.

    The one that ``flwr run`` starts by itself stays, on a fixed port, and serves all later runs of this machine.
    """
    port = programs.free_port()
    command = [str(programs.program("flower-superlink")), "--insecure", "--simulation", "--host", "127.0.0.1"]
    process = programs.start([*command, "--port", str(port)], home, log="superlink.log")
    started.append(process)
    own = f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(own)
    deadline = time.monotonic() + programs.START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return
        time.sleep(0.3)
    raise RuntimeError(f"the SuperLink does not answer: {(home / 'superlink.log').read_text()[-2000:]}")


def run_engine(home: Path, options: Sequence[str], *, clients: int) -> None:
    """Run the Flower app on the simulation engine, to its end.

    Raises:
        RuntimeError: If the run did not come to its end.
    """
    told = f"config={json.dumps(str(CONFIG))} options={json.dumps(shlex.join(options))}"
    nodes = f"num-supernodes={clients} client-resources-num-cpus=1"
    home.mkdir(parents=True)
    with programs.processes() as started:
        superlink(home, started)
        done = programs.flwr(
            home,
            *("run", str(programs.APP), "own", "--stream", "--federation-config", nodes, "--run-config", told),
        )
    summary = Path(options[options.index("--run_dir") + 1]) / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "finished":
        raise RuntimeError(f"flwr run did not finish: {(done.stdout + done.stderr)[-4000:]}")


def run_sequential(options: Sequence[str]) -> None:
    """Run ``fit`` with the sequential executor."""
    own = ["--federation.executor", "SequentialExecutor", "--trainer.enable_progress_bar", "false"]
    command = [sys.executable, "-W", "ignore", "-m", "fedgan_lightning", "fit", "--config", str(CONFIG)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *options, *own], env=environment, check=True, stdout=subprocess.DEVNULL)


def seconds_of(run_dir: Path) -> list[float]:
    """Return the time of every round."""
    return [json.loads(line)["seconds"] for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


def compare(folder: Path, *, clients: int, rounds: int) -> tuple[bool, dict[str, list[float]]]:
    """Return whether both runs end with the same weights, bit by bit, and the seconds of their rounds."""
    engine, sequential = folder / "engine", folder / "sequential"
    run_engine(folder / "flwr", options_of(clients, rounds, engine), clients=clients)
    run_sequential(options_of(clients, rounds, sequential))
    found, expected = (read_checkpoint(path / "checkpoints" / "last.ckpt") for path in (engine, sequential))
    equal = same(expected["state_dict"], found["state_dict"]) and found["global_step"] == rounds
    return equal, {"Flower's engine": seconds_of(engine), "sequential": seconds_of(sequential)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        equal, seconds = compare(Path(folder), clients=options.clients, rounds=options.rounds)
    print(f"weights equal to the bit: {'yes' if equal else 'NO'}\n")
    print("| | median s/round | every round |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} | {', '.join(f'{value:.2f}' for value in values)} |")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
