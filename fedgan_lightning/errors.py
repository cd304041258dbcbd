"""The errors a user meets: each names the rule, the value received and the fix, in one line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from pathlib import PurePath


class FedGANError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigurationError(FedGANError, ValueError):
    """A setting, or a combination of settings, cannot work."""


class DataError(FedGANError, ValueError):
    """Data or a partition of it cannot be used."""


class SampleSizeError(ConfigurationError, DataError):
    """There are too few samples for what is to be measured."""


class CheckpointError(FedGANError, RuntimeError):
    """A checkpoint is damaged, unsafe, or belongs to another run."""


class UpdateError(FedGANError, ValueError):
    """A client update must not reach the aggregator."""


class OutOfRangeError(UpdateError):
    """A number is too large for what it has to be written in; sites say so by this name, too."""


class ProtocolError(FedGANError, RuntimeError):
    """A message of secure aggregation must not be answered: it does not fit what was shared before."""


class QuorumError(FedGANError, RuntimeError):
    """Too few clients answered, however often the round was tried."""


class RefusedError(QuorumError):
    """Everybody who was asked refuses, and would again."""


class RankError(FedGANError, RuntimeError):
    """A process that shares the run failed, or is gone."""


class ClientError(FedGANError, RuntimeError):
    """A client failed; the original error is the cause.

    Args:
        client_id: The client that failed.
        round: The round in which it failed, counted from 0.
        stage: What it was doing: ``"load"``, ``"train"`` or ``"update"``.
        cause: The error that the client's code raised.
        stacked_with: Clients that were trained in one stack with it: the error may be any of theirs.
    """

    def __init__(self, *, client_id: int, round: int, stage: str, cause: BaseException, stacked_with: int = 0) -> None:
        who = f"client {client_id}" + (f" or one of {stacked_with} stacked with it" if stacked_with else "")
        text = f"{who} failed in round {round} at stage '{stage}': {type(cause).__name__}: {cause}"
        super().__init__(text + _place_of(cause))
        self.client_id, self.round, self.stage = client_id, round, stage


def _place_of(error: BaseException) -> str:
    """Return file and line where the caller's code, and not torch or Lightning, raised an error; no folders."""
    places = [(PurePath(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    loaded = (getattr(sys.modules.get(name), "__file__", None) for name in ("torch", "lightning"))
    others = [PurePath(path).parent for path in loaded if path]
    own = [(path.name, line) for path, line in places if not any(path.is_relative_to(folder) for folder in others)]
    return f" ({own[-1][0]}:{own[-1][1]})" if own else ""


def message(rule: str, *, received: object, fix: str) -> str:
    """Return ``"OPTION must RULE; got VALUE. FIX."``, the one form that all user errors take: always one line.

    Args:
        rule: What an option, a file or an argument must be, named as the user named it.
        received: What it is.
        fix: What to do, as an imperative.
    """
    text = f"{rule}; got {received}. {fix[:1].upper()}{fix[1:]}."
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text)  # names of files hold anything


def refuse_first(cases: Iterable[tuple[bool, str, object, str]], *, prefix: str = "") -> None:
    """Refuse the first of several settings that is wrong.

    Args:
        cases: Whether it is, the rule, what was received, and the fix.
        prefix: Before every rule, such as whose it is.

    Raises:
        ConfigurationError: If there is one.
    """
    for is_wrong, rule, received, fix in cases:
        if is_wrong:
            raise ConfigurationError(message(f"{prefix}{rule}", received=received, fix=fix))


class RoundInterrupted(FedGANError):  # noqa: N818 - not an error: the user asked for it
    """The user asked to stop: the round is given up, and the server keeps the state of the last complete one."""
