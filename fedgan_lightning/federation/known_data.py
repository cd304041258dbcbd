"""What the server may know of clients' data in a private run, and what a client knows of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class WithoutLabels:
    """What a server may know of clients' data under privacy: which classes there are, and how many of each, is theirs.

    Args:
        data: The clients' data.
    """

    label_counts = None

    def __init__(self, data: Any) -> None:
        self._data = data

    def __getattr__(self, name: str) -> Any:
        if name == "_data":  # asked for before there is one, by whoever copies
            raise AttributeError(name)
        return getattr(self._data, name)


def known_of(data: Any, *, federation: Any, model: Any) -> Any:
    """Return the clients' data as far as an algorithm on the server may make use of them."""
    is_private = federation.privacy is not None or getattr(model, "privacy", None) is not None
    return WithoutLabels(data) if is_private else data


def own_class_shares(data: Any, client_id: int) -> Tensor:
    """Return the share of every class among a client's samples, (classes,) in float64, from its own labels alone.

    Args:
        data: Its data: with ``client_samples``, as our own data modules have it, or else ``label_counts``.
        client_id: The client.
    """
    if hasattr(data, "client_samples"):
        counts: Tensor = data.client_samples(client_id).label_counts(data.num_classes)
    else:
        counts = torch.as_tensor(data.label_counts())[client_id]
    return counts.double() / counts.sum().clamp(min=1)
