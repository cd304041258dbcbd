"""The records that cross every boundary, and the interfaces between the parts.

Executors exchange :class:`ClientTask` and :class:`ClientUpdate` and nothing else. Raw samples have no field to
travel in. This file knows neither Lightning nor any implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

#: Tensors by name, as in ``Module.state_dict()``.
State = Mapping[str, Tensor]
#: The metric under which an executor says how long it took from a task to its answer, in seconds on its own clock.
ROUND_TRIP = "round_trip"


@dataclass(frozen=True)
class LocalWork:
    """How much a client trains in one round.

    Attributes:
        steps: Local steps K, minibatches per round; ``None`` where epochs are counted.
        epochs: Local epochs per round; ``None`` where steps are counted.
        schedule_positions: Steps already taken by each learning-rate schedule of the client module, by index.
    """

    steps: int | None = None
    epochs: int | None = None
    schedule_positions: tuple[int, ...] = ()

    def span(self, *, round: int, steps_per_epoch: int) -> tuple[int, int]:
        """Return (first step, number of steps) of this round on the client's endless stream of minibatches."""
        count = self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch
        return round * count, count


@dataclass(frozen=True)
class ClientTask:
    """What the server sends to one client for one round.

    Attributes:
        client_id: The client, in [0, number of clients).
        round: Rounds completed before this one.
        seed: Seed of all randomness of this client in this round.
        state: Shared parameters and buffers by name; shared optimizer moments under ``optimizer/``.
        local: The work to do.
    """

    client_id: int
    round: int
    seed: int
    state: State
    local: LocalWork


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
    """What is known of a client that was asked, and did not answer.

    Attributes:
        client_id: The client.
        round: The round it was asked for.
        stage: What it was doing, as far as known: ``train``, ``reply``, ...
        cause: In words.
        reached: Whether its task was sent.
    """

    client_id: int
    round: int
    stage: str
    cause: str
    reached: bool = True


@dataclass(frozen=True)
class Participant:
    """What is known of a client whose update went into a sum.

    Attributes:
        client_id: The client.
        num_examples: Size N_k of its data set.
        metrics: What follows from sizes and clocks: ``steps``, ``images``, ``seconds``, positions of schedules.
        bytes_up: What it sent, in bytes by network.
    """

    client_id: int
    num_examples: int
    metrics: Mapping[str, float]
    bytes_up: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class UpdateSum:
    """What several clients send back where only their sum can be read, as under secure aggregation.

    Attributes:
        round: The round whose tasks it answers.
        participants: Those whose updates are in it, and no others.
        delta: Mean of their parameter updates, with the aggregator's weights.
        extras: Mean of their extras, with the same weights.
        metrics: Means of their other scalars, weighted by N_k.
    """

    round: int
    participants: tuple[Participant, ...]
    delta: State
    extras: State
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Aggregate:
    """The server's view of a round: what all accepted updates amount to.

    Attributes:
        delta: Aggregated parameter update.
        extras: Aggregated extras.
        num_clients: Updates that went in.
        num_examples: Sum of their N_k.
    """

    delta: State
    extras: State
    num_clients: int
    num_examples: int


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
class StackedBatches(Protocol):
    """Optional ability of a data module: minibatches of several clients in one tensor.

    ``num_steps`` must not increase along ``client_ids``. Step s yields (x, y) with a leading dimension of those clients
    that have more than s steps.
    """

    def stacked_batches(
        self, client_ids: Sequence[int], *, first_steps: Sequence[int], num_steps: Sequence[int]
    ) -> ClientBatches: ...


