"""Other people's LightningModules: each kind of thing that a module expects of its Trainer, and what travels of it.

Modules know nothing of federation. What a plain Trainer makes of them is the measure.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn
from torch.optim import lr_scheduler as schedules

from fedgan_lightning import (
    GAN,
    ConfigurationError,
    Evaluation,
    FederatedDataModule,
    Federation,
    SequentialExecutor,
    ServerModule,
    VectorizedExecutor,
)
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.partitions import ClassesPerClient, QuantitySkew
from fedgan_lightning.sources import Ring

QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


def data(clients=2, **options):
    return FederatedDataModule(Ring(num_samples=400), num_clients=clients, batch_size=8, **options)


def federate(module, *, clients=2, rounds=3, steps=2, trainer=None, own=None, ckpt_path=None, run_dir="run", **options):
    work = {} if "local_epochs" in options else {"local_steps": steps}
    options.setdefault("evaluation", Evaluation(metrics=[]))
    found = Federation(
        module,
        own if own is not None else data(clients),
        rounds=rounds,
        run_dir=run_dir,
        trainer={**QUIET, **(trainer or {})},
        **{"executor": SequentialExecutor(), **work, **options},
    )
    found.fit(ckpt_path=ckpt_path)
    return found


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(2, 2)

    def loss(self, x):
        return (self.net(x) - 1).square().mean()

    def training_step(self, batch, index):
        return self.loss(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class TestLogger:
    """F1: ``self.logger`` of a client."""

    def test_pictures_and_numbers_are_written_beside_the_run(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        class Pictures(Net):
            def training_step(self, batch, index):
                assert self.loggers
                self.logger.experiment.add_image("fake", torch.zeros(1, 2, 2), self.current_epoch)
                self.log("loss", loss := self.loss(batch[0]), on_step=True, on_epoch=True)
                return loss

        federate(Pictures(), clients=3, client_logs=2)
        events = EventAccumulator("run/client_logs", size_guidance={"images": 0}).Reload()
        assert set(events.Tags()["images"]) == {"client_000/fake", "client_001/fake"}
        assert [event.step for event in events.Images("client_001/fake")] == [0, 0, 1, 1, 2, 2]
        assert "client_000/loss_step" in events.Tags()["scalars"]
        assert [event.value for event in events.Scalars("client_000/round")] == [0, 1, 2]

    @pytest.mark.parametrize("client_logs", [0, 2])
    def test_loggers_of_other_kinds_do_nothing_and_change_nothing(self, client_logs):
        class Other(Net):
            def training_step(self, batch, index):
                self.logger.log_image("fake", [torch.zeros(1, 2, 2)])
                self.logger.experiment.log({"a": 1})
                self.logger.experiment.add_hparams({}, {})
                self.logger.log_metrics({"a": 1.0}, step=self.global_step)
                return self.loss(batch[0])

        first, second = federate(Other(), client_logs=client_logs), federate(Net(), run_dir="plain")
        assert torch.equal(first.server.model.net.weight, second.server.model.net.weight)
        assert Path("run/client_logs").exists() == bool(client_logs)


class Clocked(Net):
    """Notes what the clocks say at the start of every minibatch."""

    def on_train_batch_start(self, batch, index):
        trainer = self.trainer
        SEEN.append(
            (
                self.current_epoch, self.global_step, trainer.max_epochs, trainer.max_steps,
                trainer.estimated_stepping_batches, trainer.fit_loop.total_batch_idx, index,
                round(self.optimizers().param_groups[0]["lr"], 3), trainer.datamodule is not None,
            )
        )  # fmt: skip


SEEN: list = []


@pytest.fixture(autouse=True)
def _nothing_seen():
    SEEN.clear()


class TestClocks:
    """F2: rounds are the epochs of a run that goes on."""

    def test_they_go_on_over_rounds(self):
        federate(Clocked(), clients=1, rounds=3, steps=2)
        assert [row[:7] for row in SEEN] == [
            (epoch, step, 3, 6, 6, step, step - 2 * epoch) for epoch in range(3) for step in (2 * epoch, 2 * epoch + 1)
        ]
        assert all(row[8] for row in SEEN)

    def test_a_resumed_run_and_late_clients_see_the_same(self):
        federate(Clocked(), clients=1, rounds=3)
        whole = list(SEEN)
        SEEN.clear()
        federate(Clocked(), clients=1, rounds=1, run_dir="part")
        first = [(*row[:2], *row[5:]) for row in SEEN]
        SEEN.clear()
        federate(Clocked(), clients=1, rounds=3, run_dir="part", ckpt_path="last")
        assert whole[2:] == SEEN
        assert first == [(*row[:2], *row[5:]) for row in whole[:2]]

    def test_gradients_that_are_accumulated_count_once(self):
        federate(Clocked(), clients=1, rounds=2, steps=4, client_trainer={"accumulate_grad_batches": 2})
        assert [(row[1], row[3]) for row in SEEN] == [(0, 4), (0, 4), (1, 4), (1, 4), (2, 4), (2, 4), (3, 4), (3, 4)]

    def test_epochs_of_unequal_clients_count_their_own_minibatches(self):
        own = FederatedDataModule(Ring(num_samples=200), partition=QuantitySkew(), num_clients=4, batch_size=8, seed=0)
        own.setup()
        federate(Clocked(), own=own, local_epochs=1, rounds=2)
        lengths = [own.steps_per_epoch(k) for k in range(4)]
        assert len(set(lengths)) > 1
        assert [row[1] for row in SEEN] == [
            *(step for length in lengths for step in range(length)),
            *(length + step for length in lengths for step in range(length)),
        ]

    def test_a_schedule_by_epochs_of_the_documentation(self):
        class Cosine(Clocked):
            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), 0.1)
                return [optimizer], [schedules.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)]

        federate(Cosine(), clients=1, rounds=6, steps=1)
        assert [row[7] for row in SEEN] == [round(0.05 * (1 + math.cos(math.pi * t / 6)), 3) for t in range(6)]

    def test_a_schedule_by_all_steps(self):
        class Vocoder(Clocked):
            def configure_optimizers(self):
                optimizer, half = torch.optim.SGD(self.parameters(), 0.1), self.trainer.max_steps // 2
                rule = schedules.LambdaLR(optimizer, lambda t: max(0.0, 0.5 * (1 + math.cos(math.pi * t / half))))
                return [optimizer], [{"scheduler": rule, "interval": "step"}]

        federate(Vocoder(), clients=1, rounds=1, steps=6)
        assert [row[7] for row in SEEN] == [0.1, 0.075, 0.025, 0.0, 0.025, 0.075]

    def test_one_cycle_has_as_many_steps_as_the_run(self):
        class OneCycle(Clocked):
            def configure_optimizers(self):
                optimizer, total = torch.optim.SGD(self.parameters(), 0.1), self.trainer.estimated_stepping_batches
                cycle = schedules.OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

        federate(OneCycle(), clients=1, rounds=4, steps=3)
        rates = [row[7] for row in SEEN]
        assert max(rates) == pytest.approx(0.1, abs=0.01)
        assert rates[-1] < 0.01

    @pytest.mark.parametrize("steps", [2, 5])
    def test_a_generator_that_counts_global_steps_learns_whatever_k(self, steps):
        module = WGAN()
        before = module.g.weight.detach().clone()
        found = federate(module, rounds=10, steps=steps)
        assert not torch.equal(before, found.server.model.g.weight)

    def test_a_warm_up_by_rounds(self):
        weights = []

        class KL(Net):
            def training_step(self, batch, index):
                weights.append(min(1.0, self.current_epoch / 3))
                return self.loss(batch[0])

        federate(KL(), clients=1, rounds=5, steps=1)
        assert weights == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])


class WGAN(L.LightningModule):
    """The generator's turn is every fifth of its critic's, by ``global_step``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.g, self.d = nn.Linear(2, 2), nn.Linear(2, 1)

    def training_step(self, batch, index):
        g, d = self.optimizers()
        x = batch[0]
        d.zero_grad()
        self.manual_backward((self.d(self.g(torch.randn_like(x)).detach()) - self.d(x)).mean())
        d.step()
        if self.is_due(index):
            g.zero_grad()
            self.manual_backward(-self.d(self.g(torch.randn_like(x))).mean())
            g.step()

    def is_due(self, index):
        return (self.global_step + 1) % 5 == 0

    def configure_optimizers(self):
        return torch.optim.Adam(self.g.parameters()), torch.optim.Adam(self.d.parameters())


