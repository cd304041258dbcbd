"""Attacks on what a generator gives away about those it was trained on, per client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.samples import ClientSamples
from fedgan_lightning.dp.audits.scores import Score, distance_score, logit_score
from fedgan_lightning.evaluation.metrics import Metric, check_reals, clients_of, everything
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_generator

Labelled = tuple[Tensor, Tensor]


class MembershipInference(Metric):
    """How well an attacker tells a client's training samples from samples that nobody trained on.

    Two attacks, each scored by its AUC, .5 at best: ``membership_auc/NUMBER`` by the distance to the nearest generated
    sample (Chen et al. 2020, GAN-Leaks, full black-box), ``membership_auc_discriminator/NUMBER`` by the logit of the
    global discriminator (Hayes et al. 2019, LOGAN). Members and others are compared within each class, and the others,
    from the test split, are seen as the client sees the world. Where training and test split differ in themselves, the
    attack succeeds without any memory: ``membership_auc_of_split/NUMBER`` is its AUC with distances to held-out reals
    in the place of generated ones.

    Args:
        max_samples: Most members, and most others, per client.
        seed: Seed of their choice.
    """

    test_only = True
    needs_client_samples = True
    networks = ("discriminator",)

    @checked(max_samples="[1, inf)", seed="[0, inf)")
    def __init__(self, *, max_samples: int = 500, seed: int = 0) -> None:
        self.max_samples, self.seed = max_samples, seed
        self.members: dict[int, ClientSamples] = {}
        self.others: dict[int, ClientSamples] = {}

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        facts = {}
        check_reals(len(data.test_samples), of="MembershipInference", split="test")
        held_out = everything(data.test_samples)
        first, second = torch.randperm(len(held_out), generator=make_generator(self.seed, "halves")).tensor_split(2)
        for client_id, view in enumerate(clients_of(data)):
            seen = ClientSamples(samples=data.test_samples, indices=held_out.indices, shift=view.shift)
            self.members[client_id] = self._some(view, torch.arange(len(view)))
            self.others[client_id] = self._some(seen, first)
            score = distance_score(_taken(self._some(seen, second))[0])
            facts[f"membership_auc_of_split/{client_id}"] = self._auc(client_id, score)
        return facts

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        score = distance_score(samples.cpu())
        return {f"membership_auc/{client_id}": self._auc(client_id, score) for client_id in self.members}

    def inspect(self, model: nn.Module) -> dict[str, float]:
        discriminator = plain_discriminator(model)
        if discriminator is None:
            return {}
        score = logit_score(discriminator)
        return {f"membership_auc_discriminator/{client_id}": self._auc(client_id, score) for client_id in self.members}

    def _some(self, view: ClientSamples, positions: Tensor) -> ClientSamples:
        """Return a view of some of a view's samples: of many clients nobody could keep the samples themselves."""
        generator = make_generator(self.seed, "members")
        chosen = positions[torch.randperm(len(positions), generator=generator)[: self.max_samples]]
        return replace(view, indices=view.indices[chosen])

    def _auc(self, client_id: int, score: Score) -> float:
        return membership_auc(_taken(self.members[client_id]), _taken(self.others[client_id]), score)


def plain_discriminator(model: nn.Module) -> nn.Module | None:
    """Return the discriminator of a module, (x, y) -> logits, or ``None``.

    Of other people's discriminators nobody knows what they take; some of ours want more than labels.
    """
    discriminator = getattr(model, "discriminator", None)
    more = getattr(model, "condition", None) is not None or getattr(model, "codec", None) is not None
    is_plain = hasattr(model, "discriminate") and not more
    return discriminator if isinstance(discriminator, nn.Module) and is_plain else None


def _taken(view: ClientSamples) -> Labelled:
    return view.take(torch.arange(len(view)))


def membership_auc(members: Labelled, others: Labelled, score: Score) -> float:
    """Return the AUC of ``score`` between members and others, the mean over classes weighted by their members; .5
    where no class has both.
    """
    (x, y), (other_x, other_y) = members, others
    inside, outside = score(x, y), score(other_x, other_y)
    found: Mapping[int, tuple[float, int]] = {
        int(label): (_auc(inside[y == label], outside[other_y == label]), int((y == label).sum()))
        for label in y.unique()
        if bool((other_y == label).any())
    }
    total = sum(count for _, count in found.values())
    return sum(auc * count for auc, count in found.values()) / total if total else 0.5


def _auc(inside: Tensor, outside: Tensor) -> float:
    truth = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))]).long()
    scores = torch.cat([inside, outside])
    # Ranks, because the function takes numbers outside [0, 1] for logits and loses differences of large ones.
    _, ranks = torch.unique(scores, return_inverse=True)
    return float(binary_auroc(ranks.double() / max(int(ranks.max()), 1), truth))
