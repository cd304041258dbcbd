"""Lightning's loop over minibatches without what a client's quiet Trainer has not.

Measured on the ring MLP, whose step takes 3 ms: Lightning's loop costs .5 ms per minibatch, most of it for a profiler,
loggers, validation, learning-rate schedulers of automatic optimization and signatures that are inspected again and
again. What modules and callbacks can see is the same: the same hooks in the same order, and ``self.log``.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class QuietEpochLoop(_TrainingEpochLoop):
    """Passes minibatches to ``training_step`` of a module with manual optimization; others take Lightning's way."""

    def run(self, data_fetcher: Any) -> None:
        module: Any = self.trainer.lightning_module
        if module.automatic_optimization or isinstance(data_fetcher, _DataLoaderIterDataFetcher):
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
