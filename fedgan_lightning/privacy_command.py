"""``python -m fedgan_lightning privacy``: what a configuration guarantees and costs, before any training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from fedgan_lightning.dp.accounting import Release, epsilon_of, most_releases, noise_for
from fedgan_lightning.dp.statement import LEAVES, NO_PRIVACY, Guarantee
from fedgan_lightning.errors import ConfigurationError, message

#: Rounds beyond which nobody looks for the largest number that a budget allows.
MOST_ROUNDS = 1_000_000


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}. See: python -m fedgan_lightning privacy --help")


def main(arguments: Sequence[str]) -> int:
    """Print the guarantee of a configuration in words; return the exit code."""
    parser = _Parser(
        prog="python -m fedgan_lightning privacy",
        description="What a configuration guarantees. All options of fit may follow.",
    )
    parser.add_argument("--target", type=float, help="an epsilon: print the noise, and the rounds, that it allows")
    own, others = parser.parse_known_args(arguments)
    if own.target is not None and not own.target > 0:
        raise ConfigurationError(message("--target must be an epsilon above 0", received=own.target, fix="write one"))
    from fedgan_lightning.cli import built
    from fedgan_lightning.federation.privacy_checks import check_privacy
    from fedgan_lightning.federation.privacy_keeper import PrivacyKeeper

    cli = built(others)
    federation, model, data = cli.orchestrator, cli.model.model, cli.datamodule
    if federation.privacy is None and getattr(model, "privacy", None) is None:
        print(f"{NO_PRIVACY}\n{LEAVES}")
        return 0
    data.prepare_data()
    data.setup("fit")
    check_privacy(federation, model, federation.policy_of(model), data, cli.trainer)
    keeper = PrivacyKeeper(federation, model, data)
    print(f"After all {federation.rounds} rounds:")
    for guarantee in keeper.guarantees(planned=True):
        print(*(f"  {line}" for line in guarantee.lines()), sep="\n")
        if own.target is not None:
            print(*(f"  {line}" for line in targets(guarantee, own.target)), sep="\n")
    for name, shares in signal_to_noise(keeper, federation, model).items():
        print(f"  {name}: {shares}")
    return 0


def targets(guarantee: Guarantee, epsilon: float) -> list[str]:
    """Return which noise, and which number of releases, an epsilon allows.

    Args:
        guarantee: That of the configuration.
        epsilon: The target.
    """
    release: Release = guarantee.release
    options: dict[str, Any] = {"delta": guarantee.delta, "accountant": guarantee.accountant}
    z = noise_for(lambda noise: [replace(release, noise_multiplier=noise)], epsilon=epsilon, **options)
    found = [f"For epsilon {epsilon:g}: noise_multiplier {z:.5g} for the {release.count} releases planned;"]
    if release.noise_multiplier > 0:
        counted = {"epsilon": epsilon, "most": MOST_ROUNDS, **options}
        most = most_releases(lambda count: [replace(release, count=count)], **counted)
        spent = epsilon_of([replace(release, count=most)], **options)
        found.append(f"or {most} releases (epsilon {spent:.4g}) with noise_multiplier {release.noise_multiplier:g}.")
    return found


def signal_to_noise(keeper: Any, federation: Any, model: Any) -> dict[str, str]:
    """Return how long the noise of a sum is beside the longest that the sum can be: z sqrt(d) over the cohort."""
    if keeper.client is None or not keeper.z:
        return {}
    parameters = dict(model.named_parameters())
    numbers = sum(parameters[name].numel() for name in federation.policy_of(model).shared_parameters)
    ratio = keeper.z * numbers**0.5 / keeper.divisor
    longer = "the noise is the longer" if ratio > 1 else "the signal can be the longer"
    text = f"z sqrt(d) / (q K) = {ratio:.3g} for d = {numbers} numbers and {keeper.divisor:g} clients a round: {longer}"
    return {"Noise over signal": f"{text} in every single round"}
