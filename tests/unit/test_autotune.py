"""``executor: autotune``: what it may choose by measuring, what it says, and that a choice is kept."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from fedgan_lightning import SequentialExecutor, VectorizedExecutor
from fedgan_lightning.algorithms import FedProx, Scaffold
from fedgan_lightning.errors import UpdateError
from fedgan_lightning.executors import AutotunedExecutor
from fedgan_lightning.federation.executors import autotuner
from fedgan_lightning.federation.executors.auto import ExecutionMode
from fedgan_lightning.federation.executors.autotuner import Autotuner, Cost, MeasuredMode
from fedgan_lightning.federation.parity_check import NOTHING_TO_COMPARE
from fedgan_lightning.federation.ranks import Ranks
from fedgan_lightning.federation.threads import available_threads
from fedgan_lightning.losses import R1, Hinge
from fedgan_lightning.protocol import ClientTask
from tests.conftest import adam, ring_data, ring_gan
from tests.contracts.test_executors import assert_same, updates
from tests.foreign import SomebodysGAN


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    """What is chosen does not matter to most tests, and half a second of every way does."""
    monkeypatch.setattr(autotuner, "TURN_SECONDS", 0.01)
    monkeypatch.setattr(autotuner, "RUN_OFF_SECONDS", 0.05)


class Normalised(torch.optim.SGD):
    """Steps of unit length: it looks at whole tensors, so clients of a stack would share one."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= parameter.grad.norm() + 1e-12
        return super().step(closure)


def normalised(parameters):
    return Normalised(parameters, lr=0.1)


def planned(executor, model=None, data=None, **options):
    found = updates(executor, ring_gan() if model is None else model, ring_data() if data is None else data, **options)
    return executor.mode, found


def test_many_small_clients_are_stacked_and_the_reason_is_said(tmp_path, caplog):
    executor = AutotunedExecutor(cache=str(tmp_path))
    with caplog.at_level(logging.INFO, logger="fedgan_lightning"):
        mode, _ = planned(executor, data=ring_data(num_clients=32, num_samples=4096))
    assert mode.chunk_size > 1
    assert 1 <= mode.num_threads <= available_threads(Ranks())
    assert "clients stacked at a time" in caplog.text
    assert "ms per client step, one by one" in caplog.text


def test_updates_do_not_depend_on_the_choice(tmp_path):
    results = [
        updates(executor, ring_gan().double(), ring_data(), rounds=2)
        for executor in (AutotunedExecutor(cache=str(tmp_path)), SequentialExecutor())
    ]
    assert_same(*results, rtol=1e-11)


@pytest.mark.parametrize("model, said", [(SomebodysGAN, "SomebodysGAN without it"), (None, "differs by")])
def test_what_cannot_be_stacked_runs_one_by_one_for_a_reason(tmp_path, model, said):
    if model is None:
        gan = ring_gan(optimizer=normalised)
    else:
        gan = model()
    mode, _ = planned(AutotunedExecutor(cache=str(tmp_path)), gan)
    assert mode.chunk_size == 1
    assert said in mode.reason


def test_a_network_with_randomness_of_its_own_is_not_stacked(tmp_path):
    gan = ring_gan()
    gan.discriminator.features.append(torch.nn.Dropout(0.5))
    mode, _ = planned(AutotunedExecutor(cache=str(tmp_path)), gan)
    assert mode.chunk_size == 1
    assert "random" in mode.reason


def test_the_choice_is_kept_for_the_machine_and_for_a_resumed_run(tmp_path):
    first = AutotunedExecutor(cache=str(tmp_path))
    mode, _ = planned(first)
    (kept,) = tmp_path.glob("executor-*.json")
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "chunk_size": 3, "reason": "kept"}))
    again, _ = planned(AutotunedExecutor(cache=str(tmp_path)))
    assert (again.chunk_size, again.reason) == (3, "kept")
    resumed = AutotunedExecutor(cache=str(tmp_path))
    resumed.load_state_dict(first.state_dict())
    assert planned(resumed)[0] == mode
    assert planned(first)[0].reason == "kept", "an object that runs again begins anew"
    kept.write_text("{not json")
    assert planned(AutotunedExecutor(cache=str(tmp_path)))[0].reason != "kept"


def test_another_workload_is_measured_anew(tmp_path):
    planned(AutotunedExecutor(cache=str(tmp_path)))
    planned(AutotunedExecutor(cache=str(tmp_path)), ring_gan(optimizer=adam), ring_data(batch_size=8))
    assert len(list(tmp_path.glob("executor-*.json"))) == 2


@pytest.mark.slow  # measures ten times
def test_another_optimizer_rate_or_loss_is_another_workload(tmp_path):
    """What can be stacked depends on them: a choice made for Adam must not meet an optimizer that cannot be."""

    def at(rate):
        return lambda parameters: torch.optim.Adam(parameters, lr=rate)

    ways = [{"optimizer": at(1e-3)}, {"optimizer": at(1e-5)}, {"optimizer": normalised}, {"loss": Hinge()}]
    ways.append({"penalties": [R1(0.1)]})
    for number, options in enumerate(ways, 1):
        for _ in range(2):  # and the same one is the same, whatever addresses its objects have
            planned(AutotunedExecutor(cache=str(tmp_path)), ring_gan(**options))
        assert len(list(tmp_path.glob("executor-*.json"))) == number


