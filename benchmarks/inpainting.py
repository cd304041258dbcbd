"""Completed pictures: the federation of configs/inpainting.yaml, centralised, every client alone, and fills without a
network, on the same holes of the same test pictures. Continues where it stopped.

    python -m benchmarks.inpainting                      # everything, then the table
    python -m benchmarks.inpainting --only federated     # one row; the table shows what there is
    python -m benchmarks.inpainting --table              # only the table

All rows take the same number of generator steps: rounds x local steps. The half-life of the moving average counts
images; controls see 1 / clients of the federation's, and have a half-life as much shorter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from fedgan_lightning import Completion
from fedgan_lightning.cli import FederatedCLI, built
from fedgan_lightning.visuals import pictures
from fedgan_lightning.visuals.completion import CompletionPictures

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "inpainting.yaml"
COLUMNS = ("psnr", "ssim", "l1", "fid")
FILLS = ("mean_fill", "nearest_fill", "telea_fill")
TRAINED = ("federated", "centralised", "local")


def options(arguments: argparse.Namespace, seed: int, run_dir: Path) -> list[str]:
    given = ["--config", str(CONFIG), "--seed_everything", str(seed), "--run_dir", str(run_dir)]
    given += ["--data.source.root", arguments.shared, "--trainer.enable_progress_bar", "false"]
    given += ["--federation.executor", "SequentialExecutor"]
    return given + (["--federation.rounds", str(arguments.rounds)] if arguments.rounds else [])


def federated(arguments: argparse.Namespace, seed: int, folder: Path) -> None:
    """Run the command line; its summary holds the values, and the fills as facts."""
    command = [sys.executable, "-W", "ignore", "-m", "fedgan_lightning", "fit", *options(arguments, seed, folder)]
    resume = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").exists() else []
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run([*command, *resume], env={**os.environ, "PYTHONPATH": path}, check=True)


def control(arguments: argparse.Namespace, seed: int, folder: Path, *, alone: bool) -> None:
    """Train on all data, or each client on its own; write the values of each."""
    values: dict[str, Any] = {}
    started, first = time.perf_counter(), build(arguments, seed, folder)
    data, clients = first.datamodule, first.datamodule.num_clients if alone else 1
    steps = first.orchestrator.rounds * first.orchestrator.local_steps
    metric = Completion()
    metric.prepare(data, device=torch.device("cpu"))
    for client_id in range(clients):
        gan = build(arguments, seed, folder).model.model
        gan.ema_half_life_images /= data.num_clients
        L.seed_everything(seed, verbose=False)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(gan, datamodule=data.client(client_id, num_steps=steps) if alone else data.pooled(num_steps=steps))
        values[str(client_id)] = metric.inspect(gan)
        folder.mkdir(parents=True, exist_ok=True)
        pictures.save(CompletionPictures().draw(data, gan), folder / f"completed{client_id}.png")
    values["seconds"] = time.perf_counter() - started
    (folder / "values.json").write_text(json.dumps(values))


def build(arguments: argparse.Namespace, seed: int, folder: Path) -> FederatedCLI:
    cli = built(options(arguments, seed, folder))
    cli.datamodule.setup()
    return cli


def read(kind: str, folder: Path) -> dict[str, Any] | None:
    """Return the values of one row and seed, means over clients, if it is finished."""
    path = folder / ("summary.json" if kind == "federated" else "values.json")
    if not path.exists():
        return None
    contents = json.loads(path.read_text())
    if kind == "federated":
        final = {**contents["final"], "seconds": contents["wall_seconds"], "facts": contents["evaluation"]}
        return final if contents["status"] == "finished" else None
    seconds = contents.pop("seconds")
    names = next(iter(contents.values()))
    return {name: statistics.mean(own[name] for own in contents.values()) for name in names} | {"seconds": seconds}


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
            lines.append(
                f"| {kind} | {len(runs)} | " + " | ".join(cells) + f" | {spread([r['seconds'] for r in runs])} |"
            )
    floor = f"Floor of the FID, whole test pictures: {facts['completion_fid_floor']:.3g}." if facts else ""
    return "\n".join([*lines, "", floor])


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
            if read(kind, folder) is not None:
                continue
            if kind == "federated":
                federated(arguments, seed, folder)
            else:
                control(arguments, seed, folder, alone=kind == "local")
    print(table(out, arguments.seeds))


if __name__ == "__main__":
    main()
