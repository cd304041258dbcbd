"""What the outcome of an attack says: rates with intervals, and what they mean for epsilon.

A lower bound holds with the confidence that is stated; an estimate does not, and says so in its name. Higher scores
mean "more likely a member" throughout. Nothing here knows what an attack is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_generator

#: Halvings of an interval of epsilon: [0, 200] is then known to 1e-13.
HALVINGS = 50
#: The largest epsilon that is looked for; e^200 is still a number.
LARGEST_EPSILON = 200.0


@dataclass(frozen=True)
class Rate:
    """A share of successes among trials, with a two-sided Clopper-Pearson interval.

    Attributes:
        value: successes / trials, in [0, 1].
        lower: Below it the true rate lies with probability (1 - confidence) / 2 at most.
        upper: Above it, likewise.
        successes: Count.
        trials: Count.
    """

    value: float
    lower: float
    upper: float
    successes: int
    trials: int


@dataclass(frozen=True)
class OperatingPoint:
    """An attack at the threshold that a false-positive rate asks for.

    Attributes:
        tpr: True-positive rate over members.
        fpr: False-positive rate over non-members, at most the one that was asked for.
        threshold: Scores above it are called members.
    """

    tpr: Rate
    fpr: Rate
    threshold: float


@dataclass(frozen=True)
class Guesses:
    """What a one-run audit counts.

    Attributes:
        num_canaries: Canaries m, each in or out by a fair coin.
        guesses: How many of them were guessed, r; of the others the attacker says nothing.
        right: Guesses that were right, v.
    """

    num_canaries: int
    guesses: int
    right: int


@checked(successes="[0, inf)", trials="[1, inf)", confidence="(0, 1)")
def clopper_pearson(*, successes: int, trials: int, confidence: float = 0.95) -> Rate:
    """Return a rate with its exact two-sided interval.

    lower = Beta^-1(a / 2; k, n - k + 1), upper = Beta^-1(1 - a / 2; k + 1, n - k), a = 1 - confidence; 0 and 1 where
    no or all trials succeed. Clopper and Pearson 1934.

    Args:
        successes: k.
        trials: n.
        confidence: In (0, 1).

    Raises:
        ConfigurationError: If there are more successes than trials.
    """
    from scipy.stats import beta

    if successes > trials:
        raise ConfigurationError(
            message("successes must be at most trials", received=f"{successes} of {trials}", fix="count again")
        )
    tail, failures = (1 - confidence) / 2, trials - successes
    lower = float(beta.ppf(tail, successes, failures + 1)) if successes else 0.0
    upper = float(beta.ppf(1 - tail, successes + 1, failures)) if failures else 1.0
    return Rate(successes / trials, lower, upper, successes, trials)


def tpr_at_fpr(inside: Tensor, outside: Tensor, *, fpr: float, confidence: float = 0.95) -> OperatingPoint:
    """Return the true-positive rate of an attack at a given false-positive rate (Carlini et al. 2022).

    The threshold is the (k + 1)-th largest score of a non-member, k = floor(fpr * n), and a score must be above it:
    ties count for nobody, so that at most k of n non-members are called members. With n < 1 / fpr this is none of them,
    and the interval of the false-positive rate then says how little n non-members can tell: up to 3.7 / n at 95 %.
    That interval is exact although the threshold comes from the same scores: the share of all non-members above their
    (k + 1)-th largest score follows Beta(k + 1, n - k), of which the upper end is a quantile.

    Args:
        inside: Scores (M,) of members.
        outside: Scores (N,) of non-members.
        fpr: False-positive rate, in [0, 1).
        confidence: Of both intervals, in (0, 1).

    Raises:
        ConfigurationError: If there are no members or non-members, or scores are no numbers.
    """
    _check_scores(inside, outside)
    if not 0 <= fpr < 1:
        raise ConfigurationError(
            message("a false-positive rate must be in [0, 1)", received=fpr, fix="choose one such as 0.01")
        )
    allowed = math.floor(fpr * len(outside) + 1e-9)
    threshold = outside.double().sort(descending=True).values[allowed]
    caught, mistaken = (int((scores.double() > threshold).sum()) for scores in (inside, outside))
    return OperatingPoint(
        tpr=clopper_pearson(successes=caught, trials=len(inside), confidence=confidence),
        fpr=clopper_pearson(successes=mistaken, trials=len(outside), confidence=confidence),
        threshold=float(threshold),
    )


def advantage(inside: Tensor, outside: Tensor) -> float:
    """Return the largest difference of true- and false-positive rate over all thresholds, in [0, 1].

    max_t P[s(member) > t] - P[s(non-member) > t] (Yeom et al. 2018, definition 4). Its threshold is chosen after the
    fact: it is above 0 for a useless attack too, by about sqrt(1 / M + 1 / N) (Kolmogorov and Smirnov).

    Args:
        inside: Scores (M,) of members.
        outside: Scores (N,) of non-members.

    Raises:
        ConfigurationError: If there are no members or non-members, or scores are no numbers.
    """
    _check_scores(inside, outside)
    thresholds = torch.cat([inside, outside]).double().unique()
    true, false = (
        1 - torch.searchsorted(own.double().sort().values, thresholds, right=True).double() / len(own)
        for own in (inside, outside)
    )
    return max(0.0, float((true - false).max()))


def epsilon_from_rates(*, tpr: Rate, fpr: Rate, delta: float) -> float:
    """Return a lower bound of epsilon from the intervals of both rates.

    (epsilon, delta) means tpr <= e^eps fpr + delta and 1 - fpr <= e^eps (1 - tpr) + delta (Kairouz et al. 2015, theorem
    2.1), hence eps >= max(ln((tpr - delta) / fpr), ln((1 - fpr - delta) / (1 - tpr))) at the lower end of tpr and
    the upper end of fpr. It holds with probability 1 - a where each interval was made with confidence 1 - a (each gives
    up a / 2 on this side), and for a threshold that was not chosen by its outcome; never below 0.

    Args:
        tpr: True-positive rate.
        fpr: False-positive rate.
        delta: In [0, 1).
    """
    found = [
        math.log(high / low)
        for high, low in ((tpr.lower - delta, fpr.upper), (1 - fpr.upper - delta, 1 - tpr.lower))
        if high > 0 and low > 0
    ]
    return max([0.0, *found])


# ---------------------------------------------------------------------- one run with many canaries


@checked(num_canaries="[1, inf)", guesses="[0, inf)", right="[0, inf)", delta="[0, 1)", p="(0, 1)")
def one_run_bound(*, num_canaries: int, guesses: int, right: int, delta: float, p: float = 0.05) -> float:
    """Return a lower bound of epsilon from one training run with many canaries.

    An (eps, delta) algorithm lets v of r guesses be right with probability at most
    P[B >= v] + 2 m delta max_i (P[B >= v - i] - P[B >= v]) / i, B ~ Bin(r, e^eps / (1 + e^eps)), i = 1 .. v; the bound
    is the largest eps for which this is at most p. With delta = 0 and all guesses right it is ln(a / (1 - a)),
    a = p^(1 / r). Steinke, Nasr and Jagielski 2023, the theorem for approximate privacy.

    Args:
        num_canaries: Canaries m, each in or out by a fair coin of its own.
        guesses: Guesses r, fixed before the outcome is known.
        right: Right ones v.
        delta: In [0, 1).
        p: Probability with which the bound may be wrong, in (0, 1).

    Raises:
        ConfigurationError: If there are more guesses than canaries, or more right ones than guesses.
    """
    if not right <= guesses <= num_canaries:
        raise ConfigurationError(
            message(
                "a one-run audit must have right <= guesses <= num_canaries",
                received=f"{right}, {guesses}, {num_canaries}",
                fix="count again",
            )
        )
    low, high = 0.0, LARGEST_EPSILON
    if _chance(low, m=num_canaries, r=guesses, v=right, delta=delta) > p:
        return 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _chance(middle, m=num_canaries, r=guesses, v=right, delta=delta) <= p:
            low = middle
        else:
            high = middle
    return low


def _chance(epsilon: float, *, m: int, r: int, v: int, delta: float) -> float:
    """Return the largest probability of v right guesses out of r under (epsilon, delta)."""
    from scipy.stats import binom

    success = 1 / (1 + math.exp(-epsilon))
    at_least = float(binom.sf(v - 1, r, success))
    if delta == 0 or v == 0:
        return at_least
    below = binom.pmf(np.arange(v - 1, -1, -1), r, success)  # v - 1, v - 2, ..., 0
    steepest = float((np.cumsum(below) / np.arange(1, v + 1)).max())
    return at_least + 2 * m * delta * steepest


@checked(guesses="[1, inf)", seed="[0, inf)")
def one_run_guesses(scores: Tensor, membership: Tensor, *, guesses: int, seed: int = 0) -> Guesses:
    """Guess the canaries of which a score says most, abstain from all others, and count what was right.

    The ceil(r / 2) highest scores are guessed in, the floor(r / 2) lowest out; about a tenth of the canaries is a good
    r, and it must be fixed before the scores are seen. Equal scores are ordered by a draw, never by position: canaries
    that are in often stand first. Steinke, Nasr and Jagielski 2023, algorithm 1.

    Args:
        scores: Of all canaries (m,), higher where one is more likely in.
        membership: Whether each was in (m,), by a fair coin.
        guesses: r, at most m.
        seed: Seed of the order of ties.

    Raises:
        ConfigurationError: If shapes differ, there are more guesses than canaries, or scores are no numbers.
    """
    m = len(scores)
    if scores.shape != membership.shape or scores.dim() != 1 or guesses > m:
        raise ConfigurationError(
            message(
                "a one-run audit must have scores and membership of shape (m,), and at most m guesses",
                received=f"{tuple(scores.shape)}, {tuple(membership.shape)}, {guesses} guesses",
                fix="give one score and one coin for each canary",
            )
        )
    _check_scores(scores, scores)
    drawn = torch.randperm(m, generator=make_generator(seed, "ties"))
    order = drawn[scores[drawn].argsort(stable=True, descending=True)]
    high = (guesses + 1) // 2
    chosen_in, chosen_out = order[:high], order[m - (guesses - high) :]
    right = int(membership[chosen_in].bool().sum()) + int((~membership[chosen_out].bool()).sum())
    return Guesses(num_canaries=m, guesses=guesses, right=right)


# ---------------------------------------------------------------------- one-shot canaries: an estimate


@checked(dimension="[2, inf)", delta="(0, 1)")
def canary_estimate(cosines: Tensor, *, dimension: int, delta: float) -> float:
    """Return an ESTIMATE of epsilon from canaries that took part once; it is no bound and has no confidence.

    Canary clients send random unit vectors c of length C in place of an update; the statistic is the cosine of c and
    the released sum. Unseen canaries have N(0, 1 / d), exact for large d; seen ones are taken for N(m, s^2) with mean
    and variance of their cosines. The estimate is the epsilon at delta of telling these two apart, in the direction
    that is easier. It needs k ~ 1000 canaries: with 100 it is noise. Andrew et al. 2023.

    Args:
        cosines: Cosines (k,) of canaries that were in, k >= 2.
        dimension: Parameters d, at least about 1000.
        delta: In (0, 1).

    Raises:
        ConfigurationError: If there are fewer than two cosines, or one is no number.
    """
    if cosines.dim() != 1 or len(cosines) < 2:
        raise ConfigurationError(
            message(
                "an estimate from canaries must have the cosines of at least two",
                received=tuple(cosines.shape),
                fix="send about a thousand canaries",
            )
        )
    _check_scores(cosines, cosines)
    seen = cosines.double()
    return gaussian_epsilon(
        mean=float(seen.mean()), deviation=float(seen.std()), null_deviation=dimension**-0.5, delta=delta
    )


def gaussian_epsilon(*, mean: float, deviation: float, null_deviation: float, delta: float) -> float:
    """Return the epsilon at which N(m, s^2) and N(0, s0^2) cannot be told apart but for delta, in both directions.

    The smallest eps with P[A] - e^eps Q[A] <= delta, A = {log p / q > eps}, for (p, q) and (q, p). The logarithm of the
    ratio is a parabola, hence A an interval or what lies outside of one: exact but for rounding.

    Args:
        mean: m.
        deviation: s, above 0.
        null_deviation: s0, above 0.
        delta: In (0, 1).
    """
    one, other = (mean, max(deviation, 1e-300)), (0.0, null_deviation)
    return max(
        _smallest(lambda epsilon: _hockey_stick(one, other, epsilon), delta),
        _smallest(lambda epsilon: _hockey_stick(other, one, epsilon), delta),
    )


def _smallest(divergence: Callable[[float], float], delta: float) -> float:
    low, high = 0.0, LARGEST_EPSILON
    if divergence(low) <= delta:
        return 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if divergence(middle) > delta:
            low = middle
        else:
            high = middle
    return high


def _hockey_stick(p: tuple[float, float], q: tuple[float, float], epsilon: float) -> float:
    """Return P[A] - e^epsilon Q[A] for Gaussians (mean, deviation), A where log p / q exceeds epsilon."""
    (a, s), (b, t) = p, q
    # log p/q - epsilon = square x^2 + slope x + level
    square = 0.5 / t**2 - 0.5 / s**2
    slope = a / s**2 - b / t**2
    level = 0.5 * (b / t) ** 2 - 0.5 * (a / s) ** 2 + math.log(t / s) - epsilon
    # As a straight line where the deviations are equal but for rounding: its root would lie at infinity.
    if abs(square) * max(s, t) ** 2 < 1e-12:
        return _over_line(p, q, epsilon, slope=slope, level=level)
    discriminant = slope**2 - 4 * square * level
    if discriminant <= 0:  # on one side of epsilon everywhere
        return max(0.0, 1 - math.exp(epsilon)) if square > 0 else 0.0
    root = math.sqrt(discriminant)
    ends = np.sort(np.array([(-slope - root) / (2 * square), (-slope + root) / (2 * square)]))
    return _mass(p, ends, outside=square > 0) - math.exp(epsilon) * _mass(q, ends, outside=square > 0)


def _over_line(p: tuple[float, float], q: tuple[float, float], epsilon: float, *, slope: float, level: float) -> float:
    from scipy.special import ndtr

    if slope == 0:
        return 0.0 if level <= 0 else max(0.0, 1 - math.exp(epsilon))
    end, sign = -level / slope, math.copysign(1.0, slope)
    above, others = (float(ndtr(sign * (own[0] - end) / own[1])) for own in (p, q))
    return above - math.exp(epsilon) * others


def _mass(gaussian: tuple[float, float], ends: NDArray[np.float64], *, outside: bool) -> float:
    from scipy.special import ndtr

    low, high = (ends - gaussian[0]) / gaussian[1]
    if outside:
        return float(ndtr(low) + ndtr(-high))
    # of two tails on one side the difference loses nothing if it is taken where both are small
    return float(ndtr(-low) - ndtr(-high)) if low > 0 else float(ndtr(high) - ndtr(low))


def _check_scores(inside: Tensor, outside: Tensor) -> None:
    """Refuse scores that say nothing.

    Raises:
        ConfigurationError: If there are none on one side, or one is not a number.
    """
    if not len(inside) or not len(outside):
        raise ConfigurationError(
            message(
                "an attack must have members and non-members",
                received=f"{len(inside)} and {len(outside)}",
                fix="give scores of both",
            )
        )
    if bool(torch.isnan(inside).any()) or bool(torch.isnan(outside).any()):
        raise ConfigurationError(
            message("scores must be numbers", received="NaN", fix="see what the attack makes of such samples")
        )
