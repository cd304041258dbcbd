"""Methods with the generator at the server over a SuperLink and SuperNodes in processes of their own."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main
from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.visuals.runs import read_run
from tests.conftest import assert_states_equal
from tests.deployment.hostile import settings
from tests.deployment.processes import CONFIG, between_processes

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(900)]

SITES = 3
OPTIONS = [
    *("--data.num_clients", str(SITES), "--federation.rounds", "3", "--federation.local_steps", "1"),
    *("--federation.optimizer_state", "reset", "--evaluation.metrics", "[]", "--pictures.every_n_rounds", "9"),
    *("--federation.sync", "{generator: server, discriminator: local}", "--checkpoint.every_n_rounds", "1"),
]
METHODS = {"MD-GAN": ["MDGAN", "--federation.algorithm.num_batches", "2"], "UA-GAN": ["UAGAN"]}


@pytest.mark.parametrize("name", METHODS)
def test_sites_of_their_own_give_the_simulation_s_generator(name, tmp_path, as_installed):
    options = [*OPTIONS, "--federation.algorithm", *METHODS[name]]
    with between_processes(tmp_path, nodes=[{}] * SITES, options=options) as code:
        assert code == 0
    options += ["--federation.executor", "SequentialExecutor"]  # as sites train: stacks round otherwise
    arguments = ["--config", str(CONFIG), *options, "--run_dir", str(tmp_path / "simulated")]
    assert main(["fit", *arguments, "--trainer.enable_progress_bar", "false"]) == 0
    mine, theirs = (
        {name: value for name, value in own["state_dict"].items() if name.startswith("generator")}
        for own in (read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("run", "simulated"))
    )
    assert len(mine) > 4
    assert_states_equal(mine, theirs, atol=1e-6, rtol=1e-5)


def test_rounds_of_arrivals_do_not_wait_for_a_slow_site(tmp_path, as_installed):
    """One of three takes long enough to miss rounds; its answers count when they come, and are as old as that."""
    slow = tmp_path / "slow.yaml"
    slow.write_text(settings(["hang"], hang_seconds=25.0))
    options = ["--data.num_clients", str(SITES), "--federation.rounds", "8", "--federation.local_steps", "1"]
    options += ["--evaluation.metrics", "[]", "--pictures.every_n_rounds", "9"]
    options += ["--federation.rules.asynchronous.buffer_size", "2"]
    with between_processes(tmp_path, nodes=[{}, {}, {"site": str(slow)}], options=options) as code:
        assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    answered = [{own["client_id"] for own in row["clients"] if own["outcome"] == "answered"} for row in rows]
    assert len(answered) == 8
    assert all(len(own) == 2 for own in answered)
    first = next(number for number, own in enumerate(answered) if 2 in own)
    assert first > 0
    assert read_run(tmp_path / "run").scalars["staleness/max"][1][first] == first
