"""Client steps per second of the executors against a hand-written loop, and against other engines where they install.

    python -m benchmarks.speed                      # all rows, five repeats, markdown
    python -m benchmarks.speed --workloads ring64 --repeats 3 --skip flower
    python -m benchmarks.speed --auto-only

Executor and loop take turns, round by round in one process: a machine that others use slows both. Every figure is a
median; "x loop" is the loop's median over the executor's, taken in the same process. The loop, the sequential and the
vectorized executor run on the number of threads that suits each best; ``auto`` is measured by itself only where it
chooses another way than these. Two ranks, Flower and pfl-research are processes of their own,
between two runs of the loop. ``--auto-only`` compares what ``auto`` chooses with the other ways by turns, since two
ratios to the loop, minutes apart, differ by more than these ways do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.bare import bare_trainer
from benchmarks.workloads import WORKLOADS, PlainLoop, Workload, data, gan
from fedgan_lightning import AutoExecutor, FederatedOrchestrator, ServerModule
from fedgan_lightning.federation.executors.auto import AdaptiveExecutor, ExecutionMode
from fedgan_lightning.protocol import Executor
from fedgan_lightning.provenance import described

WARM_UP = 1
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TakeTurns(L.Callback):
    """After every round of the federation, one round of something else; both are timed."""

    def __init__(self, other: Callable[[], float] | None) -> None:
        self.other, self.seconds, self.others = other, [], []  # type: ignore[var-annotated]
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_round_end(self, trainer: L.Trainer, server: Any, info: Any, metrics: Any) -> None:
        self.seconds.append(time.perf_counter() - self._since)
        if self.other is not None:
            self.others.append(self.other())
        self._since = time.perf_counter()


def federate(workload: Workload, executor: Executor, *, rounds: int, callback: L.Callback, devices: int = 1) -> None:
    """Run rounds of the framework as a user does, with fresh optimizers on every client."""
    orchestrator = FederatedOrchestrator(
        rounds=rounds, local_steps=workload.steps, executor=executor, optimizer_state="reset"
    )
    trainer = bare_trainer(orchestrator, callback, devices=devices)
    trainer.fit(ServerModule(gan(workload)), datamodule=data(workload))


def timed_round(loop: PlainLoop, threads: int) -> float:
    """Return the seconds of one round of the loop."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    started = time.perf_counter()
    loop.round()
    elapsed = time.perf_counter() - started
    torch.set_num_threads(before)
    return elapsed


def best_threads(loop: PlainLoop) -> int:
    """Return the number of threads on which the loop is fastest: the best of two rounds each, taking turns."""
    seconds: dict[int, list[float]] = {1: [], CORES: []}
    timed_round(loop, 1)
    for _ in range(2):
        for threads, found in seconds.items():
            found.append(timed_round(loop, threads))
    return min(seconds, key=lambda threads: min(seconds[threads]))


class Fixed(AdaptiveExecutor):
    """Runs clients in one way, on so many threads."""

    def __init__(self, chunk_size: int, threads: int) -> None:
        super().__init__(num_threads=threads)
        self.chunk_size = chunk_size

    def choose(self, context: object, tasks: object) -> ExecutionMode:
        return ExecutionMode(
            chunk_size=self.chunk_size, num_threads=self.num_threads or 1, reason="set by the benchmark"
        )


def against_loop(
    workload: Workload, executor: Executor, *, repeats: int, loop: PlainLoop, threads: int
) -> dict[str, float]:
    """Return median seconds per round of executor and loop, taking turns."""
    turns = TakeTurns(lambda: timed_round(loop, threads))
    federate(workload, executor, rounds=repeats + WARM_UP, callback=turns)
    ours, theirs = statistics.median(turns.seconds[WARM_UP:]), statistics.median(turns.others[WARM_UP:])
    return {"seconds": ours, "loop": theirs, "ratio": theirs / ours}


