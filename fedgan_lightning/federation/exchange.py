"""Who goes on with whose network, where clients hand networks on to each other."""

from __future__ import annotations

from fedgan_lightning.seeding import make_numpy_generator


def cycle(*, round: int, num_clients: int, seed: int, every: int) -> dict[int, int]:
    """Return a random cycle through all clients after every ``every`` rounds: nobody keeps what he had.

    With two clients or more it is a permutation without a fixed point; with one there is nobody to hand anything to.
    """
    if (round + 1) % every or num_clients < 2:
        return {}
    order = make_numpy_generator(seed, "exchange", round).permutation(num_clients).tolist()
    return dict(zip(order, [*order[1:], order[0]]))
