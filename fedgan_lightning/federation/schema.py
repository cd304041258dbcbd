"""What an answer must look like, and which numbers can be right: entries, shapes, dtypes, and bounds of values.

The yardstick is what the server knows itself. An answer that came first is an answer like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import TypeGuard

import torch
from torch import Tensor

from fedgan_lightning.errors import UpdateError, message
from fedgan_lightning.federation.namespaces import of_moment
from fedgan_lightning.federation.optimizer_state import is_optimizer_entry
from fedgan_lightning.packing import Layout, Packed
from fedgan_lightning.protocol import State

#: Largest absolute value that is believed: its square is still a float32, and no gradient of a network that learns has
#: a square as large.
LARGEST = 1e18
#: Moments that cannot be negative: squares, largest values, counts, products of numbers in [0, 1].
NONNEGATIVE = ("step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "exp_inf", "mu_product")
#: Optimizer updates for which one minibatch may be used.
MOST_UPDATES = 100
#: Numbers that are picked by their places; more of them are cut out entry by entry.
FEW = 1 << 16
#: How far rounding, of bfloat16 too, may move sums of squares, relative and absolute.
ROUNDING, TINY = 0.05, 1e-24


@dataclass(frozen=True)
class Sense:
    """What the entries of an answer mean, as far as it bounds them.

    Attributes:
        variances: Pairs of names: E[x^2] of a running variance, and the running mean E[x] beside it.
        ratios: By optimizer, its number first in the names of moments: exp_avg^2 is at most this times exp_avg_sq. With
            exp_avg_sq a mean of squared gradients that weighs the newest by 1 - beta2, the inequality of Cauchy and
            Schwarz gives 1 / (1 - beta2) for every beta1 <= 2 beta2 / (1 + beta2), fixed or scheduled. Means and
            medians over clients keep it.
        sums: Optimizers whose ``sum`` is one of squares.
    """

    variances: tuple[tuple[str, str], ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    sums: frozenset[str] = frozenset()


class Schema:
    """Entries, shapes and dtypes of ``delta`` and ``extras``, and what their numbers mean.

    Args:
        expected: States that look like those of an answer, under ``delta`` and ``extras``. The values of moments among
            the extras are those of a parameter whose gradient was always zero.
        sense: What bounds the numbers.
        is_open: Whether nobody knows yet which moments there are: :meth:`closed` says it by an answer.
    """

    def __init__(self, expected: Mapping[str, State], *, sense: Sense | None = None, is_open: bool = False) -> None:
        self.expected, self.is_open = expected if is_open else {}, is_open
        self.delta, self.extras = Layout.of(expected["delta"]), Layout.of(expected["extras"])
        self.untouched = {n: _small(v.detach()) for n, v in expected["extras"].items() if is_optimizer_entry(n)}
        self.sense = sense if sense is not None else Sense()
        self._before: tuple[State, Tensor] | None = None
        self._plans: dict[tuple[str, ...], tuple[list[tuple[torch.dtype, int, int]], Tensor | None]] = {}

    def fitted(self, who: str, delta: State, extras: State, *, known: State) -> tuple[Packed, Packed]:
        """Return an answer's two states, in this schema's order.

        Args:
            who: The sender, in words.
            delta: Its parameter update.
            extras: Its other tensors.
            known: What it was sent. A client gives back all moments it was given. Those of a parameter that its loss
                has not touched it does not have; then they are those of a gradient of zero.

        Raises:
            UpdateError: If entries are missing, unknown, of another kind, shape or dtype, or no plain tensors.
        """
        fitted = repacked(who, "delta", delta, self.delta)
        if is_laid_out(extras, self.extras) or not self.untouched:
            return fitted, repacked(who, "extras", extras, self.extras)
        missing = self.untouched.keys() - names_of(who, "extras", extras)
        touched = sorted(n for n in missing if n in known or bool(fitted[parameter_of(n)].any()))
        halves = {parameter_of(n) for n in missing} & {parameter_of(n) for n in self.untouched.keys() - missing}
        if touched or halves:
            wrong = touched or sorted(n for n in missing if parameter_of(n) in halves)
            raise UpdateError(f"{who}: extras differs in the entries {_few(wrong)}")
        where = next(iter(fitted.vectors.values())).device
        filled = {name: self.untouched[name].to(where) for name in missing}
        return fitted, repacked(who, "extras", {**extras, **filled}, self.extras)

    def closed(self, who: str, extras: State) -> Schema:
        """Return the schema with the moments of an answer, where the server cannot make them itself.

        Raises:
            UpdateError: If they are none of the parameters that travel.
        """
        shapes, moments = self.delta.by_name, {}
        for name in sorted(filter(is_optimizer_entry, names_of(who, "extras", extras))):
            owner, value = of_moment(name)[1], extras[name]
            if not isinstance(value, Tensor) or tuple(value.shape) not in ((), shapes.get(owner)):
                raise UpdateError(f"{who}: extras {_few([name])} is no moment of a parameter")
            moments[name] = torch.zeros_like(value)
        return Schema({**self.expected, "extras": {**self.expected["extras"], **moments}}, sense=self.sense)

    def check(self, who: str, delta: Packed, extras: Packed, *, known: State, steps: tuple[int | None, int]) -> None:
        """Refuse numbers that cannot be right; both states are as :meth:`fitted` gives them.

        What remains possible is an answer of believable numbers: a parameter update, moments or statistics that no
        honest client would have found, within these bounds. ``UpdateValidator`` has tighter ones, and robust
        aggregators withstand a minority of such answers.

        Args:
            who: The sender, in words.
            delta: Its parameter update.
            extras: Its other tensors.
            known: What it was sent.
            steps: Fewest and most updates that an optimizer may have made beyond the count that it was sent; ``None``
                where it was sent another one.

        Raises:
            UpdateError: If a number is not finite or beyond ``LARGEST``; a square, a variance or a count is negative; a
                mean is larger than its squares allow; or a step count does not follow from the work.
        """
        for part, own in (("delta", delta), ("extras", extras)):
            check_numbers(who, part, own)
        if self._nonnegative and float(self._select(extras, self._nonnegative).min()) < 0:
            name = next(name for name in self._nonnegative if bool((extras[name] < 0).any()))
            raise UpdateError(f"{who}: extras {name} is negative, and no mean of squares or count is")
        for factor, pairs in self._bounded.items():
            squares, means = zip(*pairs)
            most = factor * (1 + ROUNDING) * self._select(extras, squares).double() + TINY
            if bool((self._select(extras, means).double().square() > most).any()):
                wrong = (pair for pair in pairs if _is_beyond(extras[pair[1]], extras[pair[0]], factor))
                square, mean = next(wrong)
                raise UpdateError(f"{who}: extras {mean} is larger than {square} allows")
        self._check_steps(who, extras, known, steps)

    def _select(self, extras: Packed, names: tuple[str, ...]) -> Tensor:
        """Return the numbers of some entries in one vector: few numbers by their places, in one call."""
        plan = self._plans.get(names)
        if plan is None:
            spans = [self.extras.spans[name] for name in names]
            count, dtypes = sum(stop - start for _, start, stop in spans), {dtype for dtype, _, _ in spans}
            places = [torch.arange(start, stop) for _, start, stop in spans]
            is_short = len(dtypes) == 1 and count <= FEW
            plan = self._plans[names] = (spans, torch.cat(places) if is_short else None)
        spans, index = plan
        if index is not None:
            vector = extras.vectors[spans[0][0]]
            return vector[index.to(vector.device)]
        return torch.cat([extras.vectors[dtype][start:stop] for dtype, start, stop in spans])

    def _check_steps(self, who: str, extras: Packed, known: State, steps: tuple[int | None, int]) -> None:
        if not self._counts:
            return
        found = self._select(extras, self._counts).double()
        before = self._counts_before(found, known)
        moved, slack = found - before, 1e-3 + 1e-5 * before.abs()
        least, most = steps
        wrong = moved > most + slack
        if least is not None:
            wrong |= moved < least - slack
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0])
            raise UpdateError(
                f"{who}: extras {self._counts[place]} is {float(found[place]):.6g}, after "
                f"{float(before[place]):.6g} and at most {most} more"
            )

    def _counts_before(self, like: Tensor, known: State) -> Tensor:
        if self._before is None or self._before[0] is not known:  # the same for all clients of a round
            zero = like.new_zeros(())
            own = torch.stack([known[name].to(like) if name in known else zero for name in self._counts])
            self._before = (known, own)
        return self._before[1].to(like)

    @cached_property
    def _nonnegative(self) -> tuple[str, ...]:
        named = [(name, *of_moment(name)) for name in self.untouched if is_optimizer_entry(name)]
        sums = [name for name, index, _, key in named if key == "sum" and index in self.sense.sums]
        return tuple([name for name, _, _, key in named if key in NONNEGATIVE] + sums)

    @cached_property
    def _bounded(self) -> dict[float, list[tuple[str, str]]]:
        """Pairs of squares and means by factor, with mean^2 <= factor * squares."""
        found = {1.0: list(self.sense.variances)} if self.sense.variances else {}
        for name, value in self.untouched.items():
            mean, factor = name.removesuffix("_sq"), self.sense.ratios.get(of_moment(name)[0])
            is_pair = name.endswith("/exp_avg_sq") and mean in self.untouched
            if is_pair and factor is not None and value.dtype != torch.float16:  # whose squares are zero below 2e-4
                found.setdefault(factor, []).append((name, mean))
        return found

    @cached_property
    def _counts(self) -> tuple[str, ...]:
        return tuple(n for n, value in self.untouched.items() if n.endswith("/step") and not value.dim())


def objection(wanted: Mapping[str, Layout], received: Mapping[str, Layout], *, known: Collection[str]) -> str | None:
    """Return what is wrong with the layouts of an answer whose numbers are hidden, or ``None``.

    Args:
        wanted: Layouts of ``delta`` and ``extras`` as clients send them.
        received: Those of the answer.
        known: Moments that the client was sent; others it may not have.
    """
    for part in ("delta", "extras"):
        mine, theirs = _described(wanted[part]), _described(received[part])
        free = {
            n for n in mine if is_optimizer_entry(n) and not any(n == own or n.startswith(f"{own}/") for own in known)
        }
        differing = [n for n in {*mine} ^ {*theirs} if n in theirs or n not in free]
        differing += [n for n in {*mine} & {*theirs} if mine[n] != theirs[n]]
        if differing:
            return f"{part} differs from the server's in {_few(differing)}"
    return None


def parameter_of(moment: str) -> str:
    """Return the parameter to which a moment belongs."""
    return of_moment(moment)[1]


def is_laid_out(state: object, layout: Layout) -> bool:
    """Whether a state is packed in this layout."""
    return isinstance(state, Packed) and (state.layout is layout or state.layout == layout)


def names_of(who: str, part: str, state: object) -> set[str]:
    """Return the names of the entries of a state.

    Raises:
        UpdateError: If it is no mapping from names.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise UpdateError(f"{who}: {part} is no mapping from names to tensors")
    return {*state}


