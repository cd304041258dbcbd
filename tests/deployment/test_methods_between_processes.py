"""Methods with the generator at the server over a SuperLink and SuperNodes in processes of their own."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main
from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.deployment import launch, programs
from tests.conftest import assert_states_equal
from tests.deployment.processes import CONFIG

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
    keys, port = tmp_path / "keys", programs.free_port()
    assert launch.main(["keys", str(keys), "--sites", str(SITES), "--host", "localhost"]) == 0
    with programs.processes() as started:
        started.append(programs.superlink(tmp_path, keys=keys, host="127.0.0.1", port=port))
        programs.await_superlink(port, keys, started[0])
        programs.register(tmp_path, keys, port)
        with programs.quick_clientapp(tmp_path) as first, programs.processes() as sites:
            for number in range(SITES):
                folder = tmp_path / f"site{number}"
                own = {"ca": keys / "ca.crt", "key": keys / f"site{number}"}
                own["node"] = {"client-id": number, "state": str(folder)}
                command = programs.supernode(superlink=f"localhost:{port}", port=programs.free_port(), **own)
                sites.append(programs.start(command, folder, log="log", first=first))
            assert programs.run_app(tmp_path, CONFIG, tmp_path / "run", options) == 0
    arguments = ["--config", str(CONFIG), *options, "--run_dir", str(tmp_path / "simulated")]
    assert main(["fit", *arguments, "--trainer.enable_progress_bar", "false"]) == 0
    mine, theirs = (
        {name: value for name, value in own["state_dict"].items() if name.startswith("generator")}
        for own in (read_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("run", "simulated"))
    )
    assert len(mine) > 4
    assert_states_equal(mine, theirs, atol=1e-6, rtol=1e-5)
