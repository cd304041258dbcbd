"""The grids of benchmarks/quality.py: every kind of cell trains, finished runs are not repeated, the table adds up."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml

from benchmarks import bare_stacks, controls, grids, moving_average, quality, site_folders
from benchmarks.workloads import WORKLOADS
from fedgan_lightning.__main__ import main
from fedgan_lightning.data.sources import ImageFolder, TorchvisionImages
from fedgan_lightning.visuals.participation import Participation
from tests.conftest import ROOT

CHEAP = ["--evaluation.num_samples", "50", "--federation.executor", "SequentialExecutor"]


@pytest.mark.parametrize("label", ["K = 5", "centralised", "local only (client 0)"])
def test_every_kind_of_cell_trains(label, tmp_path):
    chosen = grids.GRIDS["digits_k"]
    options = [*chosen.common, *chosen.cells[label], "--run_dir", str(tmp_path / "run"), "--federation.rounds", "2"]
    config = str(ROOT / "configs" / chosen.config)
    assert main(["fit", "--config", config, *options, "--federation.local_steps", "1", *CHEAP]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds"] == 2
    assert summary["client_runs"] == 2 * {"centralised": 1, "local only (client 0)": 1}.get(label, 5)


def test_a_control_is_trained_and_measured_like_the_federation(tmp_path, monkeypatch):
    options = ["--config", str(ROOT / "configs" / "digits.yaml"), "--run_dir", str(tmp_path / "run"), *CHEAP]
    monkeypatch.setattr(
        "sys.argv", ["controls", "local:3", "30", *options, "--evaluation.metrics", "[FrechetDistance]"]
    )
    controls.main()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test"]["fid"] > summary["evaluation"]["fid_floor"] > 0
    assert summary["evaluation"]["fid_num_reals"] == 1438, "all clients' data, whoever trained"


def test_cells_of_a_sweep_take_equal_generator_steps():
    for grid in (grids.GRIDS["digits_k"], grids.GRIDS["mnist_k"]):
        steps = set()
        for options in grid.cells.values():
            values = dict(zip(options[::2], options[1::2]))
            steps.add(int(values["--federation.rounds"]) * int(values["--federation.local_steps"]))
        assert len(steps) == 1


def test_the_table_has_mean_and_deviation_of_what_is_done(tmp_path):
    grid = grids.Grid(title="t", config="digits.yaml", cells={"a": [], "b, c": []}, columns=("fid", "classes"))
    grid = dataclasses.replace(grid, baselines=("guess",))
    for seed, fid in enumerate((1.0, 3.0)):
        folder = tmp_path / "a" / f"seed{seed}"
        folder.mkdir(parents=True)
        summary = {
            "test": {"fid": fid},
            "evaluation": {"fid_floor": 0.5, "fid_guess": 7.0, "fid_features_hash": f"net{seed}"},
            "bytes_up": {"generator": 1e6},
            "bytes_down": {"generator": 2e6},
            "wall_seconds": 10.0,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    lines = quality.table(grid, tmp_path).splitlines()
    assert lines[0] == "| t | seeds | fid | MB | s |"
    assert lines[2] == "| guess | | 7 | | |", "what needs no training"
    assert lines[3] == f"| a | 2 | 2 ± {math.sqrt(2):.2g} | 3.0 | 10 |"
    assert len(lines) == 6, "cells without runs are left out"
    assert lines[-1] == "Floors: fid_floor 0.5. Feature network net0, net1: NOT COMPARABLE."


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    folder = tmp_path / "K_=_5" / "seed0"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"test": {}}))
    monkeypatch.setattr(quality.subprocess, "run", lambda *_, **__: pytest.fail("ran again"))
    quality.run_cell(grids.GRIDS["digits_k"], "K = 5", 0, tmp_path, shared="")


@pytest.mark.slow  # fits and tests in processes of their own
def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew(tmp_path, monkeypatch):
    chosen = dataclasses.replace(grids.GRIDS["digits_k"], cells={"a": ["--federation.rounds", "1", *CHEAP]})
    (tmp_path / "a" / "seed0").mkdir(parents=True)
    (tmp_path / "a" / "seed0" / "config.yaml").write_text("")  # what such a run leaves
    quality.run_cell(chosen, "a", 0, tmp_path, shared="")
    assert "test" in json.loads((tmp_path / "a" / "seed0" / "summary.json").read_text())


@pytest.mark.parametrize("code", [-9, 143])
def test_a_run_that_a_signal_ended_has_not_diverged(code, tmp_path, monkeypatch):
    monkeypatch.setattr(quality.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=code))
    with pytest.raises(SystemExit, match=r"K = 5, seed 0, was stopped by a signal; the same command goes on with it"):
        quality.run_cell(grids.GRIDS["digits_k"], "K = 5", 0, tmp_path, shared="")
    assert not list(tmp_path.rglob("failed"))


#: Parsing takes a second a line: every fourth grid by default.
PARSED = [own if k % 4 == 0 else pytest.param(own, marks=pytest.mark.slow) for k, own in enumerate(sorted(grids.GRIDS))]


@pytest.mark.parametrize("grid", PARSED)
def test_cells_are_command_lines_that_parse(grid, tmp_path, capsys, shared):
    chosen = grids.GRIDS[grid]
    kinds = {tuple(options[::2]): options for options in chosen.cells.values()}  # one of each set of options
    for options in kinds.values():
        own = [option.replace("{shared}", str(shared)) for option in [*chosen.common, *options]]
        with pytest.raises(SystemExit) as ended:
            main(["fit", "--config", str(ROOT / "configs" / chosen.config), *own, "--print_config"])
        assert ended.value.code == 0


def test_curves_of_a_run_end_in_the_table(tmp_path):
    run = quality.Run(
        name="r", path=tmp_path, summary={"test": {"fid": 1.0}}, config={}, config_text="", metrics={}, sizes=[],
        participation=Participation(),
        scalars={"train/loss_g": ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0], [float(n) for n in range(10)])},
    )  # fmt: skip
    assert quality.ends(run) == {"fid": 1.0, "train/loss_g, first": 0.5, "train/loss_g, last": 8.5}


def test_folders_of_sites_hold_their_own_digits(tmp_path, shared):
    assert site_folders.write(tmp_path, root=str(shared), sites=3, per_class=5) == [20, 15, 15]
    settings = yaml.safe_load((tmp_path / "site1.yaml").read_text())["data"]["source"]
    assert settings["class_path"] == "ImageFolder"
    found = ImageFolder(**settings["init_args"]).load("train")
    assert set(found.y.tolist()) == {4, 5, 6}, "labels are those of all ten digits"
    original = TorchvisionImages("MNIST", root=str(shared)).load("train")
    fours = original.x[original.y == 4][:5]
    assert all(any(torch.equal(x, four) for four in fours) for x in found.x[found.y == 4]), "not a pixel is changed"


def test_averages_made_afterwards_are_those_of_the_run(tmp_path, monkeypatch, capsys):
    options = ["--config", str(ROOT / "configs" / "digits.yaml"), "--run_dir", str(tmp_path / "run"), *CHEAP]
    monkeypatch.setattr("sys.argv", ["moving_average", *options, "--federation.rounds", "2"])
    moving_average.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {row[0].strip("| "): float(row[-1].strip(" |")) for row in rows[1:]}
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    assert found["at most 5 % of the images seen"] == float(f"{final['fid']:.4g}"), "to every digit that is printed"
    assert found["constant half-life"] != pytest.approx(found["raw"], rel=0.01)


@pytest.mark.parametrize("name", bare_stacks.ROWS)
def test_bare_stacks_compute_what_the_networks_compute(name):
    """Otherwise the bound of the speed table would be one of something else."""
    for network in WORKLOADS[name].networks():
        shape = (int(network.latent_dim),) if hasattr(network, "latent_dim") else WORKLOADS[name].sample_shape
        x = torch.randn(3, *shape)
        expected = network(x, torch.zeros(3, dtype=torch.long))
        stacked = bare_stacks.Stack(network, 2)(x.flatten(1).expand(2, -1, -1))
        torch.testing.assert_close(stacked[1].reshape(expected.shape), expected)
