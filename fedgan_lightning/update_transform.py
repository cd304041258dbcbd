"""The interface of transforms, which rewrite updates on their way from a client to the aggregator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedgan_lightning.protocol import Aggregate, State, UpdateEntry


@dataclass(frozen=True)
class RoundFacts:
    """What a transform knows of the round that an update answers.

    Attributes:
        round: Rounds completed before the task: both sides know it.
        hyperparameters: Values of the round by name, as in the task.
        seed: Of what the client draws for itself; 0 where an update is decoded.
    """

    round: int = 0
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0


class UpdateTransform(ABC):
    """Rewrites updates between client and aggregator: clips, encodes, adds noise. Transforms form a chain.
    Clients apply it in its order, the server undoes it in reverse: :meth:`decode` for every answer before it is
    aggregated, :meth:`total` once for what they amount to. Parameter updates bear the names of parameters.
    """

    #: What codes of this kind make of what the server sends; ``None`` where that stays as it is.
    downward: UpdateTransform | None = None
    #: Whether what it changes is lost, and not meant.
    is_code: bool = False
    #: Whether what it takes from an update comes in later ones.
    error_feedback: bool = False

    def check(self, *, is_secure: bool) -> None:  # noqa: B027 - most transforms go with everything
        """Refuse what this transform cannot go with, by a ConfigurationError; ``is_secure``: the server sees sums."""

    def changes(self, entries: Mapping[str, UpdateEntry]) -> bool:
        """Whether it can do its work on an update with these entries; one that cannot is refused."""
        return True

    def schema(self, entries: Mapping[str, UpdateEntry]) -> dict[str, UpdateEntry]:
        """Return the entries that leave this transform, given those that enter it."""
        return dict(entries)

    def own_entries(self) -> Mapping[str, UpdateEntry]:
        """Return scalars that come up beside an update, by names of an algorithm; :meth:`client` fills them in."""
        return {}

    def client_state(self, entries: Mapping[str, UpdateEntry]) -> State:
        """Return the private state of a client that has none yet."""
        return {}

    @abstractmethod
    def client(
        self,
        update: State,
        *,
        entries: Mapping[str, UpdateEntry],
        private: State,
        facts: RoundFacts,
    ) -> tuple[State, State]:
        """Return what leaves this transform on one client, and its private state of this transform after that; given
        what enters, what is known of its entries, the private state before, and the round.
        """

    def coded(self, entries: Mapping[str, UpdateEntry]) -> Sequence[str]:
        """Return which of these entries leave it in another form; none unless overridden."""
        return ()

    def settled(
        self, state: State, *, entered: State, arrived: State, entries: Mapping[str, UpdateEntry], facts: RoundFacts
    ) -> tuple[State, State]:
        """Return a client's private state once it is known what arrives of an update, and what that is of what entered.

        What only a code takes away is lost: whatever else a transform changes is meant, and counts as arrived.

        Args:
            state: As :meth:`client` has returned it.
            entered: What has entered this transform.
            arrived: What has left it, less what codes after it have lost and keep nothing of.
            entries: What is known of what entered.
            facts: The round.
        """
        return state, entered

    def decode(self, update: State, *, entries: Mapping[str, UpdateEntry], facts: RoundFacts) -> State:
        """Return an update as the aggregator wants it; arguments as in :meth:`client`."""
        return update

    def broadcast(self, state: State, *, is_parameter: Callable[[str], bool], facts: RoundFacts) -> tuple[State, State]:
        """Return what the server sends in place of a state that all clients receive, and what they make of it."""
        return state, state

    def decode_sum(self, mean: State, *, entries: Mapping[str, UpdateEntry], facts: RoundFacts) -> State:
        """Return the mean of several updates, of which single ones stay hidden, as the aggregator wants it."""
        return mean

    def total(self, total: Aggregate) -> Aggregate:
        """Return the total of a round as the server steps on it."""
        return total
