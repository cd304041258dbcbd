"""How a moving average of the generator should be made: one run, averaged afterwards in several ways.

    python -m benchmarks.moving_average --config configs/digits.yaml

    python -m benchmarks.moving_average --metric high_quality --config configs/ring8.yaml

Options are those of ``fit``, but for the metric that is compared (FID). The weights after every round are kept in the
run directory; then they are averaged with the configuration's half-life, constant or limited to a share of the images
seen, and every average is scored.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch

from fedgan_lightning.cli import FederatedCLI, run
from fedgan_lightning.evaluation.callback import Evaluation
from fedgan_lightning.gan.average import make_ema, update_ema_

RAMPUPS = {None: "constant half-life", 0.05: "at most 5 % of the images seen", 0.02: "at most 2 %"}


class KeepRounds(L.Callback):
    """Writes the generator's weights at the start and after every round."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.on_round_end(trainer, pl_module, None, None)

    def on_round_end(self, trainer: L.Trainer, server: Any, info: Any, metrics: Any) -> None:
        folder = Path(trainer.default_root_dir) / "rounds"
        folder.mkdir(exist_ok=True)
        torch.save(server.model.generator.state_dict(), folder / f"{trainer.global_step:05d}.pt")


def score(cli: FederatedCLI, *, metric: str) -> list[str]:
    """Return a table of a metric after a half, three quarters and all of the rounds."""
    gan, per_round = cli.model.model, cli.datamodule.batch_size * cli.orchestrator.local_steps
    (evaluation,) = (own for own in cli.trainer.callbacks if isinstance(own, Evaluation))
    start, *files = sorted((Path(cli.trainer.default_root_dir) / "rounds").glob("*.pt"))
    looks = sorted({max(1, len(files) * quarters // 4) for quarters in (2, 3, 4)})
    found: dict[str, list[float]] = {"raw": []}
    for rampup, name in RAMPUPS.items():
        gan.generator.load_state_dict(torch.load(start, weights_only=True))
        gan.generator_ema, found[name] = make_ema(gan.generator), []
        for number, path in enumerate(files, 1):
            gan.generator.load_state_dict(torch.load(path, weights_only=True))
            rule = {"half_life": gan.ema_half_life_images, "rampup": rampup}
            update_ema_(gan.generator_ema, gan.generator, num_images=per_round, **rule)
            if number in looks:
                values = evaluation.evaluate(cli.trainer, cli.model)
                found[name].append(values[metric])
                found["raw"].append(values[f"{metric}_raw"])
    lines = ["| | " + " | ".join(f"round {look}" for look in looks) + " |", "|---" * (len(looks) + 1) + "|"]
    for name, values_of in found.items():  # the raw weights' come again with every average
        lines.append(f"| {name} | " + " | ".join(f"{value:.4g}" for value in values_of[: len(looks)]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--metric", default="fid")
    own, options = parser.parse_known_args()
    keep = ["--trainer.callbacks+", "benchmarks.moving_average.KeepRounds", "--evaluation.raw", "true"]
    keep += ["--evaluation.metrics", "[FrechetDistance]"] if own.metric == "fid" else []
    print("\n".join(score(run(["fit", *options, *keep]), metric=own.metric)))


if __name__ == "__main__":
    main()
