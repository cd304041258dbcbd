"""Kill a run with SIGKILL at random instants, resume it, and compare with the run that nobody disturbed.

    python benchmarks/kill_resume.py [--kills 10] [--seed 0]

Half of the kills wait for a checkpoint that is being written. The run has client-local discriminators, kept optimizer
state, BatchNorm, spectral norm, learning-rate schedules and a moving average on the server.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fedgan_lightning.provenance import described

ROOT = Path(__file__).parents[1]
ROUNDS = 12
ARGUMENTS = [
    "fit", "--config", str(ROOT / "configs" / "digits.yaml"),
    "--model.generator", "DCGANGenerator", "--model.generator.image_size", "8", "--model.generator.width", "8",
    "--model.generator.num_classes", "10",
    "--model.discriminator", "DCGANDiscriminator", "--model.discriminator.image_size", "8",
    "--model.discriminator.width", "8", "--model.discriminator.num_classes", "10",
    "--model.discriminator.conditioning", "projection", "--model.discriminator.norm", "spectral",
    "--model.generator_scheduler", "torch.optim.lr_scheduler.LinearLR", "--model.generator_scheduler.total_iters", "40",
    "--federation.executor", "SequentialExecutor",
    "--data.num_clients", "5", "--federation.rounds", str(ROUNDS), "--federation.local_steps", "3",
    "--federation.sync", "{discriminator: local}", "--federation.optimizer_state", "keep",
    "--evaluation.num_samples", "200", "--evaluation.every_n_rounds", "3", "--pictures.every_n_rounds", "4",
    "--trainer.enable_progress_bar", "false",
]  # fmt: skip


def start(run_dir: Path, *extra: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "fedgan_lightning", *ARGUMENTS, "--run_dir", str(run_dir), *extra]
    return subprocess.Popen(
        command, env=environment, cwd=run_dir.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"run failed with {process.returncode}: {err[-2000:]}")


def kill_when(process: subprocess.Popen, run_dir: Path, *, mid_checkpoint: bool, chance: random.Random) -> str:
    """Kill the run mid-checkpoint or at a random instant of training; return when."""
    rounds = chance.randrange(1, ROUNDS - 1)
    while process.poll() is None and completed(run_dir) < rounds:
        time.sleep(0.002)
    if mid_checkpoint:
        while process.poll() is None and not list((run_dir / "checkpoints").glob(".last.ckpt.*.partial")):
            pass
    else:
        time.sleep(chance.uniform(0.0, 0.6))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    partial = bool(list((run_dir / "checkpoints").glob(".*.partial")))
    return f"after round {rounds}" + (", half-written checkpoint left behind" if partial else "")


def completed(run_dir: Path) -> int:
    """Return how often a checkpoint was written, by a file that says so without being opened."""
    path = run_dir / "checkpoints" / "last.ckpt"
    try:
        stamp = path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
    seen = _STAMPS.setdefault(str(run_dir), [])
    if stamp not in seen:
        seen.append(stamp)
    return len(seen)


_STAMPS: dict[str, list[int]] = {}


def outcome(run_dir: Path) -> dict[str, Any]:
    """Return everything that must be the same: weights, optimizer and client state, metrics."""
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    orchestrator = checkpoint["callbacks"]["FederatedOrchestrator"]
    history = json.loads((run_dir / "summary.json").read_text())["history"]
    return {
        "weights": checkpoint["state_dict"],
        "server optimizer": checkpoint["optimizer_states"],
        "clients": orchestrator["store"],
        "schedules": orchestrator["schedule_positions"],
        "bytes": [orchestrator["ledger"]["bytes_up"], orchestrator["ledger"]["bytes_down"]],
        "round": checkpoint["global_step"],
        "metrics": history,
    }


def same(first: Any, second: Any) -> bool:
    """Whether two nested structures are equal bit by bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second))
    return bool(first == second)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, identical = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        finish(start(base / "whole"))
        expected = outcome(base / "whole")
        for number in range(options.kills):
            run_dir = base / f"killed{number}"
            process = start(run_dir)
            when = kill_when(process, run_dir, mid_checkpoint=number % 2 == 1, chance=chance)
            finish(start(run_dir, "--ckpt_path", "last"))
            found = outcome(run_dir)
            different = [name for name in expected if not same(expected[name], found[name])]
            identical += not different
            print(
                f"kill {number}: {when}: {'bit-identical' if not different else f'DIFFERS in {different}'}", flush=True
            )
    print(f"{identical} of {options.kills} bit-identical after {ROUNDS} rounds; {described()}")


if __name__ == "__main__":
    main()
