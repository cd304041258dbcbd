"""Every use runs between sites with the configuration that it has in simulation."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main
from fedgan_lightning.data.sources.interactions import most_popular
from fedgan_lightning.data.vocabulary import summed
from fedgan_lightning.deployment.apps import serve_over
from fedgan_lightning.errors import QuorumError
from fedgan_lightning.sources import Interactions
from tests.conftest import ROOT, slow
from tests.deployment.loopback import LoopbackGrid
from tests.deployment.test_sites import quoted
from tests.test_cli import small

pytestmark = pytest.mark.flower


@pytest.mark.parametrize("name", ["medical", "recommendation", slow("inpainting"), slow("text_mle"), "timeseries"])
def test_a_use_is_deployed_unchanged(name, tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)
    _, config, *options = small(name)
    options = [*options, "--data.num_clients", "3"]
    if name in ("medical", "timeseries"):
        options += ["--data.partition", "IID"]
    if name == "text_mle":  # what clients agreed on in simulation, or by other means, is named to all
        assert main(["fit", "--config", config, *options, "--federation.rounds", "1", "--run_dir", "first"]) == 0
        options += ["--data.source.vocabulary", str(Path("first/vocabulary.json").resolve())]
    told = {"config": config, "options": " ".join(quoted(options))}
    nodes = {100 + k: {"client-id": k, "state": str(tmp_path / "state")} for k in range(3)}
    with caplog.at_level("INFO", logger="fedgan_lightning"):
        serve_over(
            LoopbackGrid(nodes, run_config=told), ["--config", config, *options, "--run_dir", str(tmp_path / "run")]
        )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["rounds"], summary["client_runs"]) == ("finished", 2, 6)
    assert (name == "medical") == ("not measured, because clients' samples are elsewhere" in caplog.text)
    assert "no best checkpoint" not in caplog.text
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()
    if name == "recommendation":  # sites rank for their own users, and the sums are those of the simulation
        assert main(["fit", "--config", config, *options, "--run_dir", str(tmp_path / "simulated")]) == 0
        expected = json.loads((tmp_path / "simulated" / "summary.json").read_text())
        for kind in ("final", "evaluation"):
            assert summary[kind].keys() == expected[kind].keys()
            assert summary[kind] == pytest.approx(expected[kind], rel=1e-9)
        assert 0 < summary["final"]["ndcg20"] < 1


@pytest.mark.parametrize("name", ["inpainting", "timeseries", "ring8", "toy2d", slow("text_mle"), "recommendation"])
def test_a_use_is_deployed_to_a_server_without_samples(name, tmp_path, monkeypatch):
    """Pictures are drawn without real ones beside, and what nobody can measure is left out."""
    from fedgan_lightning.deployment.data import RemoteDataModule

    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)
    _, config, *options = small(name)
    options = [*options, "--data.num_clients", "3", "--federation.rounds", "1"]
    options += ["--data.partition", "IID"] if name == "timeseries" else []
    if name == "text_mle":
        assert main(["fit", "--config", config, *options, "--run_dir", "first"]) == 0
        options += ["--data.source.vocabulary", str(Path("first/vocabulary.json").resolve())]

    def refuse(self):
        raise AssertionError("the server reads samples")

    monkeypatch.setattr(RemoteDataModule, "_training_split", refuse)
    told = {"config": config, "options": " ".join(quoted(options))}
    grid = LoopbackGrid({100 + k: {"client-id": k, "state": str(tmp_path / "s")} for k in range(3)}, run_config=told)
    serve_over(grid, ["--config", config, *options, "--run_dir", str(tmp_path / "run")], has_data=False)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert ("ndcg20" in json.loads((tmp_path / "run" / "summary.json").read_text())["final"]) == (
        name == "recommendation"
    )
    drawn = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert ("fakes_round0001.png" in drawn) == (name not in ("inpainting", "recommendation")), drawn


def test_institutions_with_files_of_their_own_number_items_alike_or_are_refused(tmp_path, monkeypatch, caplog):
    """Each has a third of the users; the list of items comes from the counts that all three tell."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)
    _, config, *options = small("recommendation")
    options = [*options, "--data.num_clients", "3", "--data.source.catalogue", "null", "--data.partition", "IID"]
    with (ROOT / "tests" / "data" / "ratings.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    paths = [tmp_path / f"ratings{k}.csv" for k in range(3)]
    for k, path in enumerate(paths):
        own = [row for row in rows if int(row[0]) % 3 == k]
        path.write_text("\n".join(map(",".join, [header, *own])) + "\n")
    told = [Interactions(str(path), num_items=30, threshold=3.0, min_user=5, min_item=1).popularity() for path in paths]
    names = most_popular(summed(told), num_items=30)
    lists = {"items": names, "turned": names[::-1]}
    for name, own in lists.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(own))

    def deploy(run_dir, *, last: str):
        nodes = {}
        for k, path in enumerate(paths):
            items = last if k == 2 else "items"
            told = f"{{path: {path}, items: {tmp_path / items}.json}}"
            own = tmp_path / f"{run_dir.name}{k}.yaml"
            own.write_text(f"data:\n  source:\n    init_args: {told}\n")
            nodes[100 + k] = {"client-id": k, "state": str(tmp_path / "state"), "site": str(own)}
        shared = [*options, "--data.source.items", str(tmp_path / "items.json")]
        grid = LoopbackGrid(nodes, run_config={"config": config, "options": " ".join(quoted(shared))})
        serve_over(grid, ["--config", config, *shared, "--run_dir", str(run_dir)])

    deploy(tmp_path / "run", last="items")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["client_runs"]) == ("finished", 6)
    assert json.loads((tmp_path / "run" / "items.json").read_text()) == names
    monkeypatch.setattr("fedgan_lightning.deployment.sites.JOIN_SECONDS", 0.0)
    with pytest.raises(QuorumError, match=r"none for clients \[2\]"):
        deploy(tmp_path / "turned", last="turned")
    assert "names of classes, and words or items" in caplog.text
