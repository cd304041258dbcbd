"""The quiet Trainer that trains clients for a round, in Lightning's public form or, where it is known, a faster one."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

logger = logging.getLogger("fedgan_lightning")

#: Trainer, loops and module form reference cycles; without a collection now and then memory grows.
FITS_PER_COLLECTION = 16
#: Versions of Lightning, first to before, with which the fast form was tested.
TESTED_LIGHTNING = ((2, 6), (2, 7))
#: Set to ``public``, this environment variable has clients trained in the public form.
FORM = "FEDGAN_ROUND_TRAINER"


class RoundTrainer:
    """Fits a module on one round's minibatches, with no checkpoint, no progress bar, no validation, and a logger that
    keeps nothing.

    The reference is a fresh ``L.Trainer`` for every fit. The fast form, which keeps one, is used instead where
    Lightning's version is one that it was tested with.

    Args:
        options: Accelerator, devices and precision.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self._fast: Any = None
        self._is_public = not is_fast_form_known()
        self._fits = 0

    def fit(self, module: L.LightningModule, batches: Any, *, callback: L.Callback) -> L.Trainer:
        """Train for one epoch of ``batches``; return the Trainer, for its metrics.

        An error leaves a Trainer in the middle, so the next call makes a new one.
        """
        try:
            with quiet_lightning():
                trainer = self._trainer(callback)
                trainer.fit(module, train_dataloaders=batches)
        except BaseException:
            self._fast = None
            raise
        self._fits += 1
        if self._fits % FITS_PER_COLLECTION == 0:
            gc.collect(1)  # the young generations only: a full collection takes as long as dozens of steps
        return trainer

    def _trainer(self, callback: L.Callback) -> L.Trainer:
        """Return a Trainer for one fit."""
        if not self._is_public:
            try:
                if self._fast is None:
                    from fedgan_lightning.federation.fast_trainer import FastTrainer

                    self._fast = FastTrainer(self._made, device_of(self.options))
                found: L.Trainer = self._fast.renewed(callback)
                return found
            except (ImportError, AttributeError, TypeError) as error:
                self._is_public = True
                logger.warning(f"clients train with Lightning's public Trainer: the fast form cannot be made ({error})")
        return self._made(callbacks=[callback])

    def _made(self, **further: Any) -> L.Trainer:
        return ClientTrainer(
            **self.options,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            use_distributed_sampler=False,
            **further,
        )


class ClientTrainer(L.Trainer):
    """Has a logger for modules that draw or note something by themselves, which drops it.

    It is not among ``loggers``: what ``self.log`` is told goes the short way that it goes without one.
    """

    @property  # type: ignore[misc] # nobody sets it
    def logger(self) -> Any:
        """A logger of which every method and every ``experiment`` does nothing."""
        return _DROPS


_DROPS = DummyLogger()


def is_fast_form_known() -> bool:
    """Whether the fast form is to be used: nobody asks for the public one, and Lightning's version was tested."""
    if os.environ.get(FORM) == "public":
        return False
    version = tuple(int(part) for part in L.__version__.split(".")[:2])
    first, last = TESTED_LIGHTNING
    if first <= version < last:
        return True
    logger.warning(f"clients train with Lightning's public Trainer: the fast form was not tested with {L.__version__}")
    return False


def device_of(options: Mapping[str, Any]) -> torch.device:
    """Return where a Trainer with these options trains: one device."""
    devices, kind = options.get("devices", 1), str(options.get("accelerator", "cpu"))
    return torch.device(kind, devices[0]) if isinstance(devices, list) else torch.device(kind)


def schedulers_of(trainer: L.Trainer) -> list[Any]:
    """Return the learning-rate schedulers of a Trainer."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def batch_length(batch: Any) -> int:
    """Return the number of samples in a batch of any nesting."""
    if isinstance(batch, Tensor):
        return len(batch)
    if isinstance(batch, Mapping):
        return batch_length(next(iter(batch.values())))
    if isinstance(batch, Sequence) and batch:
        return batch_length(batch[0])
    return 1


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's information lines for the body; warnings and errors still show."""
    logger = logging.getLogger("lightning.pytorch")
    items: list[Any] = [logger, logging.getLogger("lightning.fabric"), *logger.handlers]
    # Changing a level empties the cache of every logger, so those that are quiet already are left alone.
    levels = {item: item.level for item in items if item.level < logging.WARNING}
    for item in levels:
        item.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for item, level in levels.items():
            item.setLevel(level)