def repacked(who: str, part: str, state: State, layout: Layout) -> Packed:
    """Return a state in flat vectors laid out as ``layout``, whatever the order of its entries.

    Raises:
        UpdateError: If its entries, or their kinds, shapes or dtypes, are others.
    """
    if isinstance(state, Packed) and is_laid_out(state, layout):
        for dtype, length in layout.lengths.items():
            check_tensor(f"{who}: {part}", state.vectors.get(dtype), shape=(length,), dtype=dtype)
        return Packed(layout, {dtype: state.vectors[dtype].detach() for dtype in layout.lengths})
    if differing := names_of(who, part, state) ^ {*layout.names}:
        raise UpdateError(f"{who}: {part} differs in the entries {_few(differing)}")
    for name, (shape, dtype) in _described(layout).items():
        check_tensor(f"{who}: {part} {name}", state[name], shape=shape, dtype=dtype)
    return Packed(layout, layout.flatten(state))


def check_tensor(what: str, value: object, *, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a plain tensor of this shape and dtype, and refuse everything else.

    Raises:
        UpdateError: If it is not.
    """
    if not isinstance(value, Tensor):
        raise UpdateError(f"{what} is a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
        raise UpdateError(f"{what} is a sparse, quantised, nested or empty tensor, not a plain one")
    if tuple(value.shape) != shape:
        raise UpdateError(f"{what} has shape {list(value.shape)}, not {list(shape)}")
    if value.dtype != dtype:
        raise UpdateError(f"{what} is {value.dtype}, not {dtype}")
    return value


def check_bound(what: str, value: Tensor, bound: float | None) -> None:
    """Refuse numbers beyond an entry's own bound.

    Raises:
        UpdateError: If there is one.
    """
    if bound is not None and value.numel() and float(value.abs().max()) > bound:
        raise UpdateError(f"{what} reaches {float(value.abs().max()):.4g}, beyond {bound:.4g}")


def is_believable(values: Tensor) -> bool:
    """Return whether all values are finite and at most ``LARGEST``: by their norm, in one pass, and else one by one."""
    if not (values.is_floating_point() or values.is_complex()):
        return values.dtype == torch.bool or bool((values.double().abs() <= LARGEST).all())
    return float(torch.linalg.vector_norm(values)) <= LARGEST or bool((values.abs() <= LARGEST).all())


def check_numbers(who: str, part: str, state: Packed) -> None:
    """Refuse numbers that would poison the model for good.

    Raises:
        UpdateError: If one is not finite, or beyond ``LARGEST``; names entry and sender.
    """
    if all(map(is_believable, state.vectors.values())):
        return
    name, value = next((name, value) for name, value in state.items() if not is_believable(value))
    if bool(torch.isfinite(value).all()):
        largest = float(value.abs().max())
        raise UpdateError(f"{who}: {part} {name} reaches {largest:.4g}, beyond what any network learns with")
    reason = message(
        "updates must be finite numbers",
        received=f"NaN or infinity in {name!r} from {who}",
        fix="lower the client's learning rate, add a penalty such as R1, or clip gradients",
    )
    raise UpdateError(f"{who}: {part} {name} is not finite: {reason}")


def _small(value: Tensor) -> Tensor:
    """Return zeros without memory of their own: the schema is kept for a whole run."""
    return value if bool(value.any()) else value.new_zeros(()).expand(value.shape)


def _is_beyond(mean: Tensor, squares: Tensor, factor: float) -> bool:
    return bool((mean.double().square() > factor * (1 + ROUNDING) * squares.double() + TINY).any())


def _described(layout: Layout) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return dict(zip(layout.names, zip(layout.shapes, layout.dtypes)))


def _few(names: Iterable[str]) -> str:
    """Return the first of some names, as text that fits a line."""
    return ", ".join(printable(name, most=80) for name in sorted(names)[:3])


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def printable(text: object, *, most: int = 200) -> str:
    """Return what somebody else sent as text for a line of a log: no control characters, and not too long."""
    line = "".join(own if own.isprintable() else " " for own in str(text)[: most + 1])
    return line if len(line) <= most else f"{line[: most - 3]}..."