class TestCheckpoints:
    """F3: a run's checkpoint loads into the module itself."""

    def test_trained_weights_come_back_with_their_hyper_parameters(self):
        found = federate(Mine(3))
        loaded = Mine.load_from_checkpoint("run/checkpoints/last.ckpt")
        assert loaded.width == 3
        assert torch.equal(loaded.net.weight, found.server.model.net.weight)

    def test_networks_that_are_given_are_filled(self):
        def networks():
            return {"generator": MLPGenerator(4, (2,)), "discriminator": MLPDiscriminator((2,))}

        found = federate(GAN(**networks()), rounds=1)
        loaded = GAN.load_from_checkpoint("run/checkpoints/last.ckpt", **networks())
        for name, value in found.server.model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)

    def test_the_server_s_module_loads_them_too(self):
        found = federate(Mine(2))
        loaded = ServerModule.load_from_checkpoint("run/checkpoints/last.ckpt", model=Mine(2))
        assert torch.equal(loaded.model.net.weight, found.server.model.net.weight)

    @pytest.mark.filterwarnings("ignore:Attribute 'layer'")
    def test_hyper_parameters_that_are_objects_do_not_spoil_a_checkpoint(self):
        class Holding(Net):
            def __init__(self, width: int, layer: nn.Module):
                super().__init__()
                self.save_hyperparameters()

        federate(Holding(3, nn.Linear(1, 1)), rounds=1)
        kept = torch.load("run/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]
        assert kept == {"width": 3}
        federate(Holding(3, nn.Linear(1, 1)), rounds=2, ckpt_path="last")

    def test_what_a_module_adds_to_its_checkpoints_is_in_them(self):
        class Adds(Net):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["mine"] = 7

            def on_load_checkpoint(self, checkpoint):
                SEEN.append(checkpoint["mine"])

        federate(Adds(), rounds=1)
        federate(Adds(), rounds=2, ckpt_path="last")
        assert SEEN == [7]


class Mine(Net):
    def __init__(self, width: int):
        super().__init__()
        self.save_hyperparameters()
        self.width = width


class TestHooks:
    """F4: what Lightning calls once in a fit."""

    def test_they_are_called_once(self):
        counts: dict[str, int] = {}

        class Counting(Net):
            def _count(self, name):
                counts[name] = counts.get(name, 0) + 1

            def prepare_data(self):
                self._count("prepare_data")

            def setup(self, stage):
                self._count(f"setup {stage == 'fit'}")

            def configure_model(self):
                self._count("configure_model")

            def on_fit_start(self):
                self._count("on_fit_start")

            def on_fit_end(self):
                self._count("on_fit_end")

            def teardown(self, stage):
                self._count(f"teardown {stage == 'fit'}")

        federate(Counting(), clients=3, rounds=3)
        assert counts == dict.fromkeys(
            ["prepare_data", "setup True", "configure_model", "on_fit_start", "on_fit_end", "teardown True"], 1
        )

    def test_weights_that_setup_makes_are_the_start_and_not_every_round_s(self):
        class Init(Net):
            def setup(self, stage):
                if stage == "fit":
                    nn.init.constant_(self.net.weight, 0.5)
                    nn.init.zeros_(self.net.bias)

        class Already(Net):
            def __init__(self):
                super().__init__()
                Init.setup(self, "fit")

        first, second = federate(Init(), rounds=10), federate(Already(), rounds=10, run_dir="other")
        assert torch.equal(first.server.model.net.weight, second.server.model.net.weight)

    @pytest.mark.parametrize("hook", ["setup", "configure_model"])
    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
    def test_networks_that_are_made_there_travel(self, hook, optimizer):
        class Late(Net):
            def make(self):
                if not hasattr(self, "head"):
                    torch.manual_seed(1)
                    self.head = nn.Linear(2, 2)

            def setup(self, stage):
                self.make() if hook == "setup" else None

            def configure_model(self):
                self.make() if hook == "configure_model" else None

            def loss(self, x):
                return (self.head(self.net(x)) - 1).square().mean()

            def configure_optimizers(self):
                return optimizer(self.parameters(), 0.1)

        found = federate(Late(), rounds=2)
        torch.manual_seed(1)
        assert not torch.equal(found.server.model.head.weight, nn.Linear(2, 2).weight)
        assert found.orchestrator.ledger.bytes_up["head"] > 0

    def test_what_setup_needs_of_a_trainer_is_there(self):
        class Asks(Net):
            def setup(self, stage):
                SEEN.append((self.trainer.max_epochs, self.trainer.estimated_stepping_batches))
                SEEN.append(self.trainer.datamodule.batch_size)

        federate(Asks(), rounds=3, steps=2)
        assert SEEN == [(3, 6), 8]

    def test_what_needs_a_client_s_data_is_refused_in_words(self):
        class Peeks(Net):
            def setup(self, stage):
                next(iter(self.trainer.train_dataloader))

        with pytest.raises(ConfigurationError, match=r"setup\(\) of Peeks must run once before the first round"):
            federate(Peeks())


class TestSampling:
    """F5: a ``sample`` of another signature, and no measurement where there is none."""

    @pytest.mark.parametrize(
        "method",
        [
            lambda self, num_samples: torch.randn(num_samples, 2),
            lambda self, n, device: torch.randn(n, 2, device=device),
            lambda self, batch_size=16, return_intermediates=False: torch.randn(batch_size, 2),
            lambda self, num_samples, current_device: torch.randn(num_samples, 2, device=current_device),
        ],
        ids=["n", "n, device", "batch_size", "current_device"],
    )
    def test_other_signatures_are_found_and_measured(self, method):
        class Other(Net):
            sample = method

        found = federate(Other(), rounds=1, evaluation=Evaluation(num_samples=64))
        again = federate(Other(), rounds=1, evaluation=Evaluation(num_samples=64), run_dir="again")
        assert found.evaluation.latest
        assert found.evaluation.latest == again.evaluation.latest

    def test_a_generator_s_forward_is_sampled(self):
        class Tutorial(Net):
            latent_dim = 2

            def forward(self, z):
                return self.net(z)

        assert federate(Tutorial(), rounds=1, evaluation=Evaluation(num_samples=64)).evaluation.latest

    def test_a_function_may_be_given(self):
        evaluation = Evaluation(num_samples=64, sample_with=lambda module, count: module.net(torch.randn(count, 2)))
        assert federate(Net(), rounds=1, evaluation=evaluation).evaluation.latest

    @pytest.mark.parametrize(
        "method",
        [
            lambda self, z, steps: z,
            lambda self, num_samples: torch.randn(num_samples, 5),
            lambda self, num_samples: [1.0] * num_samples,
            lambda self, num_samples: 1 / 0,
        ],
        ids=["needs z", "other shape", "no tensor", "fails"],
    )
    def test_what_cannot_be_used_is_said_and_the_run_goes_on(self, method, caplog, recwarn):
        class Diffusion(Net):
            sample = method

        warnings.simplefilter("always")
        with caplog.at_level(logging.WARNING, logger="fedgan_lightning"):
            found = federate(Diffusion(), rounds=1, evaluation=Evaluation())
        said = caplog.text + " ".join(str(one.message) for one in recwarn)
        assert "Diffusion" in said
        assert "sample_with" in said
        assert found.evaluation.latest == {}

    def test_no_metrics_draw_nothing(self):
        class Never(Net):
            def sample(self, num_samples, *, labels=None, generator=None):
                SEEN.append(num_samples)
                return torch.randn(num_samples, 2)

        from fedgan_lightning import SamplePictures

        federate(Never(), rounds=1, evaluation=Evaluation(metrics=[]), pictures=SamplePictures(every_n_rounds=None))
        assert SEEN == []

    def test_methods_that_only_share_a_hook_s_name_are_left_alone(self):
        class Named(Net):
            def check_data(self):
                raise AssertionError

            def on_client_round_start(self):
                raise AssertionError

            def round_statistics(self, what):
                raise AssertionError

            def recalibrate(self, what):
                raise AssertionError

            def on_server_round_end(self):
                raise AssertionError

            def default_sync(self, what):
                raise AssertionError

        assert federate(Named(), rounds=1).server.rounds_completed == 1


class Pool(Net):
    def __init__(self):
        super().__init__()
        self.pool, self.step = [], 0
        self.average = Average(self.net)

    def on_train_start(self):
        SEEN.append((len(self.pool), self.step, self.net.training, float(self.average.shadow.sum())))

    def training_step(self, batch, index):
        self.pool.append(batch[0][0])
        self.step += 1
        self.average.update(self.net)
        return self.loss(batch[0])

    def on_train_end(self):
        self.net.eval()
        self.net.bias.requires_grad_(False)


class Average:
    """A moving average as other libraries have it: an object with tensors of its own."""

    def __init__(self, net):
        self.shadow = net.weight.detach().clone()
        self.count = 0

    def update(self, net):
        self.count += 1
        self.shadow.mul_(0.5).add_(net.weight.detach(), alpha=0.5)


class TestAttributes:
    """F6: plain attributes pass to nobody, and are kept where they are named."""

    def test_nothing_passes_from_client_to_client(self, caplog):
        with caplog.at_level(logging.WARNING, logger="fedgan_lightning"):
            found = federate(Pool(), rounds=2)
        assert len(set(SEEN)) == 1
        assert SEEN[0][:3] == (0, 0, True)
        assert (len(found.server.model.pool), found.server.model.step) == (0, 0)
        assert "training changes attributes of Pool" in caplog.text
        for name in ("pool", "step", "average", "net.training", "net.bias.requires_grad"):
            assert name in caplog.text

    def test_named_ones_are_each_client_s_own(self, caplog):
        with caplog.at_level(logging.WARNING, logger="fedgan_lightning"):
            found = federate(Pool(), rounds=3, steps=2, client_attributes=["pool", "step", "average"])
        assert [row[:2] for row in SEEN] == [(0, 0), (0, 0), (2, 2), (2, 2), (4, 4), (4, 4)]
        named = caplog.text.split("before every client: ")[1].split(". To keep")[0].split(", ")
        assert named == ["net.bias.requires_grad", "net.training"]
        assert len(found.orchestrator.store) == 2

    @pytest.mark.parametrize("named", [[], ["step"]])
    def test_a_resumed_run_is_an_uninterrupted_one(self, named):
        class Decay(Net):
            def __init__(self):
                super().__init__()
                self.step = 0

            def training_step(self, batch, index):
                self.step += 1
                return self.loss(batch[0]) / self.step

        whole = federate(Decay(), rounds=4, client_attributes=named)
        federate(Decay(), rounds=2, run_dir="part", client_attributes=named)
        rest = federate(Decay(), rounds=4, run_dir="part", ckpt_path="last", client_attributes=named)
        assert torch.equal(whole.server.model.net.weight, rest.server.model.net.weight)

    @pytest.mark.parametrize("name", ["nonsense", "net.weight", "net", "net.nothing"])
    def test_a_name_of_no_attribute_is_refused(self, name):
        with pytest.raises(ConfigurationError, match=f"must name plain attributes of Pool; got {name}"):
            federate(Pool(), client_attributes=[name])

    def test_what_cannot_be_kept_is_refused_by_name(self):
        class Held(Net):
            def __init__(self):
                super().__init__()
                self.function = math.sqrt

        with pytest.raises(Exception, match=r"client attribute function must be made of numbers"):
            federate(Held(), client_attributes=["function"])

    def test_stacks_refuse_them(self):
        gan = GAN(MLPGenerator(4, (2,)), MLPDiscriminator((2,)))
        gan.note = 1
        with pytest.raises(ConfigurationError, match="one after the other; got federation.client_attributes"):
            federate(gan, client_attributes=["note"], executor=VectorizedExecutor())


class TestBranches:
    """F7: a branch that one client does not take."""

    class Heads(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(2, 2) for _ in range(8)])

        def training_step(self, batch, index):
            x, y = batch
            return sum((self.heads[int(k)](x[y == k]) - 1).square().mean() for k in y.unique())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    @pytest.mark.parametrize("state", ["average", "reset", "keep"])
    def test_heads_by_class(self, state):
        own = FederatedDataModule(Ring(num_samples=400), partition=ClassesPerClient(2), num_clients=4, batch_size=8)
        assert federate(self.Heads(), own=own, optimizer_state=state).server.rounds_completed == 3

    def test_a_critic_s_turns_with_unequal_clients_and_epochs(self):
        class EveryFifth(WGAN):
            def is_due(self, index):
                return (index + 1) % 5 == 0

        own = FederatedDataModule(Ring(num_samples=200), partition=QuantitySkew(), num_clients=4, batch_size=8, seed=0)
        assert federate(EveryFifth(), own=own, local_epochs=1).server.rounds_completed == 3


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
class TestConstants:
    """F8: what nobody trains does not travel."""

    class Perceptual(Net):
        def __init__(self):
            super().__init__()
            self.vgg = nn.Sequential(nn.Linear(1000, 100), nn.BatchNorm1d(100)).requires_grad_(False).eval()
            self.losses = nn.ModuleDict({"lpips": nn.Linear(1000, 100).requires_grad_(False), "disc": nn.Linear(2, 1)})

    def test_frozen_networks_cost_nothing_also_nested(self):
        found = federate(self.Perceptual(), rounds=2)
        down, up = found.orchestrator.ledger.bytes_down, found.orchestrator.ledger.bytes_up
        assert "vgg" not in down
        assert "vgg" not in up
        assert down["losses"] == up["losses"] == 2 * 2 * 3 * 4

    def test_the_server_s_optimizer_leaves_them_alone(self):
        module = self.Perceptual()
        before = module.vgg[0].weight.detach().clone()
        federate(module, server_optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1))
        assert torch.equal(module.vgg[0].weight, before)

    @pytest.mark.parametrize("sync", [{"losses": "local"}, {"losses.disc": "local"}])
    def test_local_clients_do_not_each_keep_them(self, sync):
        found = federate(self.Perceptual(), sync=sync)
        assert not any("lpips" in name for own in found.orchestrator.store.state_dict().values() for name in own)
        assert any("disc" in name for own in found.orchestrator.store.state_dict().values() for name in own)

    @pytest.mark.parametrize("sync", [{"vgg": "server"}, {"losses.lpips": "local"}, {"losses.lpips": "server"}])
    def test_a_placement_may_be_given_all_the_same(self, sync):
        assert "vgg" not in federate(self.Perceptual(), sync=sync).orchestrator.ledger.bytes_up

    def test_twenty_million_parameters_cost_no_byte(self):
        class Large(Net):
            def __init__(self):
                super().__init__()
                self.vgg = nn.Linear(5000, 4000).requires_grad_(False)

        found = federate(Large(), rounds=1, steps=1)
        assert dict(found.orchestrator.ledger.bytes_up) == {"net": 2 * 24}

    @pytest.mark.parametrize("wrap", [False, True])
    def test_a_copy_of_what_is_trained_is_a_moving_average_and_travels(self, wrap):
        class Ema(Net):
            def __init__(self):
                super().__init__()
                own = copy.deepcopy(self.net).requires_grad_(False)
                self.ema = torch.optim.swa_utils.AveragedModel(self.net).requires_grad_(False) if wrap else own

            def on_train_batch_end(self, *arguments):
                for mine, theirs in zip(self.ema.parameters(), self.net.parameters()):
                    mine.data.lerp_(theirs.data, 0.5)

        found = federate(Ema(), rounds=2)
        assert found.orchestrator.ledger.bytes_up["ema"] > 0
        first = next(iter(found.server.model.ema.parameters()))
        assert not torch.equal(first, Ema().net.weight)
        kept = federate(Ema(), rounds=2, sync={"ema": "local"}, run_dir="kept")
        assert "ema" not in kept.orchestrator.ledger.bytes_up
        assert any("ema" in name for name in kept.orchestrator.store.read(0))

    def test_training_that_changes_one_is_refused_by_name(self):
        class Moves(Net):
            def __init__(self):
                super().__init__()
                self.frozen = nn.Linear(3, 3).requires_grad_(False)

            def on_train_batch_end(self, *arguments):
                self.frozen.weight.data.add_(1)

        with pytest.raises(Exception, match=r"got frozen.weight, .* Set federation.sync.frozen.weight"):
            federate(Moves(), rounds=1)
        moved = federate(Moves(), rounds=2, steps=2, sync={"frozen": "average"}, run_dir="told")
        assert moved.orchestrator.ledger.bytes_up["frozen"] > 0


