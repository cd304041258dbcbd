"""The federation against the plain thing: one Trainer, one mean, one uninterrupted run."""

from __future__ import annotations

import copy
import os
import signal
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch

from benchmarks.toy2d import federated, reference
from fedgan_lightning import (
    Evaluation,
    FederatedOrchestrator,
    Federation,
    SequentialExecutor,
    ServerModule,
    UpdateValidator,
    VectorizedExecutor,
)
from fedgan_lightning.aggregators import CoordinateMedian
from fedgan_lightning.errors import CheckpointError, ClientError, ConfigurationError, UpdateError
from fedgan_lightning.federation.client_context import ClientContext
from fedgan_lightning.federation.local import LocalTrainer
from fedgan_lightning.federation.policy import resolve
from fedgan_lightning.federation.store import ClientStore
from fedgan_lightning.gan import networks as nets
from fedgan_lightning.gan.module import GAN
from fedgan_lightning.gan.priors import MidpointNodes
from fedgan_lightning.losses import Hinge, LeastSquares
from fedgan_lightning.protocol import ClientTask
from fedgan_lightning.samplers import PoissonSampling
from fedgan_lightning.seeding import derive_seed, isolated_rng
from tests.conftest import (
    adam,
    assert_states_equal,
    federate,
    quiet_trainer,
    ring_data,
    ring_gan,
    sgd,
)
from tests.foreign import SomebodysGAN

#: SGD(lr=1) on the difference rounds once per round in float32.
ROUNDING = {"atol": 2e-6, "rtol": 1e-5}


class TestOneClientIsAPlainTrainer:
    @pytest.mark.parametrize("optimizer, policy", [(sgd, "reset"), (adam, "keep"), (adam, "average")])
    def test_many_rounds_equal_one_fit(self, optimizer, policy):
        """Without noise: 6 rounds of 5 steps on one client are 30 steps of L.Trainer.fit."""
        options = {"optimizer": optimizer, "prior": MidpointNodes(16)}
        data = ring_data(num_clients=1, partition=None)
        server, _, trainer = federate(ring_gan(**options), data, rounds=6, local_steps=5, optimizer_state=policy)
        plain = ring_gan(**options)
        quiet_trainer(max_epochs=1).fit(plain, datamodule=data.pooled(num_steps=30))
        assert trainer.global_step == 6
        assert_states_equal(server.model.state_dict(), plain.state_dict(), **ROUNDING)

    def test_one_round_equals_one_fit_with_noise(self):
        data = ring_data(num_clients=1, partition=None)
        server, _, _ = federate(ring_gan(), data, rounds=1, local_steps=20, seed=5)
        plain = ring_gan()
        with isolated_rng(derive_seed(5, "client", 0, 0)):
            quiet_trainer(max_epochs=1).fit(plain, datamodule=data.pooled(num_steps=20))
        assert_states_equal(server.model.state_dict(), plain.state_dict(), **ROUNDING)

    def test_schedules_continue_over_rounds(self):
        schedule = lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.05, total_iters=12)  # noqa: E731
        options = {"optimizer": sgd, "prior": MidpointNodes(16), "generator_scheduler": schedule}
        data = ring_data(num_clients=1, partition=None)
        server, _, _ = federate(ring_gan(**options), data, rounds=4, local_steps=3)
        plain = ring_gan(**options)
        quiet_trainer(max_epochs=1).fit(plain, datamodule=data.pooled(num_steps=12))
        assert_states_equal(server.model.state_dict(), plain.state_dict(), **ROUNDING)
        constant, _, _ = federate(ring_gan(**{**options, "generator_scheduler": None}), data, rounds=4, local_steps=3)
        assert not torch.allclose(
            constant.model.generator.layers[0].weight, server.model.generator.layers[0].weight, atol=1e-4
        )


class Reversed(SequentialExecutor):
    """Runs the cohort backwards."""

    def run(self, tasks):
        yield from super().run(list(tasks)[::-1])


