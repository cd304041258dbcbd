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
from pathlib import Path

from benchmarks.cells import SIGNS, Grid
from benchmarks.grids import GRIDS
from fedgan_lightning.visuals.runs import Run, read_run

ROOT = Path(__file__).parents[1]


def run_cell(grid: Grid, label: str, seed: int, folder: Path, *, shared: str) -> None:
    """Fit and test one cell with one seed, unless that is done."""
    run_dir = folder / folder_of(label) / f"seed{seed}"
    summary = run_dir / "summary.json"
    if (run_dir / "failed").exists() or (summary.exists() and "test" in json.loads(summary.read_text())):
        return
    options = [option.replace("{shared}", shared) for option in [*grid.common, *grid.cells[label]]]
    options = ["--config", str(ROOT / "configs" / grid.config), *options, "--seed_everything", str(seed)]
    options += ["--run_dir", str(run_dir), "--evaluation.raw", "true", "--trainer.enable_progress_bar", "false"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    python = [sys.executable, "-W", "ignore", "-m"]
    last = run_dir / "checkpoints" / "last.ckpt"
    started = time.perf_counter()
    commands = [["fit", *options, "--ckpt_path", "last"], ["test", *options, "--ckpt_path", str(last)]]
    commands = [["fedgan_lightning", *own] for own in commands]
    if label in grid.controls:
        kind, num_steps = grid.controls[label]
        commands = [["benchmarks.controls", kind, str(num_steps), *options]]
    for options_of in commands:
        done = subprocess.run([*python, *options_of], env=environment, stdout=subprocess.DEVNULL)
        if done.returncode < 0 or done.returncode > 128:  # a signal: neither finished nor diverged
            raise SystemExit(f"{label}, seed {seed}, was stopped by a signal; the same command goes on with it")
        if done.returncode:  # weights that are not finite, say: the table counts it
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "failed").write_text(" ".join(options_of))
            return
    print(f"{label}, seed {seed}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def table(grid: Grid, folder: Path) -> str:
    """Return mean +- standard deviation over the seeds that are done, as markdown."""
    found, facts, rulers, commits = {}, {}, set(), set()
    for label in grid.cells:
        paths = sorted(folder.glob(f"{folder_of(label)}/seed*/summary.json"))
        runs = [read_run(path.parent) for path in paths]
        found[label] = [{**run.summary, "test": ends(run)} for run in runs if "test" in run.summary]
        for summary in found[label]:
            facts |= summary["evaluation"]
            rulers |= {summary["evaluation"].get("fid_features_hash")} - {None}
            commits |= {f"{summary['commit'][:10]}{'+' * bool(summary['dirty'])}"} if summary.get("commit") else set()
    known = [c for c in grid.columns if any(c in s["test"] for done in found.values() for s in done)]
    lines = [f"| {grid.title} | seeds | " + " | ".join(known) + " | MB | s |", "|---" * (len(known) + 4) + "|"]
    for name in grid.baselines:
        cells = [facts.get(f"{column}_{name}") for column in known]
        if any(cells):
            lines.append(f"| {name} | | " + " | ".join("" if c is None else f"{c:.3g}" for c in cells) + " | | |")
    for label, done in found.items():
        if done:
            cells = [
                spread([summary["test"][c] for summary in done if summary["test"].get(c) is not None]) for c in known
            ]
            total = [sum(sum(s[f"bytes_{way}"].values()) for way in ("up", "down")) / 1e6 for s in done]
            seconds = [summary["wall_seconds"] for summary in done]
            means = f"{statistics.mean(total):.1f} | {statistics.mean(seconds):.0f}"
            lines.append(f"| {label} | {len(done)}{failed(folder, label)} | " + " | ".join(cells) + f" | {means} |")
    floors = ", ".join(
        f"{name} {value:.3g}" for name, value in facts.items() if name.endswith("floor") and value is not None
    )
    last = f"Floors: {floors}." if floors else ""
    if rulers:  # machines round differently, and so train different classifiers from the same seed
        last += f" Feature network {', '.join(sorted(rulers))}" + (": NOT COMPARABLE." if len(rulers) > 1 else ".")
    if commits:  # + where files differed from it
        last += f" Commit {', '.join(sorted(commits))}."
    return "\n".join([*lines, "", last.strip()])


def ends(run: Run) -> dict[str, float]:
    """Return what the full evaluation found, and the means of the first and last fifth of every sign's curve."""
    found: dict[str, float] = dict(run.summary["test"])
    for tag in SIGNS:
        values = run.scalars.get(tag, ([], []))[1]
        if values:
            few = max(1, len(values) // 5)
            found[f"{tag}, first"] = statistics.mean(values[:few])
            found[f"{tag}, last"] = statistics.mean(values[-few:])
    return found


def failed(folder: Path, label: str) -> str:
    """Return how many seeds did not end, in words; nothing if all did."""
    count = len(list(folder.glob(f"{folder_of(label)}/seed*/failed")))
    return f", {count} diverged" if count else ""


def folder_of(label: str) -> str:
    """Return the name of a cell's folder."""
    return label.replace(" ", "_").replace(",", "")


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
