"""The process that forks for every message: it does what Flower's own program does, and lives as long as that would."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from benchmarks.kill_server import descendants, send_kill
from fedgan_lightning.deployment import forkserver, launch, programs
from fedgan_lightning.deployment.keys import make_authority
from tests.processes import eventually

pytestmark = [
    pytest.mark.flower,
    pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone"),
    pytest.mark.timeout(300),
]
#: Nobody answers there, and Flower asks again and again.
BUSY = ["--runtime-api-address", "127.0.0.1:9", "--token", "t", "--insecure"]


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """The program that a SuperNode would find."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    cold = tmp_path / "cold"
    cold.write_text('#!/bin/sh\necho cold "$@"\nexit 3\n')
    cold.chmod(0o700)
    with forkserver.opened(cold=[str(cold)], environment=programs.environment(tmp_path)) as folder:
        yield folder / forkserver.PROGRAM


def run(program, *arguments):
    return subprocess.run([program, *arguments], capture_output=True, text=True)


def forking() -> int:
    """The process that ``opened`` started."""
    (own,) = [pid for pid in descendants(os.getpid()) if b"deployment.forkserver" in _command(pid)]
    return own


def at_work(parent: int) -> list[int]:
    """Return what it forked and has not ended; what has ended stays in the list of processes until it is asked for."""
    return [pid for pid in descendants(parent) if _command(pid)]


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_it_is_flower_s_program_with_the_asker_s_arguments_streams_and_exit_code(quick):
    told = run(quick, "--help")
    assert (told.returncode, told.stderr) == (0, "")
    assert "usage: flwr-clientapp" in told.stdout
    refused = run(quick, "--nonsense")
    assert refused.returncode == 2
    assert "--runtime-api-address" in refused.stderr
    assert quick.parent.stat().st_mode & 0o077 == 0, "nobody else may ask"


def test_a_killed_asker_takes_the_work_with_it_and_so_does_the_forking_process(quick):
    run(quick, "--help")  # it has imported everything
    parent = forking()
    for end in ("asker", "parent"):
        assert eventually(lambda: not at_work(parent)), "what was asked for before is done"
        asker = subprocess.Popen([quick, *BUSY], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert eventually(lambda: at_work(parent))
        working = at_work(parent)
        send_kill([asker.pid if end == "asker" else parent])
        assert eventually(lambda working=working: not any(map(_command, working))), end
        assert asker.wait() != 0, "nobody did it a second time"


def test_without_the_forking_process_it_becomes_the_program_that_needs_none(quick):
    send_kill([forking()])
    assert eventually(lambda: not any(b"deployment.forkserver" in _command(p) for p in descendants(os.getpid())))
    told = run(quick, "--token", "a b")
    assert (told.returncode, told.stdout) == (3, "cold --token a b\n")
    assert "starting anew takes longer" in told.stderr


def test_what_a_site_s_supernode_finds_is_the_quick_one(tmp_path, monkeypatch):
    found = []

    def keep_running(command, *, environment):
        found.append(Path(shutil.which(forkserver.PROGRAM, path=environment["PATH"])).read_text())
        return 0

    monkeypatch.setattr(launch, "keep_running", keep_running)
    monkeypatch.chdir(tmp_path)
    make_authority(tmp_path)
    for name in ("site0", "config.yaml"):
        Path(name).write_text("model: {}" if name == "config.yaml" else "")
    site = ["--superlink", "h:1", "--ca", "ca.crt", "--key", "site0", "--client-id", "0", "--config", "config.yaml"]
    assert launch.main(["site", *site]) == 0
    assert "clientapp_shim.py" in found[0]
    assert "fedgan_lightning.deployment.clientapp" in found[0], "what is installed, for when nobody is behind the door"
    assert str(programs.program(forkserver.PROGRAM)) not in found[0], "Flower's own runs whatever arrives"
