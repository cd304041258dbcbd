"""The roles of a federation between machines: what they start, and what they refuse in one line."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from fedgan_lightning.__main__ import main
from fedgan_lightning.deployment import programs, supernode_supervisor
from fedgan_lightning.errors import ConfigurationError
from tests.conftest import ROOT
from tests.processes import eventually

CONFIG = str(ROOT / "configs" / "digits.yaml")


def refused(capsys, *arguments: str) -> str:
    assert main(["deploy", *arguments]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def test_without_flower_a_federation_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(programs, "program", lambda name: None)
    text = refused(capsys, "trial", "--sites", "2", "--config", CONFIG, "--run_dir", "r")
    assert "Run pip install 'fedgan-lightning[flower]'" in text


def test_bad_options_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(programs, "program", lambda name: name)
    assert "deploy --help" in refused(capsys, "hospital")
    assert "--sites" in refused(capsys, "keys", "folder")
    site = ["--superlink", "h:1", "--ca", "ca", "--key", "k", "--client-id", "0", "--config", CONFIG]
    assert "unknown options --frobnicate" in refused(capsys, "site", *site, "--frobnicate", "1")
    assert f"files that are named must exist; got {tmp_path / 'ca'}." in refused(capsys, "site", *site)
    text = refused(capsys, "trial", "--sites", "2", "--config", "none.yaml", "--run_dir", "r")
    assert f"got {tmp_path / 'none.yaml'}" in text
    text = refused(capsys, "server", "--keys", "keys", "--config", "none.yaml", "--run_dir", "r")
    assert f"got {tmp_path / 'none.yaml'}" in text, "before anything is started"
    server = ["server", "--keys", "keys", "--config", CONFIG, "--run_dir", "r"]
    assert f"got {tmp_path / 'keys/ca.crt'}" in refused(capsys, *server)


def test_a_site_is_told_its_own_settings_and_nothing_else(tmp_path):
    command = programs.supernode(
        superlink="fedgan.example.org:8000", ca=tmp_path / "ca.crt", key=tmp_path / "site1", port=9094,
        node={"client-id": 1, "config": "/srv/mnist.yaml", "state": "/srv/state"},
    )  # fmt: skip
    options = dict(zip(command[1::2], command[2::2]))
    assert options["--node-config"] == 'client-id=1 config="/srv/mnist.yaml" state="/srv/state"'
    assert options["--root-certificates"] == str(tmp_path / "ca.crt")
    assert "--insecure" not in command


def test_keys_are_private_and_the_certificate_is_the_authority_s(tmp_path):
    pytest.importorskip("cryptography", reason="comes with the extra 'flower'")
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    from fedgan_lightning.deployment.keys import prepare

    prepare(tmp_path, sites=1, hosts=["fedgan.example.org", "10.0.0.1"])
    for name in ("ca.key", "server.key", "site0"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    ca, server = (x509.load_pem_x509_certificate((tmp_path / f"{n}.crt").read_bytes()) for n in ("ca", "server"))
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fedgan.example.org"]
    assert [str(own) for own in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]
    key = serialization.load_ssh_private_key((tmp_path / "site0").read_bytes(), password=None)
    public = serialization.load_ssh_public_key((tmp_path / "site0.pub").read_bytes())
    assert key.public_key().public_numbers() == public.public_numbers()
    assert key.curve.name == "secp384r1"


def test_processes_end_with_the_body_and_with_their_children(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), programs.processes() as started:
        started.append(programs.start(["sh", "-c", "sleep 600 & wait"], tmp_path, log="log"))
        raise RuntimeError("stop")
    (process,) = started
    assert process.poll() is not None
    assert eventually(lambda: not _running(group=process.pid)), "a killed process takes a moment to die"


def _running(*, group: int) -> list[str]:
    """States of a group's processes; in a container that nobody tidies, dead ones stay listed as zombies (Z)."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    states = [line.split() for line in listed.splitlines()]
    return [state for number, state in states if int(number) == group and not state.startswith("Z")]


