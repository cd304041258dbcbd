"""The records that cross every boundary, and the interfaces between the parts.

Executors exchange :class:`ClientTask` and :class:`ClientUpdate` and nothing else. Raw samples have no field to
travel in. This file knows neither Lightning nor any implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

#: Tensors by name, as in ``Module.state_dict()``.
State = Mapping[str, Tensor]
#: The metric under which an executor says how long it took from a task to its answer, in seconds on its own clock.
ROUND_TRIP = "round_trip"


@dataclass(frozen=True)
class UpdateEntry:
    """What the server expects under one name of an update, and what it does with it.

    Attributes:
        shape: Shape of the tensor.
        dtype: Its dtype.
        group: ``delta`` for parameter updates, ``extras`` for everything else.
        rule: ``aggregator`` combines the entry by the federation's aggregator, ``sum`` adds it with ``weight`` over
            ``denominator``, ``max`` takes the largest, ``collect`` hands all clients' tensors to the algorithm.
        weight: Weight of a client under ``sum``: ``one``, or ``population`` for pi_k, the aggregator's weight of client
            k over that of all clients of the federation, whether they were asked or not.
        denominator: What a ``sum`` is divided by: ``None`` for nothing, ``arrived`` for the sum of the weights of all
            clients that answered, or a number.
        kind: ``vector`` for what is long or short like a parameter update (transforms clip and encode it), ``value``
            for what is not, ``code`` for what a transform has made of either.
        bound: Largest absolute value that is believed; ``None`` for the general bound.
        persists: Whether the entry is about the same in every round, so that what a code loses of it may come later.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    group: Literal["delta", "extras"] = "extras"
    rule: Literal["aggregator", "sum", "max", "collect"] = "aggregator"
    weight: Literal["one", "population"] = "one"
    denominator: Literal["arrived"] | float | None = None
    kind: Literal["vector", "value", "code"] = "value"
    bound: float | None = None
    persists: bool = True

    @classmethod
    def of(cls, value: Tensor, *, is_vector: bool) -> UpdateEntry:
        """Return that of a tensor."""
        return cls(tuple(value.shape), value.dtype, kind="vector" if is_vector else "value")


@dataclass(frozen=True)
class ClientTask:
    """What the server sends to one client for one round.

    Attributes:
        client_id: The client, in [0, number of clients).
        round: Rounds completed before this one.
        seed: Seed of all randomness of this client in this round.
        state: Entries that all clients of the round receive: parameters and buffers by name, optimizer moments under
            ``optimizer/``, the algorithm's own under ``algorithm/``.
        coded: What travels in place of ``state``, where transforms encode what the server sends; ``None`` without.
        steps: Local steps K, minibatches of this round; ``None`` where epochs are counted.
        epochs: Local epochs of this round; ``None`` where steps are counted.
        before: Steps, or epochs, of the rounds before; ``None`` if all rounds have as many as this one.
        schedule_positions: Steps already taken by each learning-rate schedule of the client module, by index.
        own: Entries that only this client receives.
        hyperparameters: Values of this round by name, such as ``learning_rate``.
        rounds: Rounds of the whole run; 0 where that is not known.
        total: Steps, or epochs, of the whole run; ``None`` if all rounds have as many as this one.
        stepping: Steps of optimizers per minibatch in the rounds before.
    """

    client_id: int
    round: int
    seed: int
    state: State
    steps: int | None = None
    epochs: int | None = None
    before: int | None = None
    schedule_positions: tuple[int, ...] = ()
    own: State = field(default_factory=dict)
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 0
    total: int | None = None
    stepping: float = 1.0
    coded: State | None = None

    def span(self, *, steps_per_epoch: int) -> tuple[int, int]:
        """Return (first step, number of steps) of this round on the client's endless stream of minibatches."""
        unit, count = (1, self.steps) if self.steps is not None else (steps_per_epoch, self.epochs or 0)
        before = self.round * count if self.before is None else self.before
        return before * unit, count * unit

    def planned(self, *, steps_per_epoch: int) -> int:
        """Return the minibatches of the whole run; those up to the end of this round where that is not known."""
        unit, count = (1, self.steps) if self.steps is not None else (steps_per_epoch, self.epochs or 0)
        total = self.total if self.total is not None else max(self.rounds, self.round + 1) * count
        return total * unit


