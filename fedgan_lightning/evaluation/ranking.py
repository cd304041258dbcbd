"""Metrics of the recommendation literature: does a user's held-out interaction stand high in her ranking?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.samples import ClientSamples
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.federated_queries import COUNT, ROUNDING, FederatedQuery, QueryContext, summed
from fedgan_lightning.evaluation.metrics import Metric
from fedgan_lightning.protocol import State
from fedgan_lightning.seeding import make_generator

#: Users whose conditions are in memory at a time.
USERS_AT_A_TIME = 1000
#: What :func:`ranking_measures` returns.
MEASURES = ("precision5", "precision20", "recall20", "ndcg20", "mrr")
#: Under this name scores travel that are everybody's.
SCORES = "scores"


class RankingQuality(Metric):
    """Rankings of all items for every user, against her held-out ones: ``precision5``, ``precision20``, ``recall20``,
    ``ndcg20`` and ``mrr``, in [0, 1], 1 at best.

    The generator gets a user's training interactions, and her items are ranked by what it generates; training items
    are left out. The same values of ranking by popularity (the number of users who have an item) are reported once, as
    ``ndcg20_popularity`` and so on: what a recommender must beat. All are means over users: a site of a deployment
    ranks for its own users, and tells sums over them. Formulas: :func:`ranking_measures`.
    """

    larger_is_better = MEASURES

    def __init__(self) -> None:
        self.data: FederatedDataModule | None = None

    def queries(self, data: FederatedDataModule, *, sent: bool = False) -> list[FederatedQuery]:
        items = data.sample_shape[0]
        return [ItemCounts(items), Rankings(items, scores=torch.empty(0))]

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.data = data
        counts = summed(data, ItemCounts(data.sample_shape[0]))
        if not int(counts[COUNT]):
            raise ConfigurationError(
                message(
                    "some user must have training and held-out interactions",
                    received="none of the clients' users",
                    fix="raise data.source.holdout_fraction",
                )
            )
        popularity = _means(summed(data, Rankings(data.sample_shape[0], scores=counts["items"])))
        return {
            "ranking_users": int(counts[COUNT]),
            "ranking_held_out": int(counts["wanted"]),
            **{f"{name}_popularity": value for name, value in popularity.items()},
        }

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        return {}

    def inspect(self, model: nn.Module) -> dict[str, float]:
        assert self.data is not None
        return _means(summed(self.data, Rankings(self.data.sample_shape[0], model=model)))


def _means(sums: State) -> dict[str, float]:
    return {name: float(sums[name]) / int(sums[COUNT]) for name in MEASURES}


class ItemCounts(FederatedQuery):
    """How many of a client's users have each item, among those that can be asked about held-out ones.

    Args:
        items: Number of items.
    """

    kind = "item counts"

    def __init__(self, items: int) -> None:
        self.items = items

    def facts(self) -> dict[str, Any]:
        return {"items": self.items}

    def state(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def read(cls, facts: Mapping[str, Any], state: State, context: QueryContext) -> ItemCounts:
        return cls(int(facts["items"]))

    def answer(self, context: QueryContext) -> dict[str, Tensor]:
        seen, wanted = histories_in(context.view, context.data)
        return {"items": seen.double().sum(0), "wanted": wanted.double().sum(), COUNT: torch.tensor(len(seen))}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"items": (self.items,), "wanted": ()}

    def objection(self, answer: State, *, count: int) -> str | None:
        """A user has an item or has not, and wants at most all."""
        most = {"items": count, "wanted": count * self.items}
        return _beyond(answer, most)


class Rankings(FederatedQuery):
    """Sums over a client's users of the ranking measures, by a generator or by one list of scores for everybody.

    Args:
        items: Number of items.
        model: Whose preferences rank; or
        scores: (items,), by which they are ranked.
    """

    kind = "rankings"

    def __init__(self, items: int, *, model: nn.Module | None = None, scores: Tensor | None = None) -> None:
        self.items, self.model, self.scores = items, model, scores

    def facts(self) -> dict[str, Any]:
        return {"items": self.items}

    def state(self) -> dict[str, Tensor]:
        if self.model is None:
            assert self.scores is not None
            return {SCORES: self.scores}
        entries = self.model.state_dict().items()
        return {name: value for name, value in entries if not name.startswith("discriminator.")}

    @classmethod
    def read(cls, facts: Mapping[str, Any], state: State, context: QueryContext) -> Rankings:
        if SCORES in state:
            return cls(int(facts["items"]), scores=state[SCORES])
        assert context.module is not None
        model = copy.deepcopy(context.module)
        model.load_state_dict({**model.state_dict(), **state})
        return cls(int(facts["items"]), model=model)

    def answer(self, context: QueryContext) -> dict[str, Tensor]:
        seen, wanted = histories_in(context.view, context.data)
        if not len(seen):
            return {**dict.fromkeys(MEASURES, torch.zeros((), dtype=torch.float64)), COUNT: torch.tensor(0)}
        if self.model is not None:
            scores = preferences(self.model, seen)
        else:
            assert self.scores is not None
            scores = self.scores.expand_as(seen)
        measures = ranking_measures(scores, seen=seen, wanted=wanted)
        return {**{name: value.sum() for name, value in measures.items()}, COUNT: torch.tensor(len(seen))}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(MEASURES, ())

    def objection(self, answer: State, *, count: int) -> str | None:
        """Every measure lies in [0, 1] for every user."""
        return _beyond(answer, dict.fromkeys(MEASURES, count))


def _beyond(answer: State, most: Mapping[str, int]) -> str | None:
    """Return which sum is negative, or larger than it can be."""
    for name, bound in most.items():
        low, high = float(answer[name].min()), float(answer[name].max())
        if low < -ROUNDING or high > bound + ROUNDING * (1 + bound):
            return f"{name} from {low:.6g} to {high:.6g}, not from 0 to {bound}"
    return None


def histories(data: FederatedDataModule) -> tuple[Tensor, Tensor]:
    """Return training and held-out interactions (users, items) of all clients' users who have some of both."""
    held = torch.from_numpy(np.sort(np.concatenate(data.indices)))
    return histories_in(ClientSamples(samples=data.train_samples, indices=held), data)


