"""``executor: auto``: what it chooses by its rule, what it says, and that clocks and caches have no say."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from fedgan_lightning import GAN, AutoExecutor, SequentialExecutor, VectorizedExecutor
from fedgan_lightning.errors import ClientError, ConfigurationError, RankError, UpdateError
from fedgan_lightning.executors import AutotunedExecutor
from fedgan_lightning.federation import workload
from fedgan_lightning.federation.executors import auto, vectorized
from fedgan_lightning.federation.executors.auto import ExecutionMode
from fedgan_lightning.federation.executors.autotuner import Autotuner
from fedgan_lightning.federation.executors.vectorized import StackingError
from fedgan_lightning.federation.memory import out_of_memory
from fedgan_lightning.federation.ranks import Ranks
from fedgan_lightning.federation.threads import available_threads, each_with_threads
from fedgan_lightning.federation.vectorized_trainer import VectorizedLocalTrainer
from fedgan_lightning.networks import DCGANDiscriminator, DCGANGenerator
from tests.conftest import adam, digits_data, federate, ring_data, ring_gan
from tests.contracts.test_executors import assert_same, updates
from tests.foreign import SomebodysGAN
from tests.unit.test_autotune import normalised, planned


def small_images(**options):
    torch.manual_seed(0)
    networks = DCGANGenerator(8, 1, latent_dim=4, width=4), DCGANDiscriminator(8, 1, width=4)
    return GAN(*networks, generator_optimizer=adam, discriminator_optimizer=adam, **options)


def test_short_steps_are_stacked_and_the_reason_is_said(caplog):
    with caplog.at_level(logging.INFO, logger="fedgan_lightning"):
        mode, _ = planned(AutoExecutor())
    assert (mode.chunk_size, mode.num_threads) == (64, 1)
    assert "64 clients stacked at a time" in caplog.text
    assert "million operations per client step: overhead, which stacking saves" in caplog.text


def test_long_steps_run_one_after_the_other_on_all_cores(monkeypatch):
    monkeypatch.setitem(auto.BUSY_FLOPS, "cpu", 1e4)
    monkeypatch.setattr(auto, "PARALLEL_FLOPS", 1e4)
    mode, _ = planned(AutoExecutor(), small_images(), digits_data())
    assert mode.chunk_size == 1
    assert mode.num_threads == available_threads(Ranks())
    assert "arithmetic, which stacking does not save" in mode.reason


@pytest.mark.parametrize("said, most", [("1", 1), ("1,2", 1), ("10000", None), ("", None), ("many", None)])
def test_no_more_threads_are_taken_than_the_environment_allows(said, most, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    free = available_threads(Ranks())
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert available_threads(Ranks()) == (free if most is None else most)


def test_the_operations_of_a_step_are_counted_exactly(monkeypatch):
    """Ring MLP 4 -> 16 -> 2 and 2 -> 16 -> 1, minibatches of 16, without penalties."""
    found = []
    counted = auto.measured_workload
    monkeypatch.setattr(auto, "measured_workload", lambda *own: found.append(counted(*own)) or found[-1])
    planned(AutoExecutor(), ring_gan(penalties=[]))
    generator, discriminator = 4 * 16 + 16 * 2, 2 * 16 + 16
    # D: G forward, D on both, gradients of its weights, and of inputs but the data. G: both forward, D's inputs, G's.
    d_step = generator + 2 * discriminator + 2 * discriminator + 2 * 16
    g_step = generator + discriminator + discriminator + generator + 16 * 2
    assert found[0].flops == 2 * 16 * (d_step + g_step)
    assert found[0].weight_bytes == 4 * (4 * 16 + 16 + 16 * 2 + 2 + 2 * 16 + 16 + 16 + 1)
    assert found[0].saved_bytes > 0


def test_a_stack_takes_no_more_than_its_share_of_memory(monkeypatch):
    one = workload.Workload(flops=1, saved_bytes=600, weight_bytes=100)
    monkeypatch.setattr(workload, "STACK_BYTES", 10_000)

    class OnCPU:
        device = torch.device("cpu")

    assert workload.stack_size(OnCPU, one) == 10
    assert workload.stack_size(OnCPU, dataclasses.replace(one, saved_bytes=10**9)) == 2
    assert workload.stack_size(OnCPU, dataclasses.replace(one, saved_bytes=0, weight_bytes=1)) == 64


def test_neither_clock_nor_cache_has_a_say(tmp_path, monkeypatch):
    """The same command gives the same bits on a busy machine, with an empty cache and with a full one."""
    monkeypatch.setenv("FEDGAN_CACHE", str(tmp_path / "cache"))
    results = []
    for _ in range(2):
        monkeypatch.setattr(Autotuner, "__init__", lambda *own, **options: pytest.fail("something was timed"))
        monkeypatch.setattr("time.perf_counter", iter(range(0, 10**9, 7)).__next__)
        results.append(planned(AutoExecutor(), rounds=2))
    (mode, found), (again, others) = results
    assert mode == again
    assert_same(found, others, rtol=0.0)
    assert not (tmp_path / "cache").exists()


def test_updates_do_not_depend_on_the_choice():
    results = [
        updates(executor, ring_gan().double(), ring_data(), rounds=2)
        for executor in (AutoExecutor(), SequentialExecutor())
    ]
    assert_same(*results, rtol=1e-11)


@pytest.mark.parametrize("model, said", [(SomebodysGAN, "SomebodysGAN without it"), (None, "differs by")])
def test_what_cannot_be_stacked_runs_one_by_one_for_a_reason(model, said):
    mode, _ = planned(AutoExecutor(), ring_gan(optimizer=normalised) if model is None else model())
    assert mode.chunk_size == 1
    assert said in mode.reason


def test_a_network_with_randomness_of_its_own_is_not_stacked():
    gan = ring_gan()
    gan.discriminator.features.append(torch.nn.Dropout(0.5))
    mode, _ = planned(AutoExecutor(), gan)
    assert mode.chunk_size == 1
    assert "random" in mode.reason


class Coupled(torch.optim.SGD):
    """A thousandth of every gradient is that of the whole tensor: a fault too small for a loose comparison."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad += 1e-3 * parameter.grad.mean()
        return super().step(closure)


