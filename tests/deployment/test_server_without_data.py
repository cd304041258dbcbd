"""A server that has no samples: what sites can sum is measured, the rest is left out by name, pictures are drawn."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.deployment.apps import serve_over
from fedgan_lightning.errors import CheckpointError, ConfigurationError, SampleSizeError
from fedgan_lightning.evaluation.features import Classifier
from fedgan_lightning.metrics import ClassifierFeatures, FileFeatures
from tests.conftest import ROOT
from tests.deployment.loopback import LoopbackGrid
from tests.deployment.test_sites import quoted, summary

pytestmark = pytest.mark.flower

CONFIG = str(ROOT / "configs" / "digits.yaml")
SHORT = [
    *("--data.num_clients", "3", "--federation.rounds", "2", "--federation.local_steps", "2"),
    *("--evaluation.num_samples", "200", "--trainer.enable_progress_bar", "false"),
    *("--federation.rules", "RoundRules", "--federation.rules.min_report_fraction", "0.5"),
]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody has to be waited for."""
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)


class Elsewhere(Exception):
    """Somebody looked for samples where there are none."""


def deploy(tmp_path, *options, name="run", monkeypatch=None, sites=3, told=None, **more):
    options = [*SHORT, *options]
    nodes = {
        100 + k: {"client-id": k, "state": str(tmp_path / "state"), **(told or {}).get(k, {})} for k in range(sites)
    }
    grid = LoopbackGrid(nodes, run_config={"config": CONFIG, "options": " ".join(quoted(options))})
    serve_over(grid, ["--config", CONFIG, *options, "--run_dir", str(tmp_path / name)], **{"has_data": False, **more})
    return grid


def test_what_sites_can_sum_is_measured_and_the_rest_named(tmp_path, caplog):
    with caplog.at_level("INFO", logger="fedgan_lightning"):
        deploy(tmp_path, prometheus=tmp_path / "fedgan.prom")
    found = summary(tmp_path, "run")
    assert found["status"] == "finished"
    assert {"fid", "kid"} <= found["final"].keys()
    assert not {"fid_test", "fid_floor", "kid_test", "classes"} & found["final"].keys()
    assert found["evaluation"]["fid_features"] == "pixels (d=64)"
    assert "the server has no samples of its own: SyntheticTraining" in caplog.text
    assert "ClassCoverage is not measured: ClassifierFeatures must have labelled samples to train on" in caplog.text
    pictures = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert {"fakes_init.png", "fakes_round0002.png", "partition.png"} <= pictures
    assert "reals.png" not in pictures
    rounds = [record.message for record in caplog.records if record.message.startswith("round ")]
    assert rounds[0].startswith("round 1 of 2: 3 of 3 sites answered in ")
    assert rounds[1].startswith("round 2 of 2: ")
    assert "fid " in rounds[1]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["rounds"], status["connected"], status["missing"]) == ("finished", 2, [0, 1, 2], [])
    figures = (tmp_path / "fedgan.prom").read_text()
    assert "fedgan_rounds_completed 2\n" in figures
    assert "fedgan_sites_connected 3\n" in figures


def test_nothing_of_the_server_s_source_is_read(tmp_path, monkeypatch):
    """Sites hold their parts before; then the server's own source would fail."""
    from fedgan_lightning.deployment.data import RemoteDataModule

    def refuse(self):
        raise Elsewhere

    monkeypatch.setattr(RemoteDataModule, "_training_split", refuse)
    deploy(tmp_path)
    assert summary(tmp_path, "run")["status"] == "finished"


@pytest.mark.parametrize("metrics", ["[]", "[FrechetDistance]", "[FrechetDistance, SyntheticTraining, ClassCoverage]"])
def test_metrics_that_are_named_end_no_run(tmp_path, metrics):
    deploy(tmp_path, "--evaluation.metrics", metrics)
    assert ("fid" in summary(tmp_path, "run")["final"]) == ("Frechet" in metrics)


