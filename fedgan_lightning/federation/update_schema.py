"""What a client's update must look like, from what the server knows itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import NAdam, Optimizer, RAdam

from fedgan_lightning import states
from fedgan_lightning.federation import namespaces, optimizer_state
from fedgan_lightning.federation.client_context import ClientContext, shared_buffers
from fedgan_lightning.federation.preparation import client_copy
from fedgan_lightning.federation.schema import Schema, Sense
from fedgan_lightning.protocol import State, UpdateEntry
from fedgan_lightning.seeding import isolated_rng
from fedgan_lightning.states import Kind

logger = logging.getLogger("fedgan_lightning")

#: Optimizers whose ``exp_avg`` and ``exp_avg_sq`` are means of one gradient and of its square.
MEANS_OF_ONE_GRADIENT = (torch.optim.Adam, torch.optim.AdamW, NAdam, RAdam)


def downlink(context: ClientContext) -> dict[str, UpdateEntry]:
    """Return what the server sends to all clients, but for moments and an algorithm's own entries."""
    state, policy = context.model.state_dict(), context.policy
    return {n: UpdateEntry.of(state[n], is_vector=policy.is_parameter(n)) for n in policy.downlink_entries}


class UpdateSchema:
    """Makes the schema of answers, once for a run: nothing in it depends on the round.

    Args:
        context: Module, policy and algorithm.
    """

    def __init__(self, context: ClientContext) -> None:
        self.context = context
        self._schema: Schema | None = None

    def learn(self, schema: Schema) -> Schema:
        """Take a schema for this run's that an answer has closed."""
        self._schema = schema
        return schema

    def schema(self, state: State) -> Schema:
        """Return what clients answer that are sent ``state``."""
        moments = optimizer_state.only_moments(state)
        if self._schema is None or not moments.keys() <= self._schema.untouched.keys():
            self._schema = expected_answer(self.context, state)
        return self._schema


def expected_answer(context: ClientContext, state: State) -> Schema:
    """Return what clients answer that are sent ``state``: entries, shapes, dtypes, and what bounds their numbers.

    Moments are those that optimizers have after one step, here one on zero gradients. Where an optimizer cannot be made
    or stepped outside of training, they are those of ``state``, and before there are any those of the first answer.
    """
    policy = context.policy
    buffers = shared_buffers(policy, state)
    variances = [name for name in policy.shared_buffers if policy.entries[name].kind is Kind.VARIANCE]
    moments, sense, is_open = optimizer_state.only_moments(state), Sense(), False
    if "average" in policy.moments.values():
        try:
            first, sense = _first_moments(context)
            moments = {**first["average"], **{n: value for n, value in moments.items() if n not in first["average"]}}
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            logger.warning(f"the first answer says which moments clients have: the server cannot make them ({reason})")
            is_open = not moments
    sense = Sense(tuple((name, states.mean_name(name)) for name in variances), sense.ratios, sense.sums)
    delta = {name: state[name] for name in policy.shared_parameters}
    entries = namespaces.under(namespaces.ALGORITHM, context.entries)
    zero = torch.zeros(())
    others = {name: zero.to(entry.dtype).expand(entry.shape) for name, entry in entries.items()}
    extras = {**buffers, **moments, **others}
    return Schema({"delta": delta, "extras": extras}, sense=sense, is_open=is_open)


def expected_moments(context: ClientContext) -> dict[str, Tensor]:
    """Return the moments that a client has after one step, averaged or its own; none where they cannot be made."""
    try:
        found, _ = _first_moments(context)
    except Exception:
        return {}
    return {**found["average"], **found["keep"]}


def _first_moments(context: ClientContext) -> tuple[dict[str, dict[str, Tensor]], Sense]:
    """Return the moments that optimizers have after one step, here one on zero gradients, and what bounds them."""
    precision = str(context.trainer_options.get("precision"))
    with isolated_rng(0), _default_dtype(torch.float64 if precision == "64-true" else torch.get_default_dtype()):
        client = client_copy(context.model, context.policy, context.prepared)
        client.trainer = context.preview  # type: ignore[assignment] # what it may ask for a schedule
        optimizers = list(optimizer_state.optimizers_in(client.configure_optimizers()))
        if own := [type(one).__name__ for one in optimizers if not type(one).__module__.startswith("torch.optim")]:
            raise LookupError(f"only {own[0]} knows when it begins to keep what")
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                continue  # it keeps no moments, but a history
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.requires_grad:  # what nobody differentiates has no moments
                        parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    found = optimizer_state.collect(client, optimizers, context.policy.moments)
    ratios = {str(index): ratio for index, own in enumerate(optimizers) if (ratio := _ratio(own)) is not None}
    sums = (str(index) for index, own in enumerate(optimizers) if isinstance(own, torch.optim.Adagrad))
    return found, Sense(ratios=ratios, sums=frozenset(sums))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Run the body with another default: optimizers count their steps in float64 where it is that."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _ratio(optimizer: Optimizer) -> float | None:
    """Return how many times exp_avg_sq the square of exp_avg can be; ``None`` where nothing is known of it."""
    if type(optimizer) not in MEANS_OF_ONE_GRADIENT:
        return None
    betas = [tuple(map(float, group["betas"])) for group in optimizer.param_groups]
    if not all(first <= 2 * second / (1 + second) for first, second in betas):
        return None
    return max(1 / (1 - second) for _, second in betas)