def test_a_small_disagreement_is_found_too():
    gan = ring_gan(optimizer=lambda parameters: Coupled(parameters, lr=0.1))
    with pytest.raises(StackingError, match="differs by"):
        updates(VectorizedExecutor(), gan, ring_data())
    assert planned(AutoExecutor(), gan)[0].chunk_size == 1


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_rounding_that_adam_magnifies_is_no_disagreement(norm):
    """A bias before a BatchNorm has no gradient but rounding, which Adam turns into whole steps in float32."""
    torch.manual_seed(0)
    networks = DCGANGenerator(8, 3, latent_dim=4, width=8, norm=norm), DCGANDiscriminator(8, 3, width=8, norm=norm)
    gan = GAN(*networks, generator_optimizer=adam, discriminator_optimizer=adam)
    data = digits_data()
    small = data.train_samples
    data.__dict__["train_samples"] = type(small)(x=small.x.repeat(1, 3, 1, 1), y=small.y, columns=small.columns)
    data.sample_shape = (3, 8, 8)
    assert planned(AutoExecutor(), gan, data, work={"steps": 2})[0].chunk_size > 1


def test_an_optimizer_that_looks_at_whole_tensors_is_refused_by_the_vectorized_executor():
    gan = ring_gan(optimizer=normalised)
    with pytest.raises(ConfigurationError, match=r"stacked training must equal sequential training; got after 3 steps"):
        updates(VectorizedExecutor(), gan, ring_data())


def test_steps_that_nobody_could_take_twice_do_not_keep_clients_from_being_stacked():
    """A client that synchronises every step may hand its gradient over as a step of rate 1."""

    def plain(parameters):
        return torch.optim.SGD(parameters, lr=1e6)

    def trained(executor, steps):
        return updates(executor, ring_gan(optimizer=plain).double(), ring_data(), work={"steps": steps})

    with pytest.raises(UpdateError, match="updates must be finite numbers"):
        trained(SequentialExecutor(), 6)
    assert_same(trained(VectorizedExecutor(), 1), trained(SequentialExecutor(), 1), rtol=1e-11)