@dataclass(frozen=True)
class ClientUpdate:
    """What one client sends back.

    Attributes:
        client_id: The client.
        num_examples: Size N_k of its data set.
        delta: Shared parameters after minus before local training, by name.
        metrics: Scalars: losses, seconds, number of images seen.
        extras: Other shared tensors, to be averaged as they are: buffers (variances as second moments), moments.
        round: The round whose task it answers; ``None`` where that is not known.
        discount: Factor on its weight; below 1 only for updates that come late.
    """

    client_id: int
    num_examples: int
    delta: State
    metrics: Mapping[str, float]
    extras: State = field(default_factory=dict)
    round: int | None = None
    discount: float = 1.0


@dataclass(frozen=True)
class ClientFailure:
    """What is known of a client that was asked, and did not answer, or with nothing that can be read.

    Attributes:
        client_id: The client.
        round: The round it was asked for.
        stage: What it was doing, as far as known: ``train``, ``reply``, ...
        cause: In words.
        reached: Whether its task was sent.
        refused: Whether it did answer, with what is no answer: that counts against it.
    """

    client_id: int
    round: int
    stage: str
    cause: str
    reached: bool = True
    refused: bool = False


@dataclass(frozen=True)
class ClientReport:
    """What came of one client in one attempt of a round; plain values, so that ranks can exchange it.

    Attributes:
        client_id: The client.
        outcome: ``answered`` (its update counts), ``failed``, ``rejected``, ``late`` (what came answers the round
            before), or ``unneeded`` (enough others had answered).
        num_examples: Size N_k of its data set; 0 where nothing of it counts.
        metrics: What it says of its training, as far as the server believes it, and the norm of its update by network.
        schedule_positions: Where its learning-rate schedules stand.
        bytes_down: What was sent to it, in bytes by network.
        bytes_up: What it sent, in the same way.
        reason: Why it did not answer, or why its update does not count.
    """

    client_id: int
    outcome: str
    num_examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    schedule_positions: Sequence[int] = ()
    bytes_down: Mapping[str, int] = field(default_factory=dict)
    bytes_up: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class UpdateSum:
    """What several clients send back where only their sum can be read, as under secure aggregation.

    Attributes:
        round: The round whose tasks it answers.
        clients: Those whose updates are in it, and no others.
        delta: Mean of their parameter updates, with the aggregator's weights.
        extras: Mean of their extras, with the same weights.
        metrics: Means of their other scalars, weighted by N_k.
    """

    round: int
    clients: tuple[ClientReport, ...]
    delta: State
    extras: State
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Aggregate:
    """The server's view of a round: what all updates that count amount to.

    Attributes:
        delta: Aggregated parameter update.
        extras: Aggregated extras; entries with the rule ``sum`` as their sums.
        num_clients: Updates that went in.
        num_examples: Sum of their N_k.
        collected: Entries with the rule ``collect`` by client.
        weights: By client that answered in time the aggregator's weight; 1 where it treats all alike.
    """

    delta: State
    extras: State
    num_clients: int
    num_examples: int
    collected: Mapping[int, State] = field(default_factory=dict)
    weights: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundInfo:
    """Frozen facts of a round, for everybody who takes part in it.

    Attributes:
        round: Rounds completed before this one.
        cohort: Clients asked, in ascending order.
        first_step: Position of the round's first minibatch on the client's endless stream; set on clients only.
        num_steps: Minibatches of this round; set on clients only.
    """

    round: int
    cohort: tuple[int, ...]
    first_step: int = 0
    num_steps: int = 0