# ---------------------------------------------------------------------- what is left when something is killed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_what_a_server_started_ends_with_it_however_it_ends(tmp_path):
    code = (
        "import sys; from pathlib import Path; from fedgan_lightning.deployment import programs\n"
        "print(programs.start(['sleep', '600'], Path(sys.argv[1]), log='log').pid, flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    group = int(parent.stdout.readline())
    assert _running(group=group), "a positive control"
    parent.kill()
    parent.communicate()
    assert eventually(lambda: not _running(group=group))


def test_a_server_waits_for_its_port_and_refuses_one_that_stays_taken(tmp_path, monkeypatch):
    with socket.socket() as other:
        port = programs.free_port()
        other.bind(("127.0.0.1", port))
        other.listen()
        monkeypatch.setattr(programs, "PORT_SECONDS", 0.0)
        with pytest.raises(ConfigurationError, match=f"a port must have one server that listens; got 127.0.0.1:{port}"):
            programs.await_port("127.0.0.1", port)
        monkeypatch.setattr(programs, "PORT_SECONDS", 3600.0)
        threading.Timer(0.5, other.close).start()
        programs.await_port("127.0.0.1", port)
        assert other.fileno() == -1, "it has waited"


@pytest.fixture
def lived(tmp_path, monkeypatch):
    """A file in which SuperNodes write how many seconds each of them lived: the clock of those who look after them."""
    path = tmp_path / "lived"
    path.touch()
    clock = SimpleNamespace(monotonic=lambda: sum(map(float, path.read_text().split())), sleep=time.sleep)
    monkeypatch.setattr(supernode_supervisor, "time", clock)
    monkeypatch.setattr(supernode_supervisor, "PAUSE_SECONDS", 0.0)
    return path


def test_a_site_starts_its_supernode_again_and_gives_up_when_it_is_always_refused(lived, caplog):
    """A SuperLink takes a killed SuperNode for connected for a minute, and refuses its successor as it does others."""
    with pytest.raises(ConfigurationError, match="a SuperNode that ended with 1 again and again"):
        supernode_supervisor.keep_running(["sh", "-c", f"echo 20 >> {lived}; exit 1"], environment=os.environ)
    assert lived.read_text() == "20\n" * 6, "refused since second 20, it has run out of patience, 90 s, at second 120"
    assert "the SuperNode ended (1); it is started again" in caplog.text


def test_a_site_whose_supernode_crashes_by_itself_gives_up(lived):
    """A broken library is nobody's signal from outside."""
    with pytest.raises(ConfigurationError, match="a SuperNode that ended with -11 again and again"):
        supernode_supervisor.keep_running(["sh", "-c", f"echo 20 >> {lived}; kill -SEGV $$"], environment=os.environ)


def test_a_site_that_is_killed_early_has_all_the_time_to_come_back(lived, caplog):
    """That it had run for a moment alone must not count as refusal: those that follow it are refused for a minute."""
    # Let in for 25 s and killed, twice; between the two, and after them, refused for less than the patience.
    code = f"""
import os, signal, time
seconds = [25, 20, 20, 25, 30, 30, 20][len(open({str(lived)!r}).read().split())]
with open({str(lived)!r}, "a") as file:
    file.write(f"{{seconds}} ")
if seconds == 25:
    os.kill(os.getpid(), signal.SIGKILL)
if len(open({str(lived)!r}).read().split()) == 7:
    os.kill({os.getpid()}, signal.SIGTERM)
    time.sleep(600)
raise SystemExit(1)
"""
    assert supernode_supervisor.keep_running([sys.executable, "-ISc", code], environment=os.environ) == 0
    assert len(lived.read_text().split()) == 7
    assert caplog.text.count("the SuperNode ended (-9)") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of other processes' children")
def test_a_supernode_whose_starter_of_tasks_has_ended_is_started_again(tmp_path, monkeypatch, caplog):
    """Flower's SuperNode would take messages for ever, and nobody would do what they ask."""
    monkeypatch.setattr(supernode_supervisor, "PAUSE_SECONDS", 0.05)
    starter, starts = tmp_path / supernode_supervisor.STARTER, tmp_path / "starts"
    starter.write_text(f"#!{sys.executable} -IS\nimport time\ntime.sleep(0.5)\n")
    starter.chmod(0o700)
    # Its first one starts a starter that ends; its second one asks the whole to stop.
    code = f"""
import os, signal, subprocess, sys, threading, time
with open({str(starts)!r}, "a") as file:
    file.write("start ")
if open({str(starts)!r}).read().count("start") == 2:
    os.kill({os.getpid()}, signal.SIGTERM)
else:
    child = []
    thread = threading.Thread(target=lambda: child.append(subprocess.Popen([{str(starter)!r}])))
    thread.start()
time.sleep(600)
"""
    assert supernode_supervisor.keep_running([sys.executable, "-ISc", code], environment=os.environ) == 0
    assert starts.read_text() == "start start "
    assert f"{supernode_supervisor.STARTER} ended, and the SuperNode does not start another" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of other processes' children")
def test_a_site_that_never_has_a_starter_says_so(tmp_path, monkeypatch):
    """And blames no key."""
    monkeypatch.setattr(supernode_supervisor, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(supernode_supervisor, "PATIENCE_SECONDS", 1.0)
    starter = tmp_path / supernode_supervisor.STARTER
    starter.write_text("#!/bin/sh\nexit 1\n")
    starter.chmod(0o700)
    code = f"import subprocess, time; child = subprocess.Popen([{str(starter)!r}]); time.sleep(600)"
    with pytest.raises(ConfigurationError, match="a flower-superexec, .* got one that ended again and again"):
        supernode_supervisor.keep_running([sys.executable, "-ISc", code], environment=os.environ)


def test_the_sites_of_a_trial_are_looked_after_by_a_process_of_their_own(tmp_path):
    """It starts them again, and ends them when it is asked to stop."""
    up, asked = tmp_path / "up", tmp_path / "asked"
    polite = (
        f"trap 'echo asked > {asked}; exit 0' TERM; echo x >> {up}; [ $(wc -l < {up}) = 1 ] && exit 3; sleep 600 & wait"
    )
    with programs.processes() as started:
        started.append(programs.start(supernode_supervisor.kept(["sh", "-c", polite]), tmp_path, log="log"))
        assert eventually(lambda: up.exists() and up.read_text() == "x\nx\n"), (tmp_path / "log").read_text()
    assert eventually(asked.exists)
    assert "the SuperNode ended (3); it is started again" in (tmp_path / "log").read_text()


def test_a_site_of_a_trial_that_gives_up_is_named_while_the_run_goes_on(tmp_path, caplog):
    with programs.processes() as started:
        logs = [tmp_path / name / "log" for name in ("gives_up", "stays")]
        for log, command in zip(logs, (["sh", "-c", "exit 3"], ["sleep", "600"])):
            started.append(programs.start(command, log.parent, log="log"))
        with programs.watched(dict(zip(logs, started))):
            assert eventually(lambda: caplog.messages)
    assert caplog.messages == [f"a process ended (3); {logs[0]} says why"], "once, and not of those that end later"


def test_a_site_that_is_asked_to_stop_asks_its_supernode(tmp_path, monkeypatch):
    monkeypatch.setattr(supernode_supervisor, "PAUSE_SECONDS", 0.05)
    before = signal.getsignal(signal.SIGTERM)
    polite = f"trap 'echo asked > {tmp_path / 'asked'}; exit 0' TERM; echo x > {tmp_path / 'up'}; sleep 600 & wait"
    threading.Thread(
        target=lambda: eventually((tmp_path / "up").exists) and os.kill(os.getpid(), signal.SIGTERM)
    ).start()
    assert supernode_supervisor.keep_running(["sh", "-c", polite], environment=os.environ) == 0
    assert (tmp_path / "asked").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def deaf_program(folder) -> str:
    """Return a program that no request ends; once its number is in the file ``up``, requests are ignored."""
    told = f"echo $$ > {folder / 'fresh'}; mv {folder / 'fresh'} {folder / 'up'}"
    return f"trap '' TERM; {told}; while true; do sleep 0.1; done"


def test_a_supernode_that_does_not_end_when_it_is_asked_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(supernode_supervisor, "STOP_SECONDS", 0.5)
    deaf = deaf_program(tmp_path)
    threading.Thread(
        target=lambda: eventually((tmp_path / "up").exists) and os.kill(os.getpid(), signal.SIGTERM)
    ).start()
    assert supernode_supervisor.keep_running(["sh", "-c", deaf], environment=os.environ) == 0
    assert eventually(lambda: not _running(group=int((tmp_path / "up").read_text())))


def test_a_second_request_to_stop_does_not_wait_though_it_comes_with_the_first(tmp_path, monkeypatch):
    deaf = deaf_program(tmp_path)

    def ask_twice():
        eventually((tmp_path / "up").exists)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(supernode_supervisor, "STOP_SECONDS", 3600.0)
    threading.Thread(target=ask_twice).start()
    assert supernode_supervisor.keep_running(["sh", "-c", deaf], environment=os.environ) == 0
    assert eventually(lambda: not _running(group=int((tmp_path / "up").read_text())))
