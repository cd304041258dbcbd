"""Tensors on one device, and what must not be rounded; without a device: torch's ``meta`` refuses to mix, and to tell.

What needs a device's arithmetic is in ``tests/device``.
"""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.utilities.data import has_len_all_ranks
from torch import nn

from fedgan_lightning import Federation, SequentialExecutor, VectorizedExecutor
from fedgan_lightning.aggregators import CoordinateMedian, WeightedMean
from fedgan_lightning.editing import edited, interpolate, project
from fedgan_lightning.federation import local, optimizer_state, vectorized_trainer
from fedgan_lightning.federation.aggregation import Sums
from fedgan_lightning.federation.drift import Drift
from fedgan_lightning.federation.fast_trainer import ResidentStrategy
from fedgan_lightning.federation.report import norms
from fedgan_lightning.gan.draws import draw_step_noise
from fedgan_lightning.gan.precision import FullPrecision
from fedgan_lightning.gan.priors import Normal
from fedgan_lightning.gan.statistics import StepMeans
from fedgan_lightning.losses import Augmentation, LeCam
from fedgan_lightning.networks import MLPGenerator
from fedgan_lightning.packing import Packed, plain, unstack
from fedgan_lightning.protocol import ClientUpdate
from fedgan_lightning.seeding import isolated_rng
from tests.conftest import federate, ring_data, ring_gan

META, CPU = torch.device("meta"), torch.device("cpu")


class TestMoments:
    @staticmethod
    def trained(*, leading: int = 0, **options) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A module on a device, and an Adam that counts its steps where torch has it count."""
        module = nn.ModuleDict({"net": nn.Linear(3, 2)}).to(META)
        for parameter in module.parameters():
            parameter.data = parameter.data.expand(*[4] * leading, *parameter.shape)
        optimizer = torch.optim.Adam(module.parameters(), **options)
        for parameter in module.parameters():
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            optimizer.state[parameter] = {"step": torch.tensor(3.0), **moments}
        return module, optimizer

    @pytest.mark.parametrize("leading", [0, 1])
    def test_are_sent_from_one_device(self, leading):
        module, optimizer = self.trained(leading=leading)
        found = optimizer_state.collect(module, [optimizer], dict.fromkeys(dict(module.named_parameters()), "average"))[
            "average"
        ]
        assert len(found) == 6
        assert {value.device for value in found.values()} == {META}
        if leading:
            first, *_ = unstack(optimizer_state.rows(found, first=0, stop=4))
        else:
            first = Packed.of(found)
        assert first["optimizer/0/net.weight/exp_avg"].shape == (2, 3)
        assert first["optimizer/0/net.weight/step"].shape == ()

    @pytest.mark.parametrize("options, counted_on", [({}, CPU), ({"capturable": True}, META)])
    def test_come_back_with_counts_where_the_optimizer_reads_them(self, options, counted_on):
        module, _ = self.trained()
        names = ("net.weight", "net.bias")
        moments = {f"optimizer/0/{n}/{k}": torch.zeros(p.shape, device=META) for n, p in zip(names, module.parameters())
                   for k in ("exp_avg", "exp_avg_sq")}  # fmt: skip
        moments |= {f"optimizer/0/{name}/step": torch.tensor(float(k)) for k, name in enumerate(names)}
        optimizer = torch.optim.Adam(module.parameters(), **options)
        optimizer_state.restore(module, [optimizer], moments)
        state = [optimizer.state[parameter] for parameter in module.parameters()]
        assert {own["step"].device for own in state} == {counted_on}
        assert {own["exp_avg"].device for own in state} == {META}
        if counted_on == CPU:
            assert [float(own["step"]) for own in state] == [0.0, 1.0]
            state[0]["step"] += 1
            assert float(moments["optimizer/0/net.weight/step"]) == 0, "they belong to all clients"

    def test_numbers_keep_their_values_and_dtypes_when_they_are_moved_together(self):
        numbers = {"a": torch.tensor(1.5), "b": torch.tensor(2, dtype=torch.int64), "c": torch.tensor(3.5)}
        moved = optimizer_state.together(numbers, META)
        assert {name: value.dtype for name, value in moved.items()} == {n: v.dtype for n, v in numbers.items()}
        assert {value.device for value in moved.values()} == {META}
        assert optimizer_state.together(numbers, CPU) == numbers
        assert plain({"x": 2, **numbers, "y": torch.tensor([0.25])}) == {
            "x": 2.0,
            "a": 1.5,
            "b": 2.0,
            "c": 3.5,
            "y": 0.25,
        }


class UnusedCUDA:
    """CUDA as a process finds it: no generator until it is initialised, and then one from the seed of the process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, initialised: bool) -> None:
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(torch.cuda, "default_generators", ())
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(torch.cuda.default_generators))
        monkeypatch.setattr(torch.cuda, "init", self.init)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        if initialised:
            self.init()

    def init(self) -> None:
        if not torch.cuda.default_generators:
            own = tuple(torch.Generator().manual_seed(0) for _ in range(2))
            self.monkeypatch.setattr(torch.cuda, "default_generators", own)

    def draw(self, index: int) -> list[float]:
        self.init()
        return torch.rand(3, generator=torch.cuda.default_generators[index]).tolist()


