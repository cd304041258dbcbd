"""The quiet Trainer: what modules and callbacks see is what Lightning's own Trainer shows them."""

from __future__ import annotations

import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from fedgan_lightning.federation import fast_trainer
from fedgan_lightning.federation.fast_trainer import ResidentStrategy
from fedgan_lightning.federation.round_trainer import Fit, RoundTrainer

OPTIONS = {"accelerator": "cpu", "devices": 1}


@pytest.fixture(autouse=True)
def whatever_the_suite_runs_with(monkeypatch):
    """These tests say themselves which form they mean; the suite may run with the public one forced."""
    monkeypatch.delenv("FEDGAN_ROUND_TRAINER", raising=False)


@pytest.fixture(params=["fast", "public"])
def form(request, monkeypatch):
    """Both forms of the Trainer, to the same bits."""
    if request.param == "public":
        monkeypatch.setenv("FEDGAN_ROUND_TRAINER", "public")
    return request.param


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
def test_hooks_values_and_weights_are_those_of_a_plain_trainer(case, precision, form):
    results = []
    for quiet in (False, True):
        torch.manual_seed(0)
        module = CASES[case]()
        options = {**OPTIONS, "precision": precision}
        if quiet:
            trainer = RoundTrainer(options).fit(module, Fit(Batches(), Watch()))
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

        RoundTrainer(OPTIONS).fit(Manual(), Fit(Batches(), Look()))
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nothing_of_the_process_is_changed(form):
    """Neither environment nor the C library's settings: other code in the process may rely on them."""
    before = dict(os.environ)
    RoundTrainer(OPTIONS).fit(Manual(), Fit(Batches(), Watch()))
    assert dict(os.environ) == before


@pytest.mark.parametrize("version, is_fast", [("2.6.6", True), ("2.6.0", True), ("2.7.0", False), ("3.0.0rc1", False)])
def test_the_fast_form_is_used_where_it_was_tested(version, is_fast, monkeypatch, caplog):
    monkeypatch.setattr(L, "__version__", version)
    with caplog.at_level("WARNING", logger="fedgan_lightning"):
        trainer = RoundTrainer(OPTIONS).fit(Manual(), Fit(Batches(), Watch()))
    assert isinstance(trainer.strategy, ResidentStrategy) == is_fast
    assert caplog.text.count("clients train with Lightning's public Trainer") == (not is_fast)


def test_where_the_fast_form_cannot_be_made_clients_train_all_the_same(monkeypatch, caplog):
    monkeypatch.setattr(fast_trainer, "_FitLoop", None)
    monkeypatch.setattr(fast_trainer, "_KnownLength", None)
    module, trainer = Manual(), RoundTrainer(OPTIONS)
    with caplog.at_level("WARNING", logger="fedgan_lightning"):
        trainer.fit(module, Fit(Batches(), Watch()))
        trainer.fit(module, Fit(Batches(), Watch()))
    assert len([own for own in module.seen if own[0] == "step"]) == 8
    assert caplog.text.count("the fast form cannot be made") == 1, "said once"


def test_the_public_form_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("FEDGAN_ROUND_TRAINER", "public")
    trainer = RoundTrainer(OPTIONS).fit(Manual(), Fit(Batches(), Watch()))
    assert not isinstance(trainer.strategy, ResidentStrategy)


@pytest.mark.parametrize("listens", [True, False])
def test_backward_passes_are_announced_to_those_who_listen(listens, form):
    """A module's own hooks are called, as under Lightning's strategy; without any, gradients are the same."""

    class Listening(Manual):
        heard = 0

        def on_after_backward(self):
            self.heard += self.layer.weight.grad is not None

    torch.manual_seed(0)
    module = Listening() if listens else Manual()
    trainer = RoundTrainer(OPTIONS).fit(module, Fit(Batches(), L.Callback()))
    torch.manual_seed(0)
    plain = Listening() if listens else Manual()
    L.Trainer(**OPTIONS, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False).fit(
        plain, Batches()
    )
    if form == "fast":
        assert trainer.strategy._hears_backward() == listens
    if listens:
        assert module.heard == plain.heard == 4
    torch.testing.assert_close(module.layer.weight, plain.layer.weight, rtol=0, atol=0)


def test_hooks_set_on_objects_during_a_fit_are_called(form):
    heard = []

    class Late(L.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.on_after_backward = lambda: heard.append(1)

    RoundTrainer(OPTIONS).fit(Manual(), Fit(Batches(), Late()))
    assert len(heard) == 4
