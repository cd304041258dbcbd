"""docs/own_data.md tells the truth: its Python runs, and is short."""

from __future__ import annotations

import re

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fedgan_lightning.partitions import Dirichlet, Natural
from fedgan_lightning.protocol import FederatedData
from fedgan_lightning.sources import ArrayFile
from tests.conftest import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_data.md").read_text(), re.DOTALL)
KNOWN = {
    "L": L,
    "DataLoader": DataLoader,
    "Dataset": Dataset,
    "TensorDataset": TensorDataset,
    "Dirichlet": Dirichlet,
    "Natural": Natural,
    "ArrayFile": ArrayFile,
}


@pytest.fixture
def files(tmp_path):
    """What the page speaks of, in the working directory of the test."""
    for i in range(24):
        folder = tmp_path / "photographs" / ["cat", "dog"][i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + i, 60 - i), (i, 0, 0)).save(folder / f"{i}.png")
    np.save("scans.npy", np.zeros((40, 8, 8), dtype=np.uint8))
    np.save("labels.npy", np.arange(40) % 2)
    np.save("sites.npy", np.array(list("ab") * 20))


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_every_way_makes_a_data_module_in_a_few_lines(number, files):
    block = BLOCKS[number]
    assert len(block.splitlines()) <= 15
    if "load_from_disk" in block:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"scan": [[0.0]] * 8, "site": list("ab") * 4}).save_to_disk("scans")
    torch.manual_seed(0)
    names = {**KNOWN, "x": torch.rand(400, 2), "y": torch.arange(400) % 2}
    exec(compile(BLOCKS[0] + block, "own_data.md", "exec"), names)
    data = names["data"]
    assert isinstance(data, FederatedData)
    assert data.num_clients == 2
    assert len(list(data.client_batches(0, first_step=0, num_steps=2))) == 2