class TestDraws:
    @pytest.mark.parametrize("index", [None, 1])
    def test_a_site_draws_what_the_simulation_does(self, monkeypatch, index):
        """The simulation's process has used CUDA before a client trains; a site's has not."""
        found = []
        for initialised in (True, False):
            cuda = UnusedCUDA(monkeypatch, initialised=initialised)
            with isolated_rng(7, device=torch.device("cuda", index) if index is not None else torch.device("cuda")):
                found.append((cuda.draw(index or 0), float(torch.rand(()))))
            other = cuda.draw(1 - (index or 0))
            assert other == torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist(), "of another device"
        assert found[0] == found[1]
        assert found[0][0] == torch.rand(3, generator=torch.Generator().manual_seed(7)).tolist()

    def test_the_device_s_generator_goes_on_afterwards_even_after_an_error(self, monkeypatch):
        cuda = UnusedCUDA(monkeypatch, initialised=True)
        expected = torch.Generator().manual_seed(0)
        assert cuda.draw(0) == torch.rand(3, generator=expected).tolist()
        with pytest.raises(KeyError), isolated_rng(7, device=torch.device("cuda", 0)):
            cuda.draw(0)
            raise KeyError
        assert cuda.draw(0) == torch.rand(3, generator=expected).tolist()

    def test_work_on_the_cpu_does_not_wake_cuda(self, monkeypatch):
        UnusedCUDA(monkeypatch, initialised=False)
        with isolated_rng(7):
            pass
        assert not torch.cuda.is_initialized()

    @pytest.mark.parametrize("executor", [SequentialExecutor, VectorizedExecutor])
    def test_clients_are_isolated_on_their_own_device(self, monkeypatch, executor):
        seen = []

        def noting(seed, *, device):
            seen.append(device)
            return isolated_rng(seed, device=device)

        for module in (local, vectorized_trainer):
            monkeypatch.setattr(module, "isolated_rng", noting)
        federate(ring_gan(), ring_data(), rounds=1, local_steps=1, executor=executor())
        assert set(seen) == {CPU}

    @pytest.mark.parametrize("choice", ["balanced", "all", "held"])
    def test_labels_are_drawn_without_a_look_at_the_device(self, choice):
        options = {"latents": Normal().draw, "latent_dim": 2, "fake_labels": choice, "num_classes": 5, "mix": False}
        options |= {"num_augment": None, "num_condition": None, "dtype": torch.float32, "generator": None}
        y = draw_step_noise(torch.zeros(6, dtype=torch.int64, device=META), **options).y
        assert (y.shape, y.dtype, y.device) == ((6,), torch.int64, META)


