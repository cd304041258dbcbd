"""The command line as a user meets it: every configuration, every command, every bad input."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fedgan_lightning.__main__ import COMMANDS, main
from fedgan_lightning.cli import SUBCOMMANDS
from fedgan_lightning.visuals import pictures
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DATA = ROOT / "tests" / "data"
#: Generators that are told a condition made from data have no pictures from noise.
CONDITIONAL = ("recommendation",)
DIGITS = str(ROOT / "configs" / "digits.yaml")
TINY = ["--federation.rounds", "2", "--federation.local_steps", "2", "--evaluation.num_samples", "60"]
TINY += [
    "--trainer.enable_progress_bar",
    "false",
    "--evaluation.every_n_rounds",
    "1",
    "--checkpoint.every_n_rounds",
    "1",
]
TINY += ["--trainer.accelerator", "cpu"]
#: What stands in for data that is not at hand.
STAND_INS = {
    "fashion_mnist": ("[1, 28, 28]", 10),
    "mnist": ("[1, 28, 28]", 10),
    "mnist_uagan": ("[1, 28, 28]", 10),
    "private_mnist": ("[1, 28, 28]", 10),
    "cifar10": ("[3, 32, 32]", 10),
    "celeba": ("[3, 48, 48]", 16),
    "medical": ("[1, 28, 28]", 2),
    "image_folder": ("[3, 32, 32]", 0),
    "hospitals": ("[1, 28, 28]", 2),
    "classifier": ("[1, 28, 28]", 2),
    "inpainting": ("[1, 28, 28]", 10),
}
#: How pictures of generated samples are called, where they are more than samples.
PICTURES = {"inpainting": "completed", "digits_asyndgan": "completed", "digits_personal": ""}


#: What must know the number of words.
TEXT_PARTS = {"text_mle": ["generator"], "text": ["generator", "discriminator", "codec"]}


def run(*arguments: str, capsys=None) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as left:
        code = left.code or 0
    out, err = capsys.readouterr() if capsys is not None else ("", "")
    return code, out, err


def small(name: str) -> list[str]:
    """Arguments that make a shipped configuration small, with its own data where at hand."""
    arguments = ["--config", str(ROOT / "configs" / f"{name}.yaml"), *TINY]
    if name in STAND_INS:
        shape, classes = STAND_INS[name]
        arguments += ["--data.source", "tests.fakes.RandomImages", f"--data.source.shape={shape}"]
        arguments += [f"--data.source.classes={classes}", "--data.batch_size", "8"]
        if name in ("cifar10", "celeba"):
            width = "8"
            arguments += [f"--model.generator.width={width}", f"--model.discriminator.width={width}"]
    if name in ("text", "text_mle"):
        folder, small_text = ROOT / "tests" / "data", "num_words=60"
        arguments += ["--data.source.path", str(folder / "sentences.txt"), "--data.source.test_path", "null"]
        arguments += ["--data.source.max_words", "60", "--data.batch_size", "8"]
        arguments += [f"--model.{part}.{small_text}" for part in TEXT_PARTS[name]]
        arguments += ["--trainer.callbacks", "[]"] if name == "text" else []
    if name == "timeseries":
        arguments += ["--data.source", "tests.fakes.RandomSeries", "--data.batch_size", "8"]
    if name == "recommendation":
        arguments += [f"--data.source.path={DATA / 'ratings.csv'}", f"--data.source.catalogue={DATA / 'movies.csv'}"]
        arguments += ["--data.source.num_items=30", "--data.source.min_user=5", "--data.source.min_item=3"]
        arguments += ["--model.generator.items=30", "--model.discriminator.items=30", "--model.condition.items=30"]
        arguments += ["--data.num_clients=4", "--data.batch_size=8"]
    if name == "inpainting":
        small_metric = "{class_path: Completion, init_args: {num_images: 50, features: PixelFeatures}}"
        arguments += ["--evaluation.metrics", f"[{small_metric}]"]
    if name.startswith("private"):  # the tight accountant takes a minute, and tests/privacy have it
        arguments += [
            "--federation.privacy.accountant" if name == "private_ring" else "--model.privacy.accountant",
            "rdp",
        ]
    if name not in ("digits", "ring8"):  # what auto measures would take longer than the two rounds
        arguments += ["--federation.executor", "SequentialExecutor"]
    return arguments


def test_the_promised_configurations_are_there():
    promised = "digits mnist fashion_mnist cifar10 celeba medical image_folder hospitals timeseries inpainting"
    promised += " ring8 grid25 swiss_roll toy2d toy2d_fedprox toy2d_scaffold recommendation text text_mle"
    assert {path.stem for path in CONFIGS} >= set(promised.split())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_runs_two_rounds_and_fills_its_directory(path, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    code, _, err = run("fit", *small(path.stem), "--run_dir", tmp_path / "run", capsys=capsys)
    assert code == 0, err
    names = {item.name for item in (tmp_path / "run").iterdir()}
    wanted = {"config.yaml", "summary.json", "partition.png", "partition.npz"}
    drawn = PICTURES.get(path.stem, "" if path.stem in (*CONDITIONAL, "classifier") else "fakes")
    wanted |= {f"{drawn}_init.png", f"{drawn}_round0002.png"} if drawn else set()
    assert wanted <= names
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert any(name.startswith("events.out.tfevents") for name in names)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("finished", 2)
    assert summary["bytes_up"]
    assert summary["client_steps_per_second"] > 0
    assert [entry["rounds"] for entry in summary["history"]] == [0, 1, 2]
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    code, out, err = run("fit", "--config", tmp_path / "run" / "config.yaml", "--print_config", capsys=capsys)
    assert code == 0, err
    again = yaml.safe_load(out)
    again.pop("ckpt_path", None)
    assert again == saved, "what was saved loads as it is"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A small finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run("fit", *small("digits"), "--run_dir", folder)[0] == 0
    return folder


def test_a_run_that_its_budget_ends_is_finished(tmp_path, capsys):
    privacy = {"clip": 0.1, "noise_multiplier": 2.0, "budget": 6.0, "delta": 1e-3}
    options = [option for name, value in privacy.items() for option in (f"--federation.privacy.{name}", str(value))]
    options += ["--federation.aggregator", "WeightedMean", "--federation.aggregator.weighting", "uniform"]
    options += ["--federation.optimizer_state", "reset", "--evaluation.metrics", "[]", "--federation.rounds", "50"]
    code, out, err = run("fit", *small("digits"), *options, "--run_dir", tmp_path / "run", capsys=capsys)
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert 0 < summary["rounds"] < 50
    assert f"finished after {summary['rounds']} complete rounds of 50: the privacy budget is spent" in out
    assert summary["privacy"]["client"]["epsilon"] <= 6.0


@pytest.mark.parametrize("form", ["HeldAbsentGap", "[{class_path: HeldAbsentGap, init_args: {every_n_rounds: 1}}]"])
def test_one_callback_or_several_are_added(form, tmp_path, capsys):
    arguments = [*small("digits"), "--run_dir", tmp_path / "run", "--trainer.callbacks", form]
    code, _, err = run("fit", *arguments, "--trainer.callbacks.every_n_rounds", "1", capsys=capsys)
    assert code == 0, err
    from fedgan_lightning.visuals.runs import read_run

    assert read_run(tmp_path / "run").scalars["gap/held_minus_absent"][0] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fti", "--config", "x"], "a command must be one of fit, .*; got fti. Write fit"),
        (["train"], "got train. .*--help"),
        (["fit", "--config", "nope.yaml"], "a configuration must be a file; got nope.yaml"),
        (["test", "--run_dir", "x", "--config=nope.yaml"], "a configuration must be a file; got nope.yaml"),
    ],
)
def test_slips_of_the_finger_are_named_before_torch_is_imported(arguments, words):
    code = "import sys; from fedgan_lightning.__main__ import main; code = main(sys.argv[1:])"
    code += "; assert 'torch' not in sys.modules; sys.exit(code)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.search(words, one_line(done.stderr))


class TestCommands:
    def test_summary_says_what_the_numbers_rest_on(self, finished):
        summary = json.loads((finished / "summary.json").read_text())
        assert {"fid", "classes", "class_distance", "class_accuracy"} <= set(summary["final"])
        assert {"fid_floor", "fid_num_reals", "fid_features_hash", "num_samples"} <= set(summary["evaluation"])
        assert summary["best"]["fid"]["value"] == min(entry["fid"] for entry in summary["history"])
        assert {"torch", "lightning", "fedgan_lightning"} <= set(summary["versions"])

    def test_validate_and_test_give_the_values_of_training(self, finished, capsys):
        last = json.loads((finished / "summary.json").read_text())["final"]["fid"]
        for command in ("validate", "test"):
            arguments = ["--config", finished / "config.yaml", "--ckpt_path", finished / "checkpoints" / "last.ckpt"]
            code, out, err = run(command, *arguments, capsys=capsys)
            assert code == 0, err
            assert "fid" in out
        tested = json.loads((finished / "test.json").read_text())
        assert tested["fid"] == pytest.approx(last, rel=1e-5)

    def test_predict_writes_samples(self, finished, tmp_path, capsys):
        arguments = ["--config", finished / "config.yaml", "--ckpt_path", finished / "checkpoints" / "last.ckpt"]
        arguments += ["--run_dir", tmp_path / "out", "--pictures.predict_samples", "30"]
        code, _, err = run("predict", *arguments, capsys=capsys)
        assert code == 0, err
        arrays = np.load(tmp_path / "out" / "predictions" / "samples.npz")
        assert arrays["x"].shape == (30, 1, 8, 8)
        assert arrays["x"].dtype == np.uint8
        assert arrays["y"].tolist() == [index % 10 for index in range(30)]
        assert (tmp_path / "out" / "predictions" / "samples.png").exists()

    def test_predict_draws_as_many_points_as_a_picture_of_the_run(self, tmp_path, monkeypatch, capsys):
        """Thirty points are stored, and the cloud is drawn with as many as in the run's own pictures."""
        drawn: list[int] = []
        scatter = pictures.scatter

        def counted(points, *arguments, **options):
            drawn.append(len(points))
            return scatter(points, *arguments, **options)

        monkeypatch.setattr(pictures, "scatter", counted)
        arguments = [*small("ring8"), "--run_dir", tmp_path / "out", "--pictures.num_points", "77"]
        assert run("fit", *arguments, "--federation.rounds", "1", capsys=capsys)[0] == 0
        drawn.clear()
        assert run("predict", *arguments, "--pictures.predict_samples", "30", capsys=capsys)[0] == 0
        assert drawn == [77]
        assert np.load(tmp_path / "out" / "predictions" / "samples.npz")["x"].shape == (30, 2)

    def test_predict_writes_recommendations(self, tmp_path, capsys):
        arguments = [*small("recommendation"), "--run_dir", tmp_path / "out"]
        assert run("fit", *arguments, "--federation.rounds", "1", capsys=capsys)[0] == 0
        code, out, err = run("predict", *arguments, capsys=capsys)  # from the checkpoint that is there
        assert code == 0, err
        assert f"checkpoint: {tmp_path / 'out' / 'checkpoints'}" in out
        assert "wrote" in out
        lines = (tmp_path / "out" / "predictions" / "recommendations.csv").read_text().splitlines()
        assert lines[0] == "user,rank,item,title,score"

    @pytest.mark.parametrize("command", ["validate", "test", "predict"])
    def test_what_was_never_trained_is_not_judged(self, command, tmp_path, capsys):
        for told in ([], ["--ckpt_path", "last"]):
            code, _, err = run(command, "--config", DIGITS, "--run_dir", tmp_path / "typo", *told, capsys=capsys)
            assert code == 2
            assert "a checkpoint must be a file; got" in one_line(err)
            assert "not there" in err
        assert not (tmp_path / "typo").exists()

    def test_a_refused_resume_leaves_the_account_of_the_run_as_it_was(self, finished, capsys):
        before = (finished / "summary.json").read_text()
        arguments = ["--config", finished / "config.yaml", "--ckpt_path", "last", "--model.loss", "Hinge"]
        code, _, err = run("fit", *arguments, "--federation.rounds", "9", capsys=capsys)
        assert code == 2
        assert "model.init_args.loss" in one_line(err)
        assert (finished / "summary.json").read_text() == before

    def test_a_run_that_something_else_ended_is_not_called_finished(self, tmp_path, capsys):
        arguments = [*small("ring8"), "--federation.rounds", "500", "--trainer.max_time", "00:00:00:01"]
        code, out, err = run("fit", *arguments, "--run_dir", tmp_path / "run", capsys=capsys)
        assert code == 0, err
        assert re.search(r"stopped after \d+ complete rounds of 500; continue with: --ckpt_path last", out)
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"

    def test_other_loggers_beside_tensorboard_s(self, tmp_path, capsys):
        folders = {"CSVLogger": tmp_path / "csv", "TensorBoardLogger": tmp_path / "tb"}
        loggers = [{"class_path": name, "init_args": {"save_dir": str(own)}} for name, own in folders.items()]
        told = ["--trainer.logger", json.dumps(loggers)]
        code, _, err = run("fit", *small("ring8"), *told, "--run_dir", tmp_path / "run", capsys=capsys)
        assert code == 0, err
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
        assert list((tmp_path / "csv").rglob("metrics.csv"))

    def test_a_run_that_measures_nothing_has_no_best_checkpoint(self, tmp_path, capsys, caplog):
        code, _, err = run(
            "fit", *small("digits"), "--evaluation.metrics", "[]", "--run_dir", tmp_path / "run", capsys=capsys
        )
        assert code == 0, err
        assert "no best checkpoint: fid is not measured here (nothing is measured)" in caplog.text
        assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"last.ckpt"}

    def test_partition_prints_who_holds_what(self, tmp_path, capsys):
        code, out, _ = run("partition", "--config", DIGITS, "--run_dir", tmp_path / "p", capsys=capsys)
        assert code == 0
        assert len(re.findall(r"^ +\d+ +\d+ ", out, re.MULTILINE)) == 10
        assert (tmp_path / "p" / "partition.png").exists()
        assert run("fit", *small("digits"), "--run_dir", tmp_path / "p", capsys=capsys)[0] == 0, "it was no run yet"

    def test_resume_continues(self, tmp_path, capsys):
        folder = tmp_path / "run"
        assert run("fit", *small("digits"), "--run_dir", folder, capsys=capsys)[0] == 0
        arguments = [*small("digits"), "--run_dir", folder, "--ckpt_path", "last", "--federation.rounds", "3"]
        code, _, err = run("fit", *arguments, capsys=capsys)
        assert code == 0, err
        summary = json.loads((folder / "summary.json").read_text())
        assert [entry["rounds"] for entry in summary["history"]] == [0, 1, 2, 3]

    def test_a_run_killed_before_its_first_checkpoint_begins_anew(self, tmp_path, capsys):
        folder = tmp_path / "run"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text("run_dir: somewhere\n")
        (folder / "checkpoints" / ".last.ckpt.1.partial").write_bytes(b"half")
        assert run("fit", *small("ring8"), "--run_dir", folder, capsys=capsys)[0] == 2
        code, out, err = run("fit", *small("ring8"), "--run_dir", folder, "--ckpt_path", "last", capsys=capsys)
        assert code == 0, err
        assert "begins anew" in out
        assert json.loads((folder / "summary.json").read_text())["rounds"] == 2

    def test_the_nice_short_ways_of_the_design_work(self, capsys):
        code, out, err = run("fit", "--config", DIGITS, "--model.loss", "Hinge", "--federation.rounds", "7",
                             "--server.optimizer", "torch.optim.Adam", "--server.optimizer.lr", "0.1",
                             "--federation.clients", "FractionOfClients", "--federation.clients.fraction", "0.5",
                             "--print_config", capsys=capsys)  # fmt: skip
        assert code == 0, err
        config = yaml.safe_load(out)
        assert config["model"]["init_args"]["loss"]["class_path"].endswith("Hinge")
        assert config["server"]["optimizer"]["init_args"]["lr"] == 0.1
        assert config["federation"]["clients"]["init_args"]["fraction"] == 0.5


