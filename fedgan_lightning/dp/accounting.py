"""What noisy releases cost: epsilon at a delta, by the accountants of ``dp-accounting``.

A release is a sum of vectors of norm at most C, one from each record of a sample, plus Gaussian noise of standard
deviation z C. How the sample is drawn decides what a release costs, and between which data sets the guarantee holds:

=================== ============================================== ================= ==========
sampling            every record is in the sample                  neighbours        accountant
=================== ============================================== ================= ==========
``all``             always                                         add or remove one pld, rdp
``poisson``         on its own with probability q                  add or remove one pld, rdp
``truncated_poisson`` so, and the sample is cut to at most b       add or remove one pld
``fixed_size``      with n others of N, without replacement        replace one       rdp
=================== ============================================== ================= ==========

Numbers of Poisson sampling never stand for shuffled or fixed minibatches (Lebeda, Regehr, Kamath, Steinke 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.options import checked

Unit = Literal["client", "example"]
Sampling = Literal["all", "poisson", "truncated_poisson", "fixed_size"]
Accountant = Literal["pld", "rdp"]

#: Between which data sets a guarantee holds, in words.
RELATIONS = {"fixed_size": "one replaced by another"}
ADD_OR_REMOVE = "one added or removed"
#: Points between none and all rounds of a run at which epsilon is computed.
POINTS = 20
#: How far below a target epsilon a calibrated noise may stay.
TOLERANCE = 1e-4
#: How much less noise the tight accountant needs at most, as a guess.
TIGHTER = 0.85
#: Epsilons below this count as this.
TINY = 1e-12
#: Noise multipliers between which a calibration looks.
LEAST_NOISE, MOST_NOISE = 0.05, 1e6


@dataclass(frozen=True)
class Release:
    """Several releases of one kind.

    Attributes:
        unit: What is hidden: all of a ``client``, or one ``example``.
        sampling: How the sample is drawn.
        noise_multiplier: z: the noise's standard deviation over the bound C on one contribution.
        count: How many releases.
        rate: Probability q of a record, in (0, 1]; for ``fixed_size`` the share n / N.
        population: Records N; for ``fixed_size`` and ``truncated_poisson``.
        most: Largest sample; for ``truncated_poisson``, and for ``fixed_size`` its size.
        clip: The bound C of these releases, for the record.
    """

    unit: Unit
    sampling: Sampling
    noise_multiplier: float
    count: int = 1
    rate: float = 1.0
    population: int = 0
    most: int = 0
    clip: float = 0.0

    @property
    def kind(self) -> Release:
        """The same without its count and its bound, which cost nothing."""
        return replace(self, count=1, clip=0.0)

    @property
    def relation(self) -> str:
        """Between which data sets its guarantee holds."""
        return RELATIONS.get(self.sampling, ADD_OR_REMOVE)

    @property
    def words(self) -> str:
        """How the sample is drawn, in words."""
        return {
            "all": "no sampling: everybody is in every release",
            "poisson": f"Poisson sampling, q = {self.rate:.6g}, kept secret",
            "truncated_poisson": f"Poisson sampling, q = {self.rate:.6g}, cut to at most {self.most}, kept secret",
            "fixed_size": f"{self.most} of {self.population} without replacement, kept secret",
        }[self.sampling]


def library() -> Any:
    """Return the package ``dp_accounting``.

    Raises:
        ConfigurationError: If it is not installed.
    """
    try:
        import dp_accounting
    except ImportError as error:
        raise ConfigurationError(
            message(
                "privacy must have its accountant",
                received="no package dp-accounting",
                fix='install it: pip install "fedgan-lightning[privacy]"',
            )
        ) from error
    return dp_accounting


def check_accountant(name: str, releases: Sequence[Release] = ()) -> None:
    """Refuse an accountant that understates epsilon, or has no bound for the sampling.

    Raises:
        ConfigurationError: If it is so.
    """
    if name == "gdp":
        raise ConfigurationError(
            message("the CLT accountant understates epsilon", received="accountant=gdp", fix="choose pld or rdp")
        )
    known = {"all": ("pld", "rdp"), "poisson": ("pld", "rdp"), "truncated_poisson": ("pld",), "fixed_size": ("rdp",)}
    for release in releases:
        if name not in known[release.sampling]:
            raise ConfigurationError(
                message(
                    f"the accountant must have a bound for {release.words}",
                    received=f"accountant={name}",
                    fix=f"set accountant to {known[release.sampling][0]}",
                )
            )


def check_target(noise_multiplier: float | None, epsilon: float | None, budget: float | None, *, where: str) -> None:
    """Refuse both or neither of a noise multiplier and an epsilon to calibrate it to, and a budget without noise.

    Raises:
        ConfigurationError: If it is so.
    """
    if (noise_multiplier is None) == (epsilon is None):
        received = "neither" if epsilon is None else f"noise_multiplier={noise_multiplier:g} and epsilon={epsilon:g}"
        raise refused(
            f"exactly one of {where}.noise_multiplier and {where}.epsilon must be given", received, "set one of them"
        )
    if budget is not None and epsilon is not None:
        raise refused(
            "a budget must go with a noise multiplier: epsilon is one by itself",
            f"budget={budget:g} and epsilon={epsilon:g}",
            "leave out the budget",
        )
    if budget is not None and noise_multiplier == 0:
        raise refused(
            "without noise epsilon is infinite",
            f"budget={budget:g} with noise_multiplier=0",
            "set noise_multiplier > 0",
        )


def refused(rule: str, received: object, fix: str) -> ConfigurationError:
    """Return the error that says why settings give no guarantee."""
    return ConfigurationError(message(rule, received=received, fix=fix))


@checked(delta="(0, 1)")
def epsilon_of(releases: Sequence[Release], *, delta: float, accountant: Accountant = "pld") -> float:
    """Return the epsilon at ``delta`` of all releases together; infinite without noise, 0 without a release.

    Args:
        releases: All of one unit.
        delta: In (0, 1).
        accountant: ``pld`` (tight), or ``rdp`` (an upper bound that is looser; Mironov 2017).

    Raises:
        ConfigurationError: If the accountant has no bound for a sampling, or neighbours differ between releases.
    """
    listed = [release for release in releases if release.count]
    if not listed:
        return 0.0
    if any(release.noise_multiplier <= 0 for release in listed):
        return math.inf
    counts: dict[Release, int] = {}
    for release in listed:
        counts[release.kind] = counts.get(release.kind, 0) + release.count
    return _epsilon(tuple(replace(kind, count=count) for kind, count in counts.items()), delta, accountant)


@lru_cache(maxsize=4096)
def _epsilon(releases: tuple[Release, ...], delta: float, accountant: Accountant) -> float:
    """Return the same for kinds that are listed once; a run asks for the same again and again."""
    return float(_composed(releases, accountant).get_epsilon(delta))


def rounded_up(count: int, *, planned: int) -> int:
    """Return a count, rounded up to a multiple of a twentieth of those planned, and to no more than these.

    Epsilon of a rounded count bounds that of the count from above; computing it for every count would take half a
    second each.
    """
    step = max(1, planned // POINTS)
    return max(count, min(math.ceil(count / step) * step, planned))


def delta_at(releases: Sequence[Release], *, epsilon: float) -> float:
    """Return the delta at ``epsilon`` of all releases together, by privacy loss distributions."""
    return float(_composed(releases, "pld").get_delta(epsilon))


def gaussian_delta(epsilon: float, *, noise_multiplier: float, count: int = 1) -> float:
    """Return delta(epsilon) of ``count`` Gaussian releases without sampling, exactly.

    Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu) with mu = sqrt(count) / z (Balle and Wang 2018, theorem
    8).
    """
    from scipy.stats import norm

    mu = math.sqrt(count) / noise_multiplier
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)))


@checked(epsilon="(0, inf)", delta="(0, 1)")
def noise_for(
    releases: Callable[[float], Sequence[Release]], *, epsilon: float, delta: float, accountant: Accountant = "pld"
) -> float:
    """Return the least noise multiplier z whose releases cost at most ``epsilon``.

    Args:
        releases: From z to all releases of a run.
        epsilon: The target.
        delta: In (0, 1).
        accountant: As in :func:`epsilon_of`.

    Raises:
        ConfigurationError: If no noise is enough.
    """

    def by_renyi(z: float) -> list[Release]:
        """Return about the same releases, of a kind that a fast accountant knows."""
        return [replace(own, sampling="poisson") if own.sampling == "truncated_poisson" else own for own in releases(z)]

    target: dict[str, Any] = {"epsilon": epsilon, "delta": delta}
    guess = _least_noise(by_renyi, LEAST_NOISE, 1.0, accountant="rdp", **target)
    if accountant == "rdp":
        return guess
    return _least_noise(releases, TIGHTER * guess, guess, accountant=accountant, **target)


def _least_noise(
    releases: Callable[[float], Sequence[Release]],
    low: float,
    high: float,
    *,
    epsilon: float,
    delta: float,
    accountant: Accountant,
) -> float:
    """Return the least z that is enough, looked for from ``low`` to ``high`` first.

    Privacy loss distributions of little noise take minutes, so that the search must not begin far below.
    """
    from scipy.optimize import brentq

    def excess(log_z: float) -> float:
        spent = epsilon_of(releases(math.exp(log_z)), delta=delta, accountant=accountant)
        return math.log(max(spent, TINY) / epsilon)

    first, last = math.log(low), math.log(high)
    while excess(last) > 0:
        first, last = last, last + (last - first)
        if last > math.log(MOST_NOISE):
            raise ConfigurationError(
                message(
                    "some noise must be enough for the epsilon that is asked for",
                    received=f"epsilon={epsilon:g} at delta={delta:g}",
                    fix="raise epsilon, or ask for fewer rounds",
                )
            )
    while excess(first) <= 0:
        if first <= math.log(LEAST_NOISE):
            return math.exp(first)
        first, last = max(math.log(LEAST_NOISE), first - (last - first)), first
    found = float(brentq(excess, first, last, xtol=TOLERANCE / 2))
    while excess(found) > 0:
        found += TOLERANCE / 4
    return math.exp(found)


@checked(epsilon="(0, inf)", delta="(0, 1)", most="[1, inf)")
def most_releases(
    releases: Callable[[int], Sequence[Release]],
    *,
    epsilon: float,
    delta: float,
    most: int,
    accountant: Accountant = "pld",
) -> int:
    """Return the largest count, at most ``most``, whose releases cost at most ``epsilon``.

    Args:
        releases: From a count to all releases.
        epsilon: The budget.
        delta: In (0, 1).
        most: Where the search ends.
        accountant: As in :func:`epsilon_of`.
    """

    def fits(count: int) -> bool:
        return epsilon_of(releases(count), delta=delta, accountant=accountant) <= epsilon

    low, high = 0, 1
    while high < most and fits(high):
        low, high = high, min(2 * high, most)
    if high == most and fits(most):
        return most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _composed(releases: Sequence[Release], accountant: Accountant) -> Any:
    """Return the accountant of the library that has seen all releases."""
    check_accountant(accountant, releases)
    if len({release.relation for release in releases}) > 1:
        raise ConfigurationError(
            message(
                "all releases of a run must have the same neighbours",
                received=" and ".join(sorted({release.relation for release in releases})),
                fix="sample in one way for the whole run",
            )
        )
    da = library()
    replaces = releases[0].sampling == "fixed_size"
    relation = da.NeighboringRelation.REPLACE_ONE if replaces else da.NeighboringRelation.ADD_OR_REMOVE_ONE
    made = da.pld.PLDAccountant(relation) if accountant == "pld" else da.rdp.RdpAccountant(None, relation)
    for release in releases:
        made.compose(_event(da, release), release.count)
    return made


def _event(da: Any, release: Release) -> Any:
    """Return one release as the library's event."""
    z = release.noise_multiplier
    if release.sampling == "all" or (release.sampling == "poisson" and release.rate >= 1):
        return da.GaussianDpEvent(z)
    if release.sampling == "poisson":
        return da.PoissonSampledDpEvent(release.rate, da.GaussianDpEvent(z))
    if release.sampling == "truncated_poisson":
        return da.TruncatedSubsampledGaussianDpEvent(release.population, release.rate, release.most, z)
    # A replaced record moves the sum by up to 2 C; the library's RDP takes noise over what one record moves it by.
    gaussian = da.GaussianDpEvent(z / 2)
    return da.SampledWithoutReplacementDpEvent(release.population, release.most, gaussian)
