"""What one round passes through: files of the package, and the records that are made on its way.

    python -m benchmarks.round_trace

One round of FedGAN, two clients one after the other, is traced from the orchestrator's hook on. A file is on the way of
the round if a record (task, update, report, total) is handed to one of its functions, or comes back; what is only
called for an answer about names, tensors or threads is listed apart.
"""

from __future__ import annotations

import sys
from dataclasses import is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L

import fedgan_lightning
from benchmarks.bare import bare_trainer
from fedgan_lightning import GAN, FederatedDataModule, FederatedOrchestrator, SequentialExecutor, ServerModule
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.sources import Ring

ROOT = Path(fedgan_lightning.__file__).parent


RECORDS = ("fedgan_lightning.protocol", "fedgan_lightning.federation.report")


class Trace(L.Callback):
    """Notes what is called between the beginning of a round and its end."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.on_the_way: set[str] = set()
        self.records: set[str] = set()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        sys.setprofile(self._note)

    def on_round_end(self, trainer: L.Trainer, server: Any, info: Any, metrics: Any) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not path.is_relative_to(ROOT):
            return
        name = str(path.relative_to(ROOT))
        self.files.add(name)
        found = [argument] if event == "return" else list(frame.f_locals.values())
        found += [item for value in found if isinstance(value, (list, tuple)) for item in value]
        known = {type(value).__name__ for value in found if type(value).__module__ in RECORDS and is_dataclass(value)}
        if known:
            self.on_the_way.add(name)
            self.records |= known


def traced() -> Trace:
    """Return the trace of the first round of a small federation."""
    gan = GAN(MLPGenerator(4, (2,), hidden=(8,), output="linear"), MLPDiscriminator((2,), hidden=(8,)))
    data = FederatedDataModule(Ring(num_samples=64), num_clients=2, batch_size=8)
    trace, orchestrator = Trace(), FederatedOrchestrator(rounds=1, local_steps=2, executor=SequentialExecutor())
    bare_trainer(trace, orchestrator).fit(ServerModule(gan), datamodule=data)
    return trace


def main() -> None:
    trace = traced()
    others = sorted(trace.files - trace.on_the_way)
    print(f"{len(trace.on_the_way)} files on the way of a round: {', '.join(sorted(trace.on_the_way))}")
    print(f"{len(trace.records)} record types: {', '.join(sorted(trace.records))}")
    print(f"called for an answer: {', '.join(others)}")


if __name__ == "__main__":
    main()
