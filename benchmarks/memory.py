"""Whether memory grows over the rounds of a run: resident memory after every round of one cell of a grid.

    python -m benchmarks.memory                                        # digits, half of the cohort fails each round
    python -m benchmarks.memory digits_faults "no faults" --rounds 300

The run is the command line's, with its logs, checkpoints, evaluations and pictures.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.grids import GRIDS
from benchmarks.quality import ROOT
from fedgan_lightning.cli import FederatedCLI, run
from fedgan_lightning.provenance import described

#: Rounds whose median is taken, on either side of the span.
WINDOW = 10


class Memory(L.Callback):
    """Notes the process's resident memory in MiB after every round."""

    def __init__(self) -> None:
        self.resident: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="?", default="digits_faults", choices=list(GRIDS))
    parser.add_argument("cell", nargs="?", default="mixed faults, validated")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    grid, memory = GRIDS[arguments.grid], Memory()

    def prepare(cli: FederatedCLI) -> None:
        trainer: Any = cli.trainer
        trainer.callbacks.append(memory)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options = ["--config", str(ROOT / "configs" / grid.config), *grid.common, *grid.cells[arguments.cell]]
        options += ["--federation.rounds", str(arguments.rounds), "--seed_everything", str(arguments.seed)]
        options += ["--run_dir", f"{folder}/run", "--trainer.enable_progress_bar", "false"]
        run(["fit", *options], prepare=prepare)
    found = memory.resident
    print(f"{described()}\n")
    print("| after round | resident memory, MiB |\n|---|---|")
    for place in sorted({0, *range(19, len(found), 20), len(found) - 1}):
        print(f"| {place + 1} | {found[place]:.1f} |")
    early, late = (statistics.median(part) for part in (found[20 : 20 + WINDOW], found[-WINDOW:]))
    print(f"| median of rounds 21 to {20 + WINDOW}, of the last {WINDOW} | {early:.1f}, {late:.1f} |")


if __name__ == "__main__":
    main()
