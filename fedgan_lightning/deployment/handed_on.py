"""Networks that sites hand on to each other, by way of the server: what travels, and what is believed of it.

They pass the server because sites know nobody else. It sees them, and keeps them until the next task of whoever goes on
with them has counted.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, UpdateError, message
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.namespaces import MOMENTS, inside, of_moment, under
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.schema import NONNEGATIVE, check_tensor, is_believable, printable
from fedgan_lightning.federation.update_schema import expected_moments
from fedgan_lightning.protocol import ClientTask, ClientUpdate, State
from fedgan_lightning.states import Kind

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
        check_handed("another client", handed, context, moments=expected_moments(context))
    return dataclasses.replace(task, own=own), handed


def going_on(private: State, handed: State, policy: Policy) -> dict[str, Tensor]:
    """Return what a client goes on with that is handed a network: nothing is left of its own one, moments neither."""
    kept = {name: value for name, value in private.items() if not (handed and policy.is_exchanged(name))}
    return {**kept, **handed}


def hands_on_after(round: int, context: ClientContext) -> bool:
    """Whether clients hand on networks after a round, where several answer; to whom is settled when they have."""
    return bool(context.policy.exchanged and context.algorithm.hand_on(round=round, clients=range(2), seed=0))


def check_hands_on(task: ClientTask, context: ClientContext, *, hands_on: bool) -> None:
    """Refuse to hand networks on after a round in which the site's own configuration has nobody do so.

    Raises:
        ConfigurationError: If that is asked.
    """
    if hands_on and not hands_on_after(task.round, context):
        raise ConfigurationError(
            message(
                "networks must change hands after the rounds that this site's own configuration names",
                received=f"a wish to have them after round {task.round}",
                fix="agree on federation.sync and exchange_every",
            )
        )


def handing_on(update: ClientUpdate, state: State) -> ClientUpdate:
    """Return an update that takes along what its client hands on."""
    return dataclasses.replace(update, extras={**update.extras, **under(HANDED, state)})


def taken(update: ClientUpdate) -> tuple[ClientUpdate, dict[str, Tensor]]:
    """Return an update without what its client hands on, and that."""
    extras = {name: value for name, value in update.extras.items() if not name.startswith(HANDED)}
    return dataclasses.replace(update, extras=extras), inside(HANDED, update.extras)


def check_handed(who: str, state: State, context: ClientContext, *, moments: State) -> None:
    """Refuse what is no network that clients hand on.

    What remains possible is a network of believable numbers that is of no use to whoever goes on with it.

    Args:
        who: Whose it is, in words.
        state: What was handed on.
        context: With a module that has the same networks.
        moments: What optimizers keep of it, as :func:`~fedgan_lightning.federation.update_schema.expected_moments` has
            it; where it has none, everything that looks like a moment of the networks is taken for one.

    Raises:
        UpdateError: If an entry is missing, unknown, of another shape or dtype, or no number that can be right.
    """
    module, policy = context.model.state_dict(), context.policy
    own = {name: module[name] for name in policy.exchanged}
    for name in sorted({*own} - {*state}):
        raise UpdateError(f"{who}: hands on no {name}")
    known = {**exchanged(moments, policy), **own}
    for name, value in state.items():
        what, like = f"{who}: {printable(name)}, handed on,", known.get(name)
        if like is None and not moments and name.startswith(MOMENTS) and policy.is_exchanged(name):
            owner = module[of_moment(name)[1]]
            like = owner if isinstance(value, Tensor) and value.dim() else owner.new_zeros(())
        if like is None:
            raise UpdateError(f"{what} is none of what clients hand on")
        found = check_tensor(what, value, shape=tuple(like.shape), dtype=like.dtype)
        if not is_believable(found):
            raise UpdateError(f"{what} is not finite, or beyond what any network learns with")
        is_square = policy.entries[name].kind is Kind.VARIANCE if name in own else of_moment(name)[2] in NONNEGATIVE
        if is_square and bool((found < 0).any()):
            raise UpdateError(f"{what} is negative, and no square, variance or count is")
