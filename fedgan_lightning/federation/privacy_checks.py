"""Settings under which a guarantee would not be true are refused before the first round."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from fedgan_lightning.checkpoints import BestCheckpoint
from fedgan_lightning.dp.accounting import refused
from fedgan_lightning.federation.algorithm import FederatedAlgorithm
from fedgan_lightning.federation.client_privacy import ClientLevelPrivacy
from fedgan_lightning.federation.label_balance import BalancedClients
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.preparation import validates
from fedgan_lightning.federation.sampling import FractionOfClients, PoissonSampling
from fedgan_lightning.gan.module import GAN
from fedgan_lightning.protocol import FederatedData

logger = logging.getLogger("fedgan_lightning")

#: What a refusal is made of: whether it is due, the rule, what was received, and the fix.
Case = tuple[bool, str, object, str]
#: Metrics that compare with what clients train on.
ON_CLIENTS = ("fid", "kid", "fid_raw", "kid_raw")


def check_privacy(federation: Any, model: Any, policy: Policy, data: FederatedData, trainer: Any = None) -> None:
    """Refuse settings under which the guarantee of a private run would not be true.

    Args:
        federation: The orchestrator.
        model: The global module.
        policy: What travels.
        data: The clients' data.
        trainer: The server's, where its callbacks matter.

    Raises:
        ConfigurationError: If there are any; it names the option and the fix.
    """
    example = getattr(model, "privacy", None)
    is_secret = isinstance(federation.clients, (PoissonSampling, FractionOfClients)) and federation.clients.secret
    if federation.privacy is None and example is None and not is_secret:
        return
    cases: list[Case] = [
        (
            is_secret and federation.privacy is None,
            "a secret cohort must belong to client-level privacy",
            f"{type(federation.clients).__name__} with secret=true, and federation.privacy=null",
            "set federation.privacy, or secret to false",
        ),
        (
            federation.local_epochs is not None,
            "the number of local steps must be public",
            f"local_epochs={federation.local_epochs}",
            "set federation.local_steps instead",
        ),
        (
            validates(data),
            "what is computed on private records without noise must not leave a client",
            "data.validation_share > 0",
            "set data.validation_share to 0",
        ),
        (
            example is not None and not isinstance(model, GAN),
            "example-level privacy must have a GAN of this package, which knows its records' gradients",
            type(model).__name__,
            "set model.privacy to null",
        ),
    ]
    if federation.privacy is not None:
        cases += _of_clients(federation, model, policy)
    for is_wrong, rule, received, fix in cases:
        if is_wrong:
            raise refused(rule, received, fix)
    if federation.privacy is not None and federation.secure is not None and federation.privacy.noise == "central":
        logger.warning("client-level privacy with central noise under secure aggregation: the server sees exact sums")
    public = any(own is not None and own.public_test_data for own in (federation.privacy, example))
    check_choices([] if trainer is None else trainer.callbacks, is_public=public)


def _of_clients(federation: Any, model: Any, policy: Policy) -> list[Case]:
    """Return what client-level privacy cannot go with."""
    privacy: ClientLevelPrivacy = federation.privacy
    aggregator, name = federation.aggregator, type(federation.aggregator).__name__
    beside = "client-level privacy covers the clipped update only; {} would travel beside it"
    averaged = [own for own, kind in policy.moments.items() if kind == "average" and own in policy.shared_parameters]
    augment, anchor = getattr(model, "augment", None), getattr(model, "anchor", None)
    algorithm = type(federation.algorithm)
    unknown = sorted({*privacy.scales} - {*policy.shared_networks})
    exchanged = [own for own, placement in policy.placements.items() if placement == "exchange"]
    return [
        (not aggregator.additive, f"{name} has no bounded sensitivity here", name, "use WeightedMean with uniform"),
        (
            aggregator.additive and (not aggregator.weighs_by_size or aggregator.weight(2) != aggregator.weight(1)),
            "client-level privacy needs every client to count the same",
            f"{name} with weights N_k",
            "set federation.aggregator to WeightedMean with weighting: uniform",
        ),
        (bool(policy.shared_buffers), beside.format("buffers"), "buffers=merge", "set federation.buffers to local"),
        (
            bool(averaged),
            beside.format("optimizer moments"),
            "optimizer_state=average",
            "set federation.optimizer_state to reset",
        ),
        (
            augment is not None and getattr(augment, "probability", None) is not None,
            beside.format("the augmentation's probability"),
            type(augment).__name__,
            "set model.augment to null, or one that does not adapt",
        ),
        (anchor is not None, beside.format("LeCam's anchors"), type(anchor).__name__, "set model.anchor to null"),
        (
            _sends_more(algorithm) and not federation.algorithm.covered,
            beside.format(f"what {algorithm.__name__} sends"),
            algorithm.__name__,
            "use FedGAN, FedProx, ServedGenerator, or MDGAN with num_batches: 1",
        ),
        (
            bool(federation.algorithm.covered) and privacy.noise == "distributed",
            f"distributed noise covers parameter updates, and what {algorithm.__name__} sends is none",
            f"{algorithm.__name__} with noise=distributed",
            "set federation.privacy.noise to central",
        ),
        (
            bool(exchanged),
            beside.format("a network that clients hand on"),
            f"sync.{exchanged[0].split('.')[0] if exchanged else ''}=exchange",
            "set it to average or local",
        ),
        (
            bool(unknown),
            "federation.privacy.scales must name networks that travel",
            ", ".join(unknown),
            f"choose from {', '.join(policy.shared_networks)}",
        ),
        *_of_selection(federation),
    ]


def _sends_more(algorithm: type[FederatedAlgorithm]) -> bool:
    base = FederatedAlgorithm
    return algorithm.entries is not base.entries or algorithm.answer is not base.answer


def _of_selection(federation: Any) -> list[Case]:
    """Return what makes the cohort, or the divisor, depend on what clients do."""
    rules, clients, secure = federation.rules, federation.clients, federation.secure
    chooses = "{} chooses clients by what they send"
    is_drawn = isinstance(clients, (PoissonSampling, FractionOfClients))
    return [
        (
            rules.over_selection > 1,
            chooses.format("over-selection"),
            f"rules.over_selection={rules.over_selection:g}",
            "set rules.over_selection to 1",
        ),
        (
            rules.counts_late,
            chooses.format("counting late updates"),
            rules.late_setting,
            rules.late_remedy,
        ),
        (
            isinstance(clients, BalancedClients),
            "BalancedClients chooses clients by the labels that they hold",
            "BalancedClients",
            "set federation.clients to PoissonSampling with secret: true, or AllClients",
        ),
        (
            federation.validator is not None,
            chooses.format("screening"),
            type(federation.validator).__name__,
            "set federation.validator to null: what cannot be right counts as zero anyway",
        ),
        (
            secure is not None and isinstance(clients, PoissonSampling),
            "whether a round stops must not depend on the data",
            "PoissonSampling under federation.secure, whose cohorts may be too small for a sum",
            "use AllClients",
        ),
        (
            federation.privacy.noise == "distributed" and bool(federation.transforms),
            "distributed noise must be added to clipped updates as they are",
            f"federation.transforms={type(next(iter(federation.transforms), None)).__name__}",
            "leave federation.transforms out",
        ),
        (
            federation.privacy.noise == "distributed" and secure is None,
            "distributed noise must be added under masks",
            "federation.secure=null",
            "set federation.secure to SecureAggregation, or noise to central",
        ),
        (
            federation.privacy.most_rounds is not None and is_drawn and clients.secret,
            "a cap on rounds must go with cohorts that need no secret",
            f"most_rounds={federation.privacy.most_rounds} with secret=true",
            "leave out most_rounds, which gives the amplification away, or set secret to false",
        ),
    ]


def check_choices(callbacks: Iterable[Any], *, is_public: bool) -> None:
    """Refuse callbacks that choose a checkpoint, or the end of training, by a metric of private data.

    The best checkpoint that is kept by default is not kept then.

    Args:
        callbacks: Those of the server's Trainer.
        is_public: Whether metrics compare with public test data.

    Raises:
        ConfigurationError: If one chooses, and the test data are not declared public, or it looks at clients' data.
    """
    for own in callbacks:
        watched = getattr(own, "monitor", None)
        if not isinstance(own, (EarlyStopping, ModelCheckpoint)) or watched is None:
            continue
        if isinstance(own, BestCheckpoint) and own.is_automatic:
            own.monitor, own.save_top_k = None, 0
            continue
        if is_public and watched not in ON_CLIENTS:
            continue
        raise refused(
            "a choice by private data must be paid for, and a choice by a metric is not",
            f"{type(own).__name__} by {watched}",
            f"monitor {watched}_test"
            if is_public
            else "keep no best checkpoint (best.monitor: null), or set privacy.public_test_data to true and monitor a "
            "metric of the test split, such as fid_test",
        )
