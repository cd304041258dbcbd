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
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kill_resume import same
from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.deployment import programs
from fedgan_lightning.provenance import described

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits.yaml"


def options_of(clients: int, rounds: int) -> list[str]:
    """Return the options that both runs share."""
    steps = ["--federation.rounds", str(rounds), "--federation.local_steps", "10"]
    return ["--data.num_clients", str(clients), *steps, "--data.batch_size", "16"]


def superlink(home: Path, started: list[subprocess.Popen]) -> None:
    """Start a SuperLink for simulations, tell ``flwr`` of it, and return when it answers.

    The one that ``flwr run`` starts by itself stays, on a fixed port, and serves all later runs of this machine.
    """
    port = programs.free_port()
    command = [str(programs.program("flower-superlink")), "--insecure", "--simulation", "--host", "127.0.0.1"]
    started.append(programs.start([*command, "--port", str(port)], home, log="superlink.log"))
    programs.connect(home, None, port)
    programs.await_superlink(port, None, started[-1])


def run_engine(home: Path, options: Sequence[str], *, clients: int, run_dir: Path) -> None:
    """Run the Flower app on the simulation engine, to its end.

    Raises:
        RuntimeError: If the run did not come to its end.
    """
    nodes = f"num-supernodes={clients} client-resources-num-cpus=1"
    with programs.processes() as started:
        superlink(home, started)
        if programs.run_app(home, CONFIG, run_dir, options, engine=["--federation-config", nodes]):
            raise RuntimeError(f"flwr run did not finish: {(home / 'superlink.log').read_text()[-4000:]}")


def run_sequential(options: Sequence[str], *, run_dir: Path) -> None:
    """Run ``fit`` with the sequential executor."""
    own = ["--federation.executor", "SequentialExecutor", "--trainer.enable_progress_bar", "false"]
    own += ["--run_dir", str(run_dir)]
    command = [sys.executable, "-W", "ignore", "-m", "fedgan_lightning", "fit", "--config", str(CONFIG)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *options, *own], env=environment, check=True, stdout=subprocess.DEVNULL)


def seconds_of(run_dir: Path) -> list[float]:
    """Return the time of every round."""
    return [json.loads(line)["seconds"] for line in (run_dir / "rounds.jsonl").read_text().splitlines()]


def compare(folder: Path, *, clients: int, rounds: int) -> tuple[bool, dict[str, list[float]]]:
    """Return whether both runs end with the same weights, bit by bit, and the seconds of their rounds."""
    engine, sequential = folder / "engine", folder / "sequential"
    options = options_of(clients, rounds)
    run_engine(folder / "flwr", options, clients=clients, run_dir=engine)
    run_sequential(options, run_dir=sequential)
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
    print(f"{described()}\n")
    print(f"weights equal to the bit: {'yes' if equal else 'NO'}\n")
    print("| | median s/round | every round |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} | {', '.join(f'{value:.2f}' for value in values)} |")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