def test_the_order_of_the_cohort_changes_nothing():
    states = []
    for executor in (SequentialExecutor(), Reversed()):
        options = {"sync": {"discriminator": "local"}, "optimizer_state": "keep", "executor": executor}
        server, _, _ = federate(ring_gan(), ring_data(), rounds=3, local_steps=4, **options)
        states.append(server.model.state_dict())
    assert_states_equal(*states, atol=1e-7, rtol=1e-6)


def test_renaming_clients_changes_nothing_where_randomness_is_in_the_data_order_only():
    """Four clients that hold everything, in full batches and without noise, are interchangeable."""
    states = []
    for lists in ([[0, 1], [2, 3], [4, 5], [6, 7]], [[6, 7], [2, 3], [0, 1], [4, 5]]):
        from fedgan_lightning.partitions import ClassLists

        data = ring_data(partition=ClassLists(lists), batch_size=160, num_samples=640)
        server, _, _ = federate(ring_gan(optimizer=sgd, prior=MidpointNodes(16)), data, rounds=3, local_steps=2)
        states.append(server.model.state_dict())
    assert_states_equal(*states, atol=1e-6, rtol=1e-5)


class TestToy2D:
    @pytest.mark.parametrize("local_steps", [1, 5, 20, 50])
    @pytest.mark.parametrize("rate", [0.1, 0.02])
    def test_the_path_equals_numpy(self, local_steps, rate):
        found, exact = federated(local_steps, rate, 100), reference(local_steps, rate, 100)
        assert found == pytest.approx(exact, abs=1e-10)

    def test_the_reference_settles_where_the_table_says(self):
        assert reference(20, 0.1, 5000) == pytest.approx((0.98310, -0.01214), abs=1e-5)
        assert reference(1, 0.1, 50) == pytest.approx((2.14543, 0.07784), abs=1e-5)

    @pytest.mark.slow
    def test_the_federation_settles_there_too(self):
        assert federated(50, 0.1, 3000) == pytest.approx((0.96582, -0.09344), abs=1e-4)


class TestAnyModule:
    def test_somebodys_gan_federates_for_three_rounds_by_hand(self):
        """Each round: run every client alone from the server's state, and average with N_k / N by hand."""
        from fedgan_lightning.partitions import QuantitySkew

        torch.manual_seed(0)
        module = SomebodysGAN()
        data = ring_data(num_clients=3, partition=QuantitySkew(2.0, min_samples=32))
        expected = copy.deepcopy(module)
        policy = resolve(expected, sync=None, optimizer_state="reset", buffers="merge")
        assert set(policy.sync) == {"decoder", "critic", "(root)"}
        sizes = torch.tensor([float(data.num_examples(k)) for k in range(3)], dtype=torch.float64)
        assert len(set(sizes.tolist())) == 3
        for number in range(3):
            runner = LocalTrainer(
                ClientContext(
                    expected, data, policy, ClientStore(), trainer_options={"accelerator": "cpu", "devices": 1}
                )
            )
            start = {n: v.clone() for n, v in expected.state_dict().items()}
            names = [*policy.shared_parameters, *policy.shared_buffers]
            states = []
            for k in range(3):
                seed = derive_seed(0, "client", number, k)
                runner.run(ClientTask(k, number, seed, {n: start[n] for n in names}, steps=4))
                states.append({n: v.clone() for n, v in runner.module.state_dict().items()})
            new = {}
            for name in names:
                stacked = torch.stack([state[name].double() for state in states])
                weights = (sizes / sizes.sum()).view(-1, *([1] * (stacked.dim() - 1)))
                if name.endswith("running_var"):
                    means = torch.stack([s[name.replace("running_var", "running_mean")].double() for s in states])
                    pooled = (weights * means).sum(0)
                    new[name] = (weights * (stacked + means**2)).sum(0) - pooled**2
                else:
                    new[name] = (weights * stacked).sum(0)
            expected.load_state_dict({**start, **{n: v.to(start[n].dtype) for n, v in new.items()}})
        server, _, _ = federate(module, data, rounds=3, local_steps=4, optimizer_state="reset")
        assert_states_equal(server.model.state_dict(), expected.state_dict(), **ROUNDING)
        assert int(server.model.decoder[2].num_batches_tracked) == 0, "integer buffers stay as they are"

    def test_its_logged_metrics_arrive(self):
        seen = []

        class Listener(L.Callback):
            def on_client_end(self, trainer, server, update):
                seen.append(update)

            def on_round_end(self, trainer, server, info, metrics):
                seen.append(metrics)

        federate(SomebodysGAN(), ring_data(), Listener(), rounds=1, local_steps=2)
        assert [update.client_id for update in seen[:4]] == [0, 1, 2, 3]
        mean = np.mean([update.metrics["critic_loss"] for update in seen[:4]])
        assert seen[4]["train/critic_loss"] == pytest.approx(mean, rel=1e-5)
        assert {"update_norm/decoder", "update_norm/critic", "client/003/critic_loss"} <= set(seen[4])


