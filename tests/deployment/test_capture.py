"""What a wire between sites and server shows: over TLS neither weights nor images, without it weights."""

from __future__ import annotations

import contextlib
import socket
from threading import Thread

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
from tests.deployment.processes import CONFIG, Listener, found, may_listen, pieces  # noqa: E402
from tests.processes import eventually  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]


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
            own = {"update": raw(update.delta), "moments": raw(update.extras)}
            self.updates |= {(what, tasks[0].round, update.client_id): sent for what, sent in own.items()}
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
    data = simulated[2]
    float32 = torch.cat([x for k in range(SITES) for x, _ in data.client_samples(k).chunks(512)]).numpy()
    grey = data.train_samples.x[torch.from_numpy(np.concatenate(data.indices[:SITES]))].numpy()
    levels = np.round(grey / (255 / 16))
    forms = {"float32": float32, "uint8": grey, "levels": levels.astype(np.uint8), "float64": levels}
    return {name: pieces(np.ascontiguousarray(values).tobytes()) for name, values in forms.items()}


def test_the_recorded_federation_is_the_simulated_one(federation, simulated):
    """To the bit, with TLS, node keys and proxies between: so the bytes to look for are known."""
    assert federation.code == 0
    mine, theirs = (
        read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
        for folder in (federation.home / "run", simulated[0])
    )
    assert_states_equal(mine, theirs)


def test_no_piece_of_any_weights_or_images_passes_over_tls(federation, simulated, images):
    noted = simulated[1]
    secret = set().union(*images.values(), *map(pieces, [*noted.global_weights.values(), *noted.updates.values()]))
    for name, streams in federation.wires.items():
        assert sum(map(len, streams)) > len(noted.global_weights[0]), f"{name}: this was no federation"
        assert found(secret, streams) == set(), name


def test_without_tls_all_weights_would_show_and_still_no_image(federation, simulated, images):
    """The same traffic, opened with the server's key: the search finds what is there, and images are not."""
    noted = simulated[1]
    weights = [pieces(what) for what in (*noted.global_weights.values(), *noted.updates.values())]
    assert min(map(len, [*weights, *images.values()])) > 500
    seen = found(set().union(*weights, *images.values()), federation.opened)
    assert seen == set().union(*weights)
    assert all(own.isdisjoint(seen) for own in images.values())


def test_one_piece_of_an_image_would_be_found(federation, images):
    longest, *others = sorted(federation.opened, key=len, reverse=True)
    for own in images.values():
        piece = min(own)
        assert found(own, [*others, longest[:1001] + piece + longest[1001:]]) == {piece}


@pytest.mark.skipif(not may_listen(), reason="needs Linux and the right to capture packets")
def test_whoever_listens_on_this_machine_hears_what_is_sent_in_the_open():
    """So silence among a site's processes means that they encrypt."""
    said = np.random.default_rng(0).bytes(1 << 18)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        contextlib.closing(Listener(server.getsockname()[1])) as heard,
    ):
        with socket.create_connection(server.getsockname()) as link, server.accept()[0] as other:
            Thread(target=lambda: (link.sendall(said), link.shutdown(socket.SHUT_WR))).start()
            while other.recv(1 << 16):
                pass
        assert eventually(lambda: sum(map(len, heard.streams)) >= len(said))
    # What is sent twice on a busy machine may tear a piece apart.
    assert len(found(pieces(said), [bytes(stream) for stream in heard.streams])) > 0.99 * len(pieces(said))
