"""Arrays in files: in memory where they are small, row by row where they are not, in the same order."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from fedgan_lightning import FederatedDataModule, VectorizedExecutor
from fedgan_lightning.errors import DataError
from fedgan_lightning.partitions import ClassesPerClient, FeatureShift, Natural
from fedgan_lightning.sources import ArrayFile
from tests.conftest import ROOT, federate, ring_gan

N = 60


def save(path, **arrays):
    if path.suffix == ".npy":
        np.save(path, arrays["x"])
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file(arrays, path)
    return str(path)


def points():
    x = np.random.default_rng(0).normal(size=(N, 2)).astype(np.float32)
    return {"x": x, "y": np.arange(N) % 3, "site": np.arange(N) % 4}


def data(source, **options):
    return FederatedDataModule(source, **{"num_clients": 3, "batch_size": 8, **options})


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_labels_and_columns_of_one_file_divide_it(tmp_path, suffix):
    source = ArrayFile(save(tmp_path / f"points{suffix}", **points()))
    assert (source.sample_shape, source.class_names) == ((2,), ("0", "1", "2"))
    assert len(source.load("train")) == 54
    assert len(source.load("test")) == 6
    assert (data(source, partition=ClassesPerClient(1)).label_counts() > 0).sum() == 3
    assert data(source, partition=Natural("site"), num_clients=4).num_examples(3) > 0


def test_an_npy_file_has_its_labels_and_columns_beside_it(tmp_path):
    found = points()
    path = save(tmp_path / "x.npy", **found)
    np.save(tmp_path / "y.npy", found["y"])
    np.save(tmp_path / "site.npy", np.array(list("abcd") * 15))
    source = ArrayFile(path, y=str(tmp_path / "y.npy"), columns={"site": str(tmp_path / "site.npy")}, test=path)
    assert torch.equal(source.load("train").y, torch.arange(N) % 3)
    assert len(source.load("test")) == N
    assert data(source, partition=Natural("site"), num_clients=4).num_examples(0) == 15


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3), (3, 5, 6)], ids=["grey", "channels last", "channels first"])
def test_bytes_are_pictures_channels_first(tmp_path, suffix, shape):
    x = np.random.default_rng(0).integers(0, 256, (N, *shape), dtype=np.uint8)
    path = save(tmp_path / f"pictures{suffix}", x=x)
    expected = torch.from_numpy(x.reshape(N, 5, 6, -1).transpose(0, 3, 1, 2) if shape[0] == 5 else x)
    for limit in (1 << 20, 0):
        source = ArrayFile(path, test=path, memory_limit=limit)
        assert source.sample_shape == tuple(expected.shape[1:])
        assert torch.equal(source.load("train").x[torch.arange(N)], expected)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_what_stays_in_its_file_trains_as_in_memory(tmp_path, suffix):
    path = save(tmp_path / f"points{suffix}", **points())
    partition = FeatureShift(brightness=0.1)
    kept, read = (data(ArrayFile(path, memory_limit=limit), partition=partition) for limit in (1 << 20, 0))
    assert (kept.has_samples, read.has_samples) == (True, False)
    for k in range(3):
        for (x, y), (x2, y2) in zip(*(own.client_batches(k, first_step=1, num_steps=5) for own in (kept, read))):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)
    first, second = (federate(ring_gan(), own, rounds=2, local_steps=3)[0].model.state_dict() for own in (kept, read))
    assert all(map(torch.equal, first.values(), second.values()))
    federate(ring_gan(), read, rounds=1, local_steps=2, executor=VectorizedExecutor())
    assert len(data(ArrayFile(path, memory_limit=0), max_samples=20).train_samples) == 20


def test_the_fingerprint_follows_the_file(tmp_path):
    found = points()
    prints = set()
    for first in (0.0, 1.0):
        found["x"][:] += first
        prints.add(data(ArrayFile(save(tmp_path / "x.npy", **found), memory_limit=0)).fingerprint())
    assert len(prints) == 2


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


WRONG = {
    "missing": ("x.npy", {}, "plain numbers; got .*x.npy .FileNotFoundError"),
    "another kind": ("x.csv", {}, "must end in .npy, .npz or .safetensors"),
    "objects": ("x.npy", {"x": np.array([None] * 9)}, "dtype object"),
    "no samples": ("x.npz", {"z": np.zeros((9, 2))}, "must hold the array x of samples; got arrays .'z'."),
    "whole numbers": ("x.npy", {"x": np.zeros((9, 2), dtype=np.int64)}, "must hold pictures.*int64 of shape"),
    "one number each": ("x.npy", {"x": np.zeros(9, dtype=np.float32)}, "must hold pictures.*float32 of shape"),
    "no rows": ("x.npy", {"x": np.zeros((0, 2), dtype=np.float32)}, "must hold pictures.*of shape"),
    "fractions as labels": ("x.npz", {"x": np.zeros((9, 2)), "y": np.full(9, 0.5)}, "whole numbers of classes"),
    "too few labels": ("x.npz", {"x": np.zeros((9, 2)), "y": np.zeros(4)}, "a label for each of 9 samples; got 4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_do_not_fit_are_refused_by_name(tmp_path, name):
    file, arrays, words = WRONG[name]
    if arrays:
        np.save(tmp_path / file, arrays["x"], allow_pickle=True) if file.endswith("npy") else save(
            tmp_path / file, **arrays
        )
    with pytest.raises(DataError, match=words):
        ArrayFile(str(tmp_path / file))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_files_that_are_cut_off_are_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    save(path, **points())
    cut(path)
    with pytest.raises(DataError, match=f"x{suffix}"):
        ArrayFile(str(path))


def test_numbers_that_are_not_finite_name_file_and_row(tmp_path):
    found = points()
    found["x"][7, 1] = np.nan
    path = save(tmp_path / "x.npy", **found)
    rows = ArrayFile(path, test=path, memory_limit=0).load("train").x
    with pytest.raises(DataError, match=r"rows of .*x.npy must be finite.*NaN or infinity in row 7"):
        rows[torch.arange(N)]
    with pytest.raises(DataError, match="finite numbers; got NaN"):
        ArrayFile(path, test=path).load("train")


LARGE = """
import resource, sys
import numpy as np, torch
from fedgan_lightning import GAN, FederatedDataModule, FederatedOrchestrator, SequentialExecutor, ServerModule
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.sources import ArrayFile
import lightning as L

