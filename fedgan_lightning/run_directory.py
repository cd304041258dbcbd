"""Who may write a run directory: a new run, its own continuation, and nobody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedgan_lightning.checkpoints import check_federation, read_checkpoint
from fedgan_lightning.documents import read_settings
from fedgan_lightning.errors import CheckpointError, ConfigurationError, message
from fedgan_lightning.federation.run_fingerprint import differences
from fedgan_lightning.files import expanded
from fedgan_lightning.jsonl import NAME, entries

#: What tells a run.
MARKS = ("config.yaml", "summary.json", "checkpoints")
#: Groups of settings that make a run this one, and which of theirs a continuation may change.
GROUPS = ("model", "data", "federation", "server")
MAY_CHANGE = ("rounds",)
#: Characters of a setting that has changed.
LONGEST = 160


def check_run_directory(path: str | Path, *, resuming: bool) -> None:
    """Refuse to start a run on top of another.

    Raises:
        ConfigurationError: If the directory holds a run and this is not its continuation, or is no directory.
    """
    root = expanded(path)
    if root.exists() and not root.is_dir():
        raise ConfigurationError(
            message("a run directory must be a folder", received=f"{root}, a file", fix="choose another --run_dir")
        )
    found = marks(root)
    if found and not resuming:
        raise ConfigurationError(
            message(
                "a new run must have a directory without a run in it",
                received=f"{root} holding {', '.join(found)}",
                fix="choose another --run_dir, or continue that run with --ckpt_path last",
            )
        )


def to_continue(
    ckpt_path: str | Path, run_dir: str | Path, *, first_save: int = 1, config: str | None = None
) -> str | None:
    """Return the checkpoint that ``fit`` goes on from, or ``None`` where this run was killed before its first one.

    Args:
        ckpt_path: A file, or the run directory's own ``last`` or ``best``.
        run_dir: The run directory.
        first_save: Rounds until the first checkpoint.
        config: The settings as ``config.yaml`` has them, to know whether it is this run.

    Raises:
        CheckpointError: If the file is missing, damaged, of another program, or of another run than the directory's.
    """
    root = expanded(run_dir)
    path = located(ckpt_path, root)
    if ckpt_path == "last" and not path.exists():
        if held := _holds(root, first_save=first_save, config=config):
            raise CheckpointError(
                message(
                    "a run must be continued from its last checkpoint",
                    received=f"{path}, which is not there, in a directory with {held}",
                    fix="restore the file or continue from another one, or choose another --run_dir",
                )
            )
        print(f"{path} does not exist yet: the run begins anew")  # killed before its first round was complete
        return None
    check_federation(read_checkpoint(path), path, whole=True)
    found = marks(root)
    if found and not path.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(
            message(
                "a run must be continued from its own checkpoint",
                received=f"{path} for {root}, which holds another run ({', '.join(found)})",
                fix="choose another --run_dir, or put the file into that directory",
            )
        )
    return str(path)


def to_judge(ckpt_path: str | Path | None, run_dir: str | Path) -> str:
    """Return the checkpoint that other commands look at: without one given the best, or else the last.

    Raises:
        CheckpointError: If the file is missing, damaged, or of another program.
    """
    root = expanded(run_dir)
    if ckpt_path is None:
        ckpt_path = "best" if (root / "checkpoints" / "best.ckpt").exists() else "last"
        print(f"checkpoint: {located(ckpt_path, root)}")
    path = located(ckpt_path, root)
    check_federation(read_checkpoint(path), path, whole=False)
    return str(path)


def marks(root: Path) -> list[str]:
    """Return what tells that a directory holds a run."""
    counted = any(entry.get("counted") for entry in entries(root / NAME))
    return [mark for mark in MARKS if (root / mark).exists()] + ([NAME] if counted else [])


def located(ckpt_path: str | Path, root: Path) -> Path:
    """Return the path of a checkpoint; ``last`` and ``best`` are the run directory's own."""
    return root / "checkpoints" / f"{ckpt_path}.ckpt" if ckpt_path in ("last", "best") else expanded(ckpt_path)


def _holds(root: Path, *, first_save: int, config: str | None) -> str | None:
    """Return what would be lost if a run began in a directory without its last checkpoint; ``None`` if nothing.

    A run that is killed before its first checkpoint leaves settings, pictures, and rounds that nobody can continue.
    """
    if saved := sorted(path.name for path in (root / "checkpoints").glob("*.ckpt")):
        return f"checkpoints/{saved[0]}"
    try:
        summary = _summary(root / "summary.json")
        known = _settings(root / "config.yaml")
    except (OSError, ValueError) as error:
        return f"files of a run that cannot be read ({error})"
    status, counted = str(summary.get("status")), [e["round"] + 1 for e in entries(root / NAME) if e.get("counted")]
    rounds = max([int(summary.get("rounds") or 0), *counted])
    if rounds > first_save or (rounds and status in ("finished", "stopped")):
        return f"{rounds} rounds of a run"
    if known and config is not None:
        now = _parsed(config)
        shared = [group for group in GROUPS if group in known and group in now]
        differing = [
            line for group in shared for line in differences(_own(known, group), _own(now, group), f"{group}.")
        ]
        if differing:
            return f"the settings of another run ({differing[0][:LONGEST]})"
    return None


def _own(settings: dict[str, Any], group: str) -> Any:
    values = settings.get(group)
    return {name: value for name, value in values.items() if name not in MAY_CHANGE} if isinstance(values, dict) else {}


def _summary(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no summary")
    return found


def _settings(path: Path) -> dict[str, Any]:
    return _parsed(read_settings(path)) if path.exists() else {}


def _parsed(text: str) -> dict[str, Any]:
    import yaml

    found = yaml.safe_load(text)
    return found if isinstance(found, dict) else {}