class TestSums:
    @pytest.fixture
    def update(self) -> ClientUpdate:
        return ClientUpdate(
            client_id=1, num_examples=2, delta={"w": torch.ones(3)}, metrics={}, extras={"b": torch.ones(())}
        )

    def test_a_mean_stays_where_its_first_update_was(self, update):
        sums = Sums()
        sums.add(Packed.of({"w": torch.empty(3, device=META)}), weight=1.0)
        sums.add(Packed.of(update.delta), weight=1.0)
        assert sums.mean(2.0)["w"].device == META
        accumulator = WeightedMean().init()
        accumulator.delta.add(Packed.of({"w": torch.empty(3, device=META)}), weight=1.0)
        accumulator.extras.add(Packed.of({"b": torch.empty((), device=META)}), weight=1.0)
        accumulator.num_clients = 1
        for whole in (
            WeightedMean().accumulate(accumulator, update),
            WeightedMean().merge(accumulator, WeightedMean().accumulate(WeightedMean().init(), update)),
        ):
            aggregate = WeightedMean().finalize(whole)
            assert aggregate.delta["w"].device == aggregate.extras["b"].device == META

    def test_a_robust_rule_works_where_its_first_update_was(self, update):
        rule = CoordinateMedian()
        first = [(0, 2, Packed.of({"w": torch.empty(3, device=META)}), Packed.of({"b": torch.empty((), device=META)}))]
        for collected in (rule.accumulate(first, update), rule.merge(first, rule.accumulate([], update))):
            aggregate = rule.finalize(collected)
            assert aggregate.delta["w"].device == aggregate.extras["b"].device == META
        mixed = rule.accumulate([], update) + first
        assert rule.finalize(mixed).delta["w"].device == META, "in the order of clients"

    def test_drift_is_summed_where_updates_are(self):
        drift = Drift()
        for delta in (torch.empty(3, device=META), torch.ones(3)):
            drift.add({"net.w": delta}, {"net": 1.0})
        assert {value.device for value in drift._sums.values()} == {META}

    def test_norms_by_network_are_those_of_their_entries(self):
        state = {"a.w": torch.full((4,), 2.0), "b.w": torch.ones(9, dtype=torch.float64), "a.v": torch.full((2,), 3.0)}
        assert norms(state, ("a", "b", "c")) == pytest.approx({"a": 34**0.5, "b": 3.0, "c": 0.0})


class TestEditing:
    @pytest.fixture(params=["device", "double"])
    def generator(self, request) -> nn.Module:
        made = MLPGenerator(4, (1, 2, 2), hidden=(8,), num_classes=3)
        return made.to(META) if request.param == "device" else made.double()

    def test_inputs_go_to_the_generator(self, generator):
        like = next(generator.parameters())
        first, second, labels = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])
        found = [
            interpolate(generator, first, second.to(like), steps=3, labels=labels),
            edited(generator, first, second[0], amounts=torch.tensor([0.0, 1.0]), labels=labels),
            project(
                generator, torch.randn(3, 1, 2, 2), labels=labels, steps=2, starts=2, known=torch.ones(2, 2)
            ).latents,
        ]
        assert {(value.device, value.dtype) for value in found} == {(like.device, like.dtype)}


NARROW = [torch.bfloat16, torch.float16]