def test_a_choice_that_does_not_fit_any_more_is_given_up_with_a_warning(tmp_path, caplog):
    executor = AutotunedExecutor(cache=str(tmp_path))
    executor.load_state_dict({"mode": {"chunk_size": 4, "num_threads": 1, "reason": "of other days"}})
    model = ring_gan(optimizer=normalised).double()
    mode, found = planned(executor, model)
    assert mode.chunk_size == 1
    assert "one client after the other" in caplog.text
    assert "differs by" in caplog.text
    (kept,) = tmp_path.glob("executor-*.json")
    assert json.loads(kept.read_text())["chunk_size"] == 1, "and the next run does not try again"
    assert_same(found, updates(SequentialExecutor(), ring_gan(optimizer=normalised).double(), ring_data()), rtol=1e-11)


def test_clients_that_diverge_alone_tell_nothing_of_stacks(tmp_path):
    def wild(parameters):
        return torch.optim.SGD(parameters, lr=1e30)

    executor = AutotunedExecutor(cache=str(tmp_path))
    with pytest.raises(UpdateError, match="finite"):
        planned(executor, ring_gan(optimizer=wild))
    assert executor.mode.reason == NOTHING_TO_COMPARE
    assert not list(tmp_path.iterdir()), "it says nothing of the next run"
    stacked = VectorizedExecutor()
    with pytest.raises(UpdateError, match="finite"):
        updates(stacked, ring_gan(optimizer=wild), ring_data())
    assert not stacked._checked


def test_threads_can_be_set_and_are_restored(tmp_path):
    before = torch.get_num_threads()
    mode, _ = planned(AutotunedExecutor(num_threads=2, cache=str(tmp_path)))
    assert mode.num_threads == 2
    assert torch.get_num_threads() == before


def test_a_trial_leaves_no_trace_in_the_clients_state(tmp_path):
    results = [
        updates(executor, ring_gan(optimizer=adam).double(), ring_data(), rounds=2, optimizer_state="keep")
        for executor in (AutotunedExecutor(cache=str(tmp_path)), SequentialExecutor())
    ]
    assert_same(*results, rtol=1e-11)


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path):
    (tmp_path / "file").write_text("")
    mode, _ = planned(AutotunedExecutor(cache=str(tmp_path / "file")))
    assert isinstance(mode, ExecutionMode)


class Slow(Autotuner):
    """A client step takes a fixed time in each way, on a clock that nothing else moves."""

    def __init__(self, per_client_step, monkeypatch):
        self.per_client_step, self.ran, self.now = per_client_step, [], 0.0
        monkeypatch.setattr(autotuner, "time", SimpleNamespace(perf_counter=lambda: self.now))
        self.context, self.tasks, self.steps, self.counts = None, [None] * 32, 10, [1]
        self.costs = {way: Cost(fixed=0.0, step=0.004 * way.chunk_size) for way in per_client_step}

    def _run(self, size, stacks, steps):
        self.ran.append(size)
        self.now += self.per_client_step[MeasuredMode(size, torch.get_num_threads())] * size * stacks * steps


def test_ways_that_short_trials_leave_close_are_tried_again_by_turns(monkeypatch):
    alone, stacked, far = MeasuredMode(1, 1), MeasuredMode(16, 1), MeasuredMode(4, 1)
    slow = Slow({alone: 0.003, stacked: 0.001, far: 0.0001}, monkeypatch)
    slow.costs[alone] = Cost(fixed=0.0, step=0.0036)
    slow.costs[far] = Cost(fixed=0.0, step=4 * 0.0048)
    slow.run_off()
    assert set(slow.ran) == {1, 16}, "a way that was a third slower is out"
    assert slow.ran[:4] == [1, 16, 1, 16]
    seconds = slow.seconds()
    assert seconds[alone] == pytest.approx(32 * 10 * 0.003)
    assert seconds[stacked] == pytest.approx(32 * 10 * 0.001)


def test_a_clear_winner_is_not_tried_again(monkeypatch):
    slow = Slow({MeasuredMode(1, 1): 0.003, MeasuredMode(16, 1): 0.003}, monkeypatch)
    slow.costs[MeasuredMode(1, 1)] = Cost(fixed=0.0, step=0.001)
    slow.run_off()
    assert not slow.ran


def test_another_algorithm_is_another_workload(tmp_path):
    """Its hooks run in every step; a choice made without them would be kept for a run with them."""
    executor = AutotunedExecutor(cache=str(tmp_path))
    names = set()
    for algorithm in (FedProx(mu=0.1), FedProx(mu=0.1), FedProx(mu=0.2), Scaffold()):
        context = SimpleNamespace(
            model=ring_gan(), data=ring_data(), device=torch.device("cpu"), ranks=Ranks(), trainer_options={},
            algorithm=algorithm,
        )  # fmt: skip
        task = ClientTask(client_id=0, round=0, seed=0, state={}, steps=2)
        context.data.setup()
        names.add(executor._path(context, [task]).name)
    assert len(names) == 3