np.lib.format.open_memmap("large.npy", mode="w+", dtype=np.uint8, shape=(int(sys.argv[1]) // 3072, 32, 32, 3))
gan = GAN(MLPGenerator(4, (3, 32, 32), hidden=(8,)), MLPDiscriminator((3, 32, 32), hidden=(8,)))

def run(rounds):
    data = FederatedDataModule(ArrayFile("large.npy"), num_clients=4, batch_size=64)
    orchestrator = FederatedOrchestrator(rounds=rounds, local_steps=5, executor=SequentialExecutor())
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(accelerator="cpu", callbacks=[orchestrator], max_epochs=-1, **quiet)
    trainer.fit(ServerModule(gan), datamodule=data)

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(2)
print("grown by MiB:", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
print("peak MiB:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def trained_on(tmp_path, size):
    """Train on a sparse file; return by how many MiB the process grew, and its peak."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LARGE, str(size)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(line.rpartition(":")[2]) for line in done.stdout.splitlines() if "MiB" in line]


def test_a_large_file_does_not_come_into_memory(tmp_path):
    grown, _ = trained_on(tmp_path, 3 << 30)
    assert grown < 400


@pytest.mark.slow
def test_twenty_gigabytes_are_trained_on_in_two(tmp_path):
    _, peak = trained_on(tmp_path, 20 * 10**9)
    assert peak < 2048
