"""A server's Trainer that does nothing but federate."""

from __future__ import annotations

from typing import Any

import lightning as L


def bare_trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Return a Trainer on the CPU without logger, checkpoints, bars and validation; ``options`` go to it."""
    return L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        **options,
    )