class TestNothingIsRoundedAway:
    @pytest.mark.parametrize("dtype", NARROW)
    def test_images_are_counted_in_models_of_narrow_types(self, dtype):
        model = ring_gan(ema_half_life_images=1e6)
        model.to(dtype)
        for _ in range(1000):
            model.update_ema(num_images=32)
        assert int(model.generator_ema.images_seen) == 32000
        assert next(model.generator.parameters()).dtype == dtype

    @pytest.mark.parametrize("dtype", NARROW)
    def test_the_average_follows_by_small_steps(self, dtype):
        model = ring_gan(ema_half_life_images=3200.0, ema_rampup=None).to(dtype)
        for average, value in zip(model.generator_ema.parameters(), model.generator.parameters()):
            average.data.fill_(1.0)
            value.data.fill_(2.0)
        for _ in range(100):
            model.update_ema(num_images=32)
        for average in model.generator_ema.parameters():
            torch.testing.assert_close(average, torch.full_like(average, 1.5))
        assert model.sample(5).shape == (5, 2)

    @pytest.mark.parametrize("dtype", NARROW)
    def test_the_augmentation_s_probability_and_the_anchors_move_by_small_steps(self, dtype):
        augment, anchor = Augmentation(probability=0.5, target=0.6, images_to_full=100_000).to(dtype), LeCam().to(dtype)
        anchor.real.fill_(1.0)
        logits = torch.full((16, 1), 1.125, dtype=dtype)
        for _ in range(500):
            augment.adapt(logits, num_images=16)
            anchor.update_(logits, logits)
        assert float(augment.probability) == pytest.approx(0.58, abs=1e-4)
        assert float(anchor.real) == pytest.approx(1.125, abs=1e-3)

    def test_means_over_many_steps(self):
        means = StepMeans()
        for _ in range(2000):
            means.add({"loss": torch.tensor(1.0, dtype=torch.bfloat16)})
            means.step()
        assert float(means.values()["loss"]) == 1.0

    def test_a_wider_type_or_another_device_is_taken(self):
        module = FullPrecision()
        module.register_buffer("count", torch.tensor(3.0))
        assert module.double().count.dtype == torch.float64
        assert module.half().count.dtype == torch.float64
        assert module.to(META).count.device == META

    @pytest.mark.parametrize("executor", [SequentialExecutor, VectorizedExecutor])
    @pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
    def test_a_federation_counts_in_every_precision(self, tmp_path, executor, precision):
        run = Federation(
            ring_gan(ema_half_life_images=100.0, augment=None),
            ring_data(num_clients=3),
            rounds=3,
            local_steps=2,
            executor=executor(),
            run_dir=str(tmp_path),
            trainer={"accelerator": "cpu", "enable_progress_bar": False, "precision": precision},
        )
        run.fit()
        average = run.server.model.generator_ema
        assert float(average.images_seen) == 3 * 2 * 16
        expected = torch.float64 if precision == "64-true" else torch.float32
        assert {value.dtype for value in average.parameters()} == {expected}
        assert all(torch.isfinite(value).all() for value in run.server.model.state_dict().values())


class TestWire:
    DTYPES = [
        *(torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bool, torch.uint8),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.float8_e4m3fn),
    ]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_arrives_as_it_was_sent(self, dtype):
        pytest.importorskip("flwr")
        from fedgan_lightning.deployment.wire import content, state_of

        values = torch.tensor([0.0, 1.0, 3.0, 100.0]).to(dtype)
        state = {"w": values.view(2, 2), "n": values[3], "others": torch.ones(3), "empty": values[:0]}
        found = state_of(content({}, group=state), "group")
        assert found.keys() == state.keys()
        for name, value in state.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert found[name].tolist() == value.tolist()

    def test_an_array_of_another_dtype_is_refused(self):
        pytest.importorskip("flwr")
        from flwr.app import Array

        from fedgan_lightning.deployment.wire import content, state_of

        records = content({}, group={"w": torch.ones(2, dtype=torch.bfloat16)})
        records["arrays"]["group|torch.bfloat16"] = Array(torch.ones(2).numpy())
        with pytest.raises(ValueError, match="not 2 of torch.int16"):
            state_of(records, "group")


class TestTheTrainerOfRounds:
    def test_an_accelerator_is_made_ready_once(self, monkeypatch):
        setups = []
        monkeypatch.delenv("FEDGAN_ROUND_TRAINER", raising=False)  # the public form makes a Trainer for every visit
        monkeypatch.setattr(CPUAccelerator, "setup", lambda self, trainer: setups.append(trainer))
        federate(ring_gan(), ring_data(), rounds=3, local_steps=1)
        assert len(setups) == 2, "the server's, and the clients'"

    def test_loops_count_without_the_device(self):
        strategy = ResidentStrategy(META)
        with strategy.counts_on_cpu():
            assert has_len_all_ranks([1, 2], strategy)
        assert strategy.root_device == META

    @pytest.mark.parametrize("executor", [SequentialExecutor, VectorizedExecutor])
    def test_clients_of_a_deterministic_trainer_are_deterministic(self, tmp_path, monkeypatch, executor):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        seen = []

        class Looks(SequentialExecutor if executor is SequentialExecutor else VectorizedExecutor):
            def run(self, tasks):
                for answer in super().run(tasks):
                    seen.append((torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]))
                    yield answer

        try:
            Federation(
                ring_gan(),
                ring_data(),
                rounds=1,
                local_steps=1,
                executor=Looks(),
                run_dir=str(tmp_path),
                trainer={"accelerator": "cpu", "enable_progress_bar": False, "deterministic": True},
            ).fit()
        finally:
            torch.use_deterministic_algorithms(False)
        assert set(seen) == {(True, ":4096:8")}
