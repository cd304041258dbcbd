"""What a site makes of a task whose networks came in codes: what the server does, and no more than its module holds."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from fedgan_lightning.errors import UpdateError
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.namespaces import MOMENTS, of_moment
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.schema import check_tensor, is_believable, printable
from fedgan_lightning.protocol import ClientTask, State, UpdateEntry
from fedgan_lightning.update_transform import RoundFacts

WHO = "the server"


def decoded(task: ClientTask, context: ClientContext) -> ClientTask:
    """Return a task as a client is given it; itself where nothing came in codes.

    Args:
        task: The task as it came.
        context: The client's, whose module says how large everything is that is decoded.

    Raises:
        UpdateError: If a code is missing, or of another shape or dtype than the module's entry has, or not finite.
    """
    if task.coded is None:
        return task
    facts = RoundFacts(task.round, task.hyperparameters, seed=0)  # what goes down is restored without draws
    stages = [_entries(task.coded, module=context.model, policy=context.policy)]
    for transform in context.transforms:
        stages.append(stages[-1] if transform.downward is None else transform.downward.schema(stages[-1]))
    for name, entry in stages[-1].items():
        value = check_tensor(f"{WHO}: {printable(name)}", task.coded.get(name), shape=entry.shape, dtype=entry.dtype)
        if name not in stages[0] and not is_believable(value):
            raise UpdateError(f"{WHO}: {printable(name)} is not finite, or beyond what any network learns with")
    if unknown := sorted({*task.coded} - {*stages[-1]}):
        raise UpdateError(f"{WHO}: {printable(unknown[0])} is the code of nothing that travels")
    state: State = dict(task.coded)
    for transform, entering, leaving in reversed(list(zip(context.transforms, stages, stages[1:]))):
        if transform.downward is not None and entering is not leaving:
            state = transform.downward.decode(state, entries=entering, facts=facts)
    return dataclasses.replace(task, state=state, coded=None)


def _entries(sent: State, *, module: Any, policy: Policy) -> dict[str, UpdateEntry]:
    """Return the entries that the server has encoded, of which codes have the names and something behind a slash."""
    own = module.state_dict()
    known = {*policy.downlink_entries}
    found: dict[str, UpdateEntry] = {}
    for name, value in sent.items():
        whole = name.rpartition("/")[0]
        if not isinstance(value, Tensor):
            raise UpdateError(f"{WHO}: {printable(name)} is no tensor")
        if whole in known:
            found[whole] = UpdateEntry.of(own[whole], is_vector=policy.is_parameter(whole))
        elif whole.startswith(MOMENTS) and (owner := of_moment(whole)[1]) in known:
            found[whole] = UpdateEntry.of(own[owner], is_vector=False)
        else:
            found[name] = UpdateEntry.of(value, is_vector=policy.is_parameter(name))
    return found
