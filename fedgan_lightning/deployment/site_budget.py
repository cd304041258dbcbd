"""What a site's records have paid for training, and what they may: its own ledger, which no server sees or changes.

The ledger of a federation is the server's, and a server can write what it likes, or begin anew. So a site writes down
every step of its discriminator before it takes it, over restarts and runs, and stops by itself.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from fedgan_lightning.deployment.site_memory import SiteMemory
from fedgan_lightning.deployment.site_policy import PrivacyLimit
from fedgan_lightning.dp.accounting import Accountant, Release, refused
from fedgan_lightning.dp.charges import NAME, Ledger
from fedgan_lightning.errors import CheckpointError, ConfigurationError, message
from fedgan_lightning.federation.privacy_checks import check_privacy
from fedgan_lightning.gan.example_privacy import ExampleLevelPrivacy
from fedgan_lightning.protocol import ClientTask, FederatedData

#: What the ledger held when it was written last is remembered under this name, in another file.
KNOWN = "privacy"


class SiteBudget:
    """Charges a site for its tasks, before it trains.

    A task is charged when it is taken: one that fails, or whose answer is lost, is paid for, and so is a round that the
    server asks for again. Its steps are those of its own configuration and policy, whatever is asked (a longer task is
    refused before), and so are noise, bound and number of records.

    Args:
        memory: Of the site; the ledger lies beside it.
        module: The client's module.
        data: The site's own.
        federation: The orchestrator of its own configuration.
        limit: What its policy allows; ``None`` keeps the ledger alone.

    Raises:
        ConfigurationError: If there is a limit, and the configuration gives no guarantee that it could hold to.
    """

    def __init__(
        self, memory: SiteMemory, module: Any, data: FederatedData, federation: Any, *, limit: PrivacyLimit | None
    ) -> None:
        self.memory, self.data, self.limit = memory, data, limit
        self.privacy: ExampleLevelPrivacy | None = getattr(module, "privacy", None)
        self.draws = int(getattr(module, "d_steps", 1))
        if limit is not None:
            self._check(limit)
            check_privacy(federation, module, federation.policy_of(module), data)

    @property
    def num_examples(self) -> int:
        """Records of this site that are trained on."""
        return self.data.num_examples(0)

    def charge(self, task: ClientTask) -> None:
        """Write down what a task will release.

        Raises:
            ConfigurationError: If it would cost more than the policy allows, or nobody can say what it costs, or the
                ledger has lost something.
        """
        if self.privacy is None:
            return
        if task.steps is None:
            raise refused("a private task must be counted in steps", "one of epochs", "set federation.local_steps")
        if self.privacy.noise is None:
            raise refused(
                "every site must know the noise multiplier that its steps follow from",
                "model.privacy.epsilon in its configuration",
                "set model.privacy.noise_multiplier: python -m fedgan_lightning privacy says which",
            )
        count, noise = task.steps * self.draws, self.privacy.noise
        release = self.privacy.release(self.num_examples, noise_multiplier=noise, count=count)
        with self.memory.opened() as known:  # which nobody else writes meanwhile
            ledger = self._ledger(known)
            if (limit := self.limit) is not None and (found := self._above(ledger, release)):
                raise refused(
                    f"a site's training must cost at most the epsilon {limit.epsilon:g} at delta {limit.delta:g} of "
                    "its policy",
                    f"{found:.4g} with this task",
                    "end the run here; or raise privacy.epsilon in the site's policy",
                )
            ledger.charge([release])
            known[KNOWN] = ledger.state_dict()

    def told(self) -> str:
        """Return, in words, what has been spent; nothing for a site without privacy."""
        if self.privacy is None:
            return ""
        delta = self.privacy.delta if self.limit is None else self.limit.delta
        with self.memory.opened() as known:
            ledger = self._ledger(known)
        of = "" if self.limit is None else f" of {self.limit.epsilon:g}"
        return (
            f"epsilon {ledger.epsilon('example', delta=delta):.4g}{of} at delta {delta:g} spent, in "
            f"{sum(own.count for own in ledger.releases)} steps"
        )

    def _ledger(self, known: MutableMapping[str, Any]) -> Ledger:
        """Return the ledger; of two files one would have to be changed by hand with the other to lose anything."""
        assert self.privacy is not None
        path = self.memory.folder / NAME
        ledger = Ledger(path, is_seeded=self.privacy.testing_seed is not None, mode=0o600)
        try:
            ledger.restore(known.get(KNOWN, Ledger().state_dict()))
        except CheckpointError as error:
            raise ConfigurationError(
                message(
                    "a site must remember what its training has cost",
                    received=f"{path} without something that {self.memory.path.name} knows of",
                    fix="restore the file: what was spent stays spent",
                )
            ) from error
        return ledger

    def _above(self, ledger: Ledger, release: Release) -> float:
        """Return the epsilon with another release, if it is above the limit; else 0.

        Renyi's bound is looser and takes no time, so it settles all but the last rounds.
        """
        assert self.limit is not None
        is_cut = any(own.sampling == "truncated_poisson" for own in (*ledger.releases, release))
        accountants: tuple[Accountant, ...] = ("pld",) if is_cut else ("rdp", "pld")
        found = 0.0
        for accountant in accountants:
            found = ledger.epsilon("example", delta=self.limit.delta, accountant=accountant, also=[release])
            if found <= self.limit.epsilon:
                return 0.0
        return found

    def _check(self, limit: PrivacyLimit) -> None:
        if self.privacy is None:
            raise refused(
                "a site with a privacy budget must train with model.privacy",
                "a configuration without",
                "set model.privacy everywhere, or take privacy out of the site's policy",
            )
        if self.privacy.testing_seed is not None:
            raise refused(
                "a site with a privacy budget must add noise that nobody can draw again",
                f"model.privacy.testing_seed={self.privacy.testing_seed}",
                "leave it out",
            )
        if limit.delta >= 1 / self.num_examples:
            raise refused(
                "delta of a site's policy must be below one over the number of its records",
                f"{limit.delta:g} with {self.num_examples} records",
                f"set it below {1 / self.num_examples:.3g}",
            )