class TestOptimizerState:
    def test_the_three_policies_differ_and_average_is_shared(self):
        results = {}
        for policy in ("reset", "keep", "average"):
            server, orchestrator, _ = federate(ring_gan(), ring_data(), rounds=3, local_steps=3, optimizer_state=policy)
            results[policy] = server.model.generator.layers[0].weight.detach().clone()
            assert len(orchestrator.store) == (4 if policy == "keep" else 0)
            assert bool(server.moments) == (policy == "average")
        values = list(results.values())
        assert not any(torch.equal(values[i], values[j]) for i in range(3) for j in range(i))

    def test_sgd_without_momentum_does_not_care(self):
        states = [
            federate(ring_gan(optimizer=sgd), ring_data(), rounds=2, local_steps=3, optimizer_state=policy)[0]
            for policy in ("reset", "keep", "average")
        ]
        for other in states[1:]:
            assert_states_equal(states[0].model.state_dict(), other.model.state_dict())

    def test_averaged_moments_are_the_weighted_mean_of_the_clients(self):
        updates = []

        class Listener(L.Callback):
            def on_client_end(self, trainer, server, update):
                updates.append(update)

        server, _, _ = federate(ring_gan(), ring_data(), Listener(), rounds=1, local_steps=3)
        name = next(name for name in server.moments if name.endswith("exp_avg_sq"))
        weights = torch.tensor([float(update.num_examples) for update in updates])
        stacked = torch.stack([update.extras[name] for update in updates])
        mean = (weights.view(-1, *([1] * (stacked.dim() - 1))) * stacked).sum(0) / weights.sum()
        torch.testing.assert_close(server.moments[name], mean)


class TestSync:
    def test_a_local_network_stays_on_its_client(self):
        updates = []

        class Listener(L.Callback):
            def on_client_end(self, trainer, server, update):
                updates.append(update)

        start = ring_gan().state_dict()
        server, orchestrator, _ = federate(
            ring_gan(), ring_data(), Listener(), rounds=2, local_steps=3, sync={"discriminator": "local"}
        )
        assert all(name.startswith("generator") for update in updates for name in update.delta)
        for name, value in server.model.discriminator.state_dict().items():
            assert torch.equal(value, start[f"discriminator.{name}"])
        private = [orchestrator.store.read(k) for k in range(4)]
        weights = [state["discriminator.features.1.weight"] for state in private]
        assert not torch.equal(weights[0], weights[1])
        assert any(name.startswith("optimizer/1/discriminator") for name in private[0]), "its moments stay too"

    def test_private_networks_continue_where_they_were(self):
        """Two rounds with a local discriminator and a frozen generator equal one long round."""
        frozen = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
        stores = []
        for rounds, steps in ((4, 3), (1, 12)):
            model = ring_gan(prior=MidpointNodes(16), generator_optimizer=frozen)
            _, orchestrator, _ = federate(
                model, ring_data(), rounds=rounds, local_steps=steps, sync={"discriminator": "local"}
            )
            stores.append([orchestrator.store.read(k) for k in range(4)])
        for first, second in zip(*stores):
            assert_states_equal(first, second, atol=1e-7, rtol=1e-6)

    def test_the_moving_average_lives_on_the_server_only(self):
        model = ring_gan(ema_half_life_images=200.0)
        server, orchestrator, _ = federate(model, ring_data(), rounds=3, local_steps=5)
        assert "generator_ema" not in orchestrator.ledger.bytes_up
        average, raw = (net.layers[0].weight for net in (server.model.generator_ema, server.model.generator))
        assert not torch.equal(average, raw)
        assert not torch.equal(average, ring_gan().generator.layers[0].weight)


