"""Kill runs of shipped configurations with SIGKILL at random instants, resume them, and compare with undisturbed ones.

    python -m benchmarks.kill_resume [--configs digits ring8 ...] [--kills 10] [--seed 0]

Settings are the defaults, ``executor: auto`` included, but for fewer rounds and less evaluation. Half of the kills wait
for a checkpoint that is being written, the others fall anywhere: between two processes of a run, of which the first
has trained for long and the second has just begun, nothing may differ by a bit.
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
#: Configuration -> rounds, and options that only say where data lie, or measure less.
CONFIGS: dict[str, tuple[int, list[str]]] = {
    "digits": (30, []),
    "ring8": (24, []),
    "grid25": (24, []),
    "swiss_roll": (24, []),
    "recommendation": (
        12,
        [
            *("--data.source.path", "{shared}/movielens/ml-latest-small/ratings.csv"),
            *("--data.source.catalogue", "{shared}/movielens/ml-latest-small/movies.csv"),
        ],
    ),
    "medical": (8, ["--data.source.root", "{shared}/medmnist", "--federation.local_steps", "4"]),
    "timeseries": (12, ["--data.source.path", "{shared}/energy/ETTh1.csv"]),
    "mnist": (8, ["--data.source.root", "{shared}", "--federation.local_steps", "4"]),
}
#: Networks and moments that stay with clients, BatchNorm, spectral norm, schedules: what no shipped configuration has.
EVERYTHING = [
    "--model.generator", "DCGANGenerator", "--model.generator.image_size", "8", "--model.generator.width", "8",
    "--model.generator.num_classes", "10",
    "--model.discriminator", "DCGANDiscriminator", "--model.discriminator.image_size", "8",
    "--model.discriminator.width", "8", "--model.discriminator.num_classes", "10",
    "--model.discriminator.conditioning", "projection", "--model.discriminator.norm", "spectral",
    "--model.generator_scheduler", "torch.optim.lr_scheduler.LinearLR", "--model.generator_scheduler.total_iters", "40",
    "--data.num_clients", "5", "--federation.local_steps", "3",
    "--federation.sync", "{discriminator: local}", "--federation.optimizer_state", "keep",
    "--evaluation.num_samples", "200",
]  # fmt: skip


def arguments(config: str) -> list[str]:
    """Return the command and its options, but for the run directory."""
    name = "digits" if config == "everything" else config
    rounds, options = CONFIGS.get(config, (12, EVERYTHING))
    shared = str(ROOT.parent / "shared" / "data")
    return [
        "fit", "--config", str(ROOT / "configs" / f"{name}.yaml"),
        *(option.replace("{shared}", shared) for option in options),
        "--federation.rounds", str(rounds), "--evaluation.every_n_rounds", "3", "--pictures.every_n_rounds", "4",
        "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip


def start(config: str, run_dir: Path, *extra: str) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-m", "fedgan_lightning", *arguments(config)]
    return subprocess.Popen(
        [*command, "--run_dir", str(run_dir), *extra],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=run_dir.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"run failed with {process.returncode}: {err[-2000:]}")


def kill_when(process: subprocess.Popen, run_dir: Path, *, rounds: int, mid_checkpoint: bool, chance: Any) -> str:
    """Kill the run mid-checkpoint or at a random instant of training; return when."""
    after = chance.randrange(1, rounds - 1)
    while process.poll() is None and completed(run_dir) < after:
        time.sleep(0.002)
    if mid_checkpoint:
        while process.poll() is None and not list((run_dir / "checkpoints").glob(".last.ckpt.*.partial")):
            pass
    else:
        time.sleep(chance.uniform(0.0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    partial = bool(list((run_dir / "checkpoints").glob(".*.partial")))
    return f"after round {after}" + (", half-written checkpoint left behind" if partial else "")


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
        "clients": {**orchestrator["store"], **orchestrator.get("store_files", {})},
        "schedules": orchestrator["clock"],
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


def identical(config: str, base: Path, *, kills: int, chance: random.Random) -> int:
    """Kill and resume a configuration so many times; return how often nothing differed."""
    finish(start(config, base / "whole"))
    expected, found = outcome(base / "whole"), 0
    for number in range(kills):
        run_dir = base / f"killed{number}"
        rounds = expected["round"]
        process = start(config, run_dir)
        when = kill_when(process, run_dir, rounds=rounds, mid_checkpoint=number % 2 == 1, chance=chance)
        finish(start(config, run_dir, "--ckpt_path", "last"))
        received = outcome(run_dir)
        different = [name for name in expected if not same(expected[name], received[name])]
        found += not different
        verdict = f"DIFFERS in {different}" if different else "bit-identical"
        print(f"{config}, kill {number}: {when}: {verdict}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--configs", nargs="+", default=["digits"], choices=[*CONFIGS, "everything"])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, total = random.Random(options.seed), 0
    for config in options.configs:
        with tempfile.TemporaryDirectory() as folder:
            count = identical(config, Path(folder), kills=options.kills, chance=chance)
        print(f"{config}: {count} of {options.kills} bit-identical", flush=True)
        total += count
    print(f"{total} of {options.kills * len(options.configs)} bit-identical; {described()}")


if __name__ == "__main__":
    main()
