"""Every use runs between sites with the configuration that it has in simulation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main
from fedgan_lightning.deployment.apps import serve_over
from tests.conftest import ROOT
from tests.deployment.loopback import LoopbackGrid
from tests.deployment.test_sites import quoted
from tests.test_cli import small

pytestmark = pytest.mark.flower


@pytest.mark.parametrize("name", ["medical", "recommendation", "inpainting", "text_mle", "timeseries"])
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
