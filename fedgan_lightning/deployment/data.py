"""The server's data module in a deployment: what it knows of the clients' data without having any of it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.samples import ClientSamples, SampleForm, Samples
from fedgan_lightning.deployment.sites import Check
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.federated_queries import FederatedQuery
from fedgan_lightning.protocol import State

logger = logging.getLogger("fedgan_lightning")


class Survey(Protocol):
    """Asks all sites, and returns their answers by client; sums, where ``sums_only``, of all of them together."""

    @property
    def sums_only(self) -> bool: ...

    def facts(self) -> dict[int, dict[str, Any]]: ...

    def sums(self, facts: dict[str, Any], state: State, *, check: Check) -> list[State]: ...


class RemoteDataModule(FederatedDataModule):
    """The federation's data as its server sees it: what sites told of sizes and labels, and the server's own samples.

    ``train_samples`` and ``test_samples`` are the server's own, where it has any: rulers are trained and checked on
    them. Most servers have none; then both are a form without samples. Whatever else concerns clients' samples is asked
    of the sites as sums.

    Args:
        own: The data module of the server's configuration.
        survey: Asks the sites.
        has_samples: Whether the server has samples of its own, from the source of its configuration.
    """

    has_client_samples: ClassVar[bool] = False

    def __init__(self, own: FederatedDataModule, survey: Survey, *, has_samples: bool = True) -> None:
        super().__init__(
            own.source,
            partition=own.partition,
            num_clients=own.num_clients,
            batch_size=own.batch_size,
            drop_last=own.drop_last,
            max_samples=own.max_samples,
            validation_share=own.validation_share,
            seed=own.seed,
        )
        self._survey, self.has_server_samples = survey, has_samples
        self.has_client_sums = not survey.sums_only
        self._facts: dict[int, dict[str, Any]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Ask the sites what they hold."""
        if not self._facts:
            facts = dict(self._survey.facts())
            widths = {k: len(own["label_counts"]) for k, own in facts.items()}
            width = self.num_classes if self.num_classes and {*widths.values()} != {1} else 1
            for client_id in sorted(k for k, own in widths.items() if own != width):
                logger.warning(
                    f"client {client_id} counts {widths[client_id]} labels, not {width}: its counts are not used"
                )
                facts[client_id] = {**facts[client_id], "label_counts": [0] * width}
            for client_id in {*range(self.num_clients)} - {*facts}:  # of sites that were expelled before they came
                facts[client_id] = {"num_examples": 0, "label_counts": [0] * width, "is_image": None}
            self._facts = facts

    @property
    def train_samples(self) -> Samples:  # type: ignore[override] # of a data set that does not change
        return super().train_samples if self.has_server_samples else self._form()

    @property
    def test_samples(self) -> Samples:  # type: ignore[override]
        return super().test_samples if self.has_server_samples else self._form()

    def _form(self) -> SampleForm:
        """Return what most sites say of the samples that they hold; those who say otherwise are named."""
        self.setup()
        kinds = {k: bool(own["is_image"]) for k, own in self._facts.items() if own["is_image"] is not None}
        is_image = 2 * sum(kinds.values()) >= len(kinds)
        if others := sorted(k for k, own in kinds.items() if own != is_image):
            said, usual = ("numbers", "pixels") if is_image else ("pixels", "numbers")
            logger.warning(f"clients {others} say that they hold {said}, and most others {usual}")
        return SampleForm.of(self.sample_shape, is_image=is_image)

    def num_examples(self, client_id: int) -> int:
        return int(self._facts[client_id]["num_examples"])

    def steps_per_epoch(self, client_id: int) -> int:
        return super().steps_per_epoch(client_id) if self.num_examples(client_id) else 0  # it was expelled

    def label_counts(self) -> np.ndarray:
        return np.array([self._facts[client_id]["label_counts"] for client_id in range(self.num_clients)])

    def labels_like_union(self, num_samples: int, *, generator: torch.Generator) -> Tensor | None:
        if not self.num_classes:
            return None
        shares = torch.from_numpy(self.label_counts().sum(0)).double()
        return torch.multinomial(shares, num_samples, replacement=True, generator=generator)

    def answers(self, query: FederatedQuery) -> Iterator[State]:
        """Yield what every client answers, or the sum of all their answers, made where the samples are.

        Raises:
            QuorumError: If a site does not answer, or with what is no answer.
        """
        sizes = [self.num_examples(k) for k in range(self.num_clients)]

        def check(client_id: int | None, answer: State) -> None:
            if client_id is None:
                query.check(answer, who="all sites together, of whom none can be named", sizes=sizes)
            else:
                query.check(answer, who=f"client {client_id}", sizes=[sizes[client_id]])

        yield from self._survey.sums({**query.facts(), "query": query.kind}, query.state(), check=check)

    def client_samples(self, client_id: int) -> ClientSamples:
        """Refuse.

        Raises:
            ConfigurationError: Always: samples are at their sites.
        """
        raise ConfigurationError(
            message(
                "samples of clients must stay where they are",
                received=f"a metric or picture that asks for those of client {client_id}",
                fix="take it out of evaluation.metrics in a deployment",
            )
        )

    def fingerprint(self) -> str:
        known = [(k, own["num_examples"], own["label_counts"]) for k, own in sorted(self._facts.items())]
        stream = f"{self.batch_size} {self.seed}" + ("" if self.drop_last else " incomplete")
        return hashlib.sha256(f"{stream} {known}".encode()).hexdigest()[:16]