class Executor(ABC):
    """Runs the clients of a round. Which way it does so must not change the updates.

    Attributes:
        concurrent: Whether all clients of a round work at the same time, so that the first to answer count.
        sums_only: Whether it yields an :class:`UpdateSum` and no single updates.
    """

    concurrent: ClassVar[bool] = False
    sums_only: ClassVar[bool] = False

    @abstractmethod
    def setup(self, context: Any) -> None:
        """Prepare for a run; ``context`` is a :class:`fedgan_lightning.federation.local.ClientContext`."""

    @abstractmethod
    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate | UpdateSum | ClientFailure]:
        """Yield one update per task, in any order, as soon as each is ready, or one for several; a failure for a client
        that is out of reach.

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
        raise NotImplementedError(f"{type(self).__name__}.weight. Fix: implement it.")

    def accumulate_sum(self, accumulator: Any, total: UpdateSum) -> Any:
        """Return the accumulator with the updates in it of which only the sum is known; for additive aggregators."""
        raise NotImplementedError(f"{type(self).__name__}.accumulate_sum. Fix: implement it.")

    def reduce(self, accumulator: Any, ranks: Any) -> Any:
        """Return the accumulator over all ranks; ``ranks`` is a :class:`fedgan_lightning.federation.ranks.Ranks`.

        Additive aggregators override it; with a single rank it is the accumulator itself.
        """
        if ranks.world_size > 1:
            raise NotImplementedError(f"{type(self).__name__}.reduce over several ranks. Fix: implement it.")
        return accumulator

    @abstractmethod
    def finalize(self, accumulator: Any) -> Aggregate:
        """Return the aggregate; with no updates in it, one without entries."""


class ClientSampler(ABC):
    """Chooses the cohort of a round as a pure function of (seed, round)."""

    @abstractmethod
    def sample(self, *, num_clients: int, round: int, seed: int) -> tuple[int, ...]:
        """Return distinct client ids in ascending order; an empty cohort is allowed."""

    def population(self, *, num_clients: int, round: int) -> Sequence[int]:
        """Return the clients that could be asked in this round, in ascending order; all unless overridden."""
        return range(num_clients)


@runtime_checkable
class ClientHook(Protocol):
    """Optional hook of a client module, called before its per-round ``fit``."""

    def on_client_round_start(self, info: RoundInfo) -> None: ...


@runtime_checkable
class StackHook(Protocol):
    """Optional hook of a client module: itself for several clients at once, as the vectorized executor trains them.

    The result is a LightningModule with manual optimization whose ``state_dict`` has the names of the client's; the
    executor gives every tensor a leading dimension of clients, and passes batches with the same.

    Raises:
        ConfigurationError: If the module cannot be stacked; the message says why.
    """

    def stacked(self) -> Any: ...


class StackedModule(Protocol):
    """What the vectorized executor asks of a stacked module, beside being a LightningModule."""

    def on_stack_round_start(self, infos: Sequence[RoundInfo], generators: Sequence[torch.Generator]) -> None:
        """Begin a round of these clients, each with its own source of randomness."""

    def keep_clients(self, count: int) -> None:
        """Go on with the first ``count`` clients; the others have done their steps."""

    def round_statistics(self) -> Mapping[str, Tensor]:
        """Return scalars of the round, (clients,) each."""


@runtime_checkable
class StatisticsHook(Protocol):
    """Optional hook of a client module: its scalars of the round, beside those it logs.

    One call of ``self.log`` takes about a millisecond at the end of an epoch, which a client's round is; this takes
    none.
    """

    def round_statistics(self) -> Mapping[str, Tensor]: ...


@runtime_checkable
class ServerHook(Protocol):
    """Optional hook of the global module, called after every server step.

    ``num_images`` is the weighted mean over clients of images seen in the round: the length of one local path.
    """

    def on_server_round_end(self, *, num_images: float) -> None: ...


@runtime_checkable
class RecalibrationHook(Protocol):
    """Optional hook of the global module: make buffers anew from the weights alone, after a server step."""

    def recalibrate(self) -> None: ...


class RoundListener(Protocol):
    """Optional hooks of any callback on the server's Trainer; the orchestrator calls those that exist."""

    def on_round_start(self, trainer: Any, server: Any, info: RoundInfo) -> None: ...

    def on_client_end(self, trainer: Any, server: Any, update: ClientUpdate) -> None: ...

    def on_try_end(self, trainer: Any, server: Any, roll_call: Any) -> None: ...

    def on_round_end(self, trainer: Any, server: Any, info: RoundInfo, metrics: Mapping[str, float]) -> None: ...


@runtime_checkable
class SampleSource(Protocol):
    """A global module that can be sampled, as pictures and metrics need it."""

    def sample(
        self, num_samples: int, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor: ...


def listeners(callbacks: Sequence[Any], hook: str) -> list[Any]:
    """Return the bound ``hook`` of every callback that has one."""
    return [getattr(callback, hook) for callback in callbacks if hasattr(callback, hook)]
