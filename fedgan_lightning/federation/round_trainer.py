"""The quiet Trainer that trains clients: one for the whole run, with fresh loops every round."""

from __future__ import annotations

import gc
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch import Tensor
from torch.optim import Optimizer

from fedgan_lightning.federation.allocation import keep_freed_memory
from fedgan_lightning.federation.quiet_loop import QuietEpochLoop

BACKWARD_HOOKS = ("on_before_backward", "on_after_backward")
#: Trainer, loops and module form reference cycles; without a collection now and then memory grows.
FITS_PER_COLLECTION = 16


class RoundTrainer:
    """Fits a module on one round's minibatches, with no checkpoint, no progress bar, no validation, and a logger that
    keeps nothing.

    Constructing a Trainer scans all installed packages for callbacks, which takes longer than ten small GAN steps
    (measured); so one is kept, and its loops, where all its progress is, are renewed.

    Args:
        options: Accelerator, devices and precision.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        if device_of(options).type == "cpu":
            keep_freed_memory()
        self._trainer: L.Trainer | None = None
        self._external_callbacks: list[L.Callback] = []
        self._fits = 0

    def fit(self, module: L.LightningModule, batches: Any, *, callback: L.Callback) -> L.Trainer:
        """Train for one epoch of ``batches``; return the Trainer, for its metrics.

        An error leaves the Trainer in the middle, so the next call makes a new one.
        """
        try:
            with quiet_lightning(), no_driver_search():
                trainer = self._renewed(callback)
                trainer.fit(module, train_dataloaders=batches)
        except BaseException:
            self._trainer = None
            raise
        self._fits += 1
        if self._fits % FITS_PER_COLLECTION == 0:
            gc.collect(1)  # the young generations only: a full collection takes as long as dozens of steps
        return trainer

    def _renewed(self, callback: L.Callback) -> L.Trainer:
        if self._trainer is None:
            self._trainer = _ClientTrainer(
                **self.options,
                strategy=ResidentStrategy(device_of(self.options)),
                max_epochs=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                limit_val_batches=0,
                use_distributed_sampler=False,
            )
            self._trainer._signal_connector = _NoSignals(self._trainer)  # signals are the outer Trainer's business
            self._external_callbacks = list(self._trainer.callbacks)  # type: ignore[attr-defined]
        trainer = self._trainer
        trainer.fit_loop = _KnownLength(trainer, max_epochs=1)
        trainer.fit_loop.epoch_loop = QuietEpochLoop(trainer)
        trainer.should_stop = False
        trainer.callbacks = [*self._external_callbacks, callback]  # type: ignore[attr-defined]
        return trainer


def device_of(options: Mapping[str, Any]) -> torch.device:
    """Return where a Trainer with these options trains: one device."""
    devices, kind = options.get("devices", 1), str(options.get("accelerator", "cpu"))
    return torch.device(kind, devices[0]) if isinstance(devices, list) else torch.device(kind)


@contextmanager
def no_driver_search() -> Iterator[None]:
    """Let torch ask the CUDA runtime, in the body, whether there are GPUs; without effect where there are.

    Lightning has torch ask NVIDIA's driver, so that processes can fork before CUDA is used. Where there is no driver
    every optimizer step searches the disk for it: .17 ms of the .28 of a small Adam step (measured).
    """
    key = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(key)
    if before is None or torch.cuda.is_available():
        yield
        return
    del os.environ[key]
    try:
        yield
    finally:
        os.environ[key] = before


class _ClientTrainer(L.Trainer):
    """Has a logger for modules that draw or note something by themselves, which drops it.

    It is not among ``loggers``: what ``self.log`` is told goes the short way that it goes without one.
    """

    @property  # type: ignore[misc] # nobody sets it
    def logger(self) -> Any:
        """A logger of which every method and every ``experiment`` does nothing."""
        return _DROPS


_DROPS = DummyLogger()


class ResidentStrategy(SingleDeviceStrategy):
    """Leaves the module on its device between fits, where the next client is loaded into it, and calls no empty hooks.

    Lightning's own strategy moves module and optimizers to the CPU after every fit, and back before the next. It also
    calls four hooks a backward pass, which takes a tenth as long as the pass of a small network (measured).
    """

    _counts_on_cpu = False

    @property
    def root_device(self) -> torch.device:
        """Where the module is, and for the moment where loops count minibatches."""
        return torch.device("cpu") if self._counts_on_cpu else super().root_device

    @contextmanager
    def counts_on_cpu(self) -> Iterator[None]:
        """Have the body count on the CPU what Lightning would sum over processes, of which there is one."""
        self._counts_on_cpu = True
        try:
            yield
        finally:
            self._counts_on_cpu = False

    def setup(self, trainer: L.Trainer) -> None:
        """Prepare for a fit; the accelerator for the first one only.

        A CUDA device's preparation gives back all memory that is not in use, which the next client takes again.
        """
        super().setup(trainer)
        assert self.accelerator is not None
        self.accelerator.setup = _nothing_to_do  # type: ignore[method-assign]

    def _hears_backward(self) -> bool:
        """Whether anybody has hooks of a backward pass now: overridden, set on an object, or wrapped."""
        if type(self.precision_plugin).pre_backward is not Precision.pre_backward:
            return True
        module: Any = self.lightning_module
        heard = [(module, L.LightningModule), *((own, L.Callback) for own in module.trainer.callbacks)]
        return any(
            getattr(getattr(own, hook), "__func__", None) is not getattr(base, hook)
            for own, base in heard
            for hook in BACKWARD_HOOKS
        )

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Differentiate, with the hooks around it where somebody has any."""
        if self._hears_backward():
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        assert self.lightning_module is not None
        self.precision_plugin.backward(closure_loss, self.lightning_module, optimizer, *args, **kwargs)
        return closure_loss.detach()

    def model_to_device(self) -> None:
        """Move the module, unless it is where it belongs."""
        assert self.model is not None
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        if any(tensor.device != self.root_device for tensor in tensors):
            super().model_to_device()

    def teardown(self) -> None:
        """Release what belongs to a single fit."""
        self.precision_plugin.teardown()


def _nothing_to_do(trainer: L.Trainer) -> None:
    """Stand for a preparation that has been made."""


class _KnownLength(_FitLoop):
    """Asks for the number of minibatches without waiting for a device, which Lightning does four times a fit."""

    def setup_data(self) -> None:
        strategy: Any = self.trainer.strategy
        with strategy.counts_on_cpu():
            super().setup_data()


class _NoSignals(_SignalConnector):
    """Leaves signal handlers as they are: replacing and restoring all of them takes longer than a small GAN's step."""

    def register_signal_handlers(self) -> None:
        """Register none."""


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
