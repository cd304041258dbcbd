"""Train GANs over data that must not move: federated GANs on PyTorch Lightning.

What most programs need is here. The rest is in ``fedgan_lightning.algorithms``, ``losses``, ``networks``, ``sources``,
``partitions``, ``privacy``, ``samplers``, ``aggregators``, ``transforms``, ``schedules``, ``asynchronous``,
``executors``, ``metrics``, ``callbacks`` and ``editing``. Names are written in ``__init__.pyi`` and loaded when they
are first used, so that ``import fedgan_lightning`` costs nothing.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

from fedgan_lightning.version import __version__ as __version__

_HOMES = {
    alias.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom) and node.module is not None
    for alias in node.names
}
__all__ = sorted(_HOMES)
#: Modules of public names that are not at top level.
SUBMODULES = (
    "aggregators",
    "algorithms",
    "asynchronous",
    "callbacks",
    "editing",
    "executors",
    "losses",
    "metrics",
    "networks",
    "partitions",
    "privacy",
    "samplers",
    "schedules",
    "sources",
    "transforms",
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *SUBMODULES})
