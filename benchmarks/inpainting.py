"""Completed pictures: the federation of configs/inpainting.yaml, centralised, every client alone, and fills without a
network, on the same holes of the same test pictures. Continues where it stopped.

    python -m benchmarks.inpainting                      # everything, then the table
    python -m benchmarks.inpainting --only federated     # one row; the table shows what there is
    python -m benchmarks.inpainting --table              # only the table

All rows take the same number of generator steps: rounds x local steps. A client alone is scored on all ten digits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "inpainting.yaml"
COLUMNS = ("psnr", "ssim", "l1", "fid")
FILLS = ("mean_fill", "nearest_fill", "telea_fill")
TRAINED = ("federated", "centralised", "local")


def commands(kind: str, seed: int, folder: Path, arguments: argparse.Namespace) -> list[list[str]]:
    """Return what is run for one row and seed: one command, or one for each client."""
    settings = yaml.safe_load(CONFIG.read_text())
    rounds = arguments.rounds or settings["federation"]["rounds"]
    shared = ["--config", str(CONFIG), "--seed_everything", str(seed), "--data.source.root", arguments.shared]
    shared += ["--trainer.enable_progress_bar", "false", "--federation.executor", "SequentialExecutor"]
    shared += ["--federation.rounds", str(rounds)]
    if kind == "federated":
        resume = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").exists() else []
        return [["fedgan_lightning", "fit", *shared, "--run_dir", str(folder), *resume]]
    clients, steps = settings["data"]["num_clients"], rounds * settings["federation"]["local_steps"]
    ways = ["centralised"] if kind == "centralised" else [f"local:{client}" for client in range(clients)]
    return [
        ["benchmarks.controls", way, str(steps), *shared, "--run_dir", str(folder / way.replace(":", ""))]
        for way in ways
        if not (folder / way.replace(":", "") / "summary.json").exists()
    ]


def train(kind: str, seed: int, folder: Path, arguments: argparse.Namespace) -> None:
    """Run what is missing of one row and seed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for command in commands(kind, seed, folder, arguments):
        subprocess.run([sys.executable, "-W", "ignore", "-m", *command], env=environment, check=True)


def read(kind: str, folder: Path) -> dict[str, Any] | None:
    """Return the values of one row and seed, means over the clients that are finished, if any is."""
    paths = [folder / "summary.json"] if kind == "federated" else sorted(folder.glob("*/summary.json"))
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    if kind == "federated":
        found = [summary for summary in found if summary["status"] == "finished"]
    if not found:
        return None
    values = [summary["final"] if kind == "federated" else summary["test"] for summary in found]
    names = [f"completion_{column}" for column in COLUMNS]
    means = {name: statistics.mean(own[name] for own in values) for name in names}
    seconds = sum(summary["wall_seconds"] for summary in found)
    return {**means, "seconds": seconds, "runs": len(found), "facts": found[0]["evaluation"]}


def table(out: Path, seeds: list[int]) -> str:
    """Return means over the finished seeds, with their standard deviations, as markdown."""
    found = {kind: [v for seed in seeds if (v := read(kind, out / kind / f"seed{seed}"))] for kind in TRAINED}
    lines = ["| | seeds | PSNR, dB | SSIM | L1 in the hole | FID | s |", "|---|---|---|---|---|---|---|"]
    facts = found["federated"][0]["facts"] if found["federated"] else {}
    for name in FILLS:
        if f"completion_psnr_{name}" in facts:
            cells = [f"{facts[f'completion_{column}_{name}']:.3g}" for column in COLUMNS]
            lines.append(f"| {name.replace('_', ' ')} | | " + " | ".join(cells) + " | |")
    for kind, runs in found.items():
        if runs:
            cells = [spread([run[f"completion_{column}"] for run in runs]) for column in COLUMNS]
            seconds = statistics.mean(run["seconds"] for run in runs)
            lines.append(f"| {title(kind, runs)} | {len(runs)} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    floor = f"Floor of the FID, whole test pictures: {facts['completion_fid_floor']:.3g}." if facts else ""
    return "\n".join([*lines, "", floor])


def title(kind: str, runs: list[dict[str, Any]]) -> str:
    return f"alone, mean of {runs[0]['runs']} clients" if kind == "local" else kind


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3g}"
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TRAINED, default=list(TRAINED), help="rows to run")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, help="instead of the configuration's")
    parser.add_argument("--out", default="runs/inpainting_benchmark")
    parser.add_argument("--shared", default=str(ROOT.parent / "shared" / "data"), help="root of MNIST")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    for seed in [] if arguments.table else arguments.seeds:
        for kind in arguments.only:
            folder = out / kind / f"seed{seed}"
            if kind == "local" or read(kind, folder) is None:
                train(kind, seed, folder, arguments)
    print(table(out, arguments.seeds))


if __name__ == "__main__":
    main()
