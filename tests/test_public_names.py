"""What the package exports, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import fedgan_lightning


def test_every_public_name_exists_and_is_listed_once():
    assert len(fedgan_lightning.__all__) == len(set(fedgan_lightning.__all__))
    for name in fedgan_lightning.__all__:
        assert getattr(fedgan_lightning, name) is not None
    assert set(fedgan_lightning._HOME_OF) | {"__version__"} == set(fedgan_lightning.__all__)


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
