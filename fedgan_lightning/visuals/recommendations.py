"""What ``predict`` writes of a recommender: a CSV file of the best items for every user."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning as L

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.sources import Interactions
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.ranking import preferences, ranked
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.options import checked


class Recommendations(L.Callback):
    """In ``predict``, writes ``predictions/recommendations.csv``: user, rank, item, title, score of every user's best
    items, those that she has in training left out. The score is the generator's output, in (0, 1).

    In a simulation the server knows all users. A site would rank its own users with the global generator.

    Args:
        top: Items per user.
    """

    @checked(top="[1, inf)")
    def __init__(self, top: int = 20) -> None:
        self.top = top

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        source = getattr(trainer.datamodule, "source", None)  # type: ignore[attr-defined]
        if not isinstance(source, Interactions):
            raise ConfigurationError(
                message(
                    "Recommendations must be made for the users of Interactions",
                    received=type(source).__name__,
                    fix="set data.source: Interactions, or take the callback out of trainer.callbacks",
                )
            )

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ServerModule)
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "predictions" / "recommendations.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        data: FederatedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        lines = recommendations(pl_module, data, top=self.top)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user", "rank", "item", "title", "score"])
            writer.writerows((*line[:4], f"{line[4]:.6g}") for line in lines)
        print(f"wrote {path}")


def recommendations(
    server: ServerModule, data: FederatedDataModule, *, top: int
) -> list[tuple[str, int, str, str, float]]:
    """Return (user, rank, item, title, score) of the ``top`` items of every user of the training split."""
    source, samples = data.source, data.train_samples
    assert isinstance(source, Interactions)
    scores = preferences(server.model, samples.x)
    best = ranked(scores, seen=samples.x)[:, :top]
    unseen = (samples.x == 0).sum(1).tolist()  # a user who has nearly everything gets a shorter list
    names, titles = source.items, source.titles
    return [
        (user, place + 1, names[item], titles[item], values[item])
        for user, items, values, left in zip(
            samples.columns["user"].tolist(), best.tolist(), scores.tolist(), unseen, strict=True
        )
        for place, item in enumerate(items[:left])
    ]
