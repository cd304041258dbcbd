"""Which updates count, and which of a client's own numbers are taken as they are.

What clients say in numbers are claims. Sizes are those that clients stated when they joined; positions of schedules,
steps and images follow from the task; seconds are bounded by the server's own clock. A claim that cannot be true is
refused by name, and so is an answer whose tensors are not what the server's own module has, or cannot be right.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from numbers import Real

from fedgan_lightning.errors import ConfigurationError, UpdateError, message
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.costs import bytes_by_network, cost_group
from fedgan_lightning.federation.optimizer_state import SCHEDULE, is_optimizer_entry, only_moments
from fedgan_lightning.federation.report import UPDATE_NORM, bytes_up, is_position
from fedgan_lightning.federation.rules import UpdateValidator
from fedgan_lightning.federation.schema import LARGEST, MOST_UPDATES, check_bound, is_whole, objection, printable
from fedgan_lightning.federation.update_schema import UpdateSchema, downlink
from fedgan_lightning.gan.module import GAN
from fedgan_lightning.packing import Layout
from fedgan_lightning.protocol import (
    ROUND_TRIP,
    ClientReport,
    ClientTask,
    ClientUpdate,
    SizedBatches,
    State,
    UpdateEntry,
    UpdateSum,
)
from fedgan_lightning.update_transform import RoundFacts

#: Scalars that decide something.
RELIED_ON = ("steps", "optimizer_steps", "images", "seconds", ROUND_TRIP)
#: Scalars that one answer may bring, and letters of their names.
MOST_METRICS, MOST_LETTERS = 1000, 200
#: What of a GAN decides where its schedules stand.
SCHEDULES_BY = ("configure_optimizers", "training_step")
#: Seconds by which clocks of two machines may differ over a round.
CLOCKS = 1.0
#: Under this name the ledger counts bytes of networks that there are not.
UNKNOWN = "unknown"


class UpdateChecks:
    """Decides on the updates of a run.

    Args:
        context: Module, data, policy, algorithm and transforms.
        validator: Tighter bounds; ``None`` for none.
        sums_only: Whether the server sees sums alone.

    Raises:
        ConfigurationError: If there are entries that it cannot combine then.
    """

    def __init__(
        self, context: ClientContext, *, validator: UpdateValidator | None = None, sums_only: bool = False
    ) -> None:
        self.context, self.validator, self.update_schema = context, validator, UpdateSchema(context)
        self.began = time.perf_counter()
        self._checked: list[Mapping[str, UpdateEntry]] = []
        if sums_only:
            self.check_sums()
        if context.privacy is not None:
            self.check_covered()

    def check_transforms(self, stages: list[Mapping[str, UpdateEntry]]) -> None:
        """Refuse transforms that have nothing to do, once for the same stages; see ``TransformChain.check_used``."""
        if stages is not self._checked:
            moments = {name: entry for name, entry in stages[0].items() if is_optimizer_entry(name)}
            self.context.transforms.check_used(stages, down={**downlink(self.context), **moments})
            self._checked = stages

    def check_covered(self) -> None:
        """Refuse what an algorithm sends beside what client-level privacy covers.

        Raises:
            ConfigurationError: If there is anything.
        """
        algorithm = self.context.algorithm
        if beside := sorted({*algorithm.entries(self.context)} - algorithm.covered):
            raise ConfigurationError(
                message(
                    "client-level privacy must cover all that clients send",
                    received=f"{beside[0]} of {type(algorithm).__name__}, which it does not",
                    fix="use an algorithm that sends nothing else, or set federation.privacy to null",
                )
            )

    def check_sums(self) -> None:
        """Refuse entries that a server which sees sums alone cannot combine.

        Raises:
            ConfigurationError: If there are any.
        """
        if maxima := self.context.policy.maxima:
            raise ConfigurationError(
                message(
                    "under secure aggregation integer buffers must be merged by their mean",
                    received=f"federation.integer_buffers=max, and {maxima[0]}",
                    fix="set federation.integer_buffers to mean, or federation.secure to null",
                )
            )
        alike = self.context.privacy is not None  # then all clients weigh the same
        for name, entry in self.context.entries.items():
            if alike and entry.rule == "sum":
                continue
            if entry.rule in ("collect", "max") or (entry.rule == "sum" and entry.weight == "one"):
                raise ConfigurationError(
                    message(
                        "under secure aggregation every entry must be summed with the weights of updates",
                        received=f"{name} of {type(self.context.algorithm).__name__}, with the rule {entry.rule}",
                        fix="set federation.secure to null, or use another algorithm",
                    )
                )

    def of_round(self, task: ClientTask) -> RoundChecks:
        """Return what counts in a round, whose clients get ``task``, each with an id and a seed of its own."""
        return RoundChecks(self, task)


class RoundChecks:
    """What a round's updates must be.

    Args:
        run: What is the same for all rounds.
        task: What all clients of the round get.
    """

    def __init__(self, run: UpdateChecks, task: ClientTask) -> None:
        self.run, self.task, self.round, self.state = run, task, task.round, task.state
        self.schema = run.update_schema.schema(task.state)
        self.moments = only_moments(task.state)
        if not self.schema.is_open:
            run.check_transforms(self.stages)
        self.began = time.perf_counter()

    @property
    def stages(self) -> list[Mapping[str, UpdateEntry]]:
        """What is known of the entries of an update before, between and after transforms."""
        context = self.run.context
        return context.transforms.stages_of(context.entries, self.schema.delta, self.schema.extras)

    @property
    def rules(self) -> dict[str, UpdateEntry]:
        """All entries with the rules that transforms give them; nothing where the aggregator combines everything."""
        context, maxima = self.run.context, self.run.context.policy.maxima
        found = context.transforms.rules(self.stages) if context.transforms or context.entries or maxima else {}
        return found | {name: dataclasses.replace(found[name], rule="max") for name in maxima}

    @property
    def optional(self) -> set[str]:
        """Moments that no client was sent, and that an honest one may not have."""
        return {*self.schema.untouched} - {*self.moments}

    def size(self, client_id: int) -> int:
        """Return N_k as the client stated it when it joined.

        Raises:
            UpdateError: If there is no such client.
        """
        data = self.run.context.data
        if not is_whole(client_id) or not 0 <= client_id < data.num_clients:
            raise UpdateError(f"client {printable(client_id)}: there is no such client")
        return data.num_examples(client_id)

    def steps(self, client_id: int) -> int:
        """Return the client's local steps in this round."""
        return self.task.span(steps_per_epoch=self.run.context.data.steps_per_epoch(client_id))[1]

    # ------------------------------------------------------------------ single answers

    def admitted(self, update: ClientUpdate, *, is_late: bool = False) -> ClientUpdate:
        """Return an update in the order of the server's module, with what is known in place of what it claims.

        Raises:
            UpdateError: If it cannot be right; names the client.
        """
        who = f"client {printable(update.client_id)}"
        try:
            size = self.size(update.client_id)
            check_size(who, update.num_examples, size=size)
            metrics = self.metrics(who, update.client_id, update.metrics, is_late=is_late)
            if self.schema.is_open:
                self.schema = self.run.update_schema.learn(self.schema.closed(who, update.extras))
            plain = self._decoded(who, update)
            delta, extras = self.schema.fitted(who, plain.delta, plain.extras, known=self.moments)
            most = MOST_UPDATES * self.steps(update.client_id)
            least = None if is_late else 0  # the counts that it was sent were those of a round before
            self.schema.check(who, delta, extras, known=self.moments, steps=(least, most))
            self._check_bounds(who, extras)
        except UpdateError:
            raise
        except Exception as error:  # an answer can be anything, and its client has to be named
            cause = printable(f"{type(error).__name__}: {error}")
            raise UpdateError(f"{who}: an answer that cannot be read ({cause})") from error
        found = dataclasses.replace(update, num_examples=size, metrics=metrics, delta=delta, extras=extras)
        if self.run.validator is not None:
            self.run.validator.check(found)
        return found

    def _check_bounds(self, who: str, extras: State) -> None:
        for name, entry in namespaces.under(namespaces.ALGORITHM, self.run.context.entries).items():
            check_bound(f"{who}: {name}", extras[name], entry.bound)

    def _decoded(self, who: str, update: ClientUpdate) -> ClientUpdate:
        """Return an update as it was before transforms."""
        transforms = self.run.context.transforms
        if not transforms:
            return update
        facts = RoundFacts(self.round if update.round is None else update.round, self.task.hyperparameters)
        return transforms.decoded(who, update, self.stages, facts=facts)

    def metrics(
        self, who: str, client_id: int, metrics: Mapping[str, float], *, is_late: bool = False
    ) -> dict[str, float]:
        """Return a client's scalars, with what follows from its task in place of what it says of that.

        Raises:
            UpdateError: If one is no number of a believable size, has no proper name, or says what is not true.
        """
        others = not isinstance(self.run.context.model, GAN)
        found, steps = checked_scalars(who, metrics, undefined=others), self.steps(client_id)
        if reserved := [name for name in found if name.startswith(UPDATE_NORM)]:
            raise UpdateError(f"{who}: metric {reserved[0]} is the server's to say")
        if min(found.get("seconds", 0.0), found.get(ROUND_TRIP, 0.0)) < 0:
            raise UpdateError(f"{who}: says that it took less than no time")
        now = time.perf_counter() - (self.run.began if is_late else self.began)
        if found.get("seconds", 0.0) > min(now, found.get(ROUND_TRIP, math.inf)) + CLOCKS:
            del found["seconds"]
        if found.get("steps", steps) != steps:
            raise UpdateError(f"{who}: says that it took {found['steps']:.6g} steps, and was asked for {steps}")
        found |= {**self._images(who, client_id, found, steps), "steps": float(steps)}
        found |= self._optimizer_steps(who, found, steps)
        if is_late:  # where schedules were in the round before is not known here any more, and nobody goes on from it
            return {name: value for name, value in found.items() if not is_position(name)}
        return found | self._positions(who, found, steps)

    def _images(self, who: str, client_id: int, found: Mapping[str, float], steps: int) -> dict[str, float]:
        """Return the images that a client has seen: of data that say no size of minibatches, by its own account."""
        data = self.run.context.data
        first, _ = self.task.span(steps_per_epoch=data.steps_per_epoch(client_id))
        known = isinstance(data, SizedBatches)
        sizes = data.batch_sizes(client_id, first_step=first, num_steps=steps) if known else None  # type: ignore[attr-defined]
        claimed, most = found.get("images", 0.0), steps * self.size(client_id)
        most = most if sizes is None else max(most, sum(sizes))  # of Poisson minibatches some rows only fill up
        if not 0 <= claimed <= most:
            raise UpdateError(f"{who}: says that it saw {claimed:.6g} images, not between 0 and {most}")
        return {"images": float(claimed if sizes is None else sum(sizes))}

    def _optimizer_steps(self, who: str, found: Mapping[str, float], steps: int) -> dict[str, float]:
        """Return the steps of a client's optimizers as it says; ``steps`` minibatches bound them."""
        claimed = found.get("optimizer_steps", float(steps))
        if claimed != int(claimed) or not 0 <= claimed <= MOST_UPDATES * steps:
            raise UpdateError(f"{who}: says that it took {claimed:.6g} steps of optimizers in {steps} minibatches")
        return {"optimizer_steps": claimed}

    def _positions(self, who: str, found: Mapping[str, float], steps: int) -> dict[str, float]:
        """Return where a client's schedules stand: those of a :class:`GAN` move with every step, others as it says."""
        model, before = self.run.context.model, self.task.schedule_positions
        claimed = {name: value for name, value in found.items() if is_position(name)}
        if isinstance(model, GAN) and all(getattr(type(model), own) is getattr(GAN, own) for own in SCHEDULES_BY):
            count = sum(own is not None for own in (model.generator_scheduler, model.discriminator_scheduler))
            derived = {f"{SCHEDULE}{k}": float(_at(before, k) + steps) for k in range(count)}
            if wrong := sorted(name for name in claimed if claimed[name] != derived.get(name)):
                at = derived.get(wrong[0], math.nan)
                raise UpdateError(f"{who}: says that {wrong[0]} is at {claimed[wrong[0]]:.6g}, not {at:.6g}")
            return derived
        for name, value in claimed.items():
            first = _at(before, int(name.removeprefix(SCHEDULE)))
            least = first if self.task.epochs is None else 0  # clients with fewer minibatches are behind
            if value != int(value) or not least <= value <= first + MOST_UPDATES * steps:
                raise UpdateError(f"{who}: says that {name} is at {value:.6g}, {steps} steps after {first}")
        return {}

    # ------------------------------------------------------------------ sums

    def member(self, own: ClientReport) -> ClientReport:
        """Return what is known of a client in a sum.

        Raises:
            UpdateError: If it claims what is not true; names the client.
        """
        who = f"client {printable(own.client_id)}"
        check_size(who, own.num_examples, size=self.size(own.client_id))
        return dataclasses.replace(own, metrics=self.metrics(who, own.client_id, own.metrics))

    def check_layouts(self, client_id: int, layouts: Mapping[str, Layout]) -> None:
        """Refuse an update whose numbers are hidden, and whose entries, shapes or dtypes are not the server's.

        Raises:
            UpdateError: If they differ; names the client.
        """
        metrics = layouts["metrics"]
        checked_scalars(f"client {client_id}", dict.fromkeys(metrics.names, 0.0))
        sent = self.run.context.transforms.sent_layouts(self.stages)
        reason = objection(sent, layouts, known=self.moments) if not self.schema.is_open else None
        if any(metrics.shapes):
            reason = "metrics are not single numbers"
        if reason is not None:
            raise UpdateError(f"client {client_id}: {reason}")

    def admitted_sum(self, total: UpdateSum) -> UpdateSum:
        """Return a sum in the order of the server's module, with what is known in place of what clients claim.

        Raises:
            UpdateError: If it cannot be right: then somebody in it has lied, and nobody can be named.
        """
        who = f"the sum of clients {sorted(own.client_id for own in total.clients)}"
        try:
            metrics = checked_scalars(who, total.metrics)
            if self.schema.is_open:
                self.schema = self.run.update_schema.learn(self.schema.closed(who, total.extras))
            facts, transforms = RoundFacts(self.round, self.task.hyperparameters), self.run.context.transforms
            plain = transforms.decoded_sum(who, total, self.stages, facts=facts) if transforms else total
            delta, extras = self.schema.fitted(who, plain.delta, plain.extras, known=self.moments)
            most = MOST_UPDATES * max(self.steps(own.client_id) for own in total.clients)
            self.schema.check(who, delta, extras, known=self.moments, steps=(0, most))
            self._check_bounds(who, extras)
        except UpdateError:
            raise
        except Exception as error:
            cause = printable(f"{type(error).__name__}: {error}")
            raise UpdateError(f"{who} cannot be read ({cause})") from error
        return dataclasses.replace(total, delta=delta, extras=extras, metrics=metrics)

    # ------------------------------------------------------------------ costs

    def bytes_up(self, update: ClientUpdate) -> dict[str, int]:
        """Return what an answer amounts to, in bytes by network; what is no state counts for nothing."""
        try:
            sizes = bytes_up(update)
        except Exception:  # it is refused with the reason elsewhere
            return {}
        names = (*self.schema.delta.names, *self.schema.extras.names)
        known = {*map(cost_group, names), *bytes_by_network(self.state)}
        found: dict[str, int] = {}
        for network, size in sizes.items():
            place = network if network in known else UNKNOWN
            found[place] = found.get(place, 0) + size
        return found

    def cost(self, update: ClientUpdate, *, is_first: bool) -> dict[str, float]:
        """Return steps and seconds of a rejected update, as far as they are plausible."""
        try:
            steps = float(self.steps(update.client_id)) if is_first and self.size(update.client_id) else 0.0
            claims = {name: update.metrics.get(name) for name in ("seconds", ROUND_TRIP)}
        except Exception:  # the reason is given where it is refused
            return {}
        most = time.perf_counter() - self.run.began + CLOCKS
        believed = {n: float(v) for n, v in claims.items() if isinstance(v, (int, float)) and 0 <= v <= most}
        return {"steps": steps, **believed}


