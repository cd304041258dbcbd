"""``--data package.Class``: a data module of the user's on the command line."""

from __future__ import annotations

import pytest
import yaml

from fedgan_lightning.cli import built
from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.parser import where_data_class_is_named
from tests.conftest import ROOT
from tests.test_cli import run

ARGUMENTS = ["--config", str(ROOT / "configs" / "ring8.yaml"), "--data", "tests.fakes.Hospitals", "--data.size", "50"]
ARGUMENTS += ["--federation.rounds", "2", "--federation.local_steps", "2", "--evaluation.metrics", "[]"]
ARGUMENTS += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_a_class_of_ones_own_trains_is_recorded_and_goes_on(tmp_path, capsys):
    folder = tmp_path / "run"
    code, _, err = run("fit", *ARGUMENTS, "--run_dir", folder, capsys=capsys)
    assert code == 0, err
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["data"]["class_path"] == "tests.fakes.Hospitals"
    assert settings["data"]["init_args"]["size"] == 50
    again = ["--config", folder / "config.yaml", "--ckpt_path", "last"]
    code, _, err = run("fit", *again, "--federation.rounds", "3", capsys=capsys)
    assert code == 0, err
    code, _, err = run("fit", *again, "--federation.rounds", "4", "--data.size", "48", capsys=capsys)
    assert "data.init_args.size was 50, is 48" in err


def test_who_holds_what_is_shown(tmp_path, capsys):
    code, out, err = run("partition", *ARGUMENTS, "--run_dir", tmp_path / "run", capsys=capsys)
    assert code == 0, err
    assert [line.split() for line in out.splitlines()[1:3]] == [["0", "50", "25", "25"], ["1", "5", "3", "2"]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tests.fakes.Hospital", "data must be a class that can be imported; got tests.fakes.Hospital"),
        ("lightning.LightningDataModule", "must have a method client_dataloaders"),
    ],
)
def test_what_is_no_such_class_is_refused(name, words, tmp_path, capsys):
    arguments = [
        name if argument == "tests.fakes.Hospitals" else argument for argument in ARGUMENTS if "size" not in argument
    ]
    code, _, err = run("partition", *(own for own in arguments if own != "50"), "--run_dir", tmp_path, capsys=capsys)
    assert code != 0
    assert words in err


def test_a_deployment_must_have_a_source():
    with pytest.raises(
        ConfigurationError, match="data of a deployment must come from a source; got a FederatedDataModule"
    ):
        built(ARGUMENTS)


def test_where_a_class_is_named(tmp_path):
    (tmp_path / "own.yaml").write_text("data: {class_path: a.B}")
    (tmp_path / "ours.yaml").write_text("data: {source: Ring}")
    assert where_data_class_is_named(["fit", "--data=a.b.C"]) == "option"
    assert where_data_class_is_named(["fit", "--config", "own.yaml"]) == "file"
    assert where_data_class_is_named(["fit", "--data", "{class_path: a.B}"]) == "file"
    for own in (
        ["--config", "ours.yaml"],
        ["--data", "ours.yaml"],
        ["--data", "{source: Ring}"],
        ["--data.source=a.B"],
        [],
    ):
        assert where_data_class_is_named(["fit", *own]) is None