def test_it_measures_what_a_server_with_samples_measures(tmp_path):
    metrics = ["--evaluation.metrics", "[{class_path: FrechetDistance, init_args: {features: PixelFeatures}}]"]
    for name, has_data in (("run", False), ("with", True)):
        deploy(tmp_path, *metrics, name=name, has_data=has_data)
    mine, theirs = (summary(tmp_path, name)["final"] for name in ("run", "with"))
    assert mine["fid"] == theirs["fid"]
    assert "fid_test" in theirs


# ---------------------------------------------------------------------- a network that everybody has


def trained(tmp_path, *, form: str) -> tuple[str, str]:
    """Return the settings of a feature network in a file, and its hash."""
    net = Classifier((1, 8, 8), 10, is_image=True).eval()
    path = tmp_path / f"net.{'safetensors' if form == 'weights' else 'pt'}"
    if form == "weights":
        save_file(net.state_dict(), path)
    else:
        torch.jit.trace(net, torch.zeros(2, 1, 8, 8)).save(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    module = "fedgan_lightning.evaluation.features.Classifier"
    arguments = "{shape: [1, 8, 8], num_classes: 10, is_image: true}"
    own = f", module: {{class_path: {module}, init_args: {arguments}}}" if form == "weights" else ""
    return f"{{class_path: FileFeatures, init_args: {{path: {path}, sha256: {digest}{own}}}}}", digest


@pytest.mark.parametrize("form", ["weights", "TorchScript"])
def test_a_network_in_a_file_measures_at_all_sites(tmp_path, form):
    features, digest = trained(tmp_path, form=form)
    each = ("FrechetDistance", "KernelDistance", "ClassCoverage")
    metrics = ", ".join(f"{{class_path: {name}, init_args: {{features: {features}}}}}" for name in each)
    deploy(tmp_path, "--evaluation.metrics", f"[{metrics}]")
    found = summary(tmp_path, "run")
    assert {"fid", "kid", "classes", "class_distance"} <= found["final"].keys()
    assert found["evaluation"]["fid_features_hash"] == digest


def test_a_federation_trains_its_own_ruler(tmp_path, capsys):
    """By the shipped configuration, on pictures in folders; the file that it writes measures a GAN."""
    from fedgan_lightning.__main__ import main
    from fedgan_lightning.evaluation import federated_classifier
    from tests.fakes import write_pictures

    write_pictures(tmp_path / "images", {"normal": 60, "pneumonia": 60})
    run = tmp_path / "ruler"
    arguments = ["--config", str(ROOT / "configs" / "classifier.yaml"), "--data.source.root", str(tmp_path / "images")]
    assert main(["fit", *arguments, "--federation.rounds", "3", "--run_dir", str(run)]) == 0
    assert federated_classifier.main([str(run)]) == 0
    path, said = run / "classifier.safetensors", capsys.readouterr().out
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in said
    net = FileFeatures(str(path), digest, module=Classifier((1, 28, 28), 2, is_image=True))
    from fedgan_lightning.sources import ImageFolder

    source = ImageFolder(str(tmp_path / "images"), image_size=28, channels=1, classes=True)
    samples = source.load("train")
    built = net.build(samples, num_classes=2)
    right = (built.classify(samples.take(torch.arange(len(samples)))[0]) == samples.y).float().mean()
    assert float(right) > 0.9, "dark and bright pictures"
    assert federated_classifier.main([str(tmp_path)]) == 2


def test_a_site_without_the_file_is_left_out_by_name(tmp_path, caplog):
    features, _ = trained(tmp_path, form="weights")
    other = tmp_path / "other.yaml"
    other.write_text("evaluation: {metrics: []}\n")
    metrics = ["--evaluation.metrics", f"[{{class_path: FrechetDistance, init_args: {{features: {features}}}}}]"]
    with caplog.at_level("WARNING", logger="fedgan_lightning"):
        deploy(tmp_path, *metrics, told={1: {"site": str(other)}})
    assert "feature moments are summed up without client 1" in caplog.text
    assert "this site's ask nothing" in caplog.text
    assert "fid" in summary(tmp_path, "run")["final"]


def test_files_that_are_another_or_none_are_refused(tmp_path):
    from fedgan_lightning.sources import Digits

    samples, path = Digits().load("train"), tmp_path / "net.safetensors"
    net = Classifier((1, 8, 8), 10, is_image=True)
    save_file(net.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert FileFeatures(str(path), digest, module=net).build(samples, num_classes=10).num_features == 64
    with pytest.raises(ConfigurationError, match="must have 64 hexadecimal digits"):
        FileFeatures(str(path), "abc")
    with pytest.raises(ConfigurationError, match="must have the SHA-256 that the settings name"):
        FileFeatures(str(path), "0" * 64).build(samples, num_classes=10)
    with pytest.raises(ConfigurationError, match="must have its file"):
        FileFeatures(str(tmp_path / "none"), digest).build(samples, num_classes=10)
    with pytest.raises(ConfigurationError, match="must hold TorchScript"):
        FileFeatures(str(path), digest).build(samples, num_classes=10)
    other = Classifier((1, 8, 8), 3, is_image=True)
    with pytest.raises(ConfigurationError, match="must hold weights of Classifier"):
        FileFeatures(str(path), digest, module=other).build(samples, num_classes=10)
    save_file({"weight": torch.zeros(3, 3, 1, 1), "bias": torch.zeros(3)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    flat = FileFeatures(str(path), digest, module=torch.nn.Conv2d(1, 3, 1))
    with pytest.raises(ConfigurationError):
        flat.build(samples, num_classes=10)


def test_the_small_classifier_says_what_it_needs():
    from fedgan_lightning.data.samples import SampleForm

    with pytest.raises(SampleSizeError, match="Use PixelFeatures, or FileFeatures that all sites"):
        ClassifierFeatures().build(SampleForm.of((1, 8, 8), is_image=True), num_classes=10)


# ---------------------------------------------------------------------- the life of a consortium


def test_a_hospital_joins_a_run_and_rules_change_on_the_way(tmp_path, monkeypatch):
    """Each change is asked for, and recorded."""
    deploy(tmp_path, sites=3)
    more = ["--data.num_clients", "4", "--federation.rounds", "4"]
    more += ["--federation.rules.timeout", "60", "--federation.validator", "UpdateValidator"]
    own = tmp_path / "own.yaml"
    own.write_text(
        "data:\n  source: {class_path: tests.fakes.RandomImages, init_args: {shape: [1, 8, 8], classes: 10}}\n"
    )
    monkeypatch.syspath_prepend(str(ROOT))
    # The first three keep the parts that they have; the fourth has samples of its own.
    kept = tmp_path / "kept.yaml"
    kept.write_text("data: {num_clients: 3}\n")
    told = {3: {"site": str(own)}}
    with pytest.raises(CheckpointError, match="federation.rules.*accepted and recorded with --accept_changes true"):
        deploy(tmp_path, *more, sites=4, told=told)
    monkeypatch.setattr("fedgan_lightning.data.partition.Partition.split", _as_for_three())
    deploy(tmp_path, *more, "--accept_changes", "true", sites=4, told=told)
    found = summary(tmp_path, "run")
    assert (found["status"], found["rounds"]) == ("finished", 4)
    changed = {line["changed"].split(" was ")[0] for line in found["changes"]}
    assert "data.num_clients" in changed
    assert any(line.startswith("federation.rules") for line in changed)
    assert any(line.startswith("federation.validator") for line in changed)
    assert {line["round"] for line in found["changes"]} == {2}
    assert len(json.loads((tmp_path / "run" / "sites.json").read_text())["sites"]) == 4
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 4


def _as_for_three():
    """A division for three, whatever number of clients it is asked for."""
    from fedgan_lightning.data.partition import Partition

    split = Partition.split

    def three(self, samples, *, num_clients, seed):
        return split(self, samples, num_clients=3, seed=seed)

    return three


def test_what_is_trained_may_not_change(tmp_path):
    deploy(tmp_path)
    with pytest.raises(CheckpointError, match="batch_size was"):
        deploy(tmp_path, "--data.batch_size", "16", "--federation.rounds", "3", "--accept_changes", "true")
