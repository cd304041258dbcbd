"""What a private run has spent, and the secret numbers of its rounds."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from fedgan_lightning.dp.accounting import Release, epsilon_of
from fedgan_lightning.dp.charges import NAME, NOT_PRIVATE, Ledger
from fedgan_lightning.dp.randomness import SecretStream, new_key
from fedgan_lightning.dp.statement import Guarantee
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.client_privacy import ClientLevelPrivacy
from fedgan_lightning.federation.distributed_noise import check_range
from fedgan_lightning.federation.example_charges import ExampleCharges
from fedgan_lightning.federation.ranks import Ranks
from fedgan_lightning.federation.round_schedules import steps_of
from fedgan_lightning.federation.sampling import FractionOfClients, PoissonSampling, SelectedClients
from fedgan_lightning.federation.secure import SecureAggregation
from fedgan_lightning.federation.transforms.private import BELOW, CLIP, PrivateUpdates, with_noise
from fedgan_lightning.gan.example_privacy import ExampleLevelPrivacy
from fedgan_lightning.packing import Packed
from fedgan_lightning.protocol import Aggregate, FederatedData
from fedgan_lightning.states import network_of

#: From the total of a round to the one that is released.
Noised: TypeAlias = Callable[[Aggregate], Aggregate] | None

logger = logging.getLogger("fedgan_lightning")


class PrivacyKeeper:
    """Charges every round of a private run before it is drawn, and has the noise that is added to its sum.

    Args:
        federation: The orchestrator.
        model: The global module.
        data: The clients' data.
        folder: The run directory, for the ledger; ``None`` keeps it in memory.
        ranks: The processes that share the run: the first one draws for all.

    Raises:
        ConfigurationError: If delta is too large, the sampler has no bound, or no noise is enough.
    """

    def __init__(
        self,
        federation: Any,
        model: Any,
        data: FederatedData,
        *,
        folder: Path | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.client: ClientLevelPrivacy | None = federation.privacy
        self.example: ExampleLevelPrivacy | None = getattr(model, "privacy", None)
        self.ranks, self.data, self.sampler = ranks if ranks is not None else Ranks(), data, federation.clients
        self.rounds, self.draws = federation.rounds, int(getattr(model, "d_steps", 1))
        self.steps = [_steps(federation, round) for round in range(federation.rounds)]
        self.is_seeded = any(own is not None and own.testing_seed is not None for own in (self.client, self.example))
        path = folder / NAME if folder is not None and self.ranks.rank == 0 else None
        self.ledger = Ledger(path, is_seeded=self.is_seeded)
        self._keys: dict[str, bytes] = {}
        self.covered = covered_by(federation.algorithm)
        self.clip = 0.0
        if self.client is not None:
            count = self.num_clients
            self.delta = self.client.delta_of(count)
            self.divisor = self.client.expected(self.sampler, count)
            self.z = self.client.noise_of(self.sampler, num_clients=count, rounds=self.rounds)
            self.accounted = self.z
            if self.client.noise == "distributed":
                check_range(self.client, federation.secure, num_clients=count)
                parameters = dict(model.named_parameters())
                numbers = sum(parameters[own].numel() for own in federation.policy_of(model).shared_parameters)
                self.accounted = effective_noise(
                    self.z, clip=self.client.clip, secure=federation.secure, numbers=numbers
                )
            self.update_noise, self.count_noise = self.client.split_noise(self.z, self.divisor)
            self.clip = self.client.clip
            if warning := self.client.warning(count):
                logger.warning(warning)
        self.examples = None
        if self.example is not None:
            steps = [own * self.draws for own in self.steps]
            self.examples = ExampleCharges(self.example, data, self.ledger, steps=steps)

    @classmethod
    def of(cls, federation: Any, model: Any, data: FederatedData, folder: Path) -> PrivacyKeeper | None:
        """Return the keeper of a run; ``None`` for one without privacy."""
        if federation.privacy is None and getattr(model, "privacy", None) is None:
            return None
        return cls(federation, model, data, folder=folder, ranks=federation.ranks)

    @property
    def _terms(self) -> dict[str, Any]:
        """At which delta epsilon is computed, and how."""
        assert self.client is not None
        return {"delta": self.delta, "accountant": self.client.accountant}

    @property
    def num_clients(self) -> int:
        """Clients that could ever be asked."""
        selected = isinstance(self.sampler, SelectedClients)
        return len(self.sampler.clients) if selected else self.data.num_clients  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ before a round

    def is_exhausted(self, round: int) -> bool:
        """Return whether there must not be another round, and say why."""
        if reason := self.exhausted(round):
            logger.warning(reason)
        return bool(reason)

    def exhausted(self, round: int) -> str:
        """Return why there must not be another round; empty if there may be."""
        if self.client is not None and self.client.budget is not None:
            cost = partial(self.ledger.epsilon, "client", also=[self._release()], **self._terms)
            planned = self.client.rounds_charged(self.rounds)
            if found := _above(cost, self.client.budget, planned=planned):
                return _exhausted(round, found, self.delta, self.client.budget, "client")
        if self.examples is not None and self.examples.privacy.budget is not None:
            privacy, budget = self.examples.privacy, self.examples.privacy.budget
            cost = partial(self.examples.epsilon, more=self.examples.of_round(round))
            if found := _above(cost, budget, planned=sum(self.examples.steps)):
                return _exhausted(round, found, privacy.delta, budget, "example")
        return ""

    def begin_round(self, round: int) -> tuple[int, ...] | None:
        """Charge a round, and return its cohort where it is drawn in secret; ``None`` leaves that to the sampler.

        What is charged is written down before anybody is asked. A round that is given up after that is charged all the
        same, and the next attempt has new noise.
        """
        if self.client is None:
            return None
        mine = {name: new_key(self.client.testing_seed, name, round).hex() for name in ("cohort", "noise")}
        self._keys = {name: bytes.fromhex(key) for name, key in self.ranks.exchange(mine)[0].items()}
        if self.client.most_rounds is not None:
            return None  # what is charged depends on who is asked
        self.ledger.charge([self._release()])
        stream, count = SecretStream(self._keys["cohort"]), self.data.num_clients
        if isinstance(self.sampler, PoissonSampling):
            return stream.chosen(count, rate=self.sampler.probability)
        if isinstance(self.sampler, FractionOfClients):
            return stream.subset(count, size=self.sampler.size(count))
        return None

    def admitted(self, cohort: Sequence[int], round: int) -> tuple[int, ...]:
        """Return those of a cohort that may take part, and charge for them what is charged by client."""
        if self.client is not None and self.client.most_rounds is not None:
            asked, most = self.ledger.counts.setdefault("rounds", {}), self.client.most_rounds
            cohort = [client for client in cohort if asked.get(str(client), 0) < most]
            before = max(asked.values(), default=0)
            asked |= {str(client): asked.get(str(client), 0) + 1 for client in cohort}
            self.ledger.charge([self._release()] * (max(asked.values(), default=0) - before))
        if self.examples is not None:
            self.examples.charge(cohort, round)
        return tuple(cohort)

    def _release(self) -> Release:
        """Return what a round releases."""
        assert self.client is not None
        one = self.client.one_round(self.sampler, self.num_clients, noise_multiplier=self.accounted)
        return dataclasses.replace(one, clip=float(f"{self.clip:.6g}"))

    # ------------------------------------------------------------------ a round

    @property
    def hyperparameters(self) -> dict[str, float]:
        """What clients are told: the round's bound C, where it moves."""
        adaptive = self.client is not None and self.client.clipping == "adaptive"
        return {CLIP: self.clip} if adaptive else {}

    @property
    def public_images(self) -> float | None:
        """Samples that a client is taken to see in a step, where nothing may follow from data."""
        return None if self.client is None else float(getattr(self.data, "batch_size", 1))

    def transform(self) -> PrivateUpdates:
        """Return the transform of updates of a run with client-level privacy."""
        assert self.client is not None
        return private_updates(self.client, covered=self.covered, divisor=self.divisor, noised=self.noised)

    def noised(self, total: Aggregate) -> Aggregate:
        """Return the total of a round as it is released, and move the bound C for the next."""
        assert self.client is not None
        below = f"{namespaces.ALGORITHM}{BELOW}"
        stream, delta, extras = SecretStream(self._keys["noise"]), dict(total.delta), dict(total.extras)
        if self.client.noise == "central" and self.update_noise > 0:
            unit = self.update_noise * self.clip / self.divisor
            stds = {name: unit * self.client.scales.get(network_of(name), 1.0) for name in delta}
            delta = with_noise(delta, stds=stds, normals=stream.normals)
            own = {name: extras[name] for name in self.covered}
            extras |= with_noise(own, stds=dict.fromkeys(own, unit), normals=stream.normals)
        if below in extras:  # the mean of b - 1/2 over the expected cohort
            noise = self.count_noise * float(stream.normals(1)[0]) / self.divisor
            self.clip = self.client.next_clip(self.clip, float(extras.pop(below)) + noise + 0.5)
        return dataclasses.replace(total, delta=Packed.of(delta), extras=Packed.of(extras))

    # ------------------------------------------------------------------ what is told

    def metrics(self) -> dict[str, float]:
        """Return what has been spent, for loggers; from above, where computing it takes long."""
        found: dict[str, float] = {}
        if self.client is not None:
            planned = self.client.rounds_charged(self.rounds)
            found["privacy/epsilon"] = self.ledger.epsilon("client", planned=planned, **self._terms)
            if self.client.clipping == "adaptive":
                found["privacy/clip"] = self.clip
        if self.examples is not None:
            found["privacy/epsilon_example"] = self.examples.epsilon(planned=sum(self.examples.steps))
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def guarantees(self, *, planned: bool = False) -> list[Guarantee]:
        """Return what is guaranteed, by unit.

        Args:
            planned: After all rounds, and not for what has been spent.
        """
        found: list[Guarantee] = []
        if self.client is not None:
            count = self.client.rounds_charged(self.rounds)
            release = self._release()
            spent = [dataclasses.replace(release, count=count)] if planned else self.ledger.of("client")
            found.append(
                Guarantee(
                    release=dataclasses.replace(release, count=sum(own.count for own in spent)),
                    epsilon=epsilon_of(spent, **self._terms),
                    delta=self.delta,
                    accountant=self.client.accountant,
                    population=self.num_clients,
                    noise=self.client.noise,
                    is_seeded=self.is_seeded,
                )
            )
        if self.examples is not None:
            of_examples = self.examples.guarantee(planned=planned, is_seeded=self.is_seeded)
            found += [] if of_examples is None else [of_examples]
        return found

    def facts(self) -> dict[str, Any]:
        """Return what a summary says, as plain values."""
        found: dict[str, Any] = {own.unit: own.plain() for own in self.guarantees()}
        return {**({"note": NOT_PRIVATE} if self.is_seeded else {}), **found}

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger and the bound; no key is in it."""
        return {"ledger": self.ledger.state_dict(), "clip": self.clip}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Begin a run, or go on with one.

        Raises:
            CheckpointError: If the ledger is shorter than the checkpoint's.
        """
        failure: Exception | None = None
        try:
            if state is None:
                self.ledger.begin()
            else:
                self.ledger.restore(state["ledger"])
                self.clip = float(state["clip"])
        except Exception as error:  # of the one process that has the file
            failure = error
        self.ranks.raise_if_any_rank_failed(failure)
        self.ledger.take(self.ranks.exchange(self.ledger.state_dict())[0])


