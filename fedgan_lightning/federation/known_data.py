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
