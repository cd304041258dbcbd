"""Processes that tests start: each writes to a file of its own, and what is waited for is a condition, not a time.

Two processes that share a pipe mix their lines, and a busy machine takes any time that a test could name.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Seconds after which a test gives up: below the suite's own limit, and far above what anything takes.
PATIENCE = 280


def eventually(condition: Callable[[], object], *, seconds: float = PATIENCE) -> bool:
    """Return whether a condition came true before patience ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Program:
    """A Python file that runs in a process, and in those that Lightning starts for other ranks.

    Args:
        script: The file.
        arguments: Its arguments.
        said: Folder for what they write, one file for each rank.
        cwd: Where it runs.
    """

    def __init__(self, script: Path, arguments: Sequence[str], *, said: Path, cwd: Path) -> None:
        said.mkdir(parents=True, exist_ok=True)
        self._said = said
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SAID": str(said)}
        command = [sys.executable, "-W", "ignore", str(script), *arguments]
        self.process = subprocess.Popen(command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL)

    def finish(self) -> int:
        """Wait for the process, and return what it ended with; its children are waited for by itself."""
        return self.process.wait()

    def said(self, rank: int = 0) -> str:
        """Return what a rank has written so far."""
        path = self._said / f"rank{rank}.txt"
        return path.read_text(errors="replace") if path.exists() else ""


def write_apart() -> None:
    """Let this process write to a file of its own in ``$SAID`` from now on; programs call it first."""
    path = Path(os.environ["SAID"]) / f"rank{os.environ.get('LOCAL_RANK', '0')}.txt"
    file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


@contextlib.contextmanager
def started(script: Path, *arguments: str, cwd: Path, said: str = "said") -> Iterator[Program]:
    """Give a program that runs; it ends with the body, and so do the processes that it started."""
    program = Program(script, arguments, said=cwd / said, cwd=cwd)
    try:
        yield program
    finally:
        for pid in [*children(program.process.pid), program.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                if program.process.poll() is None or pid != program.process.pid:
                    os.kill(pid, signal.SIGKILL)
        program.process.wait()


def children(pid: int) -> list[int]:
    """Return the processes that a process started and that are still there."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(own) for own, parent, state in rows if int(parent) == pid and not state.startswith("Z")]
