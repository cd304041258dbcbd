"""What becomes of a run one of whose processes has died.

Lightning looks at the processes it started every five seconds, and kills its own at once where one has failed: before
or after the collective that names the error, as it happens. Here the collective has time to fail by itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from fedgan_lightning.federation.ranks import leave_at_exit, lost

#: Seconds between looks, and until a process that did not notice the loss is ended: it waits in a collective for ever
#: (NCCL), or trains on for what may be hours.
POLL_SECONDS, GRACE_SECONDS = 0.5, 30.0


def watch_ranks(trainer: Any) -> None:
    """See that all processes of a run end with it, and that the loss of one is named.

    Takes the place of Lightning's watch over the processes that this one started, while the Trainer runs.

    Args:
        trainer: Any; processes that others started, as ``torchrun`` does, are theirs to watch.
    """
    if trainer.world_size == 1:
        return
    leave_at_exit()
    launcher = trainer.strategy.launcher
    processes = list(getattr(launcher, "procs", ()))
    if not processes:
        return
    launcher.procs.clear()  # Lightning's thread holds this very list; with nothing in it, it ends
    launcher.procs = processes  # what Lightning itself ends on an interrupt
    size = trainer.world_size

    def is_running() -> bool:
        return bool(trainer.state.status == "running")

    threading.Thread(target=_watch, args=(processes, size, is_running), name="rank-watch", daemon=True).start()


def _watch(processes: Sequence[subprocess.Popen[bytes]], size: int, is_running: Callable[[], bool]) -> None:
    while is_running() and not any(process.poll() for process in processes):
        time.sleep(POLL_SECONDS)
    deadline = time.monotonic() + GRACE_SECONDS
    while is_running() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if is_running():
        codes = ", ".join(str(process.returncode) for process in processes if process.returncode)
        print(f"error: {lost(f'exit code {codes}', rank=0, world_size=size)}", file=sys.stderr, flush=True)
        for process in processes:
            process.kill()
        os.kill(os.getpid(), signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
