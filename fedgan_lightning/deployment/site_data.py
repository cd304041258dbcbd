"""The data of one site, as an executor asks for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.held_out import HeldOutBatches
from fedgan_lightning.data.order import steps_per_epoch
from fedgan_lightning.data.samples import BatchStream, ClientSamples
from fedgan_lightning.errors import ConfigurationError, message


class TimedStream(BatchStream):
    """Minibatches as long as ``goes_on`` does not raise."""

    def __init__(self, data: ClientSamples, *, goes_on: Callable[[], None], **options: Any) -> None:
        super().__init__(data, **options)
        self.goes_on = goes_on

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pair in super().pairs():
            self.goes_on()
            yield pair


class SiteData:
    """The data of one site, as an executor asks for it; the site is client ``client_id`` of the federation."""

    def __init__(
        self, view: ClientSamples, held_out: ClientSamples, *, client_id: int, data: FederatedDataModule
    ) -> None:
        self.view, self.held_out, self.client_id = view, held_out, client_id
        self.batch_size, self.seed, self.drop_last = data.batch_size, data.seed, data.drop_last
        self.validation_share = data.validation_share
        self.sample_shape, self.num_classes, self.class_names = data.sample_shape, data.num_classes, data.class_names
        self.deadline = math.inf

    def check_time(self) -> None:
        """Give a task up after the instant of the monotonic clock that the site's policy allows.

        Raises:
            ConfigurationError: If it is over.
        """
        if time.monotonic() > self.deadline:
            raise ConfigurationError(
                message(
                    "a task must be done within most_seconds of the site's policy",
                    received="one that takes longer",
                    fix="agree on fewer local steps, or raise most_seconds",
                )
            )

    @property
    def num_clients(self) -> int:
        return 1

    def num_examples(self, client_id: int) -> int:
        return len(self.view)

    def steps_per_epoch(self, client_id: int) -> int:
        return steps_per_epoch(len(self.view), batch_size=self.batch_size, drop_last=self.drop_last)

    def client_samples(self, client_id: int) -> ClientSamples:
        """Return the site's samples, as a view; example-level privacy draws them one by one."""
        return self.view

    def client_batches(self, client_id: int, *, first_step: int, num_steps: int) -> BatchStream:
        return TimedStream(
            self.view,
            goes_on=self.check_time,
            batch_size=self.batch_size,
            seed=self.seed,
            stream=self.client_id,
            first_step=first_step,
            num_steps=num_steps,
            drop_last=self.drop_last,
        )

    def client_validation_batches(self, client_id: int) -> HeldOutBatches | None:
        return HeldOutBatches(self.held_out, batch_size=self.batch_size) if len(self.held_out) else None

    def fingerprint(self) -> str:
        return f"site {self.client_id}"
