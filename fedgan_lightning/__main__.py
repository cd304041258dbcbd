"""``python -m fedgan_lightning``: see :mod:`fedgan_lightning.cli`."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fedgan_lightning.errors import (
    ClientError,
    ConfigurationError,
    FedGANError,
    QuorumError,
    RankError,
    UpdateError,
    message,
)
from fedgan_lightning.version import __version__

#: In the environment: let errors that nobody foresaw end with their traceback.
TRACEBACK = "FEDGAN_TRACEBACK"
COMMANDS = {
    "fit": "train a federation",
    "validate": "metrics of a checkpoint",
    "test": "full evaluation of a checkpoint on held-out data",
    "predict": "write samples of a checkpoint",
    "partition": "who holds what, before any training",
    "audit": "attacks on a checkpoint: who was a member, and what an update shows",
    "privacy": "what a configuration guarantees and costs, before any training: [--target EPSILON]",
    "deploy": "between machines, on Flower: deploy keys | server | site | trial",
    "report": "one HTML page about a run, or comparing several: report RUN [RUN ...] [--out FILE]",
}
USAGE = "\n".join(
    [
        "usage: python -m fedgan_lightning COMMAND --config FILE [--ckpt_path last] [--GROUP.OPTION VALUE ...]",
        "",
        "Train GANs over data that must not move.",
        "",
        "commands:",
        *(f"  {name:<12}{meaning}" for name, meaning in COMMANDS.items()),
        "",
        "  COMMAND --help          the groups of options, and every option",
        "  COMMAND --print_config  all settings with their values, as a file to start from",
        "  --version",
        "",
        "A first run, nothing to download:  python -m fedgan_lightning fit --config configs/digits.yaml",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0 done, 1 a client or process failed, 2 bad input, 128 + n signal n."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:  # these are answered before torch is imported
        print(f"fedgan_lightning {__version__}")
        return 0
    if arguments in ([], ["--help"], ["-h"]):
        print(USAGE)
        return 0
    try:
        return dispatched(arguments)
    except FedGANError as error:
        _say(str(error))
        return 1 if isinstance(error, (ClientError, QuorumError, RankError, UpdateError)) else 2
    except KeyboardInterrupt:
        _say("stopped by Ctrl-C; complete rounds are in the last checkpoint. See --ckpt_path to go on with them")
        return 128 + signal.SIGINT
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        _say(
            message(
                "files must be readable and writable",
                received=f"{named}{error.strerror or error}",
                fix="see the path, who may write there, and the space left on the disk",
            )
        )
        return 2
    except Exception as error:
        if TRACEBACK in os.environ:
            raise
        _say(unforeseen(error))
        return 2


def dispatched(arguments: Sequence[str]) -> int:
    """Run a command; return the exit code."""
    if arguments[0] == "report":
        return report(arguments[1:])
    if arguments[0] == "deploy":
        from fedgan_lightning.deployment.launch import main as deploy

        return deploy(arguments[1:])
    if arguments[0] == "privacy":
        from fedgan_lightning.privacy_command import main as privacy

        return privacy([expanded_config(own) for own in arguments[1:]])
    arguments = [expanded_config(own) for own in arguments]
    check(arguments)
    return federate(arguments)


def unforeseen(error: Exception) -> str:
    """Return what there is to say of an error that nobody foresaw: the settings may cause it, or this program."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return (
        f"{type(error).__name__}: {error}{place}. If a setting of yours is meant, correct it; "
        f"else report this, with what {TRACEBACK}=1 shows"
    )


def expanded_config(argument: str) -> str:
    """Return ``--config=~/file`` as a shell would have written it, had there been a space."""
    name, separator, path = argument.partition("=")
    return (
        f"{name}={Path(path).expanduser()}" if separator and name == "--config" and path.startswith("~") else argument
    )


def _say(text: str) -> None:
    print(f"error: {' '.join(text.splitlines())}", file=sys.stderr)


def check(arguments: Sequence[str]) -> None:
    """Refuse what a slip of the finger makes, before torch is imported: that takes seconds.

    Raises:
        ConfigurationError: If the command, or a configuration's file, does not exist.
    """
    name = arguments[0]
    if not name.startswith("-") and name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        fix = f"write {near[0]}" if near else "see python -m fedgan_lightning --help"
        raise ConfigurationError(message(f"a command must be one of {', '.join(COMMANDS)}", received=name, fix=fix))
    for option, value in zip(arguments, [*arguments[1:], ""]):
        path = value if option == "--config" else option.removeprefix("--config=")
        is_told = option == "--config" or path != option
        is_text = bool({"{", ":", "\n"} & {*path})  # settings may stand in place of a file
        if is_told and not is_text and not Path(path).expanduser().is_file():
            raise ConfigurationError(message("a configuration must be a file", received=path, fix="check the path"))


def federate(arguments: Sequence[str]) -> int:
    """Run a command that needs the settings; return the exit code."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from fedgan_lightning.cli import run
    from fedgan_lightning.federation.ranks import lost_rank
    from fedgan_lightning.parser import HELP

    try:
        run(list(arguments))
    except RuntimeError as error:
        if (lost := lost_rank(error)) is None:
            raise
        raise lost from error
    except MisconfigurationException as error:  # Lightning's own: a setting of the Trainer
        _say(f"{' '.join(str(error).split())} {HELP}")
        return 2
    return 0


class _OneLineParser(argparse.ArgumentParser):
    """Reports a bad argument as the other commands do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See: python -m fedgan_lightning report --help")


def report(arguments: Sequence[str]) -> int:
    """Write the page about the runs that are named; return the exit code."""
    parser = _OneLineParser(prog="python -m fedgan_lightning report", description="One HTML page about runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--out", help="file to write; default report.html in the run directory, or beside several")
    options = parser.parse_args(arguments)
    from fedgan_lightning.visuals.report import write_report

    print(f"wrote {write_report(options.runs, out=options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
