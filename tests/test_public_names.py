"""What the package exports, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import fedgan_lightning


def test_few_names_are_at_top_level_and_all_exist():
    assert len(fedgan_lightning.__all__) == len(set(fedgan_lightning.__all__)) <= 25
    for name in fedgan_lightning.__all__:
        assert getattr(fedgan_lightning, name) is not None


def test_every_other_public_name_is_in_one_module():
    homes = Counter(fedgan_lightning.__all__)
    for module in fedgan_lightning.SUBMODULES:
        home = getattr(fedgan_lightning, module)
        assert home.__doc__
        names = [name for name, value in vars(home).items() if getattr(value, "__module__", "").startswith("fedgan_")]
        assert names
        homes.update(names)
    assert {name for name, count in homes.items() if count > 1} == {"UpdateEntry"}, "which two interfaces speak of"


BASES = ("Adversarial", "Penalty", "Prior", "Condition", "Codec", "Partition", "Source", "Executor", "Aggregator")
BASES += ("ClientSampler", "UpdateTransform", "RoundSchedule", "Metric", "FeatureNet", "FederatedAlgorithm", "Modality")


def test_what_one_extends_is_public_where_its_children_are():
    """A base class that a public class of a module has is in that module, if it is one of the extension points."""
    missing = []
    for module in fedgan_lightning.SUBMODULES:
        home = getattr(fedgan_lightning, module)
        for name, value in vars(home).items():
            if not isinstance(value, type):
                continue
            missing += [f"{module}.{base.__name__} of {name}" for base in value.__mro__ if _is_extended(base, home)]
    assert not missing


def _is_extended(base: type, home: object) -> bool:
    return (
        base.__name__.startswith(BASES) and base.__module__.startswith("fedgan_") and not hasattr(home, base.__name__)
    )


def test_import_and_version_load_no_torch():
    code = "import sys, fedgan_lightning.__main__ as m; m.main(['--version']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"fedgan_lightning {fedgan_lightning.__version__}"


def test_unknown_name_is_an_attribute_error():
    try:
        fedgan_lightning.Nonsense  # noqa: B018
    except AttributeError as error:
        assert "Nonsense" in str(error)
    else:
        raise AssertionError("no error")
