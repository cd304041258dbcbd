"""The README tells the truth: its Python runs, its files and commands exist."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_the_python_blocks_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w/.]+)\)", TEXT))))
def test_linked_files_exist(path):
    assert (ROOT / path).exists()


def test_commands_name_real_subcommands_and_configurations():
    from fedgan_lightning.cli import FederatedCLI

    used = set(re.findall(r"python -m fedgan_lightning (\w+)", TEXT))
    assert used == {*FederatedCLI.subcommands(), "report", "federation"} - {"site"}
    for config in re.findall(r"configs/\w+\.yaml", TEXT):
        assert (ROOT / config).exists(), config


def test_what_can_be_chosen_is_what_there_is():
    import fedgan_lightning
    from fedgan_lightning.data.partition import Partition
    from fedgan_lightning.gan.objectives import AdversarialLoss
    from fedgan_lightning.gan.penalties import Penalty

    for base in (AdversarialLoss, Penalty, Partition):
        for kind in base.__subclasses__():
            if kind.__module__.startswith("fedgan_lightning"):
                assert f"`{kind.__name__}`" in TEXT, kind.__name__
                assert hasattr(fedgan_lightning, kind.__name__)
