"""Quality over declared grids: what is compared, over which seeds, in one table. Continues where it stopped.

    python -m benchmarks.quality --list
    python -m benchmarks.quality digits_k                 # every cell and seed, then the table
    python -m benchmarks.quality digits_k --only "K = 20" # one cell; the table shows what there is

A cell is the command line with some options; it is fitted, then tested in full. A run that is finished is not repeated,
one that was stopped goes on from its last checkpoint. All cells of a grid take the same number of generator steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
CENTRALISED = ["--data.num_clients", "1", "--data.partition", "IID"]


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
        title: In words.
        config: Configuration that all cells start from.
        cells: Options by label.
        seeds: Seeds of every cell.
        columns: Metrics of the table, as in test.json.
        common: Options of all cells.
    """

    title: str
    config: str
    cells: dict[str, list[str]]
    columns: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    common: list[str] = field(default_factory=list)


def rounds(total: int, local_steps: int) -> list[str]:
    """Return options for ``total`` generator steps in rounds of ``local_steps``."""
    return ["--federation.rounds", str(total // local_steps), "--federation.local_steps", str(local_steps)]


def only(client: int) -> list[str]:
    """Return options for training on one client's data alone."""
    return ["--federation.clients", "SelectedClients", "--federation.clients.clients", f"[{client}]"]


IMAGE_COLUMNS = (
    "fid",
    "fid_raw",
    "fid_test",
    "kid_test",
    "classes",
    "recall",
    "tstr_accuracy",
    "nearest_distance_ratio",
)
RING_COLUMNS = ("modes", "modes_raw", "high_quality", "high_quality_raw", "mode_divergence")


def k_sweep(total: int, steps: tuple[int, ...]) -> dict[str, list[str]]:
    """Return cells for several K, and the controls."""
    cells = {f"K = {k}": rounds(total, k) for k in steps}
    cells["centralised"] = [*rounds(total, 100), *CENTRALISED]
    cells["local only (client 0)"] = [*rounds(total, 100), *only(0)]
    return cells


GRIDS = {
    "digits_k": Grid(
        title="digits, five clients with two kinds each: local steps K at 1 000 generator steps",
        config="digits.yaml",
        common=["--data.num_clients", "5"],
        cells=k_sweep(1000, (1, 5, 20, 100, 500)),
        columns=IMAGE_COLUMNS,
    ),
    "digits_optimizer": Grid(
        title="digits, ten clients: what becomes of optimizer moments, IID and with two kinds of digit each",
        config="digits.yaml",
        cells={
            f"{split}, {policy}": ["--federation.optimizer_state", policy, *options]
            for split, options in {"two kinds": [], "IID": ["--data.partition", "IID"]}.items()
            for policy in ("average", "keep", "reset")
        },
        columns=IMAGE_COLUMNS,
    ),
    "mnist_k": Grid(
        title="MNIST, five clients with two digits each: local steps K at 1 200 generator steps, width 16",
        config="mnist.yaml",
        common=["--data.source.init_args.root", "{shared}"],
        cells=k_sweep(1200, (1, 5, 20, 100, 400)),
        columns=IMAGE_COLUMNS,
    ),
    "ring8_loss": Grid(
        title="ring of 8, four clients with two modes each, and IID: losses at 15 000 steps",
        config="ring8.yaml",
        cells={
            f"{loss}, {split}": ["--model.loss", loss, *options]
            for loss in ("NonSaturating", "Hinge", "LeastSquares", "RelativisticPairing")
            for split, options in {"two modes each": [], "IID": ["--data.partition", "IID"]}.items()
        },
        columns=RING_COLUMNS,
        seeds=(0, 1, 2, 3, 4),
    ),
}


def run_cell(grid: Grid, label: str, seed: int, folder: Path, *, shared: str) -> None:
    """Fit and test one cell with one seed, unless that is done."""
    run_dir = folder / label.replace(" ", "_").replace(",", "") / f"seed{seed}"
    summary = run_dir / "summary.json"
    if summary.exists() and "test" in json.loads(summary.read_text()):
        return
    options = [option.replace("{shared}", shared) for option in [*grid.common, *grid.cells[label]]]
    options = ["--config", str(ROOT / "configs" / grid.config), *options, "--seed_everything", str(seed)]
    options += ["--run_dir", str(run_dir), "--evaluation.raw", "true", "--trainer.enable_progress_bar", "false"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "fedgan_lightning"]
    last = run_dir / "checkpoints" / "last.ckpt"
    started = time.perf_counter()
    resume = ["--ckpt_path", "last"] if last.exists() else []
    subprocess.run([*command, "fit", *options, *resume], env=environment, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        [*command, "test", *options, "--ckpt_path", str(last)], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    print(f"{label}, seed {seed}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def table(grid: Grid, folder: Path) -> str:
    """Return mean +- standard deviation over the seeds that are done, as markdown."""
    found, facts = {}, {}
    for label in grid.cells:
        paths = sorted(folder.glob(f"{label.replace(' ', '_').replace(',', '')}/seed*/summary.json"))
        summaries = [json.loads(path.read_text()) for path in paths]
        found[label] = [summary for summary in summaries if "test" in summary]
        for summary in found[label]:
            facts |= summary["evaluation"]
    known = [c for c in grid.columns if any(c in s["test"] for done in found.values() for s in done)]
    lines = [f"| {grid.title} | seeds | " + " | ".join(known) + " | MB | s |", "|---" * (len(known) + 4) + "|"]
    for label, done in found.items():
        if done:
            cells = [spread([summary["test"][c] for summary in done if c in summary["test"]]) for c in known]
            total = [sum(sum(s[f"bytes_{way}"].values()) for way in ("up", "down")) / 1e6 for s in done]
            seconds = [summary["wall_seconds"] for summary in done]
            means = f"{statistics.mean(total):.1f} | {statistics.mean(seconds):.0f}"
            lines.append(f"| {label} | {len(done)} | " + " | ".join(cells) + f" | {means} |")
    floors = ", ".join(f"{name} {value:.3g}" for name, value in facts.items() if name.endswith("floor"))
    return "\n".join([*lines, "", f"Floors: {floors}." if floors else ""])


def spread(values: list[float]) -> str:
    """Return the mean, and the standard deviation where there are several."""
    if len(values) < 2:
        return f"{values[0]:.3g}" if values else ""
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="?", choices=list(GRIDS))
    parser.add_argument("--list", action="store_true", help="name the grids and their cells")
    parser.add_argument("--only", nargs="+", help="labels of cells to run")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--out", default="runs/quality")
    parser.add_argument("--shared", default=str(ROOT.parent / "shared" / "data"), help="root of MNIST")
    arguments = parser.parse_args()
    if arguments.list or arguments.grid is None:
        for name, grid in GRIDS.items():
            print(f"{name}: {grid.title}\n    {'; '.join(grid.cells)}")
        return
    grid, folder = GRIDS[arguments.grid], Path(arguments.out) / arguments.grid
    for seed in arguments.seeds or grid.seeds:
        for label in arguments.only or grid.cells:
            run_cell(grid, label, seed, folder, shared=arguments.shared)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table(grid, folder) + "\n")
    print(table(grid, folder))


if __name__ == "__main__":
    main()
