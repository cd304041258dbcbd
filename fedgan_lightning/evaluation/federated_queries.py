"""What clients are asked of their samples: sums that add up over clients, made where the samples are.

A simulation asks its own clients, a deployment its sites; the answer is made by the same code. Sites answer the
queries that they know and no others, and there is no query whose answer is about a single sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.samples import ClientSamples
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.features import FrozenNet
from fedgan_lightning.evaluation.fid import feature_sums
from fedgan_lightning.evaluation.portable import from_facts, sums_to_state, to_facts
from fedgan_lightning.federation.schema import is_believable
from fedgan_lightning.protocol import State
from fedgan_lightning.seeding import make_generator

#: Samples that are looked at together.
CHUNK = 1000
#: Dtypes of sums.
SUMS = (torch.float32, torch.float64)
#: How far rounding may move a sum, relative to 1 and to its size; sums that were masked are rounded once more.
ROUNDING = 1e-4
#: Every answer says under this name how many samples it sums up.
COUNT = "count"


@dataclass(frozen=True)
class QueryContext:
    """Who answers: one client, with what it has.

    Attributes:
        view: Its samples.
        data: Where they are from; its test split may belong to them.
        module: A module like the global one, for queries that carry the weights of one.
    """

    view: ClientSamples
    data: FederatedDataModule
    module: nn.Module | None = None


class FederatedQuery(ABC):
    """What a client is asked of all its samples together.

    Attributes:
        kind: Its name in messages.
    """

    kind: ClassVar[str]

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what :meth:`read` needs to make it anew, as plain values."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the tensors that :meth:`read` needs to make it anew."""

    @classmethod
    @abstractmethod
    def read(cls, facts: Mapping[str, Any], state: State, context: QueryContext) -> FederatedQuery:
        """Return the query that was sent."""

    @abstractmethod
    def answer(self, context: QueryContext) -> dict[str, Tensor]:
        """Return sums over the client's samples by name, and under ``count`` how many these are."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every sum but ``count``."""

    @abstractmethod
    def objection(self, answer: State, *, count: int) -> str | None:
        """Return why sums over so many samples cannot be right, or ``None``; they are finite and of the right shapes.

        Sums are inequalities to each other: a client that answers within them can still say what is not true of its
        samples, and no server that does not see these would know.
        """

    def most(self, sizes: Sequence[int]) -> int:
        """Return how many samples clients of these sizes sum up at most."""
        return sum(sizes)

    def least(self) -> int:
        """Return the fewest samples that a client must sum up: from sums over fewer single ones can be computed."""
        return 1

    def positions(self, context: QueryContext) -> Tensor:
        """Return which of the client's samples are summed up, as positions in its view."""
        return torch.arange(len(context.view))

    def check(self, answer: State, *, who: str = "a site", sizes: Sequence[int] | None = None) -> None:
        """Refuse an answer that is none.

        Args:
            answer: The sums.
            who: Who answers, in words.
            sizes: Sizes of the data sets that are in them, as clients stated them when they joined.

        Raises:
            ConfigurationError: If it has other entries, shapes or dtypes, is not finite, sums up nothing or more than
                there is, or cannot be a sum over samples.
        """
        wanted = {**self.shapes(), COUNT: ()}
        found = {name: tuple(value.shape) for name, value in answer.items()}
        finite = all(map(is_believable, answer.values()))
        kinds = {name: value.dtype for name, value in answer.items()}
        count = int(answer[COUNT]) if finite and found.get(COUNT) == () and kinds[COUNT] == torch.int64 else 0
        reason = None
        if not finite:
            reason = "NaN, infinity or larger numbers than there are"
        elif found != wanted or any(kinds[name] not in SUMS for name in self.shapes()):
            reason = f"finite numbers of shapes {found}"
        elif count < 1 or (sizes is not None and count > self.most(sizes)):
            reason = f"sums over {answer[COUNT].item()} samples" + (f" of {self.most(sizes)}" if sizes else "")
        reason = reason or self.objection(answer, count=count)
        if reason is not None:
            raise ConfigurationError(
                message(
                    f"sites must answer {self.kind} with finite sums of shapes {wanted}",
                    received=f"{reason} from {who}",
                    fix="install the same version everywhere, and look for NaN in the data",
                )
            )


