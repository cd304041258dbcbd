"""What people type, and the files they bring: a slip is one line that says what was wrong, and nothing is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from fedgan_lightning.__main__ import main
from fedgan_lightning.claim import claimed
from tests.test_cli import DIGITS, one_line, run, small

WHOLE = "0 to 4294967295"
#: Options of ``fit``, and what is said of them.
OPTIONS = {
    "a source in small letters": (["--data.source", "digits"], "data.source must be the name .* digits.*Write Digits"),
    "a class of another kind": (
        ["--data.source", "IID"],
        "must be a class of another kind; got IID.*Partition",
    ),
    "a class that is no source": (["--data.source", "torch.nn.Linear"], "data.source must be a Source; got torch.nn.L"),
    "a module that is not there": (["--data.source", "no.such.Thing"], r"got no.such.Thing \(No module named"),
    "a list for one": (["--data.source", "[Digits]"], "data.source must be one Source.*Digits"),
    "arguments beside their class": (
        ["--data.partition", "{class_path: ClassesPerClient, num_classes: 2}"],
        "below init_args.*data.partition.*got num_classes beside class_path: ClassesPerClient",
    ),
    "an executor that there is not": (["--federation.executor", "sequential"], "Write SequentialExecutor"),
    "a callback that there is not": (["--trainer.callbacks", "Nope"], "trainer.callbacks must be the name.*got Nope"),
    "a logger without its folder": (["--trainer.logger", "[TensorBoardLogger]"], "trainer.logger must have save_dir"),
    "no number of clients": (["--data.num_clients", "null"], "data.num_clients must be a whole number; got None"),
    "rounds in words": (["--federation.rounds", "many"], "federation.rounds must be a whole number; got many"),
    "rounds and a half": (["--federation.rounds", "1.5"], "federation.rounds must be a whole number; got 1.5"),
    "a rate in words": (["--model.generator_optimizer.lr", "fast"], "lr must be a number.*got fast"),
    "a word that is none of two": (["--federation.client_state", "tape"], "one of memory, disk; got tape"),
    "a seed below nought": (["--seed_everything", "-1"], f"seed_everything .* {WHOLE}; got -1"),
    "a seed beyond all": (["--seed_everything", "4294967296"], f"seed_everything .* {WHOLE}; got 4294967296"),
    "a seed that is drawn": (["--seed_everything", "true"], f"seed_everything .* {WHOLE}; got True"),
    "no threads": (["--num_threads", "0"], "num_threads must be at least 1; got 0. Raise it, or set null"),
    "pictures never": (["--pictures.every_n_rounds", "0"], "pictures.every_n_rounds .*got 0. .*or null"),
    "pictures of no rows": (["--pictures.rows", "0"], "pictures.rows .* of at least 1; got 0. Choose"),
    "a rate below nought": (
        ["--model.generator_optimizer.lr", "-1"],
        "of the model must make its optimizers .*learning rate: -1",
    ),
    "a server's rate below nought": (
        ["--server.optimizer", "torch.optim.SGD", "--server.optimizer.lr", "-1"],
        "of the server must make its optimizers .*learning rate: -1",
    ),
    "half precision": (["--trainer.precision", "16-mixed"], "got trainer.precision=16-mixed. .*bf16-mixed"),
    "true half precision": (["--trainer.precision", "16-true"], "got trainer.precision=16-true"),
    "another program's precision": (["--trainer.precision", "transformer-engine"], "got trainer.precision=transf"),
    "a device that there is not": (
        ["--trainer.accelerator", "abacus"],
        "below trainer: must make a Trainer; got .*abacus",
    ),
    "fewer than no devices": (
        ["--trainer.devices", "-5"],
        "below trainer: must make a Trainer; got .*should be an int > 0",
    ),
    "a key that is written twice": (
        ["--federation.sync", "{generator: average, generator: local}"],
        "federation.sync: a key .* once; got .*generator in line 1 and again in line 1",
    ),
    "stopping by what is measured now and then": (
        ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "fid", "--evaluation.every_n_rounds=2"],
        "EarlyStopping must look at fid .*every_n_rounds=2.*every round. Set evaluation.every_n_rounds to 1",
    ),
    "stopping by what is not measured": (
        ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "fidd"],
        "EarlyStopping must watch a metric.*monitor=fidd. Choose from .*fid, .*fid_test",
    ),
    "keeping by what is measured now and then": (
        [
            "--trainer.callbacks",
            "ModelCheckpoint",
            "--trainer.callbacks.monitor",
            "fid",
            "--evaluation.every_n_rounds=2",
        ],
        "ModelCheckpoint must look at fid .*or every_n_epochs of ModelCheckpoint to 2",
    ),
    "a value that is missing": (["--federation.rounds"], "--federation.rounds: expected one argument"),
    "no directory": (["--run_dir", ""], "a path must have a name; got ''"),
    "nobody's home": (
        ["--run_dir", "~no_such_user/run"],
        "a path must be one that can be found; got ~no_such_user/run",
    ),
    "a directory where nobody writes": (["--run_dir", "/proc/x/run"], "can be written; got /proc/x/run"),
    "no checkpoint": (["--ckpt_path", ""], "a path must have a name; got ''"),
}
#: Files of settings beside a good one.
FILES = {
    "two groups of a name": (
        "data: {num_clients: 2}\nmodel: {}\ndata: {batch_size: 3}\n",
        "with data in line 1 .*line 3",
    ),
    "tabs": ("data:\n\tbatch_size: 3\n", "line 2, column 1"),
    "nothing": ("", "which is empty"),
    "a text": ("hello\n", "which is a text"),
    "a list": ("- model\n", "which is a list"),
    "a list for a group": ("federation: [rounds]\n", "with a list below federation:"),
    "code": ("run_dir: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    "an unknown key": ("data: {sourc: Digits}\n", "data.sourc"),
    "an unknown group": ("dat: {source: Digits}\n", "dat.source"),
    "a class in small letters": ("data: {source: digits}\n", "data.source must be the name of a class; got digits"),
    "arguments beside their class": (
        "data: {partition: {class_path: ClassesPerClient, num_classes: 2}}\n",
        "data.partition.*got num_classes beside",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_cannot_be(name, tmp_path, capsys):
    extra, words = OPTIONS[name]
    arguments = ["fit", *small("digits"), "--run_dir", tmp_path / "run", *extra]
    code, _, err = run(*arguments, capsys=capsys)
    assert code == 2, err
    assert re.search(words, one_line(err)), err
    left = {path.name for path in (tmp_path / "run").rglob("*")} if (tmp_path / "run").exists() else set()
    assert not left & {"config.yaml", "summary.json", "last.ckpt", ".claim"}, "the corrected command can use it"


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_settings_that_cannot_be(name, tmp_path, capsys):
    text, words = FILES[name]
    (tmp_path / "own.yaml").write_text(text)
    told = ["--config", DIGITS, "--config", tmp_path / "own.yaml", "--run_dir", tmp_path / "run"]
    code, _, err = run("fit", *told, capsys=capsys)
    assert code == 2, err
    assert re.search(words, one_line(err)), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("role", ["server", "trial", "site"])
def test_settings_of_a_deployment_are_read_as_strictly(role, tmp_path, capsys):
    """Before anything is started for them."""
    (tmp_path / "twice.yaml").write_text("data: {batch_size: 3}\ndata: {num_clients: 2}\n")
    told = {
        "server": ["--config", tmp_path / "twice.yaml", "--run_dir", tmp_path / "run", "--keys", tmp_path],
        "trial": ["--sites=1", "--config", DIGITS, "--site", tmp_path / "twice.yaml", "--run_dir", tmp_path / "run"],
        "site": ["--superlink=a:1", "--ca=a", "--key=b", "--client-id=0", "--config", tmp_path / "twice.yaml"],
    }
    code, _, err = run("deploy", role, *told[role], capsys=capsys)
    assert code == 2
    assert "twice.yaml with data in line 1 and again in line 2" in one_line(err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["m.yaml", "m"])
def test_a_file_that_settings_name_is_read_as_strictly(name, tmp_path, capsys):
    (tmp_path / name).write_text("class_path: GAN\ninit_args: {d_steps: 1}\nclass_path: GAN\n")
    told = ["--config", DIGITS, "--model", tmp_path / name, "--run_dir", tmp_path / "run"]
    code, _, err = run("fit", *told, capsys=capsys)
    assert code == 2
    assert "class_path in line 1 and again in line 3" in one_line(err)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A small finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    told = ["--federation.executor", "SequentialExecutor", "--evaluation.metrics", "[FrechetDistance]"]
    assert run("fit", *small("digits"), *told, "--run_dir", folder)[0] == 0
    return folder


DAMAGES = {
    "empty": (b"", "which is empty"),
    "garbage": (bytes(range(256)), "must be readable; got .*bad.ckpt"),
    "text": (b"hello world", "must be readable; got .*bad.ckpt"),
    "the head of an archive": (b"PK\x03\x04" + b"x" * 300, "must be readable; got .*bad.ckpt"),
    "a list": ([1], "without an orchestrator's state"),
    "callbacks of another kind": ({"callbacks": [1]}, "without an orchestrator's state"),
    "plain Lightning": ({"state_dict": {}, "callbacks": {}, "global_step": 1}, "without an orchestrator's state"),
    "weights alone": (
        {"state_dict": {}, "callbacks": {"FederatedOrchestrator": {"identity": {}}}},
        "continued from a whole checkpoint; got .* without global_step, epoch",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_cannot_be(name, tmp_path, capsys):
    content, words = DAMAGES[name]
    bad = tmp_path / "bad.ckpt"
    if isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        torch.save(content, bad)
    code, _, err = run("fit", *small("digits"), "--run_dir", tmp_path / "new", "--ckpt_path", bad, capsys=capsys)
    assert code == 2
    assert re.search(words, one_line(err)), err
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_that_is_no_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    for path, words in (
        (tmp_path, "a folder"),
        (tmp_path / "fifo", "no regular file"),
        ("/dev/zero", "no regular file"),
    ):
        code, _, err = run("fit", *small("digits"), "--run_dir", tmp_path / "n", "--ckpt_path", path, capsys=capsys)
        assert code == 2
        assert words in one_line(err)


@pytest.mark.parametrize("command", ["test", "predict"])
def test_networks_of_another_run(command, finished, tmp_path, capsys):
    told = ["--ckpt_path", finished / "checkpoints" / "last.ckpt", "--run_dir", tmp_path / "run"]
    code, _, err = run(command, *small("ring8"), *told, capsys=capsys)
    assert code == 2
    assert "into the networks it came from; got one that differs in discriminator" in one_line(err)


@pytest.mark.parametrize("command", ["test", "predict", "partition"])
def test_a_command_that_writes_looks_first_whether_it_may(command, finished, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    told = [] if command == "partition" else ["--ckpt_path", finished / "checkpoints" / "last.ckpt"]
    code, _, err = run(command, "--config", DIGITS, "--run_dir", tmp_path / "file", *told, capsys=capsys)
    assert code == 2
    assert "a run directory must be a folder that can be written" in one_line(err)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_directory_that_another_process_writes(tmp_path, capsys):
    with claimed(tmp_path / "run"):
        code, _, err = run("fit", *small("digits"), "--run_dir", tmp_path / "run", capsys=capsys)
    assert code == 2
    assert "a run directory must be written by one process; got" in one_line(err)
    assert not (tmp_path / "run").exists()


REPORTS = {
    "summary.json": [b"", b"[]", b"null", b'{"history": 3}', b'{"history": [], "bytes_up": 7}', b"\xff\xfe"],
    "config.yaml": [b"a: [", b"\xff\xfe\x00"],
    "rounds.jsonl": [b'{"round": 0, "clients": 3}\n', b'{"round": "x", "clients": []}\n'],
    "partition.npz": [b"", b"PK\x03\x04"],
}


@pytest.mark.parametrize("name, content", [(name, own) for name, all in REPORTS.items() for own in all])
def test_a_report_on_damaged_files(name, content, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    code, _, err = run("report", tmp_path / "run", capsys=capsys)
    assert code == 2
    assert name in one_line(err) or "summary.json" in one_line(err)
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_report_on_values_that_are_not_finite(finished, tmp_path, capsys):
    """As an earlier version wrote them, and as JSON has them."""
    shutil.copytree(finished, tmp_path / "run")
    summary = json.loads((finished / "summary.json").read_text())
    summary["history"][0]["fid"], summary["history"][1]["fid"] = float("nan"), None
    summary["final"]["fid"], summary["evaluation"]["fid_floor"] = None, None
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert run("report", tmp_path / "run", capsys=capsys)[0] == 0
    html = re.sub(r'src="data:[^"]*"', "", (tmp_path / "run" / "report.html").read_text())
    assert not re.search(r"\bnan\b", html, re.IGNORECASE)


def test_what_nobody_foresaw_is_one_line_too(monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr("fedgan_lightning.__main__.dispatched", broken)
    assert main(["fit"]) == 2
    assert re.search(r"error: ZeroDivisionError: one two \(test_bad_input.py:\d+\). ", capsys.readouterr().err)
    monkeypatch.setenv("FEDGAN_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["fit"])


@pytest.mark.parametrize("raised, code, words", [
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    (OSError(28, "No space left on device", "/x/last.ckpt"), 2, "got /x/last.ckpt: No space left on device"),
])  # fmt: skip
def test_a_full_disk_and_an_early_ctrl_c(raised, code, words, monkeypatch, capsys):
    def stop(*_):
        raise raised

    monkeypatch.setattr("fedgan_lightning.__main__.dispatched", stop)
    assert main(["fit"]) == code
    assert words in one_line(capsys.readouterr().err)
