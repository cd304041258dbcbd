"""What the server may know of clients' data in a private run."""

from __future__ import annotations

from typing import Any


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
