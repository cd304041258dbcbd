"""A process that has imported everything and forks for every message, because Flower starts a new one for each.

Flower looks for ``flwr-clientapp`` on PATH. A site's SuperNode finds one there (``clientapp_shim.py``) that asks this
process to fork. The child is what Flower would have started, a process for one message; its imports are done already.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from fedgan_lightning.deployment import clientapp_shim
from fedgan_lightning.deployment.supernode_supervisor import end_with_parent

logger = logging.getLogger("fedgan_lightning")

PROGRAM = "flwr-clientapp"
#: What a message needs; the last one torch imports with the first step of an optimizer.
MODULES = ("fedgan_lightning.deployment.apps", "fedgan_lightning.deployment.site", "flwr.clientapp", "torch._dynamo")
#: Seconds until the process can be asked; it imports afterwards, and whoever asks meanwhile waits.
START_SECONDS = 30.0


@contextlib.contextmanager
def opened(cold: str, *, environment: Mapping[str, str]) -> Iterator[Path | None]:
    """Give a folder with a quick ``flwr-clientapp``, to be put first on PATH; nothing where processes do not fork well.

    Args:
        cold: Flower's own program, for when the process that forks is gone.
        environment: That of the process that forks, so what counts while it imports; afterwards it is the asker's.
    """
    if sys.platform != "linux":  # elsewhere it would outlive its parent, and libraries do not survive the fork
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="fedgan-") as name:  # readable by its owner alone, and a short path
        folder = Path(name)
        asked = [sys.executable, "-I", "-S", str(Path(clientapp_shim.__file__)), str(folder / "socket"), cold]
        (folder / PROGRAM).write_text(f'#!/bin/sh\nexec {shlex.join(asked)} "$@"\n')
        (folder / PROGRAM).chmod(0o700)
        command = [sys.executable, "-m", "fedgan_lightning.deployment.forkserver", str(folder / "socket")]
        ending = end_with_parent(signal.SIGKILL)
        process = subprocess.Popen(command, env=dict(environment), start_new_session=True, preexec_fn=ending)
        try:
            yield folder if _await(folder / "socket", process) else None
        finally:
            process.kill()  # and its children with it
            process.wait()


def _await(path: Path, process: subprocess.Popen) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists():
            return True
        time.sleep(0.05)
    logger.warning("no process that has imported everything: each message will take some seconds longer")
    return False


def serve(path: str) -> None:
    """Import everything, then fork whenever somebody connects to ``path``; return if a fork would not work.

    Args:
        path: Of the socket.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        # Otherwise whoever asks torch for a GPU while importing starts CUDA, which does not survive a fork.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        (entry,) = entry_points(group="console_scripts", name=PROGRAM)
        program = entry.load()
        for name in MODULES:
            importlib.import_module(name)
        import torch

        if torch.cuda.is_initialized():
            return
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
        while True:
            link, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(link, program)
            link.close()


def _answer(link: socket.socket, program: Any) -> NoReturn:
    """Acts as ``flwr-clientapp`` for the calling process: takes its arguments, streams, environment and folder."""
    code = 1
    try:
        end_with_parent(signal.SIGKILL)()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        request = _received(link)
        link.sendall(b"taken\n")
        threading.Thread(target=_end_with, args=(link,), daemon=True).start()
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = [PROGRAM, *request["arguments"]]
        program()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
            link.sendall(f"{code}\n".encode())
        os._exit(code)


def _received(link: socket.socket) -> dict[str, Any]:
    """Return what is asked for, and take over the standard streams that come with it."""
    text, streams, _, _ = socket.recv_fds(link, 1 << 16, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    while not text.endswith(b"\n") and (more := link.recv(1 << 16)):
        text += more
    request: dict[str, Any] = json.loads(text)
    return request


def _end_with(link: socket.socket) -> None:
    """End when the process that was started in this one's place ends: whoever kills that one means this one."""
    with contextlib.suppress(OSError):
        link.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve(sys.argv[1])