def private_parts(federation: Any) -> list[PrivateUpdates]:
    """Return what comes first of a chain of transforms: at the server with noise, at a site without."""
    if federation.privacy is None:
        return []
    if federation.keeper is not None:
        return [federation.keeper.transform()]
    # what the server divides by is none of a site's business
    return [private_updates(federation.privacy, covered=covered_by(federation.algorithm))]


def covered_by(algorithm: FederatedAlgorithm) -> list[str]:
    """Return the names in an update of what privacy covers beside parameter updates, in order."""
    return [f"{namespaces.ALGORITHM}{name}" for name in sorted(algorithm.covered)]


def private_updates(
    privacy: ClientLevelPrivacy, *, covered: Sequence[str] = (), divisor: float = 1.0, noised: Noised = None
) -> PrivateUpdates:
    """Return the transform that the settings describe; arguments as in :class:`PrivateUpdates`."""
    of_server: dict[str, Any] = {"divisor": divisor, "noised": noised, "counts": privacy.clipping == "adaptive"}
    return PrivateUpdates(clip=privacy.clip, scales=privacy.scales, covered=covered, **of_server)


def effective_noise(z: float, *, clip: float, secure: SecureAggregation, numbers: int) -> float:
    """Return z of noise that is added to rounded updates: rounding to steps lengthens each by step sqrt(d) / 2.

    Args:
        z: The noise multiplier.
        clip: The bound C.
        secure: Says how long a step is.
        numbers: d: numbers of an update.
    """
    longer = secure.ring("delta", "").step * math.sqrt(numbers) / 2
    return z * clip / (clip + longer)


def _steps(federation: Any, round: int) -> int:
    scheduled: Mapping[str, Any] = steps_of(federation.schedules, round, federation.rounds)
    return int(scheduled.get("steps") or federation.local_steps or 0)


def _above(cost: Callable[..., float], budget: float, *, planned: int) -> float:
    """Return an epsilon that is above a budget; 0 for one that is not. Mostly the bound from above settles it."""
    if cost(planned=planned) <= budget or (found := cost()) <= budget:
        return 0.0
    return found


def _exhausted(round: int, epsilon: float, delta: float, budget: float, unit: str) -> str:
    return (
        f"round {round} would bring epsilon to {epsilon:.4g} at delta {delta:.3g} for one {unit}; the budget is "
        f"{budget:.4g}: training ends here"
    )