def quickest(workload: Workload, ways: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the (clients per stack, threads) that is fastest over two rounds of half the steps each."""
    seconds, workload = {}, dataclasses.replace(workload, steps=workload.steps // 2)
    for way in ways:
        turns = TakeTurns(None)
        federate(workload, Fixed(*way), rounds=3, callback=turns)
        seconds[way] = min(turns.seconds[1:])
    return min(seconds, key=lambda way: seconds[way])


def chosen_by_auto(workload: Workload) -> tuple[int, int]:
    """Return (clients per stack, threads) as ``executor: auto`` chooses them."""
    auto = AutoExecutor()
    federate(workload, auto, rounds=1, callback=TakeTurns(None))
    assert auto.mode is not None
    return auto.mode.chunk_size, auto.mode.num_threads


def by_turns(workload: Workload, ways: set[tuple[int, int]], *, repeats: int) -> dict[tuple[int, int], float]:
    """Return the median seconds of a round of every way: short runs of each, one after the other, several times."""
    found: dict[tuple[int, int], list[float]] = {way: [] for way in sorted(ways)}
    for _ in range(repeats):
        for way, seconds in found.items():
            turns = TakeTurns(None)
            federate(workload, Fixed(*way), rounds=WARM_UP + 2, callback=turns)
            seconds += turns.seconds[WARM_UP:]
    return {way: statistics.median(seconds) for way, seconds in found.items()}


def auto_against_both(name: str, *, repeats: int) -> str:
    """Return a line of markdown: what ``auto`` chooses, time and again, and what that costs beside the best way."""
    workload = WORKLOADS[name]
    size = min(256, workload.clients)
    chosen = [chosen_by_auto(workload) for _ in range(repeats)]
    ways = {*chosen, *((own, n) for own in (1, size) for n in {1, CORES})}
    seconds = by_turns(workload, ways, repeats=repeats)
    best = min(seconds.values())
    rounds = ", ".join(f"{spelled(way)}: {1e3 * value:.0f}" for way, value in seconds.items())
    shares = ", ".join(f"{seconds[way] / best:.2f}" for way in chosen)
    return f"| {workload.title} | {rounds} | {shares} |"


def spelled(way: tuple[int, int]) -> str:
    """Return (clients per stack, threads) in words."""
    size, threads = way
    said = "1 thread, " if threads == 1 else f"{threads} threads, "
    return said + ("one by one" if size == 1 else f"stacks of {size}")


def best_of(results: dict[str, dict[str, float]]) -> tuple[str, dict[str, float]]:
    """Return the way with the best ratio."""
    return max(results.items(), key=lambda item: item[1]["ratio"])


def paired(command: list[str], *, loop: PlainLoop, threads: int, repeats: int) -> dict[str, float] | None:
    """Return median seconds per round of another process, between two batches of the loop's rounds."""
    before = [timed_round(loop, threads) for _ in range(repeats // 2 + 1)]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    after = [timed_round(loop, threads) for _ in range(repeats // 2 + 1)]
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode or not lines:
        print(run.stderr[-500:], file=sys.stderr)
        return None
    ours, theirs = statistics.median(json.loads(lines[-1])["seconds"][WARM_UP:]), statistics.median(before + after)
    return {"seconds": ours, "loop": theirs, "ratio": theirs / ours}


def measure(name: str, *, repeats: int, skip: set[str], peers_python: str) -> dict[str, Any]:
    """Return everything about one workload."""
    workload, row = WORKLOADS[name], {"workload": WORKLOADS[name].title}
    loop = PlainLoop(workload)
    threads = best_threads(loop)
    row["loop threads"] = threads
    turn: dict[str, Any] = {"repeats": repeats, "loop": loop, "threads": threads}
    counts = sorted({1, CORES})
    way = quickest(workload, [(1, n) for n in counts])
    row["sequential"] = (spelled(way), against_loop(workload, Fixed(*way), **turn))
    measured = {way: row["sequential"]}
    sizes = sorted({min(size, workload.clients) for size in (16, 64, 256)})
    way = quickest(workload, [(size, n) for n in counts for size in sizes[-2:]])
    row["vectorized"] = (spelled(way), against_loop(workload, Fixed(*way), **turn))
    measured[way] = row["vectorized"]
    if "auto" not in skip:
        way = chosen_by_auto(workload)
        row["auto"] = (
            spelled(way),
            measured[way][1] if way in measured else against_loop(workload, Fixed(*way), **turn),
        )
    own = [sys.executable, "-m", "benchmarks.speed", "--child", name, "--repeats", str(repeats)]
    if "ranks" not in skip:
        found = {f"2 ranks, {kind}": paired([*own, "--kind", kind], **turn) for kind in ("sequential", "vectorized")}
        known = {key: value for key, value in found.items() if value is not None}
        if known:
            row["two ranks"] = best_of(known)
    if "flower" not in skip:
        command = [peers_python, "-m", "benchmarks.flower_peer", name, "--rounds", str(repeats + WARM_UP)]
        result = paired(command, **turn)
        if result is not None:
            row["Flower"] = ("simulation engine, one CPU per client", result)
    if "pfl" not in skip:
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "benchmarks.pfl_peer"]
        result = paired([peers_python, *torchrun, name, "--rounds", str(repeats + WARM_UP)], **turn)
        if result is not None:
            row["pfl-research"] = ("two processes", result)
    return row


def child(name: str, kind: str, repeats: int) -> None:
    """Run the framework on two ranks; print the seconds of every round."""
    turns = TakeTurns(None)
    workload = WORKLOADS[name]
    executor = Fixed(1 if kind == "sequential" else -(-workload.clients // 2), 1)
    federate(workload, executor, rounds=repeats + WARM_UP, callback=turns, devices=2)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(json.dumps({"seconds": turns.seconds}))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table."""
    lines = ["| workload | loop, s/round (threads) | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for row in rows:
        loop = statistics.median(row[column][1]["loop"] for column in COLUMNS if column in row)
        cells = [f"{row[c][1]['ratio']:.2f} x ({row[c][0]})" if c in row else "not run" for c in COLUMNS]
        lines.append(f"| {row['workload']} | {loop:.3f} ({row['loop threads']}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


COLUMNS = ("sequential", "vectorized", "auto", "two ranks", "Flower", "pfl-research")


def versions() -> str:
    """Return commit, machine and versions."""
    return f"{described()}, {CORES} cores"


def quiet() -> None:
    """Say what the command line says: no information lines of Lightning."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], choices=["auto", "ranks", "flower", "pfl"])
    parser.add_argument(
        "--peers-python", default=sys.executable, help="a Python with flwr[simulation] and pfl[pytorch]"
    )
    parser.add_argument("--auto-only", action="store_true", help="what auto chooses, beside the best way, by turns")
    parser.add_argument("--json", help="also write all figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)  # set by Lightning; a loop without it would not pay for it
    torch.set_num_threads(1)
    if arguments.child:
        child(arguments.child, arguments.kind, arguments.repeats)
        return
    if arguments.auto_only:
        print("| workload | ms/round | what auto chose, over the best |\n|---|---|---|")
        for name in arguments.workloads:
            print(auto_against_both(name, repeats=arguments.repeats), flush=True)
        return
    rows = []
    for name in arguments.workloads:
        options = {"repeats": arguments.repeats, "skip": set(arguments.skip), "peers_python": arguments.peers_python}
        rows.append(measure(name, **options))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(f"{time.strftime('%Y-%m-%d %H:%M')}; {versions()}\n\n{markdown(rows)}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