class TestIntegers:
    """F9: counters in buffers."""

    class Ema(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("num_updates", torch.tensor(0))

        def on_train_batch_end(self, *arguments):
            self.num_updates += 1

    def test_they_go_on_over_rounds(self):
        assert int(federate(self.Ema(), clients=1, rounds=3, steps=3).server.model.num_updates) == 9

    @pytest.mark.parametrize("rule, expected", [("mean", 4), ("max", 5)])
    def test_unequal_clients_are_merged_as_the_policy_says(self, rule, expected):
        own = FederatedDataModule(Ring(num_samples=64), partition=Sizes(40, 24), num_clients=2, batch_size=8, seed=0)
        found = federate(self.Ema(), own=own, local_epochs=1, rounds=1, integer_buffers=rule)
        assert int(found.server.model.num_updates) == expected  # (40 * 5 + 24 * 3) / 64 = 4.25

    def test_batch_norm_without_momentum_counts_on(self):
        class Cumulative(Net):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(2, momentum=None)

            def loss(self, x):
                return (self.net(self.norm(x)) - 1).square().mean()

        found = federate(Cumulative(), clients=1, rounds=3, steps=4)
        assert int(found.server.model.norm.num_batches_tracked) == 12


class Sizes(ClassesPerClient):
    """The first so many samples to the first client, and so on."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def split(self, samples, *, num_clients, seed):
        import numpy as np

        return np.split(np.arange(sum(self.sizes)), np.cumsum(self.sizes)[:-1])


class InInit(Net):
    def __init__(self):
        super().__init__()
        self.o = torch.optim.Adam(self.net.parameters(), 0.1)
        self.s = schedules.ExponentialLR(self.o, 0.5)

    def on_train_start(self):
        steps = [int(own["step"]) for own in self.o.state.values()][:1]
        SEEN.append((self.o.param_groups[0]["lr"], steps))

    def configure_optimizers(self):
        return [self.o], [self.s]


class TestOptimizersOfInit:
    """F11: optimizers and schedules that are attributes."""

    def test_every_client_starts_where_the_round_does(self):
        federate(InInit(), clients=3, rounds=2)
        assert SEEN == [(0.1, [])] * 3 + [(0.05, [2])] * 3

    def test_they_equal_those_of_configure_optimizers(self):
        class Usual(Net):
            def configure_optimizers(self):
                optimizer = torch.optim.Adam(self.net.parameters(), 0.1)
                return [optimizer], [schedules.ExponentialLR(optimizer, 0.5)]

        first, second = federate(InInit(), rounds=3), federate(Usual(), rounds=3, run_dir="other")
        assert torch.equal(first.server.model.net.weight, second.server.model.net.weight)


class Logged(Net):
    def training_step(self, batch, index):
        self.log("g_loss", loss := self.loss(batch[0]))
        return loss

    def forward(self, x):
        return self.net(x)


class TestSides:
    """F12: what acts on the server, and what on clients."""

    @pytest.mark.parametrize("monitor", ["g_loss", "train/g_loss"])
    def test_what_clients_log_can_be_watched(self, monitor):
        stop = EarlyStopping(monitor, patience=1, min_delta=1e9)
        keep = ModelCheckpoint("kept", monitor=monitor, every_n_epochs=1)
        found = federate(Logged(), rounds=6, trainer={"callbacks": [stop, keep]})
        assert found.server.rounds_completed == 2
        assert Path(keep.best_model_path).exists()

    def test_clipping_and_accumulation_reach_clients(self):
        plain = federate(Logged(), clients=1, rounds=1, steps=4)
        for name, options in {
            "clipped": {"gradient_clip_val": 1e-4}, "accumulated": {"accumulate_grad_batches": 4}
        }.items():  # fmt: skip
            found = federate(Logged(), clients=1, rounds=1, steps=4, trainer=options, run_dir=name)
            same = federate(Logged(), clients=1, rounds=1, steps=4, client_trainer=options, run_dir=f"{name} again")
            assert torch.equal(found.server.model.net.weight, same.server.model.net.weight)
            assert not torch.equal(found.server.model.net.weight, plain.server.model.net.weight)
        clipped = federate(Logged(), clients=1, rounds=1, steps=1, trainer={"gradient_clip_val": 1e-4}, run_dir="one")
        moved = [(a - b).detach() for a, b in zip(clipped.server.model.parameters(), Logged().parameters())]
        assert float(torch.cat([own.flatten() for own in moved]).norm()) == pytest.approx(1e-5, rel=1e-3)

    def test_a_module_that_optimizes_itself_is_told_where_to_clip(self):
        with pytest.raises(ConfigurationError, match="got gradient_clip_val for WGAN, which optimizes by itself"):
            federate(WGAN(), trainer={"gradient_clip_val": 1.0})

    def test_options_that_are_not_clients_are_refused(self):
        with pytest.raises(ConfigurationError, match="federation.client_trainer must have options among"):
            federate(Logged(), client_trainer={"max_epochs": 3})

    def test_callbacks_of_the_server_may_call_the_module(self):
        class Show(Callback):
            def on_train_epoch_end(self, trainer, module):
                SEEN.append(module(torch.zeros(1, 2)).shape)
                SEEN.append(dict(module.hparams))

        class Parametric(Logged):
            def __init__(self, width=5):
                super().__init__()
                self.save_hyperparameters()

        federate(Parametric(), rounds=1, trainer={"callbacks": [Show()]})
        assert SEEN == [(1, 2), {"width": 5}]

    def test_callbacks_on_clients_keep_their_state_for_each(self):
        class Counts(Callback):
            def __init__(self):
                self.batches, self.shadow = 0, None

            def on_fit_start(self, trainer, module):
                SEEN.append("begin")
                self.shadow = module.net.weight.detach().clone()

            def on_train_batch_end(self, trainer, module, *arguments):
                self.batches += 1
                self.shadow.lerp_(module.net.weight.detach(), 0.5)

            def on_train_end(self, trainer, module):
                SEEN.append(self.batches)

        given = Counts()
        found = federate(Net(), rounds=2, client_callbacks=[given])
        assert SEEN == ["begin", 2, "begin", 2, 4, 4]
        assert given.batches == 0
        assert any(name.startswith("callback/0/") for name in found.orchestrator.store.read(1))

    def test_their_own_state_dict_is_what_is_kept(self):
        class Stateful(Callback):
            def __init__(self):
                self.own, self.scratch = {"n": 0}, []

            def on_train_batch_end(self, *arguments):
                self.own["n"] += 1
                self.scratch.append(object())

            def on_train_start(self, *arguments):
                SEEN.append((self.own["n"], len(self.scratch)))

            def state_dict(self):
                return dict(self.own)

            def load_state_dict(self, state):
                self.own = dict(state)

        federate(Net(), rounds=2, client_callbacks=[Stateful()])
        assert SEEN == [(0, 0), (0, 0), (2, 0), (2, 0)]

    def test_a_plateau_of_a_training_metric_resumes(self):
        class Plateau(Logged):
            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), 0.1)
                plateau = schedules.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "g_loss"}}

            def on_train_start(self):
                SEEN.append(self.optimizers().param_groups[0]["lr"])

        whole = federate(Plateau(), rounds=4)
        assert SEEN[::2] == pytest.approx([0.1, 0.01, 0.001, 0.0001])
        federate(Plateau(), rounds=2, run_dir="part")
        rest = federate(Plateau(), rounds=4, run_dir="part", ckpt_path="last")
        assert torch.equal(whole.server.model.net.weight, rest.server.model.net.weight)

    def test_hooks_about_data_that_nobody_calls_are_named(self, caplog):
        class Own(Logged):
            def train_dataloader(self):
                raise AssertionError

            def validation_step(self, batch, index):
                raise AssertionError

        with caplog.at_level(logging.WARNING, logger="fedgan_lightning"):
            federate(Own(), rounds=1)
        assert "Own.train_dataloader is not called" in caplog.text
        assert "Own.validation_step is not called" in caplog.text


def test_a_module_of_the_other_package_is_named_at_once():
    """F13."""
    pl = pytest.importorskip("pytorch_lightning", reason="needs the package pytorch_lightning")

    class Old(pl.LightningModule):
        pass

    with pytest.raises(ConfigurationError, match="Take LightningModule from lightning, not from pytorch_lightning"):
        Federation(Old(), data())


class Chained(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        own = [schedules.LinearLR(optimizer, total_iters=3), schedules.ExponentialLR(optimizer, 0.9)]
        return [optimizer], [schedules.ChainedScheduler(own)]

    def on_train_start(self):
        SEEN.append(self.optimizers().param_groups[0]["lr"])


class TestCopies:
    """F14: what cannot be copied or flattened as it is."""

    def test_weights_that_hooks_compute(self):
        class Wn(Net):
            def __init__(self):
                super().__init__()
                self.net = torch.nn.utils.weight_norm(self.net)

        found = federate(Wn(), rounds=2)
        assert found.orchestrator.ledger.bytes_up["net"] == 2 * 2 * 4 * (4 + 2 + 2)

    def test_results_and_locks_among_attributes(self):
        class Kept(Net):
            def __init__(self):
                super().__init__()
                self.last, self.lock = self.net(torch.randn(2, 2)), threading.Lock()

            def training_step(self, batch, index):
                with self.lock:
                    return self.loss(batch[0])

        assert federate(Kept(), rounds=2).server.rounds_completed == 2

    def test_layers_without_a_shape_are_named(self):
        class Lazy(Net):
            def __init__(self):
                super().__init__()
                self.net = nn.LazyLinear(2)

        with pytest.raises(ConfigurationError, match=r"got net.weight of a lazy layer.*in setup\(\)"):
            federate(Lazy())

        class Shaped(Lazy):
            def setup(self, stage):
                self.net(torch.zeros(1, 2))

        assert federate(Shaped(), rounds=1, run_dir="shaped").server.rounds_completed == 1

    def test_an_optimizer_with_a_history(self):
        class Lbfgs(Net):
            def configure_optimizers(self):
                return torch.optim.LBFGS(self.parameters(), 0.1)

        assert federate(Lbfgs(), rounds=2).server.rounds_completed == 2

    def test_names_with_slashes(self):
        class Slash(Net):
            def __init__(self):
                super().__init__()
                self.nets = nn.ModuleDict({"a/b": nn.Linear(2, 2)})
                self.net = None

            def training_step(self, batch, index):
                return self.nets["a/b"](batch[0]).square().mean()

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters())

        found = federate(Slash(), rounds=3)
        assert {name for name in found.server.moments if name.endswith("/step")} == {
            "optimizer/0/nets.a/b.weight/step", "optimizer/0/nets.a/b.bias/step"
        }  # fmt: skip

    def test_chained_schedules(self):
        federate(Chained(), clients=1, rounds=4, steps=1)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
        own = [schedules.LinearLR(optimizer, total_iters=3), schedules.ExponentialLR(optimizer, 0.9)]
        expected = []
        for _ in range(4):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            for schedule in own:
                schedule.step()
        assert pytest.approx(expected) == SEEN

    def test_a_compiled_module_is_named(self):
        with pytest.raises(ConfigurationError, match="model of Federation must be a LightningModule"):
            Federation(torch.compile(Net(), backend="eager"), data())


class TestServerAverage:
    """EMA copies at the server, by one line of settings."""

    class Averaged(Net):
        def __init__(self):
            super().__init__()
            self.ema = copy.deepcopy(self.net).requires_grad_(False)

    @pytest.mark.filterwarnings("ignore:sync.ema is server")
    def test_it_is_the_average_of_the_rounds(self):
        from fedgan_lightning.callbacks import ServerAverage

        class Watch(Callback):
            def on_round_end(self, trainer, server, info, metrics):
                SEEN.append(server.model.net.weight.detach().clone())

        average = ServerAverage(source="net", target="ema", decay=0.75)
        callbacks = [Watch(), average]
        found = federate(self.Averaged(), rounds=3, sync={"ema": "server"}, trainer={"callbacks": callbacks})
        expected = self.Averaged().ema.weight.detach()
        for weight in SEEN:
            expected = 0.75 * expected + 0.25 * weight
        torch.testing.assert_close(found.server.model.ema.weight, expected)
        assert "ema" not in found.orchestrator.ledger.bytes_down

    @pytest.mark.filterwarnings("ignore:sync.* is server")
    @pytest.mark.parametrize("options", [{"source": "nothing", "target": "ema"}, {"source": "net", "target": "other"}])
    def test_networks_that_do_not_fit_are_refused(self, options):
        from fedgan_lightning.callbacks import ServerAverage

        module = self.Averaged()
        module.other = nn.Linear(3, 3)
        with pytest.raises(ConfigurationError, match="ServerAverage"):
            sync = {options["target"]: "server"}
            federate(module, rounds=1, sync=sync, trainer={"callbacks": [ServerAverage(**options)]})


class TestValidation:
    """A held-out share of every client's samples."""

    class Validated(Logged):
        def validation_step(self, batch, index):
            SEEN.append(len(batch[0]))
            self.log("val_loss", self.loss(batch[0]))

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            plateau = schedules.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    def test_it_is_trained_on_by_nobody_and_watched_on_the_server(self):
        own = data(clients=2, validation_share=0.25)
        stop = EarlyStopping("val_loss", patience=0, min_delta=1e9)
        found = federate(self.Validated(), own=own, rounds=5, trainer={"callbacks": [stop]})
        assert found.server.rounds_completed == 2
        assert [own.num_examples(k) for k in range(2)] == [150, 150]
        assert [*[8] * 6, 2] * 4 == SEEN
        trained = {tuple(row) for k in range(2) for row in own.client_samples(k).take(torch.arange(150))[0].tolist()}
        held = {tuple(row) for k in range(2) for x, _ in own.client_validation_batches(k) for row in x.tolist()}
        assert len(held) == 100
        assert not trained & held

    def test_a_gan_validates_too_and_is_not_stacked_then(self):
        own = data(clients=2, validation_share=0.25)
        gan = GAN(MLPGenerator(4, (2,), output="linear"), MLPDiscriminator((2,)))
        found = federate(copy.deepcopy(gan), own=own, rounds=1)
        plain = federate(copy.deepcopy(gan), own=data(clients=2, validation_share=0.25), rounds=1, run_dir="again")
        assert "train/val_loss_g" in found.server.trainer.callback_metrics
        for name, value in found.server.model.state_dict().items():
            assert torch.equal(plain.server.model.state_dict()[name], value)
        with pytest.raises(ConfigurationError, match="must train one after the other; got data.validation_share"):
            federate(gan, own=own, rounds=1, executor=VectorizedExecutor(), run_dir="stacked")

    @pytest.mark.parametrize("size, held", [(1, 0), (2, 1), (3, 1), (10, 2)])
    def test_small_clients_keep_something_to_train_on(self, size, held):
        import numpy as np

        from fedgan_lightning.data.held_out import divided

        train, rest = divided(np.arange(size), 0.2, seed=0, stream=1)
        assert (len(train), len(rest)) == (size - held, held)
        assert sorted([*train, *rest]) == list(range(size))


class Slotted:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


class TestLeaks:
    """What an attack found: ways in which something passed from one client to the next."""

    def test_tensors_whose_data_are_replaced(self):
        class Moved(Net):
            def __init__(self):
                super().__init__()
                self.shadow = torch.zeros(2)

            def on_train_start(self):
                SEEN.append(float(self.shadow.sum()))

            def on_train_batch_end(self, *arguments):
                self.shadow.data = self.shadow.data + 1

        federate(Moved(), rounds=2)
        assert SEEN == [0.0] * 4

    def test_a_frozen_parameter_that_is_a_copy_travels_and_another_is_refused_when_it_moves(self):
        class Average(Net):
            def __init__(self, size):
                super().__init__()
                self.w = nn.Parameter(torch.zeros(2))
                self.w_ema = nn.Parameter(torch.zeros(size), requires_grad=False)

            def loss(self, x):
                return (self.net(x) + self.w - 1).square().mean()

            def on_train_batch_end(self, *arguments):
                self.w_ema.data = self.w_ema.data * 0.5 + self.w.data.sum() * 0.5

        assert float(federate(Average(2), rounds=2).server.model.w_ema.sum()) != 0
        with pytest.raises(Exception, match="got w_ema, which nobody trains"):
            federate(Average(3), rounds=1, run_dir="other")

    def test_networks_that_training_makes_are_refused(self):
        class Grows(Net):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([nn.Linear(2, 2)])

            def on_train_epoch_start(self):
                self.blocks.append(nn.Linear(2, 2))

        with pytest.raises(Exception, match="got blocks.1, which training made. Make it in __init__, setup"):
            federate(Grows(), rounds=1)

    def test_hooks_slots_and_packages_that_sound_like_ours(self):
        class Hung(Net):
            def __init__(self):
                super().__init__()
                self.slotted, self.other = Slotted(), type("Pool", (), {"__module__": "lightning_mods.pools"})()
                self.other.items = []

            def on_train_start(self):
                SEEN.append((self.slotted.n, len(self.other.items), len(self.net._forward_hooks)))
                self.slotted.n += 1
                self.other.items.append(1)
                self.net.register_forward_hook(lambda *arguments: None)

        federate(Hung(), rounds=2)
        assert SEEN == [(0, 0, 0)] * 4

    def test_a_rate_that_a_client_sets_is_nobody_else_s(self):
        class Adaptive(Net):
            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), 0.1)
                return [optimizer], [schedules.StepLR(optimizer, 100)]

            def on_train_epoch_start(self):
                SEEN.append(self.optimizers().param_groups[0]["lr"])
                self.optimizers().param_groups[0]["lr"] /= 3

        federate(Adaptive(), clients=3, rounds=2)
        assert SEEN == [0.1] * 6


