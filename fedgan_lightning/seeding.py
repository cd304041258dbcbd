"""Derived seeds: every random number is a pure function of (root seed, purpose, indices).

Nothing here seeds the process for good. Results therefore do not depend on the executor, on the order of the
clients, on the number of workers, or on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(root: int, purpose: str, *indices: int) -> int:
    """Return a seed in [0, 2^63) that depends on all arguments and on nothing else.

    SHA-256 decorrelates neighbouring rounds and clients, which ``root + round`` does not.
    """
    text = "/".join([str(int(root)), purpose, *(str(int(index)) for index in indices)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def make_generator(root: int, purpose: str, *indices: int) -> torch.Generator:
    """Return a CPU ``torch.Generator`` seeded with :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(root, purpose, *indices))


def make_numpy_generator(root: int, purpose: str, *indices: int) -> np.random.Generator:
    """Return a NumPy generator seeded with :func:`derive_seed`."""
    return np.random.default_rng(derive_seed(root, purpose, *indices))


def global_generator(device: torch.device) -> torch.Generator:
    """Return what torch's functions draw from on ``device`` where they are given no generator."""
    if device.type != "cuda":
        return torch.default_generator
    # A generator that is seeded before is not there yet: CUDA would start, inside the body of somebody's training, from
    # the seed of the whole process.
    torch.cuda.init()
    found: torch.Generator = torch.cuda.default_generators[
        torch.cuda.current_device() if device.index is None else device.index
    ]
    return found


@contextmanager
def isolated_rng(seed: int, *, device: torch.device = torch.device("cpu")) -> Iterator[None]:  # noqa: B008 - a constant
    """Run the body with all global generators seeded by ``seed``; restore their states afterwards.

    Client modules written by other people draw from the global generators, so these are the ones to isolate:
    Python's, NumPy's, torch's, and that of the device.

    Args:
        seed: Where they start.
        device: Where the body draws, besides the CPU.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is the point
    generators = list(dict.fromkeys([torch.default_generator, global_generator(device)]))
    states = [generator.get_state() for generator in generators]
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    # torch.manual_seed would also leave a note, with a stack trace, for devices that are never used: 2 ms.
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for generator, state in zip(generators, states):
            generator.set_state(state)