@runtime_checkable
class RemoteData(Protocol):
    """A data module whose clients' samples are elsewhere: it passes queries on."""

    def answers(self, query: FederatedQuery) -> Iterator[State]: ...


def answers(data: FederatedDataModule, query: FederatedQuery) -> Iterator[State]:
    """Yield the answer of every client; where single ones are hidden, one that is the sum of all."""
    if isinstance(data, RemoteData):
        yield from data.answers(query)
        return
    for client_id in range(data.num_clients):
        yield query.answer(QueryContext(data.client_samples(client_id), data))


def summed(data: FederatedDataModule, query: FederatedQuery) -> dict[str, Tensor]:
    """Return the sum of all clients' answers."""
    total: dict[str, Tensor] = {}
    for answer in answers(data, query):
        total = {name: value + total[name] if total else value for name, value in answer.items()}
    return total


class FeatureMoments(FederatedQuery):
    """Sums of features and of their products: what a Fréchet distance is made of.

    Args:
        net: The feature network.
        limit: Use at most so many samples of each client; ``None`` uses all.
    """

    kind = "feature moments"

    def __init__(self, net: FrozenNet, *, limit: int | None = None) -> None:
        self.net, self.limit = net, limit

    def facts(self) -> dict[str, Any]:
        return {**to_facts(self.net)[0], "limit": -1 if self.limit is None else self.limit}

    def state(self) -> dict[str, Tensor]:
        return to_facts(self.net)[1]

    @classmethod
    def read(cls, facts: Mapping[str, Any], state: State, context: QueryContext) -> FeatureMoments:
        return cls(net_of(facts, state, context), limit=None if facts["limit"] < 0 else int(facts["limit"]))

    def answer(self, context: QueryContext) -> dict[str, Tensor]:
        return sums_to_state(feature_sums(self.net, chunks(context.view, self.limit)))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        size = self.net.num_features
        return {"total": (size,), "outer": (size, size)}

    def most(self, sizes: Sequence[int]) -> int:
        return sum(sizes) if self.limit is None else sum(min(size, self.limit) for size in sizes)

    def least(self) -> int:
        """Of up to d samples the products have the rank of their number, and their span is that of the samples."""
        return self.net.num_features + 1

    def positions(self, context: QueryContext) -> Tensor:
        return chosen(context.view, self.limit)

    def objection(self, answer: State, *, count: int) -> str | None:
        """Cauchy and Schwarz: |C_ij|^2 <= C_ii C_jj for C = sum f f^T - (sum f)(sum f)^T / n, which is symmetric."""
        total, outer = answer["total"].double(), answer["outer"].double()
        slack = ROUNDING * (1.0 + outer.diagonal().clamp_min(0))
        if bool(((outer - outer.T).abs() > ROUNDING * (1 + outer.abs())).any()):
            return "products that are not symmetric"
        covariance = outer - total.outer(total) / count
        if bool((covariance.diagonal() < -slack).any()):
            return "squares that are smaller than those of their mean"
        widths = (covariance.diagonal().clamp_min(0) + slack).sqrt()
        return (
            "products that are larger than squares allow"
            if bool((covariance.abs() > widths.outer(widths) * (1 + ROUNDING)).any())
            else None
        )


def net_of(facts: Mapping[str, Any], state: State, context: QueryContext) -> FrozenNet:
    """Return the feature network of a query, for the client's samples."""
    data = context.data
    return from_facts(facts, state, sample_shape=data.sample_shape, is_image=context.view.samples.is_image)


def chunks(data: ClientSamples, limit: int | None = None) -> Iterator[Tensor]:
    """Yield the samples that :func:`chosen` says, without labels, in batches."""
    for positions in chosen(data, limit).split(CHUNK):
        yield data.take(positions)[0]


def chosen(data: ClientSamples, limit: int | None = None) -> Tensor:
    """Return the positions of at most ``limit`` samples, always the same, drawn by chance: the first ones of a folder
    may all be of one class.
    """
    if limit is None or limit >= len(data):
        return torch.arange(len(data))
    return torch.randperm(len(data), generator=make_generator(0, "some samples"))[:limit].sort().values
