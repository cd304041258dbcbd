"""Whether stacked training is what sequential training is, tried on the first clients before anything depends on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from fedgan_lightning.errors import RoundInterrupted
from fedgan_lightning.federation import optimizer_state
from fedgan_lightning.federation.cohort import CohortTrainer
from fedgan_lightning.federation.local import ClientContext, LocalTrainer
from fedgan_lightning.federation.rounds import norms
from fedgan_lightning.federation.store import ReadOnlyStore
from fedgan_lightning.packing import is_finite
from fedgan_lightning.protocol import ClientTask, LocalWork, State
from fedgan_lightning.states import network_of

#: Steps of the trial: enough for mapped networks to be recorded, and for the record to be used. A client that takes
#: fewer in a round takes those several times: with K = 1 a step may be one that nobody could take twice.
TRIAL_STEPS = 6
#: Rounding alone moves single entries by whole steps where Adam divides noise by noise (biases before a BatchNorm), so
#: updates are compared by network; what couples clients, or leaves out a term, moves them by a multiple of this.
TOLERANCE = 0.2
#: What is said where that cannot be told; what becomes of such updates is for others to say.
NOTHING_TO_COMPARE = "the first clients diverge on their own"


def trial_context(context: ClientContext) -> ClientContext:
    """Return a context whose store cannot be written."""
    return dataclasses.replace(context, store=ReadOnlyStore(context.store))


def shortened(tasks: Iterable[ClientTask], *, steps: int) -> list[ClientTask]:
    """Return the same tasks with ``steps`` local steps."""
    return [
        dataclasses.replace(task, local=LocalWork(steps=steps, schedule_positions=task.local.schedule_positions))
        for task in tasks
    ]


def stack_key(task: ClientTask, private: State) -> object:
    """Return what tasks must have in common to be trained in one stack: state, schedules, and step counts."""
    moments = optimizer_state.only_moments({**task.state, **private})
    return id(task.state), task.local.schedule_positions, optimizer_state.signature(moments)


def disagreement(context: ClientContext, tasks: Sequence[ClientTask]) -> str | None:
    """Train two of the clients for a few steps stacked and one by one; say how the updates differ, or ``None``.

    It is what an optimizer does that looks at whole tensors, or a network that draws random numbers of its own. Clients
    that diverge alone tell nothing of stacks: then the answer is ``NOTHING_TO_COMPARE``.

    Raises:
        ClientError: If a client fails on its own, too.
    """
    context = trial_context(context)
    wanted = stack_key(tasks[0], context.store.read(tasks[0].client_id))
    alike = [task for task in tasks if stack_key(task, context.store.read(task.client_id)) == wanted][:2]
    steps = min(TRIAL_STEPS, tasks[0].local.steps or TRIAL_STEPS)
    trial = shortened(alike, steps=steps)
    alone, cohort = LocalTrainer(context), CohortTrainer(context)
    references = [alone.run(task).delta for task in trial]  # an error here is the client's own, and is raised
    if not all(is_finite(value) for own in references for value in own.values()):
        return NOTHING_TO_COMPARE
    try:
        for _ in range(-(-TRIAL_STEPS // steps)):
            stacked = cohort.run(trial)
    except RoundInterrupted:
        raise
    except Exception as error:
        return " ".join(str(error).split())[:200]
    for update, reference in zip(stacked, references):
        networks = list(dict.fromkeys(map(network_of, reference)))
        lengths = norms(reference, networks)
        distances = norms({name: update.delta[name] - reference[name] for name in reference}, networks)
        for network in networks:
            if not distances[network] <= TOLERANCE * lengths[network] + 1e-6 < math.inf:  # "not" catches NaN
                share = distances[network] / max(lengths[network], 1e-6)
                return f"after {steps} steps a stacked client's {network} differs by {share:.0%} of its update"
    return None
