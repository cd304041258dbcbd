"""SIGKILL, SIGTERM and Ctrl-C: whatever ends a run, it continues as if nothing had happened.

Runs stop themselves at chosen instants (``tests/command.py``), so that no test depends on how fast the machine is.
"""

from __future__ import annotations

import json
import signal

import pytest

from benchmarks import kill_resume
from tests.conftest import ROOT
from tests.processes import started

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

CLIENTS = 5


def train(run_dir, *options, code=0):
    """Run the benchmark's federation in a process; see that it ends with this code."""
    sequential = ["--federation.executor", "SequentialExecutor"]  # whose clients can be counted
    arguments = [*kill_resume.arguments("everything"), *sequential, "--run_dir", str(run_dir), *options]
    with started(ROOT / "tests" / "command.py", *arguments, cwd=run_dir.parent) as run:
        assert run.finish() == code, run.said()


def check_that_it_resumes(run_dir, whole):
    train(run_dir, "--ckpt_path", "last")
    found = kill_resume.outcome(run_dir)
    assert [name for name in whole if not kill_resume.same(whole[name], found[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(run_dir)
    return kill_resume.outcome(run_dir)


@pytest.mark.parametrize("instant, kept", [(f"client {4 * CLIENTS + 3}", 4), ("checkpoint 6", 5)])
def test_a_killed_run_resumes_bit_identically(whole, tmp_path, monkeypatch, instant, kept):
    """In the middle of the fifth round, and of the sixth checkpoint."""
    run_dir = tmp_path / "run"
    monkeypatch.setenv("STOP", f"SIGKILL {instant}")
    train(run_dir, code=-signal.SIGKILL)
    assert kill_resume.outcome(run_dir)["round"] == kept
    left = list((run_dir / "checkpoints").glob(".*.partial"))
    assert bool(left) == instant.startswith("checkpoint")
    monkeypatch.delenv("STOP")
    check_that_it_resumes(run_dir, whole)
    assert not list((run_dir / "checkpoints").glob(".*.partial")), "what the kill left behind is tidied up"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_ends_cleanly_and_resumes_bit_identically(whole, tmp_path, monkeypatch, number):
    """In the middle of the fourth round, before any checkpoint was due."""
    run_dir = tmp_path / "run"
    monkeypatch.setenv("STOP", f"{number.name} client {3 * CLIENTS + 2}")
    train(run_dir, "--checkpoint.every_n_rounds", "100", code=128 + number)
    monkeypatch.delenv("STOP")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("stopped", 3)
    assert (run_dir / "checkpoints" / "last.ckpt").exists()
    check_that_it_resumes(run_dir, whole)


def test_a_shipped_configuration_with_its_own_executor_resumes_bit_identically(tmp_path, monkeypatch):
    """A process that has trained for long and one that has just begun compute the same (``executor: auto``)."""

    def run(run_dir, *options, code=0):
        arguments = [*kill_resume.arguments("digits"), "--run_dir", str(run_dir), *options]
        with started(ROOT / "tests" / "command.py", *arguments, cwd=tmp_path) as process:
            assert process.finish() == code, process.said()

    run(tmp_path / "whole")
    monkeypatch.setenv("STOP", "SIGKILL checkpoint 16")
    run(tmp_path / "killed", code=-signal.SIGKILL)
    monkeypatch.delenv("STOP")
    run(tmp_path / "killed", "--ckpt_path", "last")
    whole, found = (kill_resume.outcome(tmp_path / name) for name in ("whole", "killed"))
    assert [name for name in whole if not kill_resume.same(whole[name], found[name])] == []
