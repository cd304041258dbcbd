"""A small classifier that a federation trains for itself, as a ruler for its generators: no server with data is needed.

``python -m fedgan_lightning.evaluation.federated_classifier RUN`` writes the weights of a run of
``configs/classifier.yaml`` to a file, and prints the settings of metrics that measure by it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.errors import CheckpointError, FedGANError, message
from fedgan_lightning.evaluation.features import Classifier
from fedgan_lightning.files import replacing
from fedgan_lightning.options import checked

#: What the classifier's entries are called in a checkpoint.
PREFIX = "classifier."


class FederatedClassifier(L.LightningModule):
    """Trains the classifier of :class:`~fedgan_lightning.metrics.ClassifierFeatures`, by cross-entropy and Adam.

    Args:
        shape: Of one sample.
        num_classes: Number of classes.
        is_image: Whether samples are pictures (C, H, W); else they are flattened.
        learning_rate: Of Adam.
    """

    @checked(shape="[1, inf)", num_classes="[2, inf)", learning_rate="(0, inf)")
    def __init__(
        self, shape: list[int], num_classes: int, *, is_image: bool = True, learning_rate: float = 2e-3
    ) -> None:
        super().__init__()
        self.classifier = Classifier(tuple(shape), num_classes, is_image=is_image)
        self.learning_rate = learning_rate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a minibatch (x, y)."""
        x, y = batch
        loss = cross_entropy(self.classifier(x.float())[1], y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the accuracy on what a client holds out (``data.validation_share``)."""
        x, y = batch
        self.log("accuracy", (self.classifier(x.float())[1].argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def export(run_dir: str | Path, path: str | Path | None = None) -> tuple[Path, str]:
    """Write the classifier of a run to a file of safetensors; return its path and its SHA-256.

    Args:
        run_dir: The run.
        path: The file; default ``classifier.safetensors`` in the run directory.

    Raises:
        CheckpointError: If the run has no checkpoint, or one of something else.
    """
    checkpoint = Path(run_dir) / "checkpoints" / "last.ckpt"
    state = read_checkpoint(checkpoint)["state_dict"]
    entries = {
        name.removeprefix(PREFIX): own.cpu().contiguous() for name, own in state.items() if name.startswith(PREFIX)
    }
    if not entries:
        raise CheckpointError(
            message(
                "a run must have trained a FederatedClassifier",
                received=f"{checkpoint} with {', '.join(sorted(state)[:3])}",
                fix="name a run of configs/classifier.yaml",
            )
        )
    content, target = save(entries), Path(path) if path is not None else Path(run_dir) / "classifier.safetensors"
    with replacing(target) as file:
        file.write(content)
    return target, hashlib.sha256(content).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file of a run, and print what a configuration says of it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", help="run of configs/classifier.yaml")
    parser.add_argument("--out", help="file; default classifier.safetensors in the run directory")
    options = parser.parse_args(arguments)
    try:
        path, digest = export(options.run_dir, options.out)
    except FedGANError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {path}; copy it to server and sites, and name it in evaluation.metrics:")
    print(f"features: {{class_path: FileFeatures, init_args: {{path: {path}, sha256: {digest}, module: MODULE}}}}")
    name = f"{Classifier.__module__}.{Classifier.__qualname__}"
    print(f"MODULE: {{class_path: {name}, init_args: the shape, num_classes and is_image of the run}}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