class TestServerOptions:
    def test_the_server_optimizer_of_the_configuration_is_the_one_that_steps(self, tmp_path, capsys):
        states = {}
        for name, extra in (
            ("avg", []),
            ("adam", ["--server.optimizer", "torch.optim.Adam", "--server.optimizer.lr=0.1"]),
        ):
            assert run("fit", *small("ring8"), *extra, "--run_dir", tmp_path / name, capsys=capsys)[0] == 0
            states[name] = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        assert states["avg"]["optimizer_states"][0]["param_groups"][0]["lr"] == 1.0
        assert states["adam"]["optimizer_states"][0]["param_groups"][0]["lr"] == 0.1
        assert states["adam"]["optimizer_states"][0]["state"], "Adam's moments ride in the checkpoint"


def one_line(err: str) -> str:
    """Return the error; there must be exactly one, in one line."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert "; got " in lines[0] or ". See " in lines[0], "what was wrong, or where it is said"
    return lines[0]


BAD = {
    "refused by a constructor": (["--model.d_steps", "0"], "d_steps of GAN must be an integer of at least 1; got 0"),
    "unknown key": (["--federation.round", "3"], "unrecognized arguments: --federation.round 3"),
    "unknown nested key": (["--model.init_args.los", "Hinge"], "Option 'los' is not accepted"),
    "wrong type": (["--federation.rounds", "many"], "federation.rounds.*many"),
    "wrong class": (["--model.loss", "Hing"], "loss.*Hing"),
    "shapes that do not fit": (
        ["--data.source.image_size", "16"],
        r"got \[1, 8, 8\] from the generator, \[1, 16, 16\]",
    ),
    "classes that do not fit": (
        ["--model.generator.num_classes", "5", "--model.discriminator.num_classes", "5"],
        "got num_classes=5, data with 10",
    ),
    "empty client": (
        ["--data.num_clients", "2000", "--data.partition", "IID"],
        "got client 1438 with 0 under IID",
    ),
    "labels missing": (
        ["--data.source", "SwissRoll", "--data.partition", "Dirichlet"],
        "Dirichlet must have labels to split by; got a source without labels",
    ),
    "sync of no network": (["--federation.sync", "{encoder: local}"], "got encoder. Choose from generator"),
    "a cut epoch": (
        ["--trainer.limit_train_batches", "3"],
        "nothing cuts short; got trainer.limit_train_batches=3",
    ),
    "a trial run": (["--trainer.fast_dev_run", "true"], "nothing cuts short; got trainer.fast_dev_run"),
    "no rounds": (["--federation.rounds", "0"], "federation.rounds .* at least 1; got 0"),
    "negative rounds": (["--federation.rounds=-3"], "federation.rounds .* at least 1; got -3"),
    "monitor of no metric": (["--best.monitor", "fidd"], "must name a metric of the evaluation; got fidd"),
}


class TestBadInput:
    @pytest.mark.parametrize("name", BAD)
    def test_one_line_before_training_and_no_run(self, name, tmp_path, capsys):
        extra, words = BAD[name]
        arguments = [argument for argument in TINY if name not in ("no rounds", "negative rounds", "wrong type")]
        code, _, err = run("fit", "--config", DIGITS, *arguments, *extra, "--run_dir", tmp_path / "run", capsys=capsys)
        assert code == 2
        assert re.search(words, one_line(err)), err
        assert not (tmp_path / "run" / "checkpoints").exists()
        assert not (tmp_path / "run" / "config.yaml").exists(), "the corrected command can use the directory"

    @pytest.mark.parametrize("bad", ["nan", "inf"])
    def test_data_that_is_not_finite(self, bad, tmp_path, capsys, monkeypatch):
        from fedgan_lightning.data.sources import toys

        monkeypatch.setattr(toys.math, "pi", float(bad))
        code, _, err = run("fit", *small("swiss_roll"), "--run_dir", tmp_path / "run", capsys=capsys)
        assert code == 2
        assert "finite numbers; got NaN or infinity in 40000 of 40000" in one_line(err)

    def test_an_occupied_directory_is_left_as_it_is(self, finished, capsys):
        before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
        code, _, err = run("fit", *small("digits"), "--run_dir", finished, capsys=capsys)
        assert code == 2
        assert "a new run must have a directory without a run in it" in one_line(err)
        assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}

    @pytest.mark.parametrize(
        "damage, words",
        [
            ("truncate", "a checkpoint must be readable"),
            ("pickle", "must hold tensors and plain values only"),
            ("plain", "without an orchestrator's state"),
            ("missing", "a checkpoint must be a file; got .*bad.ckpt, which is not there"),
        ],
    )
    def test_checkpoints_that_cannot_be_trusted(self, damage, words, finished, tmp_path, capsys):
        bad, good = tmp_path / "bad.ckpt", (finished / "checkpoints" / "last.ckpt").read_bytes()
        if damage == "truncate":
            bad.write_bytes(good[: len(good) // 2])
        elif damage == "pickle":
            bad.write_bytes(
                pickle.dumps({"callbacks": {"FederatedOrchestrator": Bomb(str(tmp_path / "exploded"))}}, protocol=2)
            )
        elif damage == "plain":
            torch.save({"state_dict": {}}, bad)
        arguments = [*small("digits"), "--run_dir", tmp_path / "new", "--ckpt_path", bad]
        code, _, err = run("fit", *arguments, capsys=capsys)
        assert code == 2
        assert re.search(words, one_line(err))
        assert not (tmp_path / "exploded").exists(), "nothing in it was executed"
        assert not (tmp_path / "new").exists()

    def test_a_checkpoint_of_another_configuration(self, finished, tmp_path, capsys):
        path = finished / "checkpoints" / "last.ckpt"
        for extra, words in (
            (["--data.num_clients", "5"], "differs in .*data"),
            (["--model.loss", "Hinge"], r"model.init_args.loss.class_path was .*NonSaturating, is .*Hinge"),
            (["--model.generator.hidden", "[64, 64]"], "differs in"),
        ):
            arguments = [*small("digits"), *extra, "--run_dir", tmp_path / "new", "--ckpt_path", path]
            code, _, err = run("fit", *arguments, capsys=capsys)
            assert code == 2, err
            assert re.search(words, one_line(err)), err


class Bomb:
    """What a hostile checkpoint would do."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_version_and_help_are_answered_without_torch():
    program = (
        "import sys; from fedgan_lightning.__main__ import main; main([sys.argv[1]]); print('torch' in sys.modules)"
    )
    for argument, said in (("--version", "fedgan_lightning"), ("--help", "python -m fedgan_lightning COMMAND")):
        run = subprocess.run([sys.executable, "-c", program, argument], capture_output=True, text=True, check=True)
        assert said in run.stdout
        assert run.stdout.strip().endswith("False")


def test_the_short_help_names_every_command():
    own = {*SUBCOMMANDS} - {"site"}  # what a site of a deployment calls, and nobody types
    assert set(COMMANDS) == own | {"report", "deploy", "privacy"}


#: Parses configurations while another thread imports, as Ray's import goes on beside Flower's server.
BESIDE_IMPORTS = """
import sys, threading, time, types
from fedgan_lightning.cli import run

sys.setswitchinterval(1e-4)

def go_on_importing():
    for number in range(10**6):
        sys.modules[f"passing_{number}"] = types.ModuleType(f"passing_{number}")
        time.sleep(1e-4)

threading.Thread(target=go_on_importing, daemon=True).start()
for path in sys.argv[1:]:
    try:
        run(["fit", "--config", path, "--print_config"])
    except SystemExit as left:
        assert not left.code, path
"""


def test_configurations_are_read_while_another_thread_imports():
    """A generic alias that names a type in a string makes jsonargparse walk over all modules, and lose the types."""
    paths = [str(path) for path in CONFIGS if path.stem in ("digits", "recommendation", "text")]
    done = subprocess.run([sys.executable, "-c", BESIDE_IMPORTS, *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("class_path: fedgan_lightning.GAN") == len(paths) == 3
