"""The quiet Trainer: what modules and callbacks see is what Lightning's own Trainer shows them."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from fedgan_lightning.federation.round_trainer import RoundTrainer, no_driver_search

OPTIONS = {"accelerator": "cpu", "devices": 1}
HOOKS = [
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
]


class Manual(L.LightningModule):
    """One weight, one optimizer; logs, and stops where it is told to."""

    def __init__(self, *, moves: bool = False, skip_at: int | None = None, stop_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer, self.skip_at, self.stop_at = nn.Linear(2, 1), skip_at, stop_at
        self.seen: list[tuple] = []
        if moves:
            self.on_after_batch_transfer = lambda batch, dataloader_idx: (batch[0] * 2, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == self.skip_at else None

    def training_step(self, batch, batch_idx):
        self.seen.append(
            ("step", batch_idx, float(batch[0].sum()), self.trainer.global_step, self.trainer.is_last_batch)
        )
        loss = self.layer(batch[0]).square().mean()
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.trainer.should_stop = batch_idx == self.stop_at
        return {"loss": loss, "extra": batch_idx}


class NoIndex(Manual):
    """Its step takes the batch alone."""

    def training_step(self, batch):
        super().training_step(batch, 0)


class Automatic(L.LightningModule):
    """Optimized by the Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.seen: list[tuple] = []

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()


class Watch(L.Callback):
    """Writes down every hook of callback and module, with what it is given."""


def _watch(name: str):
    def hook(self, trainer, pl_module, *arguments):
        plain = [value for value in arguments if isinstance(value, int)]
        outputs = [sorted(value) for value in arguments if isinstance(value, dict)]
        pl_module.seen.append((name, plain, outputs))

    return hook


for _name in HOOKS:
    setattr(Watch, _name, _watch(_name))


class Batches:
    """Four minibatches; a list would be taken for four loaders."""

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        return iter([(torch.randn(3, 2, generator=generator), torch.zeros(3)) for _ in range(len(self))])


CASES = {
    "manual": Manual,
    "own transfer": lambda: Manual(moves=True),
    "skips the rest": lambda: Manual(skip_at=2),
    "asks to stop": lambda: Manual(stop_at=1),
    "no index": NoIndex,
    "automatic": Automatic,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_hooks_values_and_weights_are_those_of_a_plain_trainer(case, precision):
    results = []
    for quiet in (False, True):
        torch.manual_seed(0)
        module = CASES[case]()
        options = {**OPTIONS, "precision": precision}
        if quiet:
            trainer = RoundTrainer(options).fit(module, Batches(), callback=Watch())
        else:
            plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
            trainer = L.Trainer(**options, **plain, enable_model_summary=False, callbacks=[Watch()])
            trainer.fit(module, Batches())
        assert is_overridden("training_step", module)
        weights = {name: value.clone() for name, value in module.state_dict().items()}
        results.append((module.seen, weights, dict(trainer.callback_metrics), trainer.global_step))
    plain_run, quiet_run = results
    assert quiet_run[0] == plain_run[0]
    assert quiet_run[3] == plain_run[3]
    torch.testing.assert_close(quiet_run[1], plain_run[1], atol=0, rtol=0)
    torch.testing.assert_close(quiet_run[2], plain_run[2], atol=0, rtol=0)


def test_signal_handlers_stay_as_they_are():
    def handler(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, handler)
    try:

        class Look(L.Callback):
            def on_train_start(self, trainer, pl_module):
                assert signal.getsignal(signal.SIGTERM) is handler

        RoundTrainer(OPTIONS).fit(Manual(), Batches(), callback=Look())
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU nothing is changed")
def test_the_search_for_a_driver_is_left_out_and_comes_back(monkeypatch):
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    with pytest.raises(ValueError, match="inside"), no_driver_search():
        assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ
        raise ValueError("inside")
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"


#: Each step's tensors are a page larger than the last one's, so that no one of them takes another's place.
FREES = """
import resource, torch
from fedgan_lightning.federation.round_trainer import RoundTrainer
RoundTrainer({"accelerator": "cpu", "devices": 1})
def step(number):
    held = [torch.ones((256 + number) * 1024) for _ in range(16)]
step(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for number in range(1, 26):
    step(number)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose malloc can keep what is freed")
@pytest.mark.parametrize(
    "setting, pages_come_anew",
    [
        ("", False),
        ("MALLOC_TRIM_THRESHOLD_=131072", True),
        ("GLIBC_TUNABLES=glibc.malloc.trim_threshold=131072", True),
    ],
)
def test_what_a_step_frees_the_next_one_takes_unless_the_user_says_otherwise(setting, pages_come_anew):
    """In a process of its own, since it is said to the whole process.

    What glibc does when nobody says anything is no control: by what else lies on the heap it keeps some, all or none.
    """
    environment = {**os.environ, **dict([setting.split("=", 1)] if setting else [])}
    command = [sys.executable, "-c", FREES]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    faults = int(done.stdout) / (25 * 16 * 256)
    assert faults > 0.5 if pages_come_anew else faults < 0.05


@pytest.mark.parametrize("listens", [True, False])
def test_backward_passes_are_announced_to_those_who_listen(listens):
    """A module's own hooks are called, as under Lightning's strategy; without any, gradients are the same."""

    class Listening(Manual):
        heard = 0

        def on_after_backward(self):
            self.heard += self.layer.weight.grad is not None

    torch.manual_seed(0)
    module = Listening() if listens else Manual()
    trainer = RoundTrainer(OPTIONS).fit(module, Batches(), callback=L.Callback())
    torch.manual_seed(0)
    plain = Listening() if listens else Manual()
    L.Trainer(**OPTIONS, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False).fit(
        plain, Batches()
    )
    assert trainer.strategy._hears_backward() == listens
    if listens:
        assert module.heard == plain.heard == 4
    torch.testing.assert_close(module.layer.weight, plain.layer.weight, rtol=0, atol=0)


def test_hooks_set_on_objects_during_a_fit_are_called():
    heard = []

    class Late(L.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.on_after_backward = lambda: heard.append(1)

    RoundTrainer(OPTIONS).fit(Manual(), Batches(), callback=Late())
    assert len(heard) == 4
