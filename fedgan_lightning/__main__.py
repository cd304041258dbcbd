"""``python -m fedgan_lightning``: see :mod:`fedgan_lightning.cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fedgan_lightning.errors import ClientError, FedGANError, RankError, UpdateError
from fedgan_lightning.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0 done, 1 a client or process failed, 2 bad input, 128 + n signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:  # answered before torch is imported
        print(f"fedgan_lightning {__version__}")
        return 0
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from fedgan_lightning.cli import HELP, run

    try:
        run(arguments)
    except MisconfigurationException as error:  # Lightning's own: a setting of the Trainer
        print(f"error: {' '.join(str(error).split())} {HELP}", file=sys.stderr)
        return 2
    except FedGANError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, (ClientError, RankError, UpdateError)) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