def check_size(who: str, claimed: object, *, size: int) -> None:
    """Refuse another number of examples than the client stated when it joined.

    Raises:
        UpdateError: If it differs, or is no whole number.
    """
    if not is_whole(claimed):
        raise UpdateError(f"{who}: counts {printable(claimed)} examples, which is no whole number")
    if claimed != size:
        least = ", not at least 1" if claimed < 1 else ""  # type: ignore[operator]
        raise UpdateError(f"{who}: counts {printable(claimed)} examples{least}, and joined with {size}")


def checked_scalars(who: str, metrics: Mapping[str, float], *, undefined: bool = False) -> dict[str, float]:
    """Return scalars by name as numbers.

    Args:
        who: The sender, in words.
        metrics: What it says.
        undefined: Whether NaN may stand for a value that there is not, such as the recall of a class that a client does
            not hold; it is left out. What the server relies on is always a number.

    Raises:
        UpdateError: If they are too many, have no proper names, or are no numbers of a believable size.
    """
    if not isinstance(metrics, Mapping) or len(metrics) > MOST_METRICS:
        raise UpdateError(f"{who}: metrics are not up to {MOST_METRICS} numbers by name")
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MOST_LETTERS:
            raise UpdateError(f"{who}: {printable(name, most=60)!r} is no name of a metric")
        if not isinstance(value, Real) or isinstance(value, bool):
            raise UpdateError(f"{who}: metric {name} is a {type(value).__name__}, not a number")
        if undefined and value != value and not (name in RELIED_ON or is_position(name)):
            continue
        if not abs(value) <= LARGEST:  # NaN is not, either
            what = "is not finite" if value != value or math.inf in (value, -value) else "is beyond belief"
            raise UpdateError(f"{who}: metric {name} {what}")
        found[name] = float(value)
    return found


def without_unsent(extras: State, unsent: set[str]) -> State:
    """Return extras without the moments that nobody sent: those of parameters that no client has touched."""
    return {name: value for name, value in extras.items() if name not in unsent} if unsent else extras


def sent_moments(extras: State) -> set[str]:
    """Return the names of the moments among extras as they were sent: as they are, or as codes of them."""
    found = {name for name in extras if is_optimizer_entry(name)}
    return found | {name.rpartition("/")[0] for name in found}


def _at(positions: tuple[int, ...], index: int) -> int:
    return positions[index] if index < len(positions) else 0
