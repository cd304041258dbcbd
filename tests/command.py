"""The command line in a process that writes to a file of its own, and stops itself at a chosen instant.

    python tests/command.py fit --config ...
    STOP="SIGKILL checkpoint 3" python tests/command.py fit --config ... --run_dir DIR

A signal that comes from outside comes at another instant on every machine, and may come when all is done.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.processes import write_apart


def stop_at_client(number: int, which: signal.Signals) -> None:
    """Send this process a signal before the ``number``-th visit to a client."""
    from fedgan_lightning.federation.local import LocalTrainer

    run, visits = LocalTrainer.run, []

    def counted(self, task):
        visits.append(task)
        if len(visits) == number:
            os.kill(os.getpid(), which)
        return run(self, task)

    LocalTrainer.run = counted


def stop_at_checkpoint(number: int, which: signal.Signals) -> None:
    """Send this process a signal while it writes the ``number``-th checkpoint, when half of it is on the disk."""
    folder = Path(sys.argv[sys.argv.index("--run_dir") + 1]) / "checkpoints"
    sync, writes = os.fsync, []

    def counted(file):
        if list(folder.glob(".last.ckpt.*.partial")):
            writes.append(file)
            if len(writes) == number:
                os.ftruncate(file, os.fstat(file).st_size // 2)
                os.kill(os.getpid(), which)
        sync(file)

    os.fsync = counted


if __name__ == "__main__":
    write_apart()
    if "STOP" in os.environ:
        name, instant, number = os.environ["STOP"].split()
        {"client": stop_at_client, "checkpoint": stop_at_checkpoint}[instant](int(number), signal.Signals[name])
    from fedgan_lightning.__main__ import main

    sys.exit(main(sys.argv[1:]))
