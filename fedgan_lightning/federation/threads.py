"""How many threads torch computes with, and for how long."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from fedgan_lightning.federation.ranks import Ranks

Item = TypeVar("Item")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the body with ``count`` threads of torch; restore their number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each_with_threads(count: int, items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items; only what makes them computes with ``count`` threads, and not who takes them."""
    iterator = iter(items)
    while True:
        with threads(count):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def available_threads(ranks: Ranks) -> int:
    """Return the cores that this process may use: its part of the host's, and no more than ``OMP_NUM_THREADS``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a scheduler's word, or that of a user
    return max(1, min(cores // ranks.local_world_size, int(limit) if limit.isdecimal() else cores))
