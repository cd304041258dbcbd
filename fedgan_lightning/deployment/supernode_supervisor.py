"""Processes that end with the one that started them, and a SuperNode that is started again whenever it ends."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedgan_lightning.errors import ConfigurationError, message

logger = logging.getLogger("fedgan_lightning")

#: Seconds between two starts of a SuperNode, and between two looks at it.
PAUSE_SECONDS, POLL_SECONDS = 5.0, 0.2
#: Seconds for a SuperNode that is asked to end to do so; whoever asked this process waits ten.
STOP_SECONDS = 7.0
#: Seconds for which a refused SuperNode is started again. A SuperLink takes a killed SuperNode for connected until it
#: has missed two heartbeats (60 s), and turns its successor away as it turns strangers away.
PATIENCE_SECONDS = 90.0
#: A SuperNode that ran so long was not refused, whatever it ended with.
SETTLED_SECONDS = 30.0
#: What a SuperNode starts, to start a process for every task.
STARTER = "flower-superexec"
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
    stops: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: stops.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    refused_since: float | None = None
    try:
        while not stops:
            started = time.monotonic()
            ending = end_with_parent(signal.SIGTERM)  # it says goodbye, and may come back at once
            process = subprocess.Popen(
                list(command), env=dict(environment), start_new_session=True, preexec_fn=ending, umask=0o077
            )
            code, has_lost_starter = _wait(process, stops)
            _signal_group(process, signal.SIGKILL)  # what it started, and its port, must not be in the way
            now = time.monotonic()
            was_killed = code in (-signal.SIGKILL, -signal.SIGTERM) and not has_lost_starter  # by others: no refusal
            if was_killed or now - started > SETTLED_SECONDS:
                refused_since = None
            elif refused_since is None:
                refused_since = now
            if stops:
                break
            if refused_since is not None and now - refused_since > PATIENCE_SECONDS:
                raise _hopeless(code, has_lost_starter=has_lost_starter)
            logger.warning(f"the SuperNode ended ({code}); it is started again in {PAUSE_SECONDS:.0f} s")
            while not stops and time.monotonic() < now + PAUSE_SECONDS:
                time.sleep(POLL_SECONDS)
        return 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def kept(command: Sequence[str]) -> list[str]:
    """Return a command that runs :func:`keep_running` in a process of its own.

    Args:
        command: The SuperNode's; it gets the environment of that process.
    """
    return [sys.executable, "-m", "fedgan_lightning.deployment.supernode_supervisor", *command]


def _hopeless(code: int, *, has_lost_starter: bool) -> ConfigurationError:
    """Return the error of a SuperNode that ended with this code again and again."""
    if has_lost_starter:
        rule = f"a SuperNode must have a {STARTER}, which starts a process for every task"
        fix = "read what it said last; check the installation, and --tls where it is given"
        return ConfigurationError(message(rule, received="one that ended again and again", fix=fix))
    rule = "a site must have a key that the server knows, over a certificate of its authority"
    fix = "read what it said last; compare --key with the server's *.pub, and --ca with its ca.crt"
    return ConfigurationError(message(rule, received=f"a SuperNode that ended with {code} again and again", fix=fix))


def _wait(process: subprocess.Popen, stops: Sequence[int]) -> tuple[int, bool]:
    """Return the exit code of a SuperNode, and whether it was ended because it could not do tasks any more.

    The first signal asks it to end; a second one, or time, ends it.
    """
    ending_since: float | None = None
    is_useless = False
    while (code := process.poll()) is None:
        if ending_since is None and not stops and (is_useless := _has_lost_its_starter(process.pid)):
            logger.warning(f"{STARTER} ended, and the SuperNode does not start another: it could do nothing any more")
        if ending_since is None and (stops or is_useless):
            process.terminate()
            ending_since = time.monotonic()
        elif ending_since is not None and (len(stops) > 1 or time.monotonic() > ending_since + STOP_SECONDS):
            _signal_group(process, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return code, is_useless


def _has_lost_its_starter(number: int) -> bool:
    """Whether the program that a SuperNode starts first, and never looks at again, has ended; Linux only.

    Args:
        number: Process number of the SuperNode.
    """
    with contextlib.suppress(OSError, ValueError):  # it ended meanwhile, or a system without these files
        for listed in Path(f"/proc/{number}/task").glob("*/children"):
            for child in listed.read_text().split():
                name, _, state = Path(f"/proc/{child}/stat").read_text().partition("(")[2].rpartition(")")
                if name == STARTER[:15] and state.split()[0] == "Z":  # nobody has asked how it ended
                    return True
    return False


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    try:
        sys.exit(keep_running(sys.argv[1:], environment=os.environ))
    except ConfigurationError as failure:
        sys.exit(f"error: {failure}")
