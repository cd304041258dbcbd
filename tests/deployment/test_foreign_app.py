"""What runs at a site is what the site installed: an app that arrives is looked at, and neither installed nor run."""

from __future__ import annotations

import io
import sys
import types
import zipfile

import pytest

pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.deployment import clientapp, programs
from fedgan_lightning.errors import ConfigurationError, ProtocolError

pytestmark = pytest.mark.flower

OWN = (programs.APP / clientapp.CODE).read_bytes()


def app(**files: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/").replace("_py", ".py"), content)
    return made.getvalue()


def bomb() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(clientapp.CODE, bytes(64 << 20))
    return made.getvalue()


FOREIGN = {
    "other code": app(app_py=b"import os"),
    "more code": app(app_py=OWN, sitecustomize_py=b"import os"),
    "code in a folder": app(app_py=OWN, fedgan_lightning____init___py=b"import os"),
    "no code": app(readme=b"hello"),
    "no zip file": b"PK nonsense",
    "nothing": b"",
    "a bomb": bomb(),
    "too long": bytes(clientapp.MOST_BYTES + 1),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_app_is_refused_by_the_hash_of_its_code(content):
    with pytest.raises(ProtocolError, match="what runs here is what this site has installed.*Nothing of it was run"):
        clientapp.check_app(content)


def test_the_app_that_flower_builds_of_ours_is_known():
    from flwr.cli.build import build_fab_from_disk

    clientapp.check_app(build_fab_from_disk(programs.APP))


def test_flower_s_program_loads_what_is_installed(monkeypatch):
    from flwr.supernode.runtime import run_clientapp as runtime

    for name in (clientapp.INSTALLS, clientapp.LOADS):
        monkeypatch.setattr(runtime, name, None)
    assert clientapp.program().__name__ == "flwr_clientapp"
    with pytest.raises(ProtocolError):
        runtime.install_from_fab(FOREIGN["other code"], skip_prompt=True)
    load = runtime.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert type(load("somebody/else", "1.0", "hash")).__name__ == "ClientApp"


def test_a_flower_whose_ways_are_not_known_starts_nothing(monkeypatch):
    """Its program would run what arrives."""
    other = types.ModuleType("run_clientapp")
    import flwr.supernode.runtime as package

    monkeypatch.setattr(package, "run_clientapp", other, raising=False)
    monkeypatch.setitem(sys.modules, "flwr.supernode.runtime.run_clientapp", other)
    with pytest.raises(ConfigurationError, match=r"how Flower loads an app.*Install flwr 1\.41 or 1\.42"):
        clientapp.program()
