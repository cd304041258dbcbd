"""Checks of a federation before its first round: settings, Trainer, cohorts."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from fedgan_lightning.errors import ConfigurationError, FedGANError, message, refuse_first
from fedgan_lightning.federation.optimizer_state import optimizers_in
from fedgan_lightning.federation.policy import Policy
from fedgan_lightning.federation.preparation import client_copy
from fedgan_lightning.federation.round_schedules import check_names
from fedgan_lightning.federation.sampling import AllClients
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.federation.transform_chain import TransformChain
from fedgan_lightning.gan.checks import check_minibatch
from fedgan_lightning.gan.module import GAN
from fedgan_lightning.hooks import DataHook, offers
from fedgan_lightning.protocol import Aggregator, FederatedData, SizedBatches
from fedgan_lightning.seeding import isolated_rng

#: Names under which Lightning knows what a federation can compute in.
PRECISIONS = ("64-true", "64", "32-true", "32", "bf16-mixed", "bf16", "bf16-true")


def checked_work(*, local_steps: int | None, local_epochs: int | None) -> int | None:
    """Return the local steps of a round, 20 where neither steps nor epochs are given.

    Raises:
        ConfigurationError: If both are given.
    """
    if local_steps is not None and local_epochs is not None:
        raise ConfigurationError(
            message(
                "local work must be counted in steps or in epochs",
                received=f"local_steps={local_steps} and local_epochs={local_epochs}",
                fix="set one of them to null",
            )
        )
    if local_steps is None and local_epochs is None:
        return 20
    return local_steps


def checked_trainer(
    trainer: L.Trainer, module: L.LightningModule, *, aggregator: Aggregator
) -> tuple[ServerModule, FederatedData]:
    """Return the server's module and the federated data that a Trainer fits.

    Raises:
        ConfigurationError: If the Trainer cannot run a federation.
    """
    check_precision(trainer.precision)
    data, several = getattr(trainer, "datamodule", None), trainer.world_size > 1 and not aggregator.additive
    cut = "an epoch must be a whole round, which nothing cuts short", "set federation.rounds and federation.local_steps"
    wrong: list[tuple[bool, str, object, str]] = [
        (
            not isinstance(module, ServerModule),
            "a FederatedOrchestrator must train a ServerModule",
            type(module).__name__,
            "fit ServerModule(your_module)",
        ),
        (
            not isinstance(data, FederatedData),
            "a federation must have a data module that knows its clients",
            type(data).__name__,
            "pass datamodule=FederatedDataModule(...)",
        ),
        (
            several,
            "several devices sum their clients' updates, so the aggregator must be additive",
            f"{type(aggregator).__name__} on {trainer.world_size} devices",
            "set trainer.devices to 1, or use WeightedMean",
        ),
    ]
    for option, default in (("fast_dev_run", False), ("limit_train_batches", 1.0)):
        value: Any = getattr(trainer, option)
        wrong.append((value != default, cut[0], f"trainer.{option}={value}", cut[1]))
    refuse_first(wrong)
    assert isinstance(module, ServerModule)
    assert isinstance(data, FederatedData)
    return module, data


def check_parts(federation: Any, module: L.LightningModule, policy: Policy) -> None:
    """Refuse an algorithm, transforms and schedules that do not go with each other and with the rest.

    Raises:
        ConfigurationError: If they do not.
    """
    algorithm = federation.algorithm
    algorithm.check(policy=policy, aggregator=federation.aggregator, rules=federation.rules)
    TransformChain(federation.transforms).check(is_secure=federation.secure is not None)
    has_epochs = federation.local_epochs is not None
    algorithm.check_schedules(federation.schedules)
    check_names(federation.schedules, module=module, scheduled=algorithm.scheduled, has_epochs=has_epochs)


def check_optimizers(server: ServerModule, preview: L.Trainer | None) -> None:
    """Refuse settings of optimizers and schedules that they refuse themselves, before a client trains with them.

    Args:
        server: The server.
        preview: What a module of somebody else's finds as its Trainer.

    Raises:
        ConfigurationError: If the module's, or the server's, cannot be made.
    """
    ours, model = isinstance(server.model, GAN), server.model
    if not ours:
        model = client_copy(server.model, server.policy)
        model.trainer = preview  # type: ignore[assignment]
    for owner, module in (("the model", model), ("the server", server)):
        try:
            with isolated_rng(0):
                made = optimizers_in(module.configure_optimizers())
            if module is not server:
                server.algorithm.check_optimizers(made)
        except FedGANError:
            raise
        except (ValueError, TypeError) as error:
            if not (ours or module is server or str(error).startswith("Invalid ")):
                continue  # somebody else's module may learn in its ``setup`` what its schedules need
            raise ConfigurationError(
                message(
                    f"the settings of {owner} must make its optimizers and schedules",
                    received=" ".join(str(error).split()).rstrip("."),
                    fix="correct that setting",
                )
            ) from error
        except Exception:  # a module may ask its Trainer, which it has in a round only
            continue


#: Rounds whose cohorts are looked at before the first one.
LOOKED_AT = 8
#: Options of a Trainer that reach the clients', by the value that changes nothing.
CLIENT_TRAINER: dict[str, Any] = {
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "accumulate_grad_batches": 1,
    "detect_anomaly": False,
}


def checked_client_trainer(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of clients' Trainers that change something.

    Raises:
        ConfigurationError: If one is not theirs to have.
    """
    if unknown := sorted({*options} - {*CLIENT_TRAINER}):
        raise ConfigurationError(
            message(
                f"federation.client_trainer must have options among {', '.join(CLIENT_TRAINER)}",
                received=", ".join(unknown),
                fix="set accelerator, devices and precision by trainer, and local work by federation.local_steps",
            )
        )
    every = options.get("accumulate_grad_batches") or 1
    if not isinstance(every, int) or every < 1:
        raise ConfigurationError(
            message(
                "federation.client_trainer.accumulate_grad_batches must be a whole number of at least 1",
                received=repr(every),
                fix="write one",
            )
        )
    return {name: value for name, value in options.items() if value is not None and value != CLIENT_TRAINER[name]}