class TestCost:
    def test_bytes_per_client_step_follow_fedgans_law(self):
        """2 (|G| + |D|) * 4 / K bytes in float32; K = 20 moves exactly 1/20 of K = 1."""
        ledgers = {}
        for local_steps, rounds in ((1, 40), (20, 2)):
            _, orchestrator, _ = federate(
                ring_gan(), ring_data(), rounds=rounds, local_steps=local_steps, optimizer_state="reset"
            )
            ledgers[local_steps] = orchestrator.ledger
        size = sum(p.numel() for p in ring_gan().parameters()) * 4
        assert ledgers[1].bytes_per_client_step == 2 * size
        assert ledgers[20].bytes_per_client_step == 2 * size / 20
        assert ledgers[1].bytes_per_client_step == 20 * ledgers[20].bytes_per_client_step
        assert ledgers[20].bytes_up == ledgers[20].bytes_down
        assert ledgers[20].client_steps == 2 * 4 * 20

    def test_averaged_moments_are_counted_apart(self):
        _, orchestrator, _ = federate(ring_gan(), ring_data(), rounds=1, local_steps=1, optimizer_state="average")
        assert orchestrator.ledger.bytes_up["optimizer"] > 2 * orchestrator.ledger.bytes_up["generator"]
        assert "optimizer" not in orchestrator.ledger.bytes_down, "there are none before the first round"

    def test_a_round_given_up_costs_nothing_in_the_ledger(self):
        class Stop(L.Callback):
            def on_client_end(self, trainer, server, update):
                if trainer.global_step == 2 and update.client_id == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

        _, orchestrator, _ = federate(ring_gan(), ring_data(), Stop(), rounds=5, local_steps=2)
        assert orchestrator.ledger.client_runs == 8
        assert orchestrator.ledger.client_steps == 16


