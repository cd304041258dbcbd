"""The command ``audit``: attacks on a checkpoint, as ``audit.json`` and ``inversion.png`` in the run directory.

What it finds is what these attacks find; a better one may find more, and none of it is a guarantee.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.dp.audits.inversion import batch_errors, first_linear, invert
from fedgan_lightning.dp.audits.scores import evaluating
from fedgan_lightning.dp.audits.views import Protection
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.attacks import MembershipAttacks
from fedgan_lightning.evaluation.audit import plain_discriminator
from fedgan_lightning.evaluation.callback import Evaluation
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.files import write_json
from fedgan_lightning.gan.module import GAN
from fedgan_lightning.hooks import completed_rounds
from fedgan_lightning.seeding import make_generator
from fedgan_lightning.visuals import pictures

FILE, PICTURE = "audit.json", "inversion.png"
#: Samples whose steps are inverted one by one and shown, and those of the largest minibatch.
SHOWN, MOST = 8, 32
#: What a metric of an attack is called.
PREFIX = ("attack_", "membership_auc")
CAVEAT = "what these attacks find; a better one may find more, and an attack that fails proves nothing"


def prepare_audit(trainer: L.Trainer, data: L.LightningDataModule, *, client: int) -> None:
    """Add the membership attacks to an evaluation whose settings have none; refuse a client that there is not.

    Args:
        trainer: About to test.
        data: The federation's.
        client: Whose samples are to be reconstructed.

    Raises:
        ConfigurationError: If there is no such client.
    """
    num_clients = int(data.num_clients)  # type: ignore[attr-defined]
    if not 0 <= client < num_clients:
        raise ConfigurationError(
            message(f"--client must be one of 0 to {num_clients - 1}", received=client, fix="name another")
        )
    evaluation = _evaluation(trainer)
    if not any(isinstance(own, MembershipAttacks) for own in evaluation.metrics or []):
        evaluation.extra_metrics = [MembershipAttacks()]


def write_audit(
    trainer: L.Trainer, server: L.LightningModule, data: L.LightningDataModule, *, client: int, protection: Protection
) -> None:
    """Write what the attacks of the last ``test`` found, and invert steps of one client's discriminator.

    Args:
        trainer: Has tested the server.
        server: Holds the checkpoint's weights.
        data: The federation's.
        client: Whose samples.
        protection: Clip, noise and masks of the views that are compared.
    """
    evaluation = _evaluation(trainer)
    found = {**evaluation.facts, **evaluation.latest}
    root = Path(trainer.default_root_dir)
    audit: dict[str, Any] = {
        "meaning": CAVEAT,
        "checkpoint": str(trainer.ckpt_path or ""),
        "rounds": completed_rounds(trainer),
        "membership": {name: value for name, value in found.items() if name.startswith(PREFIX)},
        "inversion": inversion(server, data, client=client, protection=protection, picture=root / PICTURE),
    }
    write_json(root / FILE, audit)
    said = audit["inversion"]
    print(
        f"gradient inversion left out: {said['left_out']}"
        if "left_out" in said
        else f"gradient inversion of client {client}, cosine to the truth: {_listed(said['cosine'])}"
    )
    print(f"wrote {root / FILE}" + ("" if "left_out" in said else f" and {root / PICTURE}"))


def inversion(
    server: L.LightningModule, data: L.LightningDataModule, *, client: int, protection: Protection, picture: Path
) -> dict[str, Any]:
    """Invert steps of the global discriminator on a client's samples; return values, or why it is ``left_out``.

    Each step is on one real and one generated sample, by the adversarial loss alone: penalties and augmentation, which
    would change what is seen, are left out, so that what is shown leaks at most.

    Args:
        server: Holds the checkpoint's weights.
        data: The federation's.
        client: Whose samples.
        protection: Clip, noise and masks of the views that are compared.
        picture: Where to draw truth and reconstructions.
    """
    why = _obstacle(server, data)
    if why:
        return _without(why, picture)
    assert isinstance(data, FederatedDataModule)
    assert isinstance(server, ServerModule)
    gan: GAN = copy.deepcopy(server.model).cpu().float()  # type: ignore[assignment]
    view = data.client_samples(client)
    generator = make_generator(protection.seed, "inverted", client)
    x, y = view.take(torch.randperm(len(view), generator=generator)[:MOST])
    draws = gan.draw(y, dtype=x.dtype, generator=generator)
    with torch.no_grad(), evaluating(gan.generator):
        fake = gan.generate(draws.z, draws.y)
    if first_linear(gan.discriminator, x, y) is None:
        return _without(
            f"{type(gan.discriminator).__name__} does not begin with a linear layer on the samples", picture
        )
    options: dict[str, Any] = {"loss": gan.loss.discriminator, "pairs": gan.loss.pairs_real}
    own = (x[:SHOWN], y[:SHOWN], (fake[:SHOWN], draws.y[:SHOWN]))
    result = invert(gan.discriminator, *own, protection=protection, **options)
    pictures.save(pictures.comparison({"truth": result.truth, **result.found}), picture)
    errors = batch_errors(gan.discriminator, x, y, (fake, draws.y), **options)
    return {
        "client": client,
        "samples": len(result.truth),
        "protection": asdict(protection),
        "relative_error": result.relative_errors(),
        "cosine": result.cosines(),
        "label_accuracy": result.label_accuracies(),
        "best_row_error_by_batch": {str(size): error for size, error in errors.items()},
    }


def _evaluation(trainer: L.Trainer) -> Evaluation:
    return next(own for own in trainer.callbacks if isinstance(own, Evaluation))  # type: ignore[attr-defined]


def _without(why: str, picture: Path) -> dict[str, Any]:
    """Return why there is no inversion; a picture of an earlier one would belong to other weights."""
    picture.unlink(missing_ok=True)
    return {"left_out": why}


def _obstacle(server: L.LightningModule, data: L.LightningDataModule) -> str:
    """Return what stands in the way of an inversion, in words; nothing if nothing does."""
    if not isinstance(server, ServerModule) or not isinstance(server.model, GAN):
        return "the module is none of this program's GANs"
    if plain_discriminator(server.model) is None:
        return "the discriminator gets more than samples and labels"
    if server.policy.is_private("discriminator"):
        return "discriminators stay with the clients"
    if not isinstance(data, FederatedDataModule) or not data.has_client_samples:
        return "clients' samples are elsewhere"
    return ""


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())