def check_client_trainer(options: dict[str, Any], module: L.LightningModule) -> None:
    """Refuse options of automatic optimization for a module that optimizes by itself.

    Raises:
        ConfigurationError: If there are any.
    """
    automatic = sorted({*options} - {"detect_anomaly"})
    if automatic and not module.automatic_optimization:
        own = "model.clip_gradient_norm" if isinstance(module, GAN) else "self.clip_gradients in its training_step"
        raise ConfigurationError(
            message(
                "options of automatic optimization must have a module that leaves its optimization to Lightning",
                received=f"{automatic[0]} for {type(module).__name__}, which optimizes by itself",
                fix=f"take it out, and use {own}",
            )
        )


def check_precision(precision: Any) -> None:
    """Refuse a precision of the Trainer in which a federation does not compute; call it before data are read.

    float16 needs a loss scaler, which the server's step must not pass through; other programs' number formats have
    layers of their own, which sites would have to share.

    Raises:
        ConfigurationError: If it is one.
    """
    if precision is not None and str(precision) not in PRECISIONS:
        raise ConfigurationError(
            message(
                "a federation must compute in float64, float32 or bfloat16: float16 needs a loss scaler, which the "
                "server's step must not pass through",
                received=f"trainer.precision={precision}",
                fix="set trainer.precision to 32-true, bf16-mixed, bf16-true or 64-true",
            )
        )


def same_precision(precision: Any) -> str:
    """Return the one name of a precision that Lightning knows under several."""
    text = "32" if precision is None else str(precision)
    return {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}.get(text, text)


def check_cohort(size: int, *, aggregator: Aggregator) -> None:
    """Refuse cohorts that are always too small for a rule; ``size`` is that of the largest.

    Raises:
        ConfigurationError: If the rule needs more updates.
    """
    if size < aggregator.needed > 1:
        raise ConfigurationError(
            message(
                f"{type(aggregator).__name__} must have {aggregator.needed} updates a round",
                received=f"a cohort of {size}",
                fix="ask more clients per round, or withstand fewer bad ones",
            )
        )


def check_cohorts(federation: Any, data: FederatedData) -> None:
    """Tell who chooses and weighs what is known of clients; refuse first cohorts that cannot be, or are too small.

    One that is too small by chance is filled up.

    Raises:
        ConfigurationError: If they are.
    """
    federation.clients.prepare(data)
    federation.aggregator.prepare(data)
    clock = federation.rules.asynchronous
    if clock is not None:
        chooses = not isinstance(federation.clients, AllClients)
        clock.check(num_clients=data.num_clients, sampler=federation.clients, chooses=chooses)
        check_cohort(clock.buffer_size, aggregator=federation.aggregator)
        return
    rounds = range(min(LOOKED_AT, federation.rounds))
    sample, seed = federation.clients.sample, federation.seed
    size = max(len(sample(num_clients=data.num_clients, round=r, seed=seed)) for r in rounds)
    check_cohort(size, aggregator=federation.aggregator)
    if federation.secure is not None:
        federation.secure.check_cohort(size, sums_only=federation.executor.sums_only)


def check_data(model: Any, data: Any, *, trains: bool) -> None:
    """Let a module that can say so refuse data that do not fit its networks, and its steps where it ``trains``.

    Raises:
        ConfigurationError: If they do not.
        DataError: If a client's minibatches cannot be divided among the discriminator's steps.
    """
    if offers(model, DataHook) and hasattr(data, "sample_shape"):
        model.check_data(data.sample_shape, getattr(data, "num_classes", 0))
    divides = isinstance(model, GAN) and model.d_steps > 1 and model.privacy is None  # which makes its own minibatches
    is_sized = isinstance(data, SizedBatches)
    if trains and divides and is_sized:
        for client_id in range(data.num_clients):
            steps = data.steps_per_epoch(client_id)
            for size in {*(data.batch_sizes(client_id, first_step=0, num_steps=steps) or ())}:
                check_minibatch(size, d_steps=model.d_steps, whose=f"client {client_id}")


def check_device(root: torch.device) -> None:
    """Refuse devices that cannot sum in float64.

    Raises:
        ConfigurationError: If it is one.
    """
    if root.type == "mps":
        raise ConfigurationError(
            message("sums over clients must be float64", received="an mps device", fix="set trainer.accelerator: cpu")
        )
