"""Methods with the generator at the server over a SuperLink and SuperNodes in processes of their own."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main
from fedgan_lightning.checkpoints import read_checkpoint
from tests.conftest import assert_states_equal
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
    arguments = ["--config", str(CONFIG), *options, "--run_dir", str(tmp_path / "simulated")]
    assert main(["fit", *arguments, "--trainer.enable_progress_bar", "false"]) == 0
    mine, theirs = (
        {name: value for name, value in own["state_dict"].items() if name.startswith("generator")}
        for own in (read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("run", "simulated"))
    )
    assert len(mine) > 4
    assert_states_equal(mine, theirs, atol=1e-6, rtol=1e-5)
