"""The README tells the truth: its Python runs, its files and commands exist."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
DOCUMENTS = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def test_the_python_blocks_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_it_is_one_page():
    assert len(TEXT.splitlines()) <= 120


@pytest.mark.parametrize("name", DOCUMENTS)
def test_linked_files_exist(name):
    path = DOCUMENTS[name]
    links = {link.partition("#")[0] for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", path.read_text())}
    assert [link for link in sorted(links) if not (path.parent / link).exists()] == []


def test_the_reading_order_is_short():
    paths = re.findall(r"\]\((fedgan_lightning/[\w/.]+)\)", TEXT[TEXT.index("To read the code") :])
    assert len(paths) <= 6
    assert sum(len((ROOT / path).read_text().splitlines()) for path in paths) < 1000


def test_commands_name_real_subcommands_and_configurations():
    from fedgan_lightning.cli import SUBCOMMANDS

    used = set(re.findall(r"python -m fedgan_lightning (\w+)", TEXT))
    assert used == {*SUBCOMMANDS, "report", "deploy", "privacy"} - {"site"}
    for config in re.findall(r"configs/\w+\.yaml", TEXT):
        assert (ROOT / config).exists(), config


def test_what_can_be_chosen_is_what_there_is():
    from fedgan_lightning import algorithms, losses, partitions, schedules, transforms
    from fedgan_lightning.data.partition import Partition
    from fedgan_lightning.federation.algorithm import FederatedAlgorithm
    from fedgan_lightning.gan.objectives import AdversarialLoss
    from fedgan_lightning.gan.penalties import Penalty
    from fedgan_lightning.update_transform import UpdateTransform

    text = DOCUMENTS["choices.md"].read_text()
    homes = {AdversarialLoss: losses, Penalty: losses, Partition: partitions, FederatedAlgorithm: algorithms}
    for base, home in {**homes, UpdateTransform: transforms, schedules.RoundSchedule: schedules}.items():
        for kind in base.__subclasses__():
            if kind.__module__.startswith("fedgan_lightning"):
                assert f"`{kind.__name__}`" in text, kind.__name__
                assert hasattr(home, kind.__name__)
