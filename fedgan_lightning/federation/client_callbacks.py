"""Lightning callbacks on clients: each client has its own state of them, and none knows of another's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.attributes import AttributeSnapshot
from fedgan_lightning.federation.plain_state import decode, encode, parts_of
from fedgan_lightning.hooks import nothing
from fedgan_lightning.protocol import State

#: Hooks that are called in a client's first round alone, and those that are never called: a round ends no run.
FIRST, NEVER = ("on_fit_start",), ("on_fit_end", "teardown")
#: Callbacks that own a Trainer's whole run, or its epochs, by the name of their class or of one that it inherits.
UNUSABLE = {
    "StochasticWeightAveraging": "a callback of your own that keeps an average",
    "WeightAveraging": "a callback of your own that keeps an average",
    "Checkpoint": "trainer.callbacks, on the server",
    "GradientAccumulationScheduler": "client_trainer.accumulate_grad_batches",
    "BaseFinetuning": "requires_grad_ in the module, and federation.sync of what it thaws",
    "ProgressBar": "trainer.callbacks, on the server",
}
#: What of a callback's attributes is no state of its own: a Trainer sets the last two.
NO_STATE = (*FIRST, *NEVER, "log", "log_dict")


class ClientCallbacks:
    """The user's callbacks on clients' Trainers.

    Args:
        callbacks: The user's; they are copied.
        module: The resident module of the clients, of which a callback's state may name parts.
    """

    def __init__(self, callbacks: Sequence[L.Callback], module: L.LightningModule) -> None:
        self.callbacks = [copy.deepcopy(callback) for callback in callbacks]
        self._snapshots = [AttributeSnapshot(callback) for callback in self.callbacks]
        self._parts = parts_of(module) if callbacks else {}

    def reset(self, private: State) -> None:
        """Put all back to how the user gave them; ``private`` says which a client has had in a round before."""
        for index, (callback, snapshot) in enumerate(zip(self.callbacks, self._snapshots)):
            snapshot.restore()
            done = (*NEVER, *FIRST) if self._kept(index, private) else NEVER
            vars(callback).update(dict.fromkeys(done, nothing))

    def load(self, private: State) -> None:
        """Give callbacks that have been set up what the client has kept of them."""
        for index, callback in enumerate(self.callbacks):
            if kept := self._kept(index, private):
                _load(callback, decode(kept, _state(callback), parts=self._parts))

    def private(self) -> dict[str, Tensor]:
        """Return what the client keeps of them after a round."""
        found: dict[str, Tensor] = {}
        for index, callback in enumerate(self.callbacks):
            what = f"the state of {type(callback).__name__}"
            value = encode(_state(callback), what=what, parts=self._parts)
            found |= namespaces.under(f"{namespaces.CALLBACK}{index}/", value)
        return found

    @staticmethod
    def _kept(index: int, private: State) -> dict[str, Tensor]:
        return namespaces.inside(f"{namespaces.CALLBACK}{index}/", private)


def check_callbacks(callbacks: Sequence[L.Callback]) -> None:
    """Refuse callbacks that no client's Trainer can have, since it ends with the round.

    Raises:
        ConfigurationError: If there is one.
    """
    for callback in callbacks:
        found = next((own.__name__ for own in type(callback).__mro__ if own.__name__ in UNUSABLE), None)
        if found is not None:
            raise ConfigurationError(
                message(
                    "federation.client_callbacks must be callbacks that can begin anew with every round",
                    received=type(callback).__name__,
                    fix=f"use {UNUSABLE[found]}",
                )
            )


def _state(callback: L.Callback) -> Any:
    """Return a callback's state: what it says itself, or else its attributes."""
    if type(callback).state_dict is not L.Callback.state_dict:
        return callback.state_dict()
    own = {name: value for name, value in vars(callback).items() if name not in NO_STATE}
    return {name: value for name, value in own.items() if not (inspect.isroutine(value) or _is_trainer_s(value))}


def _is_trainer_s(value: Any) -> bool:
    return isinstance(value, (L.Trainer, L.LightningModule))


def _load(callback: L.Callback, state: Any) -> None:
    if type(callback).state_dict is not L.Callback.state_dict:
        callback.load_state_dict(state)
    else:
        vars(callback).update(state)
