"""Networks that sites hand on to each other, by way of the server: what travels, and what is believed of it.

They pass the server because sites know nobody else. It sees them, and keeps them until the next task of whoever goes on
with them has counted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from fedgan_lightning.errors import UpdateError
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.namespaces import MOMENTS, inside, of_moment, under
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.schema import check_tensor, is_believable, printable
from fedgan_lightning.protocol import ClientTask, ClientUpdate, State

#: What is handed on has this before its names, on the way.
HANDED = "exchange/"


def exchanged(state: State, policy: Policy) -> dict[str, Tensor]:
    """Return the entries of a private state that clients hand on to each other, moments among them."""
    return {name: value for name, value in state.items() if policy.is_exchanged(name)}


def with_handed(task: ClientTask, state: State) -> ClientTask:
    """Return a task that brings its client what another one has handed on."""
    return dataclasses.replace(task, own={**task.own, **under(HANDED, state)}) if state else task


def opened(task: ClientTask, context: ClientContext) -> tuple[ClientTask, dict[str, Tensor]]:
    """Return a task without what was handed on, and that; errors as in :func:`check_handed`."""
    own = {name: value for name, value in task.own.items() if not name.startswith(HANDED)}
    handed = inside(HANDED, task.own)
    if handed:
        check_handed("another client", handed, module=context.model, policy=context.policy)
    return dataclasses.replace(task, own=own), handed


def handing_on(update: ClientUpdate, state: State) -> ClientUpdate:
    """Return an update that takes along what its client hands on."""
    return dataclasses.replace(update, extras={**update.extras, **under(HANDED, state)})


def taken(update: ClientUpdate) -> tuple[ClientUpdate, dict[str, Tensor]]:
    """Return an update without what its client hands on, and that."""
    extras = {name: value for name, value in update.extras.items() if not name.startswith(HANDED)}
    return dataclasses.replace(update, extras=extras), inside(HANDED, update.extras)


def check_handed(who: str, state: State, *, module: Any, policy: Policy) -> None:
    """Refuse what is no network that clients hand on.

    Args:
        who: Whose it is, in words.
        state: What was handed on.
        module: A module with the same networks.
        policy: Says which they are.

    Raises:
        UpdateError: If an entry is missing, unknown, of another shape or dtype, or no number that can be right.
    """
    own = exchanged(module.state_dict(), policy)
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    for name in sorted({*own} - {*state}):
        raise UpdateError(f"{who}: hands on no {name}")
    for name, value in state.items():
        what = f"{who}: {printable(name)}, handed on,"
        if name in own:
            shape, dtype = tuple(own[name].shape), own[name].dtype
        elif name.startswith(MOMENTS) and policy.is_exchanged(name) and isinstance(value, Tensor):
            shape, dtype = (shapes.get(of_moment(name)[1], ()) if value.dim() else ()), value.dtype
        else:
            raise UpdateError(f"{what} is none of what clients hand on")
        if not is_believable(check_tensor(what, value, shape=shape, dtype=dtype)):
            raise UpdateError(f"{what} is not finite, or beyond what any network learns with")
