"""What a wire between sites and server shows: over TLS no weights and no images, in the open weights and still no images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

flwr = pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning import SequentialExecutor  # noqa: E402
from fedgan_lightning.checkpoints import read_checkpoint  # noqa: E402
from fedgan_lightning.cli import run  # noqa: E402
from fedgan_lightning.packing import Packed  # noqa: E402
from fedgan_lightning.protocol import Executor  # noqa: E402
from tests.conftest import assert_states_equal  # noqa: E402
from tests.deployment.conftest import OPTIONS, SITES  # noqa: E402
from tests.deployment.processes import CONFIG, found, pieces  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]


class Noted(Executor):
    """Runs clients one after the other, and notes the bytes of what a deployment would send."""

    def __init__(self) -> None:
        self.inner, self.global_weights, self.updates = SequentialExecutor(), {}, {}

    def setup(self, context):
        self.inner.setup(context)

    def run(self, tasks):
        tasks = list(tasks)
        for task in tasks:
            self.global_weights[task.round] = raw(task.state)
        for update in self.inner.run(tasks):
            self.updates[tasks[0].round, update.client_id] = raw(update.delta) + raw(update.extras)
            yield update

    def teardown(self):
        self.inner.teardown()


def raw(state) -> bytes:
    """Return the float32 numbers of a state, in the order in which they travel."""
    return Packed.of(state).vectors[torch.float32].cpu().numpy().tobytes()


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The same federation in this process."""
    folder, noted, built = tmp_path_factory.mktemp("simulated"), Noted(), []

    def prepare(cli):
        cli.orchestrator.executor = noted
        built.append(cli.datamodule)

    run(["fit", "--config", str(CONFIG), *OPTIONS, "--run_dir", str(folder)], prepare=prepare)
    return folder, noted, built[0]


@pytest.fixture(scope="module")
def images(simulated) -> dict[str, set[bytes]]:
    """Pieces of the sites' images, in the forms in which they lie at a site."""
    data, rows = simulated[2], [torch.cat([x for x, _ in simulated[2].client_samples(k).chunks(512)]) for k in range(SITES)]
    float32 = torch.cat(rows).numpy()
    grey = data.train_samples.x[torch.from_numpy(np.concatenate(data.indices[:SITES]))].numpy()
    levels = np.round(grey / (255 / 16))
    forms = {"float32": float32, "uint8": grey, "levels": levels.astype(np.uint8), "float64": levels}
    return {name: pieces(np.ascontiguousarray(values).tobytes()) for name, values in forms.items()}


def test_the_recorded_federations_are_the_simulated_one(federations, simulated):
    """To the bit: with TLS, node keys and proxies between, and without."""
    expected = read_checkpoint(simulated[0] / "checkpoints" / "last.ckpt")["state_dict"]
    for recorded in federations:
        assert recorded.code == 0
        found = read_checkpoint(recorded.run_dir / "checkpoints" / "last.ckpt")["state_dict"]
        assert_states_equal(found, expected)


def test_over_tls_no_piece_of_any_weights_or_images_passes(federations, simulated, images):
    noted, closed = simulated[1], federations[0]
    weights = pieces(b"".join([*noted.global_weights.values(), *noted.updates.values()]))
    sent = len(noted.updates[0, 0])
    for name, streams in closed.wires.items():
        assert sum(map(len, streams)) > SITES * sent / 2, f"{name}: too little passed to have been a federation"
        assert found(weights, streams) == set(), name
        assert all(found(own, streams) == set() for own in images.values()), name


def test_in_the_open_all_weights_pass_and_still_no_image(federations, simulated, images):
    """Proves that the search would find them, and that there is nothing to find of the images."""
    noted, streams = simulated[1], federations[1].wires["to the SuperLink"]
    for what in (*noted.global_weights.values(), *noted.updates.values()):
        expected = pieces(what)
        assert len(expected) > 500
        assert len(found(expected, streams)) > 0.99 * len(expected)
    for form, own in images.items():
        assert len(own) > 500
        assert found(own, streams) == set(), form


def test_one_image_in_a_wire_would_be_found(federations, images):
    streams = federations[1].wires["to the SuperLink"]
    for own in images.values():
        piece = min(own)
        longest = max(range(len(streams)), key=lambda k: len(streams[k]))
        planted = [*streams[:longest], streams[longest][:1001] + piece + streams[longest][1001:], *streams[longest + 1 :]]
        assert found(own, planted) == {piece}
