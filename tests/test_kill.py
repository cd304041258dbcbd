"""SIGKILL, SIGTERM and Ctrl-C: whatever ends a run, it continues as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import time

import pytest

from benchmarks import kill_resume

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    kill_resume.finish(kill_resume.start(run_dir))
    return kill_resume.outcome(run_dir)


@pytest.mark.parametrize("mid_checkpoint", [False, True])
def test_a_killed_run_resumes_bit_identically(whole, tmp_path, mid_checkpoint):
    run_dir = tmp_path / "run"
    process = kill_resume.start(run_dir)
    kill_resume.kill_when(process, run_dir, mid_checkpoint=mid_checkpoint, chance=random.Random(3))
    assert process.returncode == -signal.SIGKILL
    kill_resume.finish(kill_resume.start(run_dir, "--ckpt_path", "last"))
    found = kill_resume.outcome(run_dir)
    assert [name for name in whole if not kill_resume.same(whole[name], found[name])] == []
    assert not list((run_dir / "checkpoints").glob(".*.partial")), "what the kill left behind is tidied up"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_ends_cleanly_and_resumes_bit_identically(whole, tmp_path, number):
    run_dir = tmp_path / "run"
    process = kill_resume.start(run_dir, "--checkpoint.every_n_rounds", "100")
    while process.poll() is None and not (run_dir / "summary.json").exists():
        time.sleep(0.005)  # written after the third round: there is no checkpoint yet
    process.send_signal(number)
    process.communicate()
    assert process.returncode == 128 + number
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert 3 <= summary["rounds"] < kill_resume.ROUNDS
    assert (run_dir / "checkpoints" / "last.ckpt").exists()
    kill_resume.finish(kill_resume.start(run_dir, "--ckpt_path", "last"))
    found = kill_resume.outcome(run_dir)
    assert [name for name in whole if not kill_resume.same(whole[name], found[name])] == []
