"""A client's round: where it starts, what the algorithm sees of it, and the update that it sends.

This is the one place where an update is formed: for one client, for the rows of a stack, and for the server, which
expects the same entries (:mod:`.update_schema`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation import namespaces, optimizer_state
from fedgan_lightning.federation.client_context import ClientContext, shared_buffers, shared_deltas
from fedgan_lightning.federation.client_privacy import public_metrics
from fedgan_lightning.federation.optimizer_state import stacked
from fedgan_lightning.federation.round_schedules import ALGORITHM
from fedgan_lightning.federation.round_trainer import TrainerClock, clock_of
from fedgan_lightning.packing import Packed, unstack
from fedgan_lightning.protocol import ClientTask, ClientUpdate, RoundInfo, State
from fedgan_lightning.update_transform import RoundFacts


class Visit:
    """The round of one client, or of several in a stack, as an algorithm and the trainers see it.

    In a stack every tensor that differs by client has a leading dimension of clients, and clients that have done their
    steps leave it: nothing but the visit may hold such tensors from one step to the next.

    Args:
        tasks: The tasks; several only for a stack, those with most steps first.
        context: Data, policy, algorithm and store.
        is_stacked: Whether tensors have the leading dimension.

    Attributes:
        tasks: Those of the clients that are still at work.
        infos: Position and number of their minibatches.
        optimizers: The client's optimizers, while it trains.
        module: The module, while it trains.
        path: By parameter the sum of the learning rates of the steps taken in this round.
        positions: Steps that every learning-rate schedule has taken before.
        fit: Trains the module for the steps of the round; set by the trainer.
    """

    def __init__(self, tasks: Sequence[ClientTask], context: ClientContext, *, is_stacked: bool) -> None:
        self.context, self.is_stacked, self.tasks = context, is_stacked, list(tasks)
        self.infos = [_info_of(task, context) for task in tasks]
        self.module: Any = None
        self.optimizers: Sequence[Optimizer] = ()
        self.path: dict[str, float] = {}
        self.positions = tasks[0].schedule_positions if tasks else ()
        self.fit: Callable[[], None] = _no_trainer
        self._stored = [_private_state(task.client_id, context) for task in tasks]
        self._cut: dict[str, dict[str, Tensor]] = {}

    # ------------------------------------------------------------------ for algorithms

    @property
    def task(self) -> State:
        """The algorithm's entries of the task; those of single clients with the leading dimension."""
        return self._once("task", self._task)

    @property
    def private(self) -> State:
        """The algorithm's private entries, with the leading dimension."""
        return self._once("private", self._private)

    @property
    def start(self) -> State:
        """Parameters as the server sent them, where the client's are; the same for all clients of a stack."""
        return self._once("start", self._start)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The module's parameters as they are now, detached, of the clients of this visit."""
        found = {name: own.detach() for name, own in self.module.named_parameters()}
        return {n: own[len(own) - len(self.tasks) :] for n, own in found.items()} if self.is_stacked else found

    @property
    def state(self) -> dict[str, Tensor]:
        """All entries of the module as they are now, of the clients of this visit; extra state as the module has it."""
        found = self.module.state_dict()
        return {n: own[len(own) - len(self.tasks) :] for n, own in found.items()} if self.is_stacked else found

    def hyperparameter(self, name: str, default: float) -> float:
        """Return a hyper-parameter of the algorithm for this round: what the task says, or else ``default``."""
        return float(self.tasks[0].hyperparameters.get(f"{ALGORITHM}.{name}", default))

    def norms(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the Euclidean norm of all tensors taken as one vector: (), or (clients,) in a stack."""
        squares = [
            value.square().flatten(1).sum(1) if self.is_stacked else value.square().sum() for value in tensors.values()
        ]
        return torch.stack(squares).sum(0).sqrt()

    def scale_(self, tensors: Mapping[str, Tensor], factors: Tensor) -> None:
        """Multiply all tensors in place by a factor, (), or by one per client, (clients,)."""
        for value in tensors.values():
            shape = (-1,) + (1,) * (value.dim() - 1) if self.is_stacked else ()
            value.mul_(factors.to(value.dtype).reshape(shape))

    def fit_discriminator(self, fakes: tuple[Tensor, Tensor] | None = None) -> None:
        """Train the discriminator alone for the steps of the round.

        Args:
            fakes: Samples and labels to train against; by default every step generates its own.

        Raises:
            ConfigurationError: If the module cannot.
        """
        with self._ability("only_discriminator")(fakes):
            self.fit()

    def feedback(self, samples: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the discriminator's logits, and their gradients with respect to ``samples``.

        Raises:
            ConfigurationError: If the module cannot.
        """
        found: tuple[Tensor, Tensor] = self._judged("feedback", samples, labels)
        return found

    def generator_feedback(self, samples: Tensor, labels: Tensor) -> Tensor:
        """Return the gradients of the generator's mean loss with respect to ``samples``.

        Raises:
            ConfigurationError: If the module cannot.
        """
        found: Tensor = self._judged("generator_feedback", samples, labels)
        return found

    def _judged(self, name: str, samples: Tensor, labels: Tensor) -> Any:
        """Return what an ability says of samples; clients of a stack that go on training are not touched by it."""
        ability = self._ability(name)
        size = len(next(self.module.parameters())) if self.is_stacked else len(self.tasks)
        others = size - len(self.tasks) if self.is_stacked else 0
        if not others:
            return ability(samples, labels)
        buffers = {own: value.clone() for own, value in self.module.named_buffers()}
        padded = (torch.cat([own[:1].expand(others, *own.shape[1:]), own]) for own in (samples, labels))
        found = ability(*padded)
        for own, value in self.module.named_buffers():
            value[:others] = buffers[own][:others]
        return tuple(own[others:] for own in found) if isinstance(found, tuple) else found[others:]

    def _ability(self, name: str) -> Any:
        found = getattr(self.module, name, None)
        if found is None:
            raise ConfigurationError(
                message(
                    f"{type(self.context.algorithm).__name__} must have a module with the method {name}",
                    received=f"{type(self.module).__name__} without it",
                    fix="add the method (see fedgan_lightning.gan.abilities), or use another algorithm",
                )
            )
        return found

    # ------------------------------------------------------------------ for trainers

    @cached_property
    def clock(self) -> TrainerClock:
        """Where the Trainer of the first client stands."""
        task, info, data = self.tasks[0], self.infos[0], self.context.data
        planned = task.planned(steps_per_epoch=data.steps_per_epoch(task.client_id))
        return clock_of(task, info, planned=planned, options=self.context.trainer_options)

    @property
    def stored(self) -> State:
        """Everything that the first client keeps."""
        return self._stored[0]

    def module_state(self, initial: State) -> dict[str, Tensor]:
        """Return every entry of the client's module: the server's, its own, and ``initial`` ones for the rest."""
        kept = [namespaces.of_module(stored) for stored in self._stored]
        rows = [{**initial, **namespaces.of_module(task.state), **own} for task, own in zip(self.tasks, kept)]
        return stacked(rows) if self.is_stacked else rows[0]

    @property
    def moments(self) -> dict[str, Tensor]:
        """Optimizer moments to start from, the server's and the clients' own."""
        rows = [
            optimizer_state.only_moments({**task.state, **stored}) for task, stored in zip(self.tasks, self._stored)
        ]
        return stacked(rows) if self.is_stacked else rows[0]

    def keep(self, count: int) -> None:
        """Go on with the first ``count`` clients of the stack."""
        del self.tasks[count:], self.infos[count:], self._stored[count:]
        self._cut = {name: value for name, value in self._cut.items() if name == "start"}  # the same for all

    def rows(self, first: int) -> Visit:
        """Return the visit of the clients from ``first`` on, with the same module and path."""
        found = Visit((), self.context, is_stacked=self.is_stacked)
        found.tasks, found.infos, found._stored = self.tasks[first:], self.infos[first:], self._stored[first:]
        found.module, found.optimizers, found.path = self.module, self.optimizers, self.path
        return found

    def _once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if name not in self._cut:
            self._cut[name] = make()
        return self._cut[name]

    def _task(self) -> dict[str, Tensor]:
        shared = namespaces.inside(namespaces.ALGORITHM, self.tasks[0].state)
        rows = [namespaces.inside(namespaces.ALGORITHM, task.own) for task in self.tasks]
        found = {**shared, **(stacked(rows) if self.is_stacked else rows[0])}
        return {name: value.to(self.context.device) for name, value in found.items()}

    def _private(self) -> dict[str, Tensor]:
        rows = [namespaces.inside(namespaces.ALGORITHM, stored) for stored in self._stored]
        return stacked(rows) if self.is_stacked else rows[0]

    def _start(self) -> dict[str, Tensor]:
        state, device = self.tasks[0].state, self.context.device
        dtypes = {} if self.module is None else {n: p.dtype for n, p in self.module.named_parameters()}
        return {name: state[name].to(device, dtypes.get(name)) for name in self.context.policy.shared_parameters}


def _no_trainer() -> None:
    raise RuntimeError("Visit.fit must be called in a trainer: let an executor run the task")


def _info_of(task: ClientTask, context: ClientContext) -> RoundInfo:
    first_step, num_steps = task.span(steps_per_epoch=context.data.steps_per_epoch(task.client_id))
    return RoundInfo(round=task.round, cohort=(task.client_id,), first_step=first_step, num_steps=num_steps)


def _private_state(client_id: int, context: ClientContext) -> dict[str, Tensor]:
    """Return a client's private state where it is trained; what the algorithm keeps begins with declared values."""
    stored = context.store.read(client_id)
    arrived = Packed.of(stored).to(context.device)  # in one piece; step counts are needed where they are
    private = {n: stored[n] if optimizer_state.is_shared_number(n, v) else v for n, v in arrived.items()}
    return {**context.new_client, **private}


# ---------------------------------------------------------------------- what comes up


def client_updates(
    visit: Visit, metrics: Sequence[Mapping[str, float]]
) -> list[tuple[ClientUpdate, dict[str, Tensor] | State]]:
    """Return the update and the private state of every client of a visit that has done its steps.

    Args:
        visit: The visit, or its last rows: those of the module's tensors that belong to them.
        metrics: What each client reports.
    """
    context, policy, count = visit.context, visit.context.policy, len(visit.tasks)
    state, moments = _rows_of(visit)
    split = _unstacked if visit.is_stacked else _alone
    delta = shared_deltas(policy, state, visit.tasks[0].state)
    if context.algorithm.sees_steps:
        _check_path(visit, delta)
    deltas = split(delta, count)
    answer = namespaces.under(namespaces.ALGORITHM, {**context.algorithm.answer(visit), **_blank(visit)})
    extras = split({**shared_buffers(policy, state), **moments["average"], **answer}, count)
    kept = {name: state[name] for name in policy.private}
    kept = kept if visit.is_stacked else {name: value.detach().clone() for name, value in kept.items()}
    private = split({**kept, **moments["keep"]}, count)
    found: list[tuple[ClientUpdate, State]] = []
    for row, task in enumerate(visit.tasks):
        update = ClientUpdate(
            client_id=task.client_id,
            num_examples=context.data.num_examples(task.client_id),
            delta=deltas[row],
            metrics=metrics[row] if context.privacy is None else public_metrics(metrics[row]),
            extras=extras[row],
            round=task.round,
        )
        facts = RoundFacts(task.round, task.hyperparameters, task.seed)
        names = policy.shared_parameters if context.algorithm.keeps_state else ()
        own = {n: state[n][row] if visit.is_stacked else state[n] for n in names}
        found.append(_sent(update, private[row], visit._stored[row], context, facts, parameters=own))
    return found


def _blank(visit: Visit) -> dict[str, Tensor]:
    """Return the scalars that transforms fill in."""
    shape = (len(visit.tasks),) if visit.is_stacked else ()
    return {name: torch.zeros(shape, dtype=own.dtype) for name, own in visit.context.transforms.own_entries().items()}


def _check_path(visit: Visit, delta: State) -> None:
    """Refuse a module that has moved parameters by steps that the algorithm did not see.

    Raises:
        ConfigurationError: If it has.
    """
    unseen = [name for name, value in delta.items() if name not in visit.path and bool(value.any())]
    if unseen:
        raise ConfigurationError(
            message(
                f"{type(visit.context.algorithm).__name__} must see every step that moves a client's parameters",
                received=f"{type(visit.module).__name__}, which moved {unseen[0]} without a step of one of them",
                fix="return all optimizers from configure_optimizers, and let them alone change parameters",
            )
        )


def _rows_of(visit: Visit) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Return the module's entries, and its moments by policy, of the clients of a visit."""
    moments = optimizer_state.collect(visit.module, visit.optimizers, visit.context.policy.moments)
    if not visit.is_stacked:
        return visit.state, moments
    stop = len(next(visit.module.parameters()))
    first = stop - len(visit.tasks)
    return visit.state, {own: optimizer_state.rows(moments[own], first=first, stop=stop) for own in moments}


def _alone(state: State, count: int) -> list[Packed]:
    return [Packed.of(state)]


def _unstacked(state: State, count: int) -> list[Packed]:
    return unstack(state) or [Packed.of({})] * count


def _sent(
    update: ClientUpdate,
    private: State,
    before: State,
    context: ClientContext,
    facts: RoundFacts,
    *,
    parameters: State,
) -> tuple[ClientUpdate, State]:
    """Return an update as it is sent, and the private state that follows from what the server receives of it."""
    algorithm, transforms = context.algorithm, context.transforms
    if not transforms and not algorithm.keeps_state:
        return update, private
    sent, residuals = transforms.sent(update, before, context.entries, facts=facts)
    own = namespaces.inside(namespaces.ALGORITHM, before)
    if algorithm.keeps_state:
        received = transforms.received(sent, context.entries, before=update, facts=facts)
        seen = {**received.delta, **namespaces.inside(namespaces.ALGORITHM, received.extras)}
        own = dict(algorithm.settle(own, seen, parameters))
    return sent, {**private, **namespaces.under(namespaces.ALGORITHM, own), **residuals}
