"""The fast form of the per-round Trainer: what of Lightning's private classes it replaces is in this file alone.

It is used with the versions of Lightning that it was tested with; with others, or where anything of it cannot be made,
clients are trained in the public form of :mod:`.round_trainer`, to the same bits. Measured on small GANs: constructing
a Trainer scans all installed packages for callbacks, which takes longer than ten steps, so one is kept and its loops,
where all its progress is, are renewed; Lightning's loop costs .5 ms per minibatch, most of it for a profiler, loggers,
validation, schedulers of automatic optimization and signatures that are inspected again and again. What modules and
callbacks can see is the same: the same hooks in the same order, and ``self.log``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

BACKWARD_HOOKS = ("on_before_backward", "on_after_backward")


class FastTrainer:
    """One Trainer for the whole run, with fresh loops for every fit.

    Args:
        make: Makes a Trainer with these further arguments.
        device: Where clients are trained.
    """

    def __init__(self, make: Any, device: torch.device) -> None:
        self._trainer: L.Trainer = make(strategy=ResidentStrategy(device))
        self._trainer._signal_connector = _NoSignals(self._trainer)  # signals are the outer Trainer's business
        self._external_callbacks = list(self._trainer.callbacks)  # type: ignore[attr-defined]

    def renewed(self, callbacks: Sequence[L.Callback]) -> Any:
        """Return the Trainer, ready for a fit with these callbacks."""
        trainer = self._trainer
        trainer.fit_loop = _KnownLength(trainer, max_epochs=1)
        trainer.fit_loop.epoch_loop = QuietEpochLoop(trainer)
        trainer.should_stop = False
        trainer.callbacks = [*self._external_callbacks, *callbacks]  # type: ignore[attr-defined]
        return trainer


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


TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class QuietEpochLoop(_TrainingEpochLoop):
    """Passes minibatches to ``training_step`` of a module with manual optimization and without validation; others take
    Lightning's way.
    """

    def run(self, data_fetcher: Any) -> None:
        module: Any = self.trainer.lightning_module
        plain = not isinstance(data_fetcher, _DataLoaderIterDataFetcher) and not self.trainer.enable_validation
        if module.automatic_optimization or not plain:
            super().run(data_fetcher)
            return
        self.reset()
        self.on_run_start(data_fetcher)
        strategy = self.trainer.strategy
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        moves_itself = any(is_overridden(hook, module) for hook in TRANSFER_HOOKS)
        for optimizer in strategy._lightning_optimizers:
            optimizer._on_after_step = self.manual_optimization.optim_step_progress.increment_completed
        for batch, index, _ in data_fetcher:
            batch = self.trainer.precision_plugin.convert_input(batch)
            if moves_itself or not _lies_on(strategy.root_device, batch):
                batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
                batch = strategy.batch_to_device(batch, dataloader_idx=0)
            self.batch_progress.is_last_batch = data_fetcher.done
            if not self._step(batch, index, takes_index=takes_index) or self.trainer.should_stop:
                break

    def _step(self, batch: Any, index: int, *, takes_index: bool) -> bool:
        """Train on one minibatch; return whether to go on."""
        trainer, progress = self.trainer, self.batch_progress
        connector = trainer._logger_connector
        progress.increment_ready()
        connector.on_batch_start(batch)
        call._call_callback_hooks(trainer, "on_train_batch_start", batch, index)
        if call._call_lightning_module_hook(trainer, "on_train_batch_start", batch, index) == -1:
            progress.increment_by(0, is_last_batch=True)
            return False
        progress.increment_started()
        arguments = (batch, index) if takes_index else (batch,)
        output = call._call_strategy_hook(trainer, "training_step", *arguments)
        output = self.manual_optimization.output_result_cls.from_training_step_output(output).asdict()
        progress.increment_processed()
        call._call_callback_hooks(trainer, "on_train_batch_end", output, batch, index)
        call._call_lightning_module_hook(trainer, "on_train_batch_end", output, batch, index)
        if trainer._results:  # something was logged
            connector.on_batch_end()
        progress.increment_completed()
        self._batches_that_stepped += 1
        return True


def _lies_on(device: torch.device, batch: Any) -> bool:
    """Whether a batch is a tuple of tensors that are all on ``device``."""
    return type(batch) is tuple and all(isinstance(value, Tensor) and value.device == device for value in batch)
