"""Optional hooks of modules and callbacks; whoever has one is asked, nobody needs to inherit anything.

A method is a hook if it can be called as one: somebody's ``sample(batch_size, steps)`` is a method of that name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fedgan_lightning.protocol import ClientUpdate, RoundInfo


def offers(owner: Any, hook: type) -> bool:
    """Return whether an object has all methods of a protocol, and they can be called as the protocol says."""
    for name, wanted in vars(hook).items():
        if name.startswith("_") or not inspect.isfunction(wanted):
            continue
        method = getattr(owner, name, None)
        if not callable(method):
            return False
        parameters = list(inspect.signature(wanted).parameters.values())[1:]
        keywords = {own.name: None for own in parameters if own.kind is inspect.Parameter.KEYWORD_ONLY}
        try:
            inspect.signature(method).bind(*[None] * (len(parameters) - len(keywords)), **keywords)
        except (TypeError, ValueError):  # it wants other arguments, or nobody knows which
            return False
    return True


def attributes_of(module: Any, kind: str) -> frozenset[str]:
    """Return names of attributes that a module declares of a kind; none where it declares none."""
    found: frozenset[str] = frozenset(getattr(module, kind, ()))
    return found


def nothing(*arguments: Any, **options: Any) -> None:
    """Stand for a hook that is not to be called, or has been."""


class ClientHook(Protocol):
    """Optional hook of a client module, called before its per-round ``fit``."""

    def on_client_round_start(self, info: RoundInfo) -> None: ...


class StackHook(Protocol):
    """Optional hook of a client module: itself for several clients at once, as the vectorized executor trains them.

    The result is a LightningModule with manual optimization whose ``state_dict`` has the names of the client's; the
    executor gives every tensor a leading dimension of clients, and passes batches with the same.

    Raises:
        ConfigurationError: If the module cannot be stacked; the message says why.
    """

    def stacked(self) -> Any: ...


class StackedModule(Protocol):
    """What the vectorized executor asks of a stacked module, beside being a LightningModule."""

    def on_stack_round_start(self, infos: Sequence[RoundInfo], generators: Sequence[torch.Generator]) -> None:
        """Begin a round of these clients, each with its own source of randomness."""

    def keep_clients(self, count: int) -> None:
        """Go on with the first ``count`` clients; the others have done their steps."""

    def round_statistics(self) -> Mapping[str, Tensor]:
        """Return scalars of the round, (clients,) each."""


class StatisticsHook(Protocol):
    """Optional hook of a client module: its scalars of the round, beside those it logs.

    One call of ``self.log`` takes about a millisecond at the end of an epoch, which a client's round is; this takes
    none.
    """

    def round_statistics(self) -> Mapping[str, Tensor]: ...


class ServerHook(Protocol):
    """Optional hook of the global module, called after every server step.

    ``num_images`` is the weighted mean over clients of images seen in the round: the length of one local path.
    """

    def on_server_round_end(self, *, num_images: float) -> None: ...


class RecalibrationHook(Protocol):
    """Optional hook of the global module: make buffers anew from the weights alone, after a server step."""

    def recalibrate(self) -> None: ...


class PlacementHook(Protocol):
    """Optional hook of a module: where its networks live unless settings say otherwise; see :mod:`.policy`.

    A network that it names with ``server`` is ``None`` on clients.
    """

    def default_sync(self) -> Mapping[str, str]: ...


class DataHook(Protocol):
    """Optional hook of a module, called before the first round: refuse data that do not fit its networks."""

    def check_data(self, sample_shape: Sequence[int], num_classes: int) -> None: ...


class RoundListener(Protocol):
    """Optional hooks of any callback on the server's Trainer; the orchestrator calls those that exist."""

    def on_round_start(self, trainer: Any, server: Any, info: RoundInfo) -> None: ...

    def on_client_end(self, trainer: Any, server: Any, update: ClientUpdate) -> None: ...

    def on_attempt_end(self, trainer: Any, server: Any, report: Any) -> None: ...

    def on_round_end(self, trainer: Any, server: Any, info: RoundInfo, metrics: Mapping[str, float]) -> None: ...


class SampleSource(Protocol):
    """A global module that can be sampled, as pictures and metrics need it."""

    def sample(
        self, num_samples: int, *, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor: ...


def listeners(callbacks: Sequence[Any], hook: str) -> list[Any]:
    """Return the bound ``hook`` of every callback that has one."""
    return [getattr(callback, hook) for callback in callbacks if hasattr(callback, hook)]


def completed_rounds(trainer: Any) -> int:
    """Return the rounds that the server of a Trainer has completed; without a federation its global steps."""
    return int(getattr(trainer.lightning_module, "rounds_completed", trainer.global_step))


def is_finished(trainer: Any) -> bool:
    """Return whether all rounds are done that there are to be: fewer than were asked for where a budget is spent."""
    return completed_rounds(trainer) >= planned_rounds(trainer)


def planned_rounds(trainer: Any) -> int:
    """Return the rounds that the server of a Trainer is to complete; without a federation its ``max_steps``."""
    return int(getattr(trainer.lightning_module, "rounds_planned", trainer.max_steps))
