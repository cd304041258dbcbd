"""Client-level differential privacy: what a federation may reveal of all that one client holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from fedgan_lightning.dp.accounting import Accountant, Release, check_accountant, check_target, noise_for, refused
from fedgan_lightning.federation.optimizer_state import SCHEDULE
from fedgan_lightning.federation.sampling import AllClients, FractionOfClients, PoissonSampling, SelectedClients
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import ClientSampler

#: Clients below which noise that hides one of them drowns what the others say.
FEW = 100
#: What a client says of itself that follows from its task alone.
PUBLIC = ("steps", "optimizer_steps")
#: Share of the expected cohort that the noise of the clipping's count is, unless settings say otherwise.
COUNT_NOISE = 20


class ClientLevelPrivacy:
    """Hides all that one client holds, in all rounds, behind noise on the sum of clipped updates (DP-FedAvg).

    Every client's update v, over all networks that travel together, is cut to v min(1, C / |v / s|), with s the scale
    of each network. The server releases (sum of these + N(0, (z C s)^2)) / (q K): the divisor is that of the expected
    cohort, all clients count alike, and a client that fails, or whose answer is refused, counts as zero. A round is
    charged when its cohort is drawn. It goes with ``algorithm: ServedGenerator``: clients train the discriminator, and
    the server trains the generator on the noised one at no cost (Augenstein et al. 2020).

    Source: McMahan, Ramage, Talwar, Zhang 2018; adaptive clipping after Andrew, Thakkar, McMahan, Ramaswamy 2021.

    Args:
        clip: The bound C on an update's norm, > 0; where clipping is adaptive, its value in the first round. A third of
            the median norm is a good one: ninety of a hundred updates may be clipped.
        noise_multiplier: z: the noise's standard deviation over C. Exactly one of it and ``epsilon`` is given.
        epsilon: What all rounds together may cost; z is calibrated to it before the first one.
        budget: With ``noise_multiplier``: the run ends, as usual, before a round that would bring epsilon above it.
        delta: Probability with which the guarantee may fail, below one over the number of clients; default that number
            to the power -1.1.
        clipping: ``fixed``, or ``adaptive``: C follows the quantile ``target_quantile`` of the norms by a noised count.
        target_quantile: Share of clients that are not clipped, in (0, 1).
        clip_learning_rate: Step size eta of C, > 0.
        count_noise: Standard deviation of the count's noise; default a twentieth of the expected cohort.
        scales: Scale s by network, 1 where none is given.
        noise: ``central``: the server adds it, and sees updates (sums alone under secure aggregation);
            ``distributed``: clients add shares of it before they are masked, so that the server cannot take it away.
        survivors: For distributed noise: fewest clients whose sum is opened; default all that secure aggregation needs.
        colluding: For distributed noise: clients that may tell the server their share of it.
        accountant: ``pld``, or ``rdp``, which is looser, and has a bound for cohorts of a fixed size.
        most_rounds: Rounds that a client takes part in at most; for cohorts that nobody draws at random.
        expected_clients: What the sum is divided by, where the sampler does not say.
        public_test_data: Whether the data that metrics compare with are public, so that a checkpoint may be chosen by
            them.
        testing_seed: Makes noise and cohorts repeatable. Then nothing is private, and every output says so.

    Raises:
        ConfigurationError: If options contradict each other.
    """

    @checked(
        "federation.privacy",
        clip="(0, inf)",
        noise_multiplier="[0, inf)",
        epsilon="(0, inf)",
        budget="(0, inf)",
        delta="(0, 1)",
        target_quantile="(0, 1)",
        clip_learning_rate="(0, inf)",
        count_noise="(0, inf)",
        scales="(0, inf)",
        survivors="[1, inf)",
        colluding="[0, inf)",
        most_rounds="[1, inf)",
        expected_clients="[1, inf)",
        testing_seed="[0, inf)",
    )
    def __init__(
        self,
        *,
        clip: float,
        noise_multiplier: float | None = None,
        epsilon: float | None = None,
        budget: float | None = None,
        delta: float | None = None,
        clipping: Literal["fixed", "adaptive"] = "fixed",
        target_quantile: float = 0.5,
        clip_learning_rate: float = 0.2,
        count_noise: float | None = None,
        scales: dict[str, float] | None = None,
        noise: Literal["central", "distributed"] = "central",
        survivors: int | None = None,
        colluding: int = 0,
        accountant: Literal["pld", "rdp", "gdp"] = "pld",
        most_rounds: int | None = None,
        expected_clients: float | None = None,
        public_test_data: bool = False,
        testing_seed: int | None = None,
    ) -> None:
        check_accountant(accountant)
        check_target(noise_multiplier, epsilon, budget, where="federation.privacy")
        self.clip, self.noise_multiplier, self.epsilon, self.budget = float(clip), noise_multiplier, epsilon, budget
        self.delta, self.clipping, self.scales = delta, clipping, dict(scales or {})
        self.target_quantile, self.clip_learning_rate = target_quantile, clip_learning_rate
        self.count_noise = count_noise
        self.noise, self.survivors, self.colluding = noise, survivors, colluding
        self.accountant: Accountant = accountant  # type: ignore[assignment] # gdp is refused above
        self.most_rounds, self.expected_clients = most_rounds, expected_clients
        self.public_test_data, self.testing_seed = public_test_data, testing_seed
        for name, is_given in {"survivors": survivors is not None, "colluding": colluding > 0}.items():
            if is_given and noise == "central":
                raise refused(
                    f"{name} must belong to distributed noise",
                    f"federation.privacy.{name} with noise=central",
                    "set noise to distributed, or leave it out",
                )
        if noise == "distributed" and noise_multiplier is None:
            raise refused(
                "every client must know the noise multiplier that its share follows from",
                f"noise=distributed with epsilon={epsilon:g}",
                "set noise_multiplier: python -m fedgan_lightning privacy --target EPSILON says which",
            )
        if noise == "distributed" and clipping == "adaptive":
            raise refused(
                "adaptive clipping must have a server that adds the noise of its count",
                "clipping=adaptive with noise=distributed",
                "set clipping to fixed",
            )

    # ------------------------------------------------------------------ what a round costs

    def delta_of(self, population: int) -> float:
        """Return delta, for so many clients.

        Raises:
            ConfigurationError: If it is not below one over their number: then revealing one of them all is allowed.
        """
        found = float(population) ** -1.1 if self.delta is None else self.delta
        if found >= 1 / population:
            raise refused(
                "delta must be below one over the number of clients",
                f"{found:g} with {population} clients",
                f"set federation.privacy.delta below {1 / population:.3g}",
            )
        return found

    def expected(self, sampler: ClientSampler, num_clients: int) -> float:
        """Return the expected size q K of a cohort, which every sum is divided by."""
        release = self.one_round(sampler, num_clients)
        if self.expected_clients is not None:
            return self.expected_clients
        if release.sampling == "all":
            if self.most_rounds is not None and not isinstance(sampler, (AllClients, SelectedClients)):
                raise refused(
                    "a sum must be divided by a number that does not depend on who is there",
                    f"{type(sampler).__name__} without federation.privacy.expected_clients",
                    "set expected_clients",
                )
            return float(len(sampler.population(num_clients=num_clients, round=0)))
        return release.rate * num_clients if release.sampling == "poisson" else float(release.most)

    def one_round(self, sampler: ClientSampler, num_clients: int, *, noise_multiplier: float = 1.0) -> Release:
        """Return what a round releases: it follows from the class of the sampler.

        Raises:
            ConfigurationError: If nobody knows a bound for the sampler, or its cohorts are public.
        """
        common: dict[str, Any] = {"unit": "client", "noise_multiplier": noise_multiplier}
        kind = type(sampler)
        if kind in (AllClients, SelectedClients) or self.most_rounds is not None:
            return Release(sampling="all", **common)
        if isinstance(sampler, (PoissonSampling, FractionOfClients)) and kind in (PoissonSampling, FractionOfClients):
            if self.noise == "distributed":
                raise refused(
                    "the server knows the cohort; sampling does not amplify against it",
                    f"noise=distributed with {kind.__name__}",
                    "use AllClients, or set most_rounds and expected_clients, which account for no sampling",
                )
            if not sampler.secret:
                raise refused(
                    "amplification by sampling needs a secret cohort",
                    f"{kind.__name__} that draws from the public seed of the run",
                    "set federation.clients.init_args.secret to true",
                )
        if kind is PoissonSampling:
            return Release(sampling="poisson", rate=sampler.probability, **common)  # type: ignore[attr-defined]
        if kind is FractionOfClients:
            check_accountant(self.accountant, [Release(sampling="fixed_size", **common)])
            size = sampler.size(num_clients)  # type: ignore[attr-defined]
            return Release(sampling="fixed_size", rate=size / num_clients, population=num_clients, most=size, **common)
        raise refused(
            f"the accountant has no bound for {kind.__name__}",
            kind.__name__,
            "use PoissonSampling with secret: true, or AllClients, or set most_rounds and expected_clients",
        )

    def rounds_charged(self, rounds: int) -> int:
        """Return in how many of so many rounds one client can take part."""
        return rounds if self.most_rounds is None else min(rounds, self.most_rounds)

    def noise_of(self, sampler: ClientSampler, *, num_clients: int, rounds: int) -> float:
        """Return z: as it is given, or calibrated so that all rounds cost at most ``epsilon``."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None
        count = self.rounds_charged(rounds)

        def all_rounds(z: float) -> list[Release]:
            return [replace(self.one_round(sampler, num_clients, noise_multiplier=z), count=count)]

        target = {"epsilon": self.epsilon, "delta": self.delta_of(num_clients), "accountant": self.accountant}
        return noise_for(all_rounds, **target)  # type: ignore[arg-type]

    def split_noise(self, noise_multiplier: float, expected: float) -> tuple[float, float]:
        """Return the noise multiplier of updates, and the standard deviation of the count's noise; 0 where C is fixed.

        z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2): both together cost what z alone does (Andrew et al. 2021, theorem 1).

        Raises:
            ConfigurationError: If z >= 2 sigma_b, so that nothing is left for the updates.
        """
        if self.clipping == "fixed" or noise_multiplier == 0:
            return noise_multiplier, 0.0
        of_count = expected / COUNT_NOISE if self.count_noise is None else self.count_noise
        if noise_multiplier >= 2 * of_count:
            raise refused(
                "the noise of the count must be more than half the noise multiplier",
                f"count_noise={of_count:g} with z={noise_multiplier:g}",
                "raise count_noise, ask more clients per round, or set clipping to fixed",
            )
        return (noise_multiplier**-2 - (2 * of_count) ** -2) ** -0.5, of_count

    def next_clip(self, clip: float, share_below: float) -> float:
        """Return C exp(-eta (b - gamma)), for the noised share b of clients whose norm is at most C."""
        return clip * math.exp(-self.clip_learning_rate * (share_below - self.target_quantile))

    def warning(self, num_clients: int) -> str:
        """Return what there is to say to a federation of few clients; empty for one of many."""
        if num_clients >= FEW:
            return ""
        return (
            f"client-level privacy with {num_clients} clients: below about {FEW} the noise that hides one client is "
            "larger than what all others say together. For a few institutions use example-level privacy (model.privacy)"
        )


def public_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return what a client may say of itself under client-level privacy: nothing that follows from its data."""
    return {name: value for name, value in metrics.items() if name in PUBLIC or name.startswith(SCHEDULE)}