def histories_in(view: ClientSamples, data: FederatedDataModule) -> tuple[Tensor, Tensor]:
    """Return training and held-out interactions (users, items) of the users of a view who have some of both.

    Raises:
        ConfigurationError: If the splits are not about the same users.
    """
    users = view.samples.columns.get("user")
    if users is None or "user" not in data.test_samples.columns:
        raise ConfigurationError(
            message(
                "RankingQuality must have the same users in both splits, by a column user",
                received=type(data.source).__name__,
                fix="use it with data.source Interactions",
            )
        )
    rows = {name: row for row, name in enumerate(data.test_samples.columns["user"].tolist())}
    held = view.indices.numpy()
    pairs = [(place, rows[name]) for place, name in zip(held.tolist(), users[held].tolist()) if name in rows]
    places, others = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    seen, wanted = view.samples.x[places].float(), data.test_samples.x[others].float()
    both = seen.any(1) & wanted.any(1)
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
                "rankings must come from a GAN whose condition are the user's purchases",
                received=f"{type(model).__name__} without a condition",
                fix="set model.condition: CFGANCondition, or leave RankingQuality out of evaluation.metrics",
            )
        )
    noise, found = make_generator(0, "ranking latents"), []
    for x in purchases.split(USERS_AT_A_TIME):
        nothing_masked = torch.ones(len(x), condition.num_random)
        conditions = condition.make(x, torch.zeros(len(x), dtype=torch.int64), nothing_masked)
        found.append(sample(len(x), conditions=conditions, generator=noise).float().cpu())
    return torch.cat(found)


def ranked(scores: Tensor, *, seen: Tensor) -> Tensor:
    """Return items (users, items) in descending order of score, the seen ones last; of equals the first item leads."""
    return scores.masked_fill(seen > 0, -torch.inf).argsort(dim=1, descending=True, stable=True)


def ranking_values(scores: Tensor, *, seen: Tensor, wanted: Tensor) -> dict[str, float]:
    """Return the means over users of :func:`ranking_measures`."""
    measures = ranking_measures(scores, seen=seen, wanted=wanted)
    return {name: float(value.mean()) for name, value in measures.items()}


def ranking_measures(scores: Tensor, *, seen: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Return the ranking measures of every user (users,).

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
    return {
        "precision5": hits[:, :5].sum(1) / 5,
        "precision20": hits[:, :20].sum(1) / 20,
        "recall20": hits[:, :20].sum(1) / count,
        "ndcg20": (hits * discounts)[:, :20].sum(1) / ideal,
        "mrr": 1 / (hits.argmax(1).double() + 1),
    }