class TestOddEntries:
    """Buffers that no mean can be made of, and state that is no tensor."""

    @pytest.mark.parametrize(
        "buffer",
        [
            torch.polar(torch.ones(3), torch.arange(3.0)),
            torch.triu(torch.full((4, 4), float("-inf")), 1),
            torch.tensor(float("inf")),
            torch.tensor(2**62),
            torch.eye(3).to_sparse(),
        ],
        ids=["complex", "mask", "infinity", "large", "sparse"],
    )
    def test_they_stay_as_they_are(self, buffer):
        class Odd(Net):
            def __init__(self):
                super().__init__()
                self.register_buffer("odd", buffer.clone())

            def on_train_start(self):
                SEEN.append(torch.equal(self.odd.to_dense(), buffer.to_dense()))

        found = federate(Odd(), rounds=2)
        assert SEEN == [True] * 4
        assert "(root)" not in found.orchestrator.ledger.bytes_up

    def test_extra_state_is_the_module_s_own(self):
        class Extra(Net):
            def get_extra_state(self):
                return {"n": 1}

            def set_extra_state(self, state):
                SEEN.append(state)

        assert federate(Extra(), rounds=2).server.rounds_completed == 2

    def test_a_client_s_own_validation_data_are_used(self):
        class Own(L.LightningDataModule):
            def __init__(self, size):
                super().__init__()
                self.size = size

            def train_dataloader(self):
                return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(self.size, 2)), 4)

            def val_dataloader(self):
                return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(3, 2)), 3)

        class Validated(Net):
            def validation_step(self, batch, index):
                SEEN.append(len(batch[0]))

        federate(Validated(), own=FederatedDataModule.from_datasets([Own(9), Own(20)]), rounds=2)
        assert SEEN == [3] * 4

    def test_a_folder_to_write_in_is_there_for_every_client(self):
        class Writes(Net):
            def on_train_start(self):
                SEEN.append(self.logger.log_dir)

        federate(Writes(), clients=3, rounds=1, client_logs=1)
        assert [Path(path).name for path in SEEN] == ["client_000", "client_001", "client_002"]

    def test_callbacks_may_make_things_in_setup_and_some_cannot_be(self):
        class Copies(Callback):
            def setup(self, trainer, module, stage):
                self.ema, self.trainer = copy.deepcopy(module.net), trainer

            def on_train_batch_end(self, trainer, module, *arguments):
                for mine, theirs in zip(self.ema.parameters(), module.net.parameters()):
                    mine.data.lerp_(theirs.data, 0.5)

            def on_train_start(self, trainer, module):
                SEEN.append(torch.equal(self.ema.weight, module.net.weight))

        federate(Net(), rounds=2, client_callbacks=[Copies()])
        assert SEEN == [True, True, False, False]
        from lightning.pytorch.callbacks import StochasticWeightAveraging

        for callback in (StochasticWeightAveraging(0.1), ModelCheckpoint("kept")):
            with pytest.raises(ConfigurationError, match="client_callbacks must be callbacks that can begin anew"):
                federate(Net(), client_callbacks=[callback], run_dir="refused")

    def test_data_sets_in_memory_hold_out_a_share(self):
        def sets():
            return [torch.utils.data.TensorDataset(torch.randn(size, 2)) for size in (8, 20)]

        class Validated(Net):
            def validation_step(self, batch, index):
                SEEN.append(len(batch[0]))

        own = FederatedDataModule.from_datasets(sets(), batch_size=4, validation_share=0.25)
        federate(Validated(), own=own, rounds=1)
        assert SEEN == [2, 4, 1]
        from fedgan_lightning import DataError

        with pytest.raises(DataError, match="validation_share must have samples that are read into memory"):
            FederatedDataModule.from_datasets(sets(), memory_limit=0, validation_share=0.25)


