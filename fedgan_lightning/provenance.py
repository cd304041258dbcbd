"""Where a number comes from: commit, machine and versions."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedgan_lightning.version import __version__

#: Packages whose versions decide numbers.
PACKAGES = ("torch", "lightning", "torchvision", "torchmetrics", "numpy")
#: Seconds for git, which answers from a disk.
PATIENCE = 10.0


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return commit and whether files differ from it (both ``None`` outside of a checkout), device, threads, versions.

    Args:
        device: Where the server computes.
    """
    commit, dirty = code_state(Path(__file__).parent)
    return {
        "commit": commit,
        "dirty": dirty,
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def described() -> str:
    """Return the same in one line, for a table of results."""
    found = provenance("cuda" if torch.cuda.is_available() else "cpu")
    commit = f"commit {found['commit'][:10]}" if found["commit"] else "no commit"
    changed = " with changes" if found["dirty"] else ""
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name != "fedgan_lightning")
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    return f"{commit}{changed}; {found['device']}, {threads}; {names}"


def versions() -> dict[str, str]:
    """Return the versions of everything that decides the numbers."""
    found = {"fedgan_lightning": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def device_name(device: torch.device) -> str:
    """Return what the device is called."""
    if device.type == "cuda" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "cpu"


@lru_cache(maxsize=4)
def code_state(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that a folder's files belong to, and whether any were changed or added.

    Of an installed package there is neither, even where its environment lies within somebody's checkout.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    added = _git(folder, "ls-files", "--others", "--exclude-standard", "--", ".")
    if commit is None or changed is None or added is None:
        return commit, None
    return commit, bool(changed or added)


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git says, or ``None``: there may be no git, no repository, or one that belongs to somebody else."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PATIENCE,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()
