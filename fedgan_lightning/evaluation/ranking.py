"""Metrics of the recommendation literature: does a user's held-out interaction stand high in her ranking?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.metrics import Metric
from fedgan_lightning.seeding import make_generator

#: Users whose conditions are in memory at a time.
USERS_AT_A_TIME = 1000


class RankingQuality(Metric):
    """Rankings of all items for every user, against her held-out ones: ``precision5``, ``precision20``, ``recall20``,
    ``ndcg20`` and ``mrr``, in [0, 1], 1 at best.

    The generator is told a user's training interactions, and her items are ranked by what it generates; training items
    are left out. The same values of ranking by popularity (the number of users who have an item) are reported once, as
    ``ndcg20_popularity`` and so on: what a recommender must beat. All are means over users, so that a site's sum and
    its number of users would be all that it has to tell. Formulas: :func:`ranking_values`.
    """

    needs_client_samples = True
    larger_is_better = ("precision5", "precision20", "recall20", "ndcg20", "mrr")

    def __init__(self) -> None:
        self.seen = self.wanted = torch.empty(0)

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.seen, self.wanted = histories(data)
        popularity = ranking_values(self.seen.sum(0).expand_as(self.seen), seen=self.seen, wanted=self.wanted)
        return {
            "ranking_users": len(self.seen),
            "ranking_held_out": int(self.wanted.sum()),
            **{f"{name}_popularity": value for name, value in popularity.items()},
        }

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        return {}

    def inspect(self, model: nn.Module) -> dict[str, float]:
        return ranking_values(preferences(model, self.seen), seen=self.seen, wanted=self.wanted)


def histories(data: FederatedDataModule) -> tuple[Tensor, Tensor]:
    """Return training and held-out interactions (users, items) of the clients' users who have some of both.

    Raises:
        ConfigurationError: If the splits are not about the same users, or are not at hand.
    """
    train = data.train_samples if data.has_client_samples else None
    users = None if train is None else train.columns.get("user")
    if train is None or users is None or "user" not in data.test_samples.columns:
        raise ConfigurationError(
            message(
                "RankingQuality needs the same users in both splits, by a column user",
                received=f"{type(data.source).__name__} of {type(data).__name__}",
                fix="use it with data.source Interactions, in a simulation",
            )
        )
    rows = {name: row for row, name in enumerate(data.test_samples.columns["user"].tolist())}
    held = np.sort(np.concatenate(data.indices))
    pairs = [(place, rows[name]) for place, name in zip(held.tolist(), users[held].tolist()) if name in rows]
    places, others = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    seen, wanted = train.x[places].float(), data.test_samples.x[others].float()
    both = seen.any(1) & wanted.any(1)
    if not bool(both.any()):
        raise ConfigurationError(
            message(
                "some user has training and held-out interactions",
                received=f"none of {len(held)} in the training split",
                fix="raise data.source.holdout_fraction",
            )
        )
    return seen[both], wanted[both]


def preferences(model: nn.Module, purchases: Tensor) -> Tensor:
    """Return what the generator gives for purchases (users, items), by the moving average where there is one.

    Raises:
        ConfigurationError: If the model takes no condition made from purchases.
    """
    condition, sample = getattr(model, "condition", None), getattr(model, "sample", None)
    if condition is None or sample is None:
        raise ConfigurationError(
            message(
                "rankings need a GAN whose condition are the user's purchases",
                received=f"{type(model).__name__} without a condition",
                fix="set model.condition: Purchases, or leave RankingQuality out of evaluation.metrics",
            )
        )
    noise, found = make_generator(0, "ranking latents"), []
    for x in purchases.split(USERS_AT_A_TIME):
        nothing_masked = torch.ones(len(x), condition.num_random)
        told = condition.make(x, torch.zeros(len(x), dtype=torch.int64), nothing_masked)
        found.append(sample(len(x), conditions=told, generator=noise).float().cpu())
    return torch.cat(found)


def ranked(scores: Tensor, *, seen: Tensor) -> Tensor:
    """Return items (users, items) in descending order of score, the seen ones last; of equals the first item leads."""
    return scores.masked_fill(seen > 0, -torch.inf).argsort(dim=1, descending=True, stable=True)


def ranking_values(scores: Tensor, *, seen: Tensor, wanted: Tensor) -> dict[str, float]:
    """Return means over users of the ranking measures.

    With hit_r = 1 where the item at rank r is wanted, and n wanted items of a user:

        precision_k = sum_{r <= k} hit_r / k            recall_k = sum_{r <= k} hit_r / n
        ndcg_k = sum_{r <= k} hit_r / log2(r + 1)  /  sum_{r <= min(k, n)} 1 / log2(r + 1)
        mrr = 1 / (rank of the first wanted item)

    Sources: Järvelin and Kekäläinen 2002 (NDCG, binary gains); measures and cut-offs as in Chae et al. 2018, section 5.

    Args:
        scores: (users, items), any finite numbers.
        seen: Training interactions (users, items) in {0, 1}; they are not ranked.
        wanted: Held-out interactions (users, items) in {0, 1}; at least one of every user.
    """
    hits = wanted.double().gather(1, ranked(scores, seen=seen))
    count = wanted.double().sum(1)
    discounts = 1 / torch.log2(torch.arange(2, hits.shape[1] + 2, dtype=torch.float64))
    ideal = discounts.cumsum(0)[count.clamp(max=20).long() - 1]
    values = {
        "precision5": hits[:, :5].sum(1) / 5,
        "precision20": hits[:, :20].sum(1) / 20,
        "recall20": hits[:, :20].sum(1) / count,
        "ndcg20": (hits * discounts)[:, :20].sum(1) / ideal,
        "mrr": 1 / (hits.argmax(1) + 1.0),
    }
    return {name: float(value.mean()) for name, value in values.items()}