class SubGAN(GAN):
    """A GAN of somebody's own, with a line of his own."""

    def setup(self, stage):
        super().setup(stage)
        SEEN.append(stage == "fit")


class TestSubclassesOfGAN:
    @pytest.mark.parametrize("executor", [SequentialExecutor, VectorizedExecutor])
    @pytest.mark.parametrize("work", [{"steps": 2}, {"local_epochs": 1}], ids=["steps", "epochs"])
    def test_they_train_as_the_class_itself(self, executor, work):
        def made(kind):
            torch.manual_seed(0)
            networks = MLPGenerator(4, (2,), hidden=(8,), output="linear"), MLPDiscriminator((2,), hidden=(8,))
            return kind(*networks, generator_scheduler=lambda optimizer: schedules.StepLR(optimizer, 3)).double()

        def own():
            return FederatedDataModule(Ring(num_samples=200), partition=Sizes(120, 40, 40), num_clients=3, batch_size=8)

        found = [
            federate(made(kind), own=own(), rounds=2, run_dir=kind.__name__, executor=executor(), **work)
            for kind in (GAN, SubGAN)
        ]
        assert SEEN == [True]
        for name, value in found[0].server.model.state_dict().items():
            assert torch.equal(found[1].server.model.state_dict()[name], value)


class TestKinds:
    """What attributes are made of comes back as it was."""

    def test_counters_tuples_with_names_and_frozen_sets(self):
        from collections import Counter, OrderedDict, defaultdict, namedtuple

        from fedgan_lightning.federation.plain_state import decode, encode

        Pair = namedtuple("Pair", "a b")
        values = [
            Counter("aab"), OrderedDict(b=1, a=2), defaultdict(list, {1: [2]}), Pair(1, [2]), frozenset({1}), {1, 2},
            (1, (2, None)), {"x": [1.5, "y"]},
        ]  # fmt: skip
        for value in values:
            found = decode(encode(value, what="it"), copy.deepcopy(value))
            assert type(found) is type(value)
            assert found == value

    def test_buffers_that_training_fills_or_grows_begin_anew(self):
        class Fills(Net):
            def __init__(self):
                super().__init__()
                self.register_buffer("ema", None)
                self.register_buffer("bank", torch.zeros(0, 2), persistent=False)

            def training_step(self, batch, index):
                SEEN.append((self.ema is None, len(self.bank)))
                self.ema, self.bank = self.net.weight.detach().clone(), torch.cat([self.bank, batch[0]])
                return self.loss(batch[0])

        federate(Fills(), rounds=2, steps=2)
        assert SEEN == [(True, 0), (False, 8)] * 4

    def test_what_setup_plans_with_accumulation_is_what_training_finds(self):
        class Plans(Logged):
            def setup(self, stage):
                SEEN.append(self.trainer.estimated_stepping_batches)

            def on_train_start(self):
                SEEN.append(self.trainer.estimated_stepping_batches)

        federate(Plans(), clients=1, rounds=2, steps=5, client_trainer={"accumulate_grad_batches": 2})
        assert SEEN == [6, 6, 6]

    def test_a_module_with_extra_state_and_odd_attributes_resumes(self):
        class Extra(Net):
            def __init__(self):
                super().__init__()
                self.graph = torch.eye(3).to_sparse()

            def get_extra_state(self):
                return {"n": 1}

            def set_extra_state(self, state):
                pass

        federate(Extra(), rounds=1)
        assert federate(Extra(), rounds=2, ckpt_path="last").server.rounds_completed == 2
