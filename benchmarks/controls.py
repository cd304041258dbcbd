"""A control of a federation: the same GAN trained by a plain Trainer, on the union of the data or on one client's.

    python -m benchmarks.controls centralised 1200 --config configs/medical.yaml --run_dir runs/pooled
    python -m benchmarks.controls local:4 1200 --config configs/medical.yaml --run_dir runs/alone

It is evaluated in full, on the same data as the federation: clients see the world as they do there. Options after the
number of steps are those of ``fit``.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import lightning as L
import torch

from fedgan_lightning.cli import FederatedCLI, run
from fedgan_lightning.evaluation.callback import Evaluation
from fedgan_lightning.files import write_json
from fedgan_lightning.provenance import provenance


def train(cli: FederatedCLI, *, kind: str, num_steps: int) -> None:
    """Train the global module in place before the command looks at it."""
    data, gan = cli.datamodule, cli.model.model
    data.prepare_data()
    if kind == "centralised":
        own = data.pooled(num_steps=num_steps)
    else:
        own = data.client(int(kind.removeprefix("local:")), num_steps=num_steps)
    bare = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    torch.manual_seed(data.seed)
    L.Trainer(max_epochs=1, accelerator="auto", devices=1, **bare).fit(gan, datamodule=own)


def main() -> None:
    if len(sys.argv) < 3 or not re.fullmatch(r"centralised|local:\d+", sys.argv[1]):
        sys.exit(__doc__)
    kind, num_steps, *options = sys.argv[1:]
    started = time.perf_counter()
    cli = run(["test", *options], prepare=lambda cli: train(cli, kind=kind, num_steps=int(num_steps)))
    folder = Path(cli.trainer.default_root_dir)
    (evaluation,) = (own for own in cli.trainer.callbacks if isinstance(own, Evaluation))
    summary = {
        "test": json.loads((folder / "test.json").read_text()),
        "evaluation": evaluation.facts,
        "bytes_up": {},
        "bytes_down": {},
        "wall_seconds": time.perf_counter() - started,
        **provenance(cli.trainer.strategy.root_device),
    }
    write_json(folder / "summary.json", summary)


if __name__ == "__main__":
    main()
