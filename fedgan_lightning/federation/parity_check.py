"""Whether stacked training is what sequential training is, tried on the first clients before anything depends on it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.data.poisson import PoissonClients
from fedgan_lightning.errors import ClientError, RoundInterrupted
from fedgan_lightning.federation import optimizer_state
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.local import LocalTrainer
from fedgan_lightning.federation.preparation import client_copy
from fedgan_lightning.federation.report import norms
from fedgan_lightning.federation.store import ReadOnlyStore
from fedgan_lightning.federation.transform_chain import TransformChain
from fedgan_lightning.federation.vectorized_trainer import VectorizedLocalTrainer
from fedgan_lightning.packing import is_finite
from fedgan_lightning.protocol import ClientTask, FederatedData, SizedBatches, State
from fedgan_lightning.states import network_of

#: Steps of the trial, at most those of a round: with K = 1 a step may be one that nobody could take twice.
TRIAL_STEPS = 3
#: Largest distance between a stacked client's update and its own, by network, as a share of the update. In float64 an
#: optimizer's eps is far above rounding, so that Adam does not divide noise by noise as it does in float32.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
#: What is said where that cannot be told; what becomes of such updates is for others to say.
NOTHING_TO_COMPARE = "the first clients diverge on their own"


def trial_context(context: ClientContext) -> ClientContext:
    """Return a context whose store cannot be written, and whose clients send updates as they are and log nothing."""
    store, model, data = ReadOnlyStore(context.store), context.model, context.data
    if isinstance(data, PoissonClients):  # both ways must see the same samples and noise; nothing of it is released
        privacy = data.options.for_trial()  # type: ignore[attr-defined]
        model, data = (
            client_copy(model, context.policy, context.prepared),
            PoissonClients(data.data, privacy, draws=data.draws),
        )
        model.privacy = privacy  # type: ignore[assignment]
    facts: dict[str, Any] = {"store": store, "model": model, "data": data}
    return dataclasses.replace(context, transforms=TransformChain(), logs=None, **facts)


def shortened(tasks: Iterable[ClientTask], *, steps: int) -> list[ClientTask]:
    """Return the same tasks with ``steps`` local steps, the first of their clients' streams."""
    return [dataclasses.replace(task, steps=steps, epochs=None, before=0) for task in tasks]


def stack_key(task: ClientTask, context: ClientContext) -> object:
    """Return what tasks must have in common to be trained in one stack."""
    moments = optimizer_state.only_moments({**task.state, **context.store.read(task.client_id)})
    hyperparameters = tuple(sorted(task.hyperparameters.items()))
    facts = (id(task.state), task.schedule_positions, hyperparameters, tuple(task.own), sizes_key(task, context.data))
    return *facts, optimizer_state.signature(moments)


def sizes_key(task: ClientTask, data: FederatedData) -> object:
    """Return what tells whose minibatches have the same sizes for as long as both clients train.

    These are the runs of equal sizes, (size, steps), without the steps of the last one, in which some may go on for
    longer than others. A client of whom they are not known goes with nobody.
    """
    if not isinstance(data, SizedBatches):
        return ()
    first, count = task.span(steps_per_epoch=data.steps_per_epoch(task.client_id))
    sizes = data.batch_sizes(task.client_id, first_step=first, num_steps=count)
    if sizes is None:
        return task.client_id
    runs = [(size, len(list(equal))) for size, equal in itertools.groupby(sizes)]
    return (*runs[:-1], *((size, 0) for size, _ in runs[-1:]))


def largest_group(context: ClientContext, tasks: Sequence[ClientTask]) -> list[ClientTask]:
    """Return those of the tasks that can be trained in one stack: the most that there are, and the first of these."""
    groups: dict[object, list[ClientTask]] = {}
    for task in tasks:
        groups.setdefault(stack_key(task, context), []).append(task)
    return max(groups.values(), key=len, default=[])


def in_double(context: ClientContext, tasks: Sequence[ClientTask]) -> tuple[ClientContext, list[ClientTask]]:
    """Return the same clients, tasks and private states in float64."""
    options = {**context.trainer_options, "precision": "64-true"}
    model = client_copy(context.model, context.policy, context.prepared).double()
    states = {id(task.state): task.state for task in tasks}
    doubles = {key: doubled(state) for key, state in states.items()}
    store = DoubleStore(context.store)
    converted = dataclasses.replace(context, model=model, store=store, trainer_options=options)
    return converted, [
        dataclasses.replace(task, state=doubles[id(task.state)], own=doubled(task.own)) for task in tasks
    ]


class DoubleStore(ReadOnlyStore):
    """A view of a store in float64, for trials."""

    def read(self, client_id: int) -> State:
        return doubled(super().read(client_id))


def doubled(state: State) -> dict[str, Tensor]:
    """Return a state with its floating-point entries in float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in state.items()}


def disagreement(context: ClientContext, tasks: Sequence[ClientTask]) -> str | None:
    """Train two of the clients, alike, for a few steps stacked and one by one; say how the updates differ, or ``None``.

    It is what an optimizer does that looks at whole tensors, or a network that draws random numbers of its own. Both
    ways compute in float64, where rounding explains nothing. A module that cannot is compared in its own precision.
    Clients that diverge alone tell nothing of stacks: then the answer is ``NOTHING_TO_COMPARE``.

    Raises:
        ClientError: If a client fails on its own, too.
    """
    context = trial_context(context)
    alike = largest_group(context, tasks)[:2]
    trial = largest_group(context, shortened(alike, steps=min(TRIAL_STEPS, tasks[0].steps or TRIAL_STEPS)))
    try:
        converted, doubles = in_double(context, trial)
        references = _alone(converted, doubles)
    except ClientError:
        references = _alone(context, trial)  # an error here is the client's own, and is raised
        return _compared(context, trial, references, tolerance=TOLERANCE[torch.float32])
    return _compared(converted, doubles, references, tolerance=TOLERANCE[torch.float64])


def _alone(context: ClientContext, tasks: Sequence[ClientTask]) -> list[State]:
    trainer = LocalTrainer(context)
    return [trainer.run(task).delta for task in tasks]


def _compared(
    context: ClientContext, tasks: Sequence[ClientTask], references: Sequence[State], *, tolerance: float
) -> str | None:
    """Return how the clients' updates differ where they are stacked, or ``None``."""
    if not all(is_finite(value) for own in references for value in own.values()):
        return NOTHING_TO_COMPARE
    try:
        stacked = VectorizedLocalTrainer(context).run(tasks)
    except RoundInterrupted:
        raise
    except Exception as error:
        return " ".join(str(error).split())[:200]
    for update, reference in zip(stacked, references):
        networks = list(dict.fromkeys(map(network_of, reference)))
        lengths = norms(reference, networks)
        distances = norms({name: update.delta[name] - reference[name] for name in reference}, networks)
        for network in networks:
            if not distances[network] <= tolerance * (lengths[network] + tolerance) < math.inf:  # "not" catches NaN
                share, steps = distances[network] / max(lengths[network], tolerance), tasks[0].steps
                return f"after {steps} steps a stacked client's {network} differs by {share:.1g} of its update"
    return None
