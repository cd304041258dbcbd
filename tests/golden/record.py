"""Golden short runs: what they gave, and the command that wrote it down.

python -m tests.golden.record
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch

from tests.conftest import digits_data, federate, ring_data, ring_gan
from tests.parity.test_federation import batchnorm_gan

FOLDER = Path(__file__).parent
RUNS = {
    "ring_average": lambda *c: federate(ring_gan(), ring_data(), *c, rounds=4, local_steps=5),
    "ring_local_keep": lambda *c: federate(
        ring_gan(), ring_data(), *c, rounds=4, local_steps=5, optimizer_state="keep", sync={"discriminator": "local"}
    ),
    "digits_batchnorm": lambda *c: federate(batchnorm_gan(), digits_data(), *c, rounds=4, local_steps=3),
}


class Record(L.Callback):
    def __init__(self):
        self.lines = []

    def on_round_end(self, trainer, server, info, metrics):
        kept = [name for name in sorted(metrics) if name.startswith(("train/loss", "update_norm"))]
        self.lines += [f"{info.round + 1} {name} {metrics[name]:.9g}" for name in kept]


def lines(name: str) -> list[str]:
    torch.set_num_threads(1)
    record = Record()
    RUNS[name](record)
    return record.lines


def main() -> None:
    head = (
        f"# python -m tests.golden.record; torch {torch.__version__}, python {sys.version.split()[0]}, one CPU thread\n"
    )
    for name in RUNS:
        (FOLDER / f"{name}.txt").write_text(head + "\n".join(lines(name)) + "\n")


if __name__ == "__main__":
    main()