class TestServerOptimizer:
    def test_half_a_step_and_fedadam(self):
        data = ring_data()
        start = ring_gan().state_dict()
        full = federate(ring_gan(), data, rounds=1, local_steps=3)[0].model.state_dict()
        half_server = ServerModule(ring_gan(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        half = federate(half_server.model, data, server=half_server, rounds=1, local_steps=3)[0].model.state_dict()
        for name in start:
            torch.testing.assert_close(half[name], (start[name] + full[name]) / 2, atol=1e-6, rtol=1e-5)
        adam_server = ServerModule(ring_gan(), optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
        moved = federate(adam_server.model, data, server=adam_server, rounds=1, local_steps=3)[0].model.state_dict()
        step = torch.cat([(moved[name] - start[name]).flatten().abs() for name in start])
        assert float(step.median()) == pytest.approx(0.01, rel=1e-3), "Adam's first step is its learning rate"

    def test_its_schedule_steps_once_per_round(self):
        server = ServerModule(
            ring_gan(),
            optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
            scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
        )
        _, _, trainer = federate(server.model, ring_data(), server=server, rounds=3, local_steps=1)
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.125


class TestRounds:
    def test_empty_cohorts_pass(self):
        server, orchestrator, trainer = federate(
            ring_gan(), ring_data(), rounds=12, local_steps=1, clients=PoissonSampling(0.05)
        )
        assert trainer.global_step == 12
        assert orchestrator.ledger.client_runs < 12
        assert all(torch.isfinite(value).all() for value in server.model.state_dict().values())

    def test_local_epochs_follow_each_clients_size(self):
        from fedgan_lightning.partitions import QuantitySkew

        updates = []

        class Listener(L.Callback):
            def on_client_end(self, trainer, server, update):
                updates.append(update)

        data = ring_data(partition=QuantitySkew(1.0, min_samples=32))
        federate(ring_gan(), data, Listener(), rounds=1, local_steps=None, local_epochs=2)
        assert [u.metrics["steps"] for u in updates] == [2.0 * (data.num_examples(k) // 16) for k in range(4)]

    def test_the_global_generators_are_left_alone(self):
        state = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
        model, data = ring_gan(), ring_data()
        torch.random.set_rng_state(state[0])
        federate(model, data, rounds=2, local_steps=2)
        assert torch.equal(state[0], torch.random.get_rng_state())
        assert state[1] == np.random.get_state()[1].tolist()

    def test_two_runs_are_bit_identical(self):
        states = [federate(ring_gan(), ring_data(), rounds=3, local_steps=3)[0].model.state_dict() for _ in range(2)]
        assert_states_equal(*states)

    def test_another_seed_gives_another_run(self):
        states = [
            federate(ring_gan(), ring_data(), rounds=1, local_steps=3, seed=s)[0].model.state_dict() for s in (0, 1)
        ]
        assert not torch.equal(states[0]["generator.layers.0.weight"], states[1]["generator.layers.0.weight"])

    def test_a_failing_client_is_named_with_its_round_and_stage(self):
        class Fails(SomebodysGAN):
            def on_train_epoch_start(self):
                raise ZeroDivisionError("no luck")

        with pytest.raises(
            ClientError,
            match="client 0 failed in round 0 at stage 'train': ZeroDivisionError: no luck .test_federation.py:[0-9]+.",
        ):
            federate(Fails(), ring_data(), rounds=1, local_steps=1)

    def test_a_client_that_diverges_is_named_before_it_poisons_the_model(self):
        class Diverges(SomebodysGAN):
            def on_train_epoch_end(self):
                self.bias.data.fill_(float("nan"))

        module = Diverges()
        with pytest.raises(UpdateError, match="NaN or infinity in 'bias' from client 0"):
            federate(module, ring_data(), rounds=1, local_steps=1)
        assert torch.isfinite(module.bias).all()

    @pytest.mark.parametrize(
        "options, words",
        [
            ({"rounds": 0}, "rounds .* at least 1; got 0"),
            ({"local_steps": 1, "local_epochs": 1}, "in steps or in epochs"),
            ({"local_steps": 0}, "local_steps .* at least 1 or None; got 0"),
        ],
    )
    def test_impossible_settings_are_refused_in_the_constructor(self, options, words):
        with pytest.raises(ConfigurationError, match=words):
            FederatedOrchestrator(**options)

    def test_what_cannot_be_federated_says_why(self):
        with pytest.raises(ConfigurationError, match="must train a ServerModule; got GAN"):
            pooled = ring_data().pooled(num_steps=1)
            quiet_trainer(FederatedOrchestrator(rounds=1)).fit(ring_gan(), datamodule=pooled)
        with pytest.raises(ConfigurationError, match="must be trained by a FederatedOrchestrator; got a"):
            quiet_trainer().fit(ServerModule(ring_gan()), datamodule=ring_data())
        with pytest.raises(
            ConfigurationError, match=r"got trainer.precision=16-mixed. Set trainer.precision to 32-true"
        ):
            orchestrator = FederatedOrchestrator(rounds=1)
            uncut = {"fast_dev_run": False, "limit_train_batches": 1.0}
            facts = {"datamodule": ring_data(), "precision": "16-mixed", "world_size": 1, **uncut}
            orchestrator._checked(type("T", (), facts)(), ServerModule(ring_gan()))
        with pytest.raises(ConfigurationError, match="must be additive; got Median on 2 devices"):
            facts = {"datamodule": ring_data(), "precision": "32-true", "world_size": 2, **uncut}
            orchestrator.aggregator = type("Median", (), {"additive": False})()
            orchestrator._checked(type("T", (), facts)(), ServerModule(ring_gan()))


def batchnorm_gan() -> GAN:
    torch.manual_seed(0)
    return GAN(
        nets.DCGANGenerator(8, 1, latent_dim=4, width=4, num_classes=10),
        nets.DCGANDiscriminator(8, 1, width=4, num_classes=10, conditioning="projection", norm="spectral"),
        generator_optimizer=adam,
        discriminator_optimizer=adam,
        generator_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=20),
        ema_half_life_images=100.0,
    )


class TestResume:
    @pytest.mark.parametrize(
        "policy",
        [
            {"optimizer_state": "average"},
            {"optimizer_state": "keep", "sync": {"discriminator": "local"}},
            {"optimizer_state": "keep", "buffers": "local"},
            {"optimizer_state": "keep", "sync": {"discriminator": "local"}, "client_state": "disk"},
        ],
    )
    @pytest.mark.filterwarnings("ignore:buffers are local")
    def test_a_resumed_run_is_bit_identical(self, tmp_path, policy):
        from tests.conftest import digits_data

        def start(name: str, rounds: int) -> Federation:
            options = {"accelerator": "cpu", "enable_progress_bar": False}
            return Federation(
                batchnorm_gan(),
                digits_data(max_samples=400),
                rounds=rounds,
                executor=SequentialExecutor(),
                local_steps=2,
                run_dir=str(tmp_path / name),
                evaluation=Evaluation(every_n_rounds=1),
                trainer=options,
                **policy,
            )

        whole = start("whole", 4)
        values = whole.fit()
        start("parts", 3).fit()
        resumed = start("parts", 4)
        again = resumed.fit(ckpt_path=str(tmp_path / "parts" / "checkpoints" / "last.ckpt"))
        assert_states_equal(whole.server.model.state_dict(), resumed.server.model.state_dict())
        assert values == again
        assert whole.evaluation.history == resumed.evaluation.history
        for k in range(5):
            assert_states_equal(dict(whole.orchestrator.store.read(k)), dict(resumed.orchestrator.store.read(k)))
        assert_states_equal(whole.server.moments, resumed.server.moments)
        assert whole.orchestrator.ledger.bytes_up == resumed.orchestrator.ledger.bytes_up

    @pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
    def test_a_resumed_run_is_bit_identical_in_other_precisions(self, tmp_path, precision):
        """Doubles must not pass through float32 on the way out of a checkpoint."""

        def start(name: str, rounds: int) -> Federation:
            options = {"accelerator": "cpu", "enable_progress_bar": False, "precision": precision}
            run_dir, executor = str(tmp_path / name), SequentialExecutor()
            how = {"local_steps": 3, "executor": executor, "evaluation": Evaluation(metrics=[]), "trainer": options}
            return Federation(ring_gan(ema_half_life_images=50.0), ring_data(), rounds=rounds, run_dir=run_dir, **how)

        whole = start("whole", 3)
        whole.fit()
        start("parts", 2).fit()
        resumed = start("parts", 3)
        resumed.fit(ckpt_path=str(tmp_path / "parts" / "checkpoints" / "last.ckpt"))
        assert_states_equal(whole.server.model.state_dict(), resumed.server.model.state_dict())
        assert_states_equal(whole.server.moments, resumed.server.moments)

    def test_a_checkpoint_of_other_settings_is_refused(self, tmp_path):
        from tests.conftest import ring_data as data

        def fit(ckpt_path=None, *, rounds=2, model=None, server=None, **options):
            orchestrator = FederatedOrchestrator(rounds=rounds, **{"local_steps": 1, **options})
            trainer = quiet_trainer(orchestrator)
            module = ServerModule(ring_gan(**(model or {})), **(server or {}))
            trainer.fit(module, datamodule=data(), ckpt_path=ckpt_path)
            return trainer

        slow, fast = (partial(torch.optim.Adam, lr=lr, betas=(0.5, 0.999)) for lr in (1e-3, 3e-3))
        first = {"loss": Hinge(), "optimizer": slow}
        fit(model=first).save_checkpoint(tmp_path / "a.ckpt")
        for options, words in (
            ({"local_steps": 2}, "local_steps was 1, is 2"),
            ({"seed": 3}, "seed was 0, is 3"),
            ({"optimizer_state": "keep"}, "optimizer_state.discriminator was average, is keep"),
            ({"aggregator": CoordinateMedian()}, "federation.aggregator.*was.*WeightedMean.*is.*CoordinateMedian"),
            ({"validator": UpdateValidator(max_norm=7.0)}, "federation.validator was None, is .*7.0"),
            ({"model": {**first, "loss": LeastSquares()}}, "model.loss.type was Hinge, is LeastSquares"),
            ({"model": {**first, "optimizer": fast}}, "model.discriminator_optimizer.lr was 0.001, is 0.003"),
            (
                {"server": {"optimizer": partial(torch.optim.SGD, lr=0.5)}},
                "server.optimizer was function, is .*SGD",
            ),
        ):
            own = {"model": first, **options}
            with pytest.raises(CheckpointError, match=words):
                fit(tmp_path / "a.ckpt", **own)
        # The number of rounds may change, who runs the clients, and how an optimizer computes.
        same = {**first, "optimizer": partial(slow, foreach=True)}
        again = fit(tmp_path / "a.ckpt", rounds=3, model=same, executor=SequentialExecutor())
        assert again.global_step == 3


class TestStopping:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("where", ["between clients", "inside a client"])
    def test_a_signal_gives_the_round_up_and_leaves_the_last_complete_state(self, number, where):
        class Between(L.Callback):
            def on_client_end(self, trainer, server, update):
                if where == "between clients" and trainer.global_step == 2 and update.client_id == 1:
                    os.kill(os.getpid(), number)

        batches = []

        class Inside(SomebodysGAN):
            def on_train_batch_start(self, batch, batch_idx):
                batches.append(batch_idx)
                if where == "inside a client" and len(batches) == 30:  # round 2: 4 clients of 3 steps make 12 a round
                    os.kill(os.getpid(), number)

        before = signal.getsignal(number)
        torch.manual_seed(0)
        options = {"local_steps": 3, "optimizer_state": "keep", "sync": {"critic": "local"}}
        server, orchestrator, trainer = federate(Inside(), ring_data(), Between(), rounds=5, **options)
        assert trainer.global_step == 2
        assert orchestrator.signals.number == number
        assert signal.getsignal(number) == before
        torch.manual_seed(0)
        two, other, _ = federate(SomebodysGAN(), ring_data(), rounds=2, **options)
        assert_states_equal(server.model.state_dict(), two.model.state_dict())
        for k in range(4):
            assert_states_equal(dict(orchestrator.store.read(k)), dict(other.store.read(k)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
@pytest.mark.parametrize("executor", [SequentialExecutor, VectorizedExecutor])
def test_a_gpu_gives_the_results_of_the_cpu_where_no_noise_is_drawn(executor):
    states = []
    for accelerator in ("cpu", "cuda"):
        orchestrator = FederatedOrchestrator(rounds=3, local_steps=4, executor=executor())
        server = ServerModule(ring_gan(optimizer=sgd, prior=MidpointNodes(16)))
        quiet_trainer(orchestrator, accelerator=accelerator, devices=1).fit(server, datamodule=ring_data())
        states.append({name: value.cpu() for name, value in server.model.state_dict().items()})
    assert_states_equal(*states, atol=1e-5, rtol=1e-4)


def test_what_the_server_cannot_know_is_said():
    with pytest.warns(UserWarning, match="sync.generator is local"):
        federate(ring_gan(), ring_data(), rounds=1, local_steps=1, sync={"generator": "local"})


def test_a_mapping_leaves_the_other_networks_at_the_default():
    policy = resolve(ring_gan(), sync=None, optimizer_state={"generator": "keep"}, buffers="merge")
    assert policy.optimizer_state == {"generator": "keep", "discriminator": "average"}


@pytest.mark.parametrize("option", [{"max_steps": 5}, {"max_epochs": 1}])
def test_options_that_rounds_overrule_are_refused(option, tmp_path):
    with pytest.raises(
        ConfigurationError,
        match=r"federation.rounds alone must count the epochs, .*; got trainer.max_\w+=\d. Set federation.rounds",
    ):
        Federation(ring_gan(), ring_data(), rounds=2, local_steps=1, run_dir=str(tmp_path), trainer=option)


def test_the_place_of_an_error_is_the_user_s_wherever_it_lies(tmp_path):
    path = tmp_path / "lightning" / "own_gan.py"
    path.parent.mkdir()
    path.write_text("import torch\n\ndef fail():\n    torch.zeros(2) @ torch.nn.Linear(3, 3)(torch.zeros(2))\n")
    namespace: dict = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    try:
        namespace["fail"]()
    except RuntimeError as error:
        told = str(ClientError(client_id=1, round=2, stage="train", cause=error))
    assert told.endswith("(own_gan.py:4)"), told


def test_a_test_that_fails_leaves_the_account_of_the_run_as_it_was(tmp_path, monkeypatch):
    options = {"accelerator": "cpu", "enable_progress_bar": False}
    federation = Federation(
        ring_gan(), ring_data(), rounds=1, local_steps=1, run_dir=str(tmp_path / "run"), trainer=options
    )
    federation.fit()
    before = federation.summary_path.read_text()

    def fail(*_, **__):
        raise ArithmeticError("no luck")

    monkeypatch.setattr(federation.evaluation, "evaluate", fail)
    with pytest.raises(ArithmeticError):
        federation.test()
    assert federation.summary_path.read_text() == before
    with pytest.raises(ConfigurationError, match="a new run must have a directory"):
        federation.fit()
    assert federation.summary_path.read_text() == before


def test_one_callback_is_as_good_as_a_list_of_one(tmp_path):
    class Counting(L.Callback):
        rounds = 0

        def on_round_end(self, trainer, server, info, metrics):
            self.rounds += 1

    own = Counting()
    options = {"accelerator": "cpu", "enable_progress_bar": False, "callbacks": own}
    how = {"rounds": 2, "local_steps": 1, "run_dir": str(tmp_path / "run"), "evaluation": Evaluation(metrics=[])}
    Federation(ring_gan(), ring_data(), trainer=options, **how).fit()
    assert own.rounds == 2


def test_a_foreign_module_without_sample_runs_with_all_callbacks(tmp_path):
    federation = Federation(
        SomebodysGAN(),
        ring_data(),
        rounds=2,
        local_steps=1,
        run_dir=str(tmp_path / "run"),
        trainer={"accelerator": "cpu", "enable_progress_bar": False},
    )
    with pytest.warns(UserWarning, match="SomebodysGAN has no sample method"):
        federation.fit()
    assert federation.summary_path.exists()


def test_buffers_outside_the_state_dict_and_gradients_stay_with_their_client():
    seen = []

    class Leaky(SomebodysGAN):
        def __init__(self):
            super().__init__()
            self.register_buffer("pool", torch.zeros(2), persistent=False)

        def on_train_epoch_start(self):
            seen.append((self.pool.sum().item(), all(p.grad is None for p in self.parameters())))

        def on_train_epoch_end(self):
            self.pool.add_(1.0)

    torch.manual_seed(0)
    module, data = Leaky(), ring_data()
    runner = LocalTrainer(
        ClientContext(
            module,
            data,
            resolve(module, sync=None, optimizer_state="reset", buffers="merge"),
            ClientStore(),
            trainer_options={"accelerator": "cpu", "devices": 1},
        )
    )
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for k in range(3):
        runner.run(ClientTask(k, 0, k, state, steps=1))
    assert seen == [(0.0, True)] * 3