def test_a_choice_given_up_in_the_middle_of_a_round_asks_nobody_twice():
    """Where the first stack diverges on its own, the second is the first that is compared."""
    calls, answers = [], []

    class Own(AutoExecutor):
        def run(self, tasks):
            for answer in super().run(tasks):
                answers.append(answer.client_id)
                yield answer

    class Late(VectorizedExecutor):
        def _check(self, context, tasks):
            calls.append([task.client_id for task in tasks])
            if len(calls) == 2:
                raise StackingError("it differs. None")

    executor = Own()
    executor.load_state_dict({"mode": {"chunk_size": 2, "num_threads": 1, "reason": "of other days"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgan_lightning.federation.executors.auto.VectorizedExecutor", Late)
        _, found = planned(executor, ring_gan().double())
    assert calls == [[0, 1], [2, 3]]
    assert sorted(answers) == [0, 1, 2, 3]
    assert_same(found, updates(SequentialExecutor(), ring_gan().double(), ring_data()), rtol=1e-11)


def test_threads_can_be_set_and_do_not_leak_to_whoever_takes_the_answers():
    before = torch.get_num_threads()

    def computed():
        for _ in range(3):
            yield torch.get_num_threads()

    inside = []
    for found in each_with_threads(before + 1, computed()):
        inside.append(found)
        assert torch.get_num_threads() == before, "a callback between two answers keeps its threads"
    assert inside == [before + 1] * 3
    mode, _ = planned(AutoExecutor(num_threads=2))
    assert mode.num_threads == 2
    assert torch.get_num_threads() == before


def test_auto_is_the_default_and_its_choice_rides_in_the_checkpoint():
    _, orchestrator, _ = federate(ring_gan(), ring_data(), rounds=1, local_steps=2, executor="auto")
    assert isinstance(orchestrator.executor, AutoExecutor)
    state = orchestrator.state_dict()["executor"]
    assert ExecutionMode(**state["mode"]) == orchestrator.executor.mode
    assert state["executor"] == {"checked": True, "largest": 64}
    _, orchestrator, _ = federate(ring_gan(), ring_data(), rounds=1, local_steps=2, executor="autotune")
    assert isinstance(orchestrator.executor, AutotunedExecutor)


def test_a_resumed_run_takes_the_plan_and_the_verdict_of_its_checkpoint(monkeypatch):
    first = AutoExecutor()
    planned(first)
    resumed = AutoExecutor()
    resumed.load_state_dict(first.state_dict())
    monkeypatch.setattr(auto, "disagreement", lambda *own: pytest.fail("compared again"))
    monkeypatch.setattr(vectorized, "disagreement", lambda *own: pytest.fail("compared again"))
    assert planned(resumed)[0] == first.mode


def test_an_error_while_choosing_reaches_every_rank():
    """A rank that failed here used to meet the others in another exchange than theirs."""
    calls = []

    class Two:
        rank, world_size, local_world_size = 1, 2, 2

        def raise_if_any_rank_failed(self, failure):
            calls.append("raise_if_any_rank_failed")
            raise failure if failure is not None else RankError("rank 0: no memory")

        def exchange(self, value):
            calls.append("exchange")
            return [value]

    class Failing(AutoExecutor):
        def choose(self, context, tasks):
            raise ConfigurationError("no")

    executor = Failing()
    executor.context = dataclasses.make_dataclass("Context", ["ranks"])(Two())
    with pytest.raises(ConfigurationError, match="no"):
        next(executor.run([object()]))
    assert calls == ["raise_if_any_rank_failed"]


class SmallMemory(VectorizedLocalTrainer):
    """There is memory for two clients."""

    sizes = []

    def run(self, tasks):
        if self.context.model.automatic_optimization is False and len(tasks) > 2:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except torch.OutOfMemoryError as cause:
                raise ClientError(client_id=0, round=0, stage="train", cause=cause) from cause
        self.sizes.append(len(tasks))
        return super().run(tasks)


def test_a_stack_without_memory_is_divided_and_the_run_goes_on(monkeypatch, caplog):
    monkeypatch.setattr(vectorized, "VectorizedLocalTrainer", SmallMemory)
    SmallMemory.sizes = []
    executor = VectorizedExecutor(chunk_size=8)
    data = lambda: ring_data(num_clients=7, num_samples=1120)  # noqa: E731
    found = updates(executor, ring_gan().double(), data(), rounds=2)
    assert "no memory for a stack of 7 clients" in caplog.text
    assert max(SmallMemory.sizes) == 2
    assert executor.state_dict()["largest"] <= 2
    assert_same(found, updates(SequentialExecutor(), ring_gan().double(), data(), rounds=2), rtol=1e-11)


def test_what_says_that_there_is_no_memory():
    def caused(cause):
        try:
            raise cause
        except Exception as error:
            found = ClientError(client_id=0, round=0, stage="train", cause=error)
            found.__cause__ = error
            return found

    assert out_of_memory(caused(torch.OutOfMemoryError("x")))
    assert out_of_memory(MemoryError())
    assert out_of_memory(caused(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")))
    assert not out_of_memory(caused(RuntimeError("shapes differ")))
