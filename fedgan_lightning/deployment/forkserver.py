"""A process that has imported everything and forks for every message, because Flower starts a new one for each.

Flower looks for ``flwr-clientapp`` on PATH. A site's SuperNode finds one there that runs the installed ClientApp
(``clientapp.py``): through ``clientapp_shim.py``, which asks this process to fork, or, where processes do not fork
well, by itself. The child is what Flower would have started, a process for one message; its imports are done already.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fedgan_lightning.deployment import clientapp, clientapp_shim
from fedgan_lightning.deployment.supernode_supervisor import end_with_parent

logger = logging.getLogger("fedgan_lightning")

PROGRAM = "flwr-clientapp"
#: What stands in for it.
OWN_PROGRAM = (sys.executable, "-m", "fedgan_lightning.deployment.clientapp")
#: What a message needs; the last one torch imports with the first step of an optimizer.
MODULES = ("fedgan_lightning.deployment.apps", "fedgan_lightning.deployment.site", "flwr.clientapp", "torch._dynamo")
#: Seconds until the process can be asked; it imports afterwards, and whoever asks meanwhile waits.
START_SECONDS = 30.0


@contextlib.contextmanager
def opened(*, environment: Mapping[str, str], cold: Sequence[str] = OWN_PROGRAM) -> Iterator[Path]:
    """Give a folder with a ``flwr-clientapp`` of this package, to be put first on PATH; quick where processes fork.

    Args:
        environment: That of the process that forks, so what counts while it imports; afterwards it is the asker's.
        cold: The command that does the same without a process that forks.
    """
    with tempfile.TemporaryDirectory(prefix="fedgan-") as name:  # readable by its owner alone, and a short path
        folder = Path(name)
        _write_program(folder, cold)
        if sys.platform != "linux":  # elsewhere it would outlive its parent, and libraries do not survive the fork
            yield folder
            return
        command = [sys.executable, "-m", "fedgan_lightning.deployment.forkserver", str(folder / "socket")]
        ending = end_with_parent(signal.SIGKILL)
        process = subprocess.Popen(
            command, env=dict(environment), start_new_session=True, preexec_fn=ending, umask=0o077
        )
        try:
            if _await(folder / "socket", process):
                shim = str(Path(clientapp_shim.__file__))
                _write_program(folder, [sys.executable, "-I", "-S", shim, str(folder / "socket"), *cold, "--"])
            yield folder
        finally:
            process.kill()  # and its children with it
            process.wait()


def _write_program(folder: Path, command: Sequence[str]) -> None:
    path = folder / PROGRAM
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    path.chmod(0o700)


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
        program = clientapp.program()
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
