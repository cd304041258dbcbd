"""Other people's modules between sites: a deployment computes what the simulation does, attributes and clocks too."""

from __future__ import annotations

import pytest
import yaml

flwr = pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main  # noqa: E402
from fedgan_lightning.checkpoints import read_checkpoint  # noqa: E402
from fedgan_lightning.deployment.apps import serve_over  # noqa: E402
from tests.conftest import assert_states_equal, slow  # noqa: E402
from tests.deployment.loopback import LoopbackGrid  # noqa: E402
from tests.foreign_modules.data import BATCH_SIZE, SIZES  # noqa: E402

pytestmark = [
    pytest.mark.flower,
    pytest.mark.filterwarnings("ignore:.* has no sample method"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

SETTINGS = {
    "data": {
        "source": "Digits",
        "partition": {"class_path": "tests.foreign_modules.data.Sizes", "init_args": {"sizes": [*SIZES]}},
        "num_clients": len(SIZES),
        "batch_size": BATCH_SIZE,
    },
    "federation": {"rounds": 3, "local_epochs": 1, "optimizer_state": "keep"},
    "evaluation": {"metrics": []},
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
}
EMA = {"class_path": "tests.foreign_modules.EMACallback", "init_args": {"decay": 0.9}}
#: What is different for each module, by part of the settings.
CASES = {
    "TutorialGAN": {},
    "DCGAN": {},
    "WGANGP": {},
    "VAE": {"federation": {"local_epochs": None, "local_steps": 3}},
    "DenoisingDiffusion": {"federation": {"client_callbacks": [EMA]}, "data": {"validation_share": 0.25}},
    "StyleGAN": {"federation": {"client_attributes": ["ema"]}},
    "DeepEnergyModel": {
        "federation": {"client_attributes": ["sampler.examples"], "client_trainer": {"gradient_clip_val": 0.1}}
    },
    "AutoEncoder": {
        "federation": {"client_trainer": {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}},
        "data": {"validation_share": 0.25},
    },
    "TableGAN": {"data": {"source": {"class_path": "Ring", "init_args": {"num_samples": sum(SIZES)}}}},
}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Nobody has to be waited for."""
    monkeypatch.setattr("fedgan_lightning.deployment.sites.POLL_SECONDS", 0.0)


def settings_file(folder, name):
    """Write the settings of a federation of a module; return the path."""
    own = CASES[name]
    parts = {part: {**values, **own.get(part, {})} for part, values in SETTINGS.items()}
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump({"model": {"class_path": f"tests.foreign_modules.{name}"}, **parts}))
    return str(path)


def grid_of(folder, config):
    nodes = {100 + k: {"client-id": k, "state": str(folder / "state")} for k in range(len(SIZES))}
    return LoopbackGrid(nodes, run_config={"config": config, "options": ""})


def deployed(folder, config, *options, grid=None):
    grid = grid_of(folder, config) if grid is None else grid
    serve_over(grid, ["--config", config, *options, "--run_dir", str(folder / "deployed")])
    return weights(folder / "deployed")


def simulated(folder, config):
    own = ["--run_dir", str(folder / "simulated"), "--federation.executor", "SequentialExecutor"]
    assert main(["fit", "--config", config, *own]) == 0
    return weights(folder / "simulated")


def weights(run):
    return read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize("name", [own if k % 3 == 0 else slow(own) for k, own in enumerate(CASES)])
def test_sites_compute_what_the_simulation_computes(name, tmp_path):
    config = settings_file(tmp_path, name)
    assert_states_equal(deployed(tmp_path, config), simulated(tmp_path, config))


@pytest.mark.parametrize("name", ["WGANGP", *(slow(own) for own in ("StyleGAN", "DeepEnergyModel", "AutoEncoder"))])
def test_a_server_that_goes_on_finds_sites_as_they_were(name, tmp_path):
    """Three rounds at once, or two and one more."""
    config = settings_file(tmp_path, name)
    grid = grid_of(tmp_path / "parts", config)
    deployed(tmp_path / "parts", config, "--federation.rounds", "2", grid=grid)
    parts = deployed(tmp_path / "parts", config, grid=grid)
    assert_states_equal(parts, deployed(tmp_path / "whole", config))
