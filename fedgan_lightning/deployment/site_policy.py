"""What a site answers, whatever it is asked: a file at the site, which no server sees or changes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedgan_lightning.documents import check_settings_file, read_settings
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.options import checked
from fedgan_lightning.protocol import ClientTask


@dataclass(frozen=True)
class PrivacyLimit:
    """What a site lets its training cost.

    Attributes:
        epsilon: At most.
        delta: At which it is computed.
    """

    epsilon: float
    delta: float


class SitePolicy:
    """Limits of a site on what is asked of it; the defaults are for a site that trusts its server with nothing more.

    Args:
        metrics: Class names of the metrics whose sums it tells; ``None`` takes those of its own configuration, which
            bounds this list in any case.
        sent_networks: Whether sums may be of features of a network that the server sends. Who chooses its weights can
            choose them so that sums tell single samples.
        fewest_samples: Sums over fewer are not told, under masks neither, nor those that differ from earlier ones by
            fewer.
        unmixing: Whether sums are told from which single samples could be computed, because they are over fewer
            samples than their numbers determine.
        new_members: Whether sums, and updates under masks, are told of which a server has those of another group of
            sites: the difference belongs to those who are in one group alone.
        most_queries_a_day: Queries about samples that are answered within 24 hours.
        most_local_steps: Steps of a round; ``None`` takes those of its own configuration.
        most_local_epochs: Epochs of a round; ``None`` takes those of its own configuration.
        most_seconds: Seconds of a task, after which it is given up; ``None`` sets no limit.
        largest_message_megabytes: Longest task or question that is read.
        networks: Networks of which updates may leave; ``None`` takes those that its own configuration shares.
        privacy: ``epsilon`` and ``delta`` of all that training may ever tell of one record of this site, over all runs;
            see :class:`~fedgan_lightning.deployment.site_budget.SiteBudget`. ``None`` sets no limit.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    @checked(
        "policy",
        fewest_samples="[1, inf)",
        most_queries_a_day="[0, inf)",
        most_local_steps="[1, inf)",
        most_local_epochs="[1, inf)",
        most_seconds="(0, inf)",
        largest_message_megabytes="(0, inf)",
        privacy="(0, inf)",
    )
    def __init__(
        self,
        *,
        metrics: Sequence[str] | None = None,
        sent_networks: bool = False,
        fewest_samples: int = 10,
        unmixing: Literal["refuse", "answer"] = "refuse",
        new_members: Literal["refuse", "answer"] = "refuse",
        most_queries_a_day: int = 200,
        most_local_steps: int | None = None,
        most_local_epochs: int | None = None,
        most_seconds: float | None = 3600.0,
        largest_message_megabytes: float = 1000.0,
        networks: Sequence[str] | None = None,
        privacy: dict[str, float] | None = None,
    ) -> None:
        self.metrics = None if metrics is None else tuple(metrics)
        self.sent_networks, self.fewest_samples, self.unmixing = sent_networks, fewest_samples, unmixing
        self.new_members, self.most_queries_a_day = new_members, most_queries_a_day
        self.most_local_steps, self.most_local_epochs = most_local_steps, most_local_epochs
        self.most_seconds, self.largest_message_megabytes = most_seconds, largest_message_megabytes
        self.networks = None if networks is None else tuple(networks)
        self.privacy = None if privacy is None else _limit(privacy)

    @classmethod
    def of_trial(cls) -> SitePolicy:
        """Return the policy of a site without settings of its own: a trial's, or one of Flower's simulation, whose
        server chooses all settings and has all data anyway.
        """
        return cls(
            sent_networks=True,
            unmixing="answer",
            new_members="answer",
            most_queries_a_day=1_000_000,
            most_seconds=None,
        )

    @classmethod
    def read(cls, path: str | Path) -> SitePolicy:
        """Return the policy in a YAML file, one option a line.

        Raises:
            ConfigurationError: If it is no such file, or names an option that there is not.
        """
        import inspect

        import yaml

        text = read_settings(path)
        options = yaml.safe_load(text) if text.strip() else {}
        known = [*inspect.signature(cls).parameters]
        if options is None:
            options = {}
        if not isinstance(options, dict):
            check_settings_file(path)
        if unknown := [str(name) for name in options if name not in known]:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            raise ConfigurationError(
                message(
                    f"a site's policy must have options of {', '.join(known)}",
                    received=f"{unknown[0]} in {path}",
                    fix=f"write {near[0]}" if near else "take the line out",
                )
            )
        try:
            return cls(**options)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error}") from error

    # ------------------------------------------------------------------ what it says of a task

    def check_size(self, num_bytes: int) -> None:
        """Refuse a message that is too long.

        Raises:
            ConfigurationError: If it is.
        """
        if num_bytes > self.largest_message_megabytes * 1e6:
            raise self._refused(
                "a message to this site", f"{num_bytes / 1e6:.1f} MB", "largest_message_megabytes", unit=" MB"
            )

    def check_task(self, task: ClientTask, *, own_steps: int | None, own_epochs: int | None) -> None:
        """Refuse a task that is longer than the site's policy, or its own configuration, has it.

        Args:
            task: What the server asks for.
            own_steps: Most steps of a round in the site's own configuration.
            own_epochs: The same of epochs.

        Raises:
            ConfigurationError: If it is.
        """
        steps = own_steps if self.most_local_steps is None else self.most_local_steps
        epochs = own_epochs if self.most_local_epochs is None else self.most_local_epochs
        for name, asked, most in (("steps", task.steps, steps), ("epochs", task.epochs, epochs)):
            if asked is not None and asked > (most or 0):
                where = "policy" if getattr(self, f"most_local_{name}") is not None else "configuration"
                raise ConfigurationError(
                    message(
                        f"a task must have at most the {most or 0} local {name} of this site's own {where}",
                        received=asked,
                        fix=f"agree on federation.local_{name}, or set most_local_{name} in the site's policy",
                    )
                )

    def check_networks(self, shared: Sequence[str]) -> None:
        """Refuse a configuration that shares networks which the policy keeps.

        Raises:
            ConfigurationError: If it does.
        """
        if self.networks is not None and (kept := sorted({*shared} - {*self.networks})):
            raise ConfigurationError(
                message(
                    "a configuration must share no network that the site's policy keeps",
                    received=f"{', '.join(kept)}, with networks: {list(self.networks)} in the policy",
                    fix=f"set federation.sync.{kept[0]}: local, or add it to networks in the site's policy",
                )
            )

    def _refused(self, what: str, received: str, option: str, *, unit: str = "") -> ConfigurationError:
        return ConfigurationError(
            message(
                f"{what} must have at most the {getattr(self, option):g}{unit} of its policy",
                received=received,
                fix=f"raise {option} in the site's policy",
            )
        )


def _limit(given: Mapping[str, float]) -> PrivacyLimit:
    if {*given} != {"epsilon", "delta"} or given["delta"] >= 1:
        raise ConfigurationError(
            message(
                "policy.privacy must have an epsilon, and a delta below 1",
                received=", ".join(f"{name}: {value:g}" for name, value in given.items()) or "neither",
                fix="write privacy: {epsilon: 8.0, delta: 1.0e-5}",
            )
        )
    return PrivacyLimit(epsilon=float(given["epsilon"]), delta=float(given["delta"]))
