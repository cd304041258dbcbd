"""A run directory as plain values: what reports are made of. Needs neither torch nor the settings' classes."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.files import expanded
from fedgan_lightning.jsonl import NAME
from fedgan_lightning.visuals.participation import Participation

#: (steps, values) of a curve.
Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Attributes:
        name: Name of its directory.
        path: The directory.
        summary: ``summary.json``.
        config: ``config.yaml`` as nested values; empty where the run was started from Python.
        config_text: The same as text.
        metrics: Curves of the evaluation by metric, against rounds.
        scalars: Curves of TensorBoard by tag, against rounds.
        sizes: Samples by client.
        participation: Who was asked in which round, and what came of it.
        audit: ``audit.json``, what attacks have found; empty where there were none.
    """

    name: str
    path: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    metrics: dict[str, Curve]
    scalars: dict[str, Curve]
    sizes: list[int]
    participation: Participation
    audit: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes_by_round(self) -> Curve:
        """Bytes in both directions since the start, against rounds."""
        totals: dict[float, float] = {}
        for tag, (steps, values) in self.scalars.items():
            if tag.startswith("bytes/"):
                for step, value in zip(steps, values):
                    totals[step] = totals.get(step, 0.0) + value
        return list(totals), list(totals.values())

    def picture(self, name: str) -> Path | None:
        """Return the path of a picture, or ``None`` if there is none."""
        return self.path / name if (self.path / name).exists() else None

    @property
    def grids(self) -> list[tuple[str, Path]]:
        """Pictures of the generator with their titles: untrained, a few on the way, the last."""
        found = self.path.glob("fakes_round*.png")
        numbered = sorted((int(re.sub(r"\D", "", path.stem)), path) for path in found)
        positions = sorted({round(i * (len(numbered) - 1) / 4) for i in range(5)}) if numbered else []
        chosen = [(f"round {number}", path) for number, path in (numbered[position] for position in positions)]
        first = self.picture("fakes_init.png")
        return ([("untrained", first)] if first else []) + chosen


def read_run(path: str | Path) -> Run:
    """Read a run directory.

    Raises:
        ConfigurationError: If it holds no run, or a summary that cannot be read.
    """
    root = expanded(path)
    try:
        summary = json.loads((root / "summary.json").read_text(encoding="utf-8"))
        history = _history(summary)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            message(
                "a report must be made of run directories with a summary.json",
                received=f"{path} ({type(error).__name__})",
                fix="name the directory that fit wrote, after its first evaluation",
            )
        ) from error
    text, config = _settings(root / "config.yaml")
    names = dict.fromkeys(name for entry in history for name in entry if name != "rounds")
    metrics = {
        name: ([e["rounds"] for e in history if name in e], [e[name] for e in history if name in e]) for name in names
    }
    return Run(
        name=root.resolve().name,
        path=root,
        summary=summary,
        config=config,
        config_text=text,
        metrics=metrics,
        scalars=_scalars(root),
        sizes=_sizes(root / "partition.npz"),
        participation=_participation(root / NAME),
        audit=_audit(root / "audit.json"),
    )


def _audit(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError("no audit")
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    return found


def _history(summary: Any) -> list[dict[str, float]]:
    """Return the values of every evaluation that are numbers: JSON has ``null`` for those that are not finite.

    Raises:
        ValueError: If it is no summary.
    """
    if not isinstance(summary, dict) or not isinstance(summary.get("history", []), list):
        raise ValueError("no summary")
    history = [entry for entry in summary.get("history", []) if isinstance(entry, dict) and "rounds" in entry]
    return [{name: value for name, value in entry.items() if _is_number(value)} for entry in history]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _participation(path: Path) -> Participation:
    try:
        return Participation.read(path)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, error) from error


def _settings(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the settings of a run as text and as nested values; nothing where it was started from Python."""
    import yaml

    if not path.exists():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise damaged(path, error) from error
    return text, values if isinstance(values, dict) else {}


def damaged(path: Path, error: Exception) -> ConfigurationError:
    """Return the error that names a file of a run that cannot be read."""
    return ConfigurationError(
        message(
            "the files of a run must be as fit wrote them",
            received=f"{path} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no more'})",
            fix="restore it, or move it away: the report goes without it",
        )
    )


def _scalars(root: Path) -> dict[str, Curve]:
    """Return all scalars of the directory's event files; what a resumed run repeats counts once, as written last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[float, float]] = {}
    for path in sorted(root.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        try:
            events.Reload()
        except Exception as error:
            raise damaged(path, error) from error
        for tag in events.Tags()["scalars"]:
            curve = found.setdefault(tag, {})
            for event in events.Scalars(tag):
                curve[float(event.step)] = event.value
    return {tag: (sorted(curve), [curve[step] for step in sorted(curve)]) for tag, curve in found.items()}


def _sizes(path: Path) -> list[int]:
    if not path.exists():
        return []
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [len(arrays[name]) for name in sorted(arrays.files)]
    except Exception as error:  # NumPy, zip and zlib say a dozen things of damaged files
        raise damaged(path, error) from error


def flattened(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    if isinstance(values, dict) and values:
        merged: dict[str, Any] = {}
        for key, value in values.items():
            merged |= flattened(value, f"{prefix}{key}.")
        return merged
    return {prefix.rstrip("."): values}


def differing(runs: list[Run]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ, by dotted name; directories do not count."""
    settings = [flattened(run.config) for run in runs]
    names = sorted({name for own in settings for name in own})
    ignored = ("run_dir", "default_root_dir", "save_dir", "config")
    found = {name: [own.get(name, "") for own in settings] for name in names if name.rsplit(".", 1)[-1] not in ignored}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}
