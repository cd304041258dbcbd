"""Membership attacks on a generator, per client and pooled, as rates at small false-positive rates with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.samples import ClientSamples, Samples
from fedgan_lightning.dp.audits.scores import (
    Score,
    calibrated_score,
    density_ratio_score,
    distance_score,
    logit_score,
    monte_carlo_radius,
    monte_carlo_score,
    principal_components,
    set_accuracy,
)
from fedgan_lightning.dp.audits.statistics import advantage, tpr_at_fpr
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.audit import Labelled, plain_discriminator
from fedgan_lightning.evaluation.metrics import Metric, check_reals, clients_of, everything
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_generator

#: Name of the attack on all clients at once, in the place of a client's number.
POOLED = "pooled"
#: Held-out samples that there must be: others, and a reference of which densities are estimated.
FEWEST_HELD_OUT = 4


@dataclass(frozen=True)
class Candidates:
    """Whom an attacker judges: members, others with the same share of every class, and what he knows besides.

    Attributes:
        members: Views of training samples.
        others: Views of held-out samples, as clients see the world.
        reference: Views of further held-out samples: the population, as he knows it.
    """

    members: list[ClientSamples]
    others: list[ClientSamples]
    reference: list[ClientSamples]


class MembershipAttacks(Metric):
    """How many training samples an attacker finds while he hardly ever accuses anybody falsely.

    For each attack, client and false-positive rate ``attack_tpr/ATTACK@FPR/CLIENT`` is the true-positive rate in
    [0, 1], between ``attack_tpr_lower/...`` and ``attack_tpr_upper/...`` (Clopper-Pearson); a useless attack has the
    false-positive rate itself. ``attack_advantage/ATTACK/CLIENT`` is the largest difference of the two rates over all
    thresholds. CLIENT is a number, or ``pooled``: all clients at once, every held-out sample in it once. With fewer
    than 1 / FPR others the rate can only be had at no false positive at all: ``attack_others/CLIENT`` is their number.

    Attacks: ``nearest`` (distance to the nearest generated sample), ``calibrated`` (the same, less the distance to
    held-out samples in the place of a reference generator's), ``monte_carlo`` and ``monte_carlo_log`` (generated
    samples around it), ``domias`` (density ratio of generated and held-out samples), ``discriminator`` (logit of the
    global one). ``attack_tpr/split@FPR/CLIENT`` is a control without any generator: held-out samples stand in for
    generated ones, so that what it finds is a difference of the two splits.

    Members and others are matched by class; half of the test split are others, the rest is the attacker's reference.
    Sources: Carlini et al. 2022 (rates), Chen et al. 2020, Hilprecht et al. 2019, van Breugel et al. 2023, Hayes et al.
    2019. Nothing here is a guarantee: a better attack may find more.

    Args:
        tpr_at: False-positive rates, in (0, 1).
        calibrated: Whether to calibrate the distance.
        monte_carlo: Whether to count generated samples around a candidate.
        domias: Whether to estimate densities.
        set_size: Samples in a set, for ``attack_set_accuracy/ATTACK/CLIENT``: how often the summed score of a set of
            members exceeds that of a set of others, .5 at best; ``None`` leaves sets out.
        components: Principal components in which samples are counted and densities estimated.
        clients: Which clients besides ``pooled``; default all.
        max_samples: Most members, and most others, of a client.
        confidence: Of the intervals, in (0, 1).
        seed: Seed of all choices.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    test_only = True
    needs_client_samples = True
    networks = ("discriminator",)

    @checked(
        tpr_at="(0, 1)",
        set_size="[1, inf)",
        components="[1, inf)",
        clients="[0, inf)",
        max_samples="[1, inf)",
        confidence="(0, 1)",
        seed="[0, inf)",
    )
    def __init__(
        self,
        *,
        tpr_at: Sequence[float] = (0.01, 0.001),
        calibrated: bool = True,
        monte_carlo: bool = True,
        domias: bool = True,
        set_size: int | None = None,
        components: int = 8,
        clients: Sequence[int] | None = None,
        max_samples: int = 2000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> None:
        self.tpr_at, self.clients = list(tpr_at), None if clients is None else list(clients)
        self.calibrated, self.monte_carlo, self.domias = calibrated, monte_carlo, domias
        self.set_size, self.components, self.max_samples = set_size, components, max_samples
        self.confidence, self.seed = confidence, seed
        self.candidates: dict[str, Candidates] = {}

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        check_reals(len(data.test_samples), of="MembershipAttacks", least=FEWEST_HELD_OUT, split="test")
        held_out = everything(data.test_samples)
        halves = torch.randperm(len(held_out), generator=make_generator(self.seed, "halves")).tensor_split(2)
        views = clients_of(data)
        facts: dict[str, Any] = {}
        found = {str(number): self._of_client(views[number], data, halves) for number in self._asked(len(views))}
        found[POOLED] = self._of_all(views, data, halves)
        self.candidates = {}
        for name, group in found.items():
            matched = self._matched(group)
            counts = [sum(map(len, side)) for side in (matched.members, matched.others)]
            facts |= {f"attack_members/{name}": counts[0], f"attack_others/{name}": counts[1]}
            if min(counts):  # no class of this client's is in the test split
                self.candidates[name] = matched
                facts |= self._judged(name, "split", distance_score(_taken(matched.reference)[0]), sets=False)
        return facts

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, group in self.candidates.items():
            for attack, score in self._attacks(samples.cpu(), group).items():
                values |= self._judged(name, attack, score)
        return values

    def inspect(self, model: nn.Module) -> dict[str, float]:
        discriminator = plain_discriminator(model)
        values: dict[str, float] = {}
        if discriminator is not None:
            for name in self.candidates:
                values |= self._judged(name, "discriminator", logit_score(discriminator))
        return values

    # ------------------------------------------------------------------ who is judged

    def _asked(self, num_clients: int) -> list[int]:
        """Return the clients that are judged one by one.

        Raises:
            ConfigurationError: If there is no such client.
        """
        asked = list(range(num_clients)) if self.clients is None else self.clients
        if wrong := [number for number in asked if number >= num_clients]:
            raise ConfigurationError(
                message(
                    f"MembershipAttacks must name clients 0 to {num_clients - 1}",
                    received=wrong[0],
                    fix="change its clients",
                )
            )
        return asked

    def _of_client(
        self, view: ClientSamples, data: FederatedDataModule, halves: tuple[Tensor, ...] | list[Tensor]
    ) -> Candidates:
        others, reference = (_seen(data.test_samples, half, view) for half in halves)
        return Candidates([view], [others], [reference])

    def _of_all(
        self, views: list[ClientSamples], data: FederatedDataModule, halves: tuple[Tensor, ...] | list[Tensor]
    ) -> Candidates:
        """Return all clients' members; every held-out sample is there once, as one of the clients would see it.

        The intervals count on that: of one sample in ten views the ten scores are no independent trials.
        """
        sizes = torch.tensor([len(view) for view in views], dtype=torch.float64)
        sides = []
        for half in halves:
            ends = (sizes.cumsum(0) / sizes.sum() * len(half)).round().long().tolist()
            parts = [half[start:end] for start, end in zip([0, *ends], ends)]
            sides.append([_seen(data.test_samples, part, view) for part, view in zip(parts, views) if len(part)])
        others, reference = sides
        return Candidates(views, others, reference)

    def _matched(self, group: Candidates) -> Candidates:
        """Choose members and others so that every class has the same share on both sides.

        A score of the class alone then has equal rates. Of class c, s_c = min(members, others) are taken, times the
        largest whole number that a side has of every class.
        """
        labels = [_labels(side) for side in (group.members, group.others)]
        counts = [torch.bincount(own, minlength=int(max(map(_highest, labels))) + 1) for own in labels]
        shared = torch.minimum(*counts)
        if not int(shared.sum()):
            return replace(group, members=[], others=[])
        sides = []
        for views, own, count in zip((group.members, group.others), labels, counts):
            times = int((count[shared > 0] // shared[shared > 0]).min())
            wanted = shared * times
            if int(wanted.sum()) > self.max_samples:  # with the same share on both sides
                wanted = (shared * (self.max_samples / int(shared.sum()))).floor().long().clamp_max(wanted)
            sides.append(_picked(views, _chosen(own, wanted, seed=self.seed)))
        members, others = sides
        return Candidates(members, others, self._limited(group.reference))

    def _limited(self, views: list[ClientSamples]) -> list[ClientSamples]:
        total = sum(map(len, views))
        generator = make_generator(self.seed, "reference")
        return _picked(views, torch.randperm(total, generator=generator)[: self.max_samples])

    # ------------------------------------------------------------------ how they are judged

    def _attacks(self, generated: Tensor, group: Candidates) -> dict[str, Score]:
        """Return scores by attack."""
        reference = _taken(group.reference)[0]
        scores = {"nearest": distance_score(generated)}
        if self.calibrated:
            scores["calibrated"] = calibrated_score(generated, reference)
        if self.monte_carlo:
            project = principal_components(generated, number=self.components)
            both = torch.cat([_taken(side)[0] for side in (group.members, group.others)])
            radius = monte_carlo_radius(both, generated, project=project)
            for variant in ("count", "log"):
                name = "monte_carlo" if variant == "count" else "monte_carlo_log"
                scores[name] = monte_carlo_score(generated, radius=radius, variant=variant, project=project)
        if self.domias:
            scores["domias"] = density_ratio_score(generated, reference, components=self.components)
        return scores

    def _judged(self, name: str, attack: str, score: Score, *, sets: bool = True) -> dict[str, float]:
        """Return what is reported of one attack on one group."""
        group = self.candidates[name]
        inside, outside = (score(*_taken(side)) for side in (group.members, group.others))
        values = {f"attack_advantage/{attack}/{name}": advantage(inside, outside)}
        for rate in self.tpr_at:
            point = tpr_at_fpr(inside, outside, fpr=rate, confidence=self.confidence)
            label = f"{attack}@{rate:g}/{name}"
            values |= {f"attack_tpr/{label}": point.tpr.value}
            values |= {f"attack_tpr_lower/{label}": point.tpr.lower, f"attack_tpr_upper/{label}": point.tpr.upper}
        if sets and self.set_size is not None:
            accuracy = set_accuracy(inside, outside, size=self.set_size, seed=self.seed)
            values[f"attack_set_accuracy/{attack}/{name}"] = accuracy
        return values


def _seen(samples: Samples, positions: Tensor, view: ClientSamples) -> ClientSamples:
    """Return some of the test split as a client would see them."""
    return ClientSamples(samples=samples, indices=positions, shift=view.shift)


def _taken(views: list[ClientSamples]) -> Labelled:
    """Return samples and labels of several views."""
    parts = [view.take(torch.arange(len(view))) for view in views]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _labels(views: list[ClientSamples]) -> Tensor:
    """Return the labels of several views, without their samples; zeros where there are none."""
    found = []
    for view in views:
        y = view.samples.y
        found.append(torch.zeros(len(view), dtype=torch.int64) if y is None else y[view.indices])
    return torch.cat(found)


def _highest(labels: Tensor) -> int:
    return int(labels.max()) if len(labels) else 0


def _chosen(labels: Tensor, wanted: Tensor, *, seed: int) -> Tensor:
    """Return positions of so many samples of each class, drawn without replacement."""
    drawn = torch.randperm(len(labels), generator=make_generator(seed, "members"))
    found = [drawn[labels[drawn] == label][: int(count)] for label, count in enumerate(wanted.tolist())]
    return torch.cat(found)


def _picked(views: list[ClientSamples], positions: Tensor) -> list[ClientSamples]:
    """Return the views of some positions of several views laid end to end; positions only, no copy of a sample."""
    ends = torch.tensor([len(view) for view in views]).cumsum(0)
    owner = torch.searchsorted(ends, positions, right=True)
    starts = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1]])
    found = []
    for number, view in enumerate(views):
        mine = positions[owner == number] - starts[number]
        if len(mine):
            found.append(replace(view, indices=view.indices[mine]))
    return found
