"""Processes that end with the one that started them, and a SuperNode that is started again whenever it ends."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from fedgan_lightning.errors import ConfigurationError, message

logger = logging.getLogger("fedgan_lightning")

#: Seconds between two starts of a SuperNode.
PAUSE_SECONDS = 5.0
#: Seconds for which a refused SuperNode is started again. A SuperLink takes a killed SuperNode for connected until it
#: has missed two heartbeats (60 s), and turns its successor away as it turns strangers away.
PATIENCE_SECONDS = 90.0
#: A SuperNode that ran so long was not refused.
SETTLED_SECONDS = 30.0
PR_SET_PDEATHSIG = 1


def end_with_parent(number: int) -> Callable[[], None]:
    """Return what a process calls, a new one as ``preexec_fn``, to be sent a signal when its parent ends, however.

    Linux only; elsewhere it does nothing, and whoever kills a parent looks after its children.

    Args:
        number: The signal.
    """
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def ask() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, int(number))

    return ask


def keep_running(command: Sequence[str], *, environment: Mapping[str, str]) -> int:
    """Run a SuperNode, and start it again whenever it ends, until a signal asks to stop; return the exit code.

    Args:
        command: The SuperNode's.
        environment: Its environment.

    Raises:
        ConfigurationError: If it was refused for longer than a SuperLink takes to notice that its predecessor is gone.
    """
    stopping = threading.Event()
    current: list[subprocess.Popen] = []

    def stop(number: int, frame: FrameType | None) -> None:
        for process in current:
            _signal_group(process, signal.SIGKILL) if stopping.is_set() else process.terminate()
        stopping.set()

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    refused_since = time.monotonic()
    try:
        while not stopping.is_set():
            started = time.monotonic()
            ending = end_with_parent(signal.SIGTERM)  # it says goodbye, and may come back at once
            current[:] = [
                subprocess.Popen(list(command), env=dict(environment), start_new_session=True, preexec_fn=ending)
            ]
            code = current[0].wait()
            _signal_group(current[0], signal.SIGKILL)  # what it started, and its port, must not be in the way
            now = time.monotonic()
            refused_since = now if now - started > SETTLED_SECONDS else refused_since
            if stopping.is_set():
                break
            if now - refused_since > PATIENCE_SECONDS:
                raise ConfigurationError(
                    message(
                        "a site is let in with a key that the server knows, over a certificate of its authority",
                        received=f"a SuperNode that ended with {code} again and again",
                        fix="read what it said last; compare --key with the server's *.pub, and --ca with its ca.crt",
                    )
                )
            logger.warning(f"the SuperNode ended ({code}); it is started again in {PAUSE_SECONDS:.0f} s")
            stopping.wait(PAUSE_SECONDS)
        return 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
