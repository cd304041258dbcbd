"""Lightning's callbacks that watch a metric: whether it is there when they look."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from fedgan_lightning.errors import ConfigurationError, message

#: Packages whose callbacks log nothing that another could watch, beside what the orchestrator logs of training.
KNOWN = ("fedgan_lightning.", "lightning.")


def check_watchers(
    callbacks: Iterable[Any], *, measured: Collection[str], every_n_rounds: int, is_known: bool = True
) -> None:
    """Refuse callbacks that would miss their metric, or take that of an earlier round for this one's.

    Args:
        callbacks: Those of the Trainer.
        measured: What the evaluation measures.
        every_n_rounds: Rounds between evaluations.
        is_known: Whether it is known what clients log: somebody else's module may log anything.

    Raises:
        ConfigurationError: If one watches a metric that is not measured, or in rounds in which it is not.
    """
    listed = list(callbacks)
    others_log = not is_known or any(not type(own).__module__.startswith(KNOWN) for own in listed)
    for own in listed:
        watched = getattr(own, "monitor", None)
        if not isinstance(own, (EarlyStopping, ModelCheckpoint)) or watched is None:
            continue
        name = type(own).__name__
        if watched not in measured:
            if not others_log and not watched.startswith("train/") and type(own).__module__.startswith("lightning."):
                raise ConfigurationError(
                    message(
                        f"{name} must watch a metric of the evaluation, or train/loss_d and the like",
                        received=f"monitor={watched}",
                        fix=f"choose from {', '.join(sorted(measured)) or 'those of training'}",
                    )
                )
            continue
        looks = (own.every_n_epochs or 1) if isinstance(own, ModelCheckpoint) else 1
        if type(own).__module__.startswith("lightning.") and looks % every_n_rounds:
            more = f", or every_n_epochs of {name} to {every_n_rounds}" if isinstance(own, ModelCheckpoint) else ""
            raise ConfigurationError(
                message(
                    f"{name} must look at {watched} in rounds in which it is measured",
                    received=f"evaluation.every_n_rounds={every_n_rounds} for a look every "
                    + ("round" if looks == 1 else f"{looks} rounds"),
                    fix=f"set evaluation.every_n_rounds to {looks}{more}",
                )
            )
