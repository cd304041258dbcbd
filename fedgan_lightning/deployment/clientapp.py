"""``flwr-clientapp`` as sites run it: Flower's own program with the ClientApp that is installed, whatever app arrives.

Flower ships an app from the server to every site, installs it, and runs it there with the site's rights. A site that
has data to protect runs what it has installed and nothing else: the app that arrives is not installed and not imported.
It is looked at, without being run, to refuse by name whatever is not this package's.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

from fedgan_lightning.errors import ConfigurationError, ProtocolError, message

#: The file of an app that would run, and the longest app that is looked at: ours has two files of a page each.
CODE, MOST_BYTES = "app.py", 1 << 20
#: What Flower's program does with an app that arrives, by the names under which it imported that.
INSTALLS, LOADS = "install_from_fab", "get_load_client_app_fn"


def main() -> None:
    """Run Flower's program on the arguments of the command line."""
    program()()


def program() -> Any:
    """Return Flower's program, with what is installed in place of what arrives.

    It changes Flower's module in this process, whose only work this is.

    Raises:
        ConfigurationError: If Flower's program is not one whose ways are known: it would run what arrives.
    """
    from flwr.supernode.runtime import run_clientapp as runtime

    if not all(hasattr(runtime, name) for name in (INSTALLS, LOADS)):
        raise ConfigurationError(
            message(
                "a site must know how Flower loads an app, to load the installed one in its place",
                received="another version of Flower",
                fix="install flwr 1.41 or 1.42",
            )
        )

    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    def installed(content: bytes, *_: Any, **__: Any) -> None:
        check_app(content)

    def loader(*_: Any, **__: Any) -> Any:
        from fedgan_lightning.deployment.apps import client_app

        return lambda *_: client_app()

    setattr(runtime, INSTALLS, installed)
    setattr(runtime, LOADS, loader)
    return flwr_clientapp


def check_app(content: bytes) -> None:
    """Refuse an app that is not this package's; nothing of it is run either way.

    Args:
        content: What Flower ships, a zip file.

    Raises:
        ProtocolError: If its code is another than that of the installed app.
    """
    own = (Path(__file__).parent / "app" / CODE).read_bytes()
    found = _code_of(content)
    if found != own:
        what = "none that can be read" if found is None else f"one whose {CODE} has SHA-256 {_hash(found)}"
        raise ProtocolError(
            message(
                "a server must send the app of fedgan_lightning; what runs here is what this site has installed",
                received=f"{what}, and the installed one's is {_hash(own)}",
                fix="nothing of it was run; ask who runs the server, or install its version",
            )
        )


def _code_of(content: bytes) -> bytes | None:
    """Return the code of an app; ``None`` where it has none, more than one file of it, or is no such file."""
    if len(content) > MOST_BYTES:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as app:
            codes = [own for own in app.infolist() if own.filename.endswith((".py", ".so", ".pyc"))]
            if [own.filename for own in codes] != [CODE] or codes[0].file_size > MOST_BYTES:
                return None
            return app.read(CODE)
    except Exception:  # what comes can be anything
        return None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    main()