class ClientBatches(Protocol):
    """The minibatches of one client in one round."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


@runtime_checkable
class FederatedData(Protocol):
    """What orchestrator and executors ask of a data module."""

    @property
    def num_clients(self) -> int: ...

    def num_examples(self, client_id: int) -> int: ...

    def steps_per_epoch(self, client_id: int) -> int: ...

    def client_batches(self, client_id: int, *, first_step: int, num_steps: int) -> ClientBatches: ...

    def fingerprint(self) -> str: ...


@runtime_checkable
class SizedBatches(Protocol):
    """Optional ability of a data module: how many samples each minibatch has, where clients differ in that.

    Clients are trained in one stack only if their minibatches have the same sizes, step by step; a client of whom they
    are not known, ``None``, is trained alone. Of data without this ability all minibatches are taken to be of one size.
    """

    def batch_sizes(self, client_id: int, *, first_step: int, num_steps: int) -> Sequence[int] | None: ...


@runtime_checkable
class StackedBatches(Protocol):
    """Optional ability of a data module: minibatches of several clients in one tensor.

    ``num_steps`` must not increase along ``client_ids``. Step s yields (x, y) with a leading dimension of those clients
    that have more than s steps, whose minibatches have one size.
    """

    def stacked_batches(
        self, client_ids: Sequence[int], *, first_steps: Sequence[int], num_steps: Sequence[int]
    ) -> ClientBatches: ...


class Executor(ABC):
    """Runs the clients of a round. Which way it does so must not change the updates.

    Attributes:
        concurrent: Whether all clients of a round work at the same time, so that the first to answer count.
        sums_only: Whether it yields an :class:`UpdateSum` and no single updates.
        in_real_time: Whether clients go on working between two calls of :meth:`run`, so that a later one may yield what
            an earlier one began.
    """

    concurrent: ClassVar[bool] = False
    in_real_time: ClassVar[bool] = False
    sums_only: ClassVar[bool] = False

    @abstractmethod
    def setup(self, context: Any) -> None:
        """Prepare for a run; ``context`` is a :class:`fedgan_lightning.federation.client_context.ClientContext`."""

    @abstractmethod
    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate | UpdateSum | ClientFailure]:
        """Yield one result per task in completion order: a :class:`ClientUpdate`, a :class:`ClientFailure` if the
        client cannot be reached, or one :class:`UpdateSum` for several tasks.

        Raises:
            ClientError: If a client's code fails in this process; it names client, round and stage.
        """

    @abstractmethod
    def teardown(self) -> None:
        """Release what :meth:`setup` took."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know to compute the same; nothing unless overridden."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Return what a report says of it, as plain values; nothing unless overridden."""
        return {}

    def gauges(self) -> dict[str, float]:
        """Return what a dashboard shows of it after every round, by tag; nothing unless overridden."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most executors know nothing
        """Take over what an earlier run knew; nothing unless overridden."""


class Aggregator(ABC):
    """Turns updates into one. Additive aggregators stream: memory does not grow with the number of clients."""

    #: Whether ``merge(accumulate(a), accumulate(b))`` equals one pass over both, as secure aggregation needs.
    additive: ClassVar[bool]
    #: Fewest updates that it can make one of.
    needed: int = 1
    #: Whether a client's weight follows from its N_k alone, so that it can weigh its own update before it masks it.
    weighs_by_size: ClassVar[bool] = True

    @abstractmethod
    def init(self) -> Any:
        """Return an empty accumulator."""

    @abstractmethod
    def accumulate(self, accumulator: Any, update: ClientUpdate) -> Any:
        """Return the accumulator with one more update in it.

        Raises:
            UpdateError: If the update is not finite, or does not fit those before it; names the client.
        """

    @abstractmethod
    def merge(self, first: Any, second: Any) -> Any:
        """Return the accumulator of both sets of updates."""

    def weight(self, num_examples: int) -> float:
        """Return the weight of a client that holds so many examples; additive aggregators have one."""
        raise NotImplementedError(f"{type(self).__name__}.weight must be implemented")

    def weight_of(self, client_id: int, num_examples: int) -> float:
        """Return the weight of a client; that of its examples unless overridden."""
        return self.weight(num_examples)

    def prepare(self, data: FederatedData) -> None:  # noqa: B027 - most look at nothing but updates
        """Look at what is known of clients before the first round; nothing unless overridden.

        Raises:
            ConfigurationError: If what is needed is not known.
        """

    def accumulate_sum(self, accumulator: Any, total: UpdateSum) -> Any:
        """Return the accumulator with the updates in it of which only the sum is known; for additive aggregators."""
        raise NotImplementedError(f"{type(self).__name__}.accumulate_sum must be implemented")

    def reduce(self, accumulator: Any, ranks: Any) -> Any:
        """Return the accumulator over all ranks; ``ranks`` is a :class:`fedgan_lightning.federation.ranks.Ranks`.

        Additive aggregators override it; with a single rank it is the accumulator itself.
        """
        if ranks.world_size > 1:
            raise NotImplementedError(f"{type(self).__name__}.reduce must be implemented for several ranks")
        return accumulator

    @abstractmethod
    def finalize(self, accumulator: Any) -> Aggregate:
        """Return the aggregate; with no updates in it, one without entries."""


class ClientSampler(ABC):
    """Chooses the cohort of a round as a pure function of (seed, round)."""

    @abstractmethod
    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        """Return distinct client ids in ascending order; an empty cohort is allowed."""

    def prepare(self, data: FederatedData) -> None:  # noqa: B027 - most look at nothing
        """Look at what is known of clients before the first round; as :meth:`Aggregator.prepare`."""

    def population(self, *, num_clients: int, round: int) -> Sequence[int]:
        """Return the clients that could be asked in this round, in ascending order; all unless overridden."""
        return range(num_clients)
