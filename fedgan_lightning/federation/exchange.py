"""Who goes on with whose network, where clients hand networks on to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fedgan_lightning.federation.costs import bytes_by_network
from fedgan_lightning.federation.store import ClientStore
from fedgan_lightning.seeding import make_numpy_generator


def cycle(*, round: int, clients: Sequence[int], seed: int, every: int) -> dict[int, int]:
    """Return a random cycle through clients after every ``every`` rounds: nobody keeps what he had.

    With two clients or more it is a permutation without a fixed point; with one there is nobody to hand anything to.
    """
    if (round + 1) % every or len(clients) < 2:
        return {}
    places = make_numpy_generator(seed, "exchange", round).permutation(len(clients)).tolist()
    order = [clients[place] for place in places]
    return dict(zip(order, [*order[1:], order[0]]))


def hand_on(store: ClientStore, moves: Mapping[int, int], *, names: Callable[[str], bool]) -> dict[str, int]:
    """Let clients go on with entries of others, and return how many bytes moved between them, by network.

    Args:
        store: What clients keep.
        moves: For every client whose entries it gets.
        names: Whether an entry moves.
    """
    sent: dict[str, int] = {}
    for source in moves.values():
        moving = {name: value for name, value in store.read(source).items() if names(name)}
        for network, size in bytes_by_network(moving).items():
            sent[network] = sent.get(network, 0) + size
    store.hand_on(moves, names)
    return sent
