"""Where networks live and who trains them: served and exchanged networks, abilities of a GAN."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedgan_lightning import GAN, ConfigurationError, SequentialExecutor, ServerModule, VectorizedExecutor
from fedgan_lightning.algorithms import FedGAN, ServedGenerator
from fedgan_lightning.deployment.secure_users import refuse_exchange
from fedgan_lightning.evaluation.callback import Evaluation
from fedgan_lightning.federation.policy import resolve
from fedgan_lightning.federation.store import ClientStore
from fedgan_lightning.losses import R1, NonSaturating, RelativisticPairing
from fedgan_lightning.metrics import Metric
from fedgan_lightning.networks import DCGANDiscriminator, DCGANGenerator
from tests.conftest import adam, assert_states_equal, federate, quiet_trainer, ring_data, ring_gan, sgd
from tests.foreign import SomebodysGAN

EXECUTORS = {"sequential": SequentialExecutor, "vectorized": VectorizedExecutor}


def run(algorithm, *, gan=None, executor=None, **options):
    gan = ring_gan(optimizer=sgd).double() if gan is None else gan
    options = {"rounds": 3, "local_steps": 2, **options}
    executor = SequentialExecutor() if executor is None else executor
    return federate(gan, ring_data(), algorithm=algorithm, executor=executor, **options)


def discriminators(orchestrator):
    """The private discriminators by client."""
    return {
        int(k): {n: v for n, v in own.items() if n.startswith("discriminator.")}
        for k, own in orchestrator.store.state_dict().items()
    }


class TestServed:
    SYNC = {"generator": "served"}

    def test_the_server_trains_the_generator_and_clients_the_discriminator(self):
        gan = ring_gan(optimizer=sgd)
        before = {name: value.detach().clone() for name, value in gan.named_parameters()}
        server, orchestrator, _ = run(ServedGenerator(generator_steps=2), gan=gan, sync=self.SYNC)
        assert all(not torch.equal(value, before[name]) for name, value in server.model.named_parameters())
        assert not any(name.startswith("generator") for name in orchestrator.ledger.bytes_up)
        assert orchestrator.ledger.bytes_down["generator"] > 0

    def test_rounds_are_counted_and_not_steps(self):
        """Three steps of G and one of D a round were four rounds, when optimizer steps were counted."""
        server, orchestrator, trainer = run(ServedGenerator(generator_steps=3), sync=self.SYNC, rounds=4)
        assert (server.rounds_completed, trainer.global_step) == (4, 16)
        assert orchestrator.ledger.client_steps == 4 * 4 * 2

    def test_clients_leave_the_generator_as_it_is(self):
        seen = []

        class Watch(SequentialExecutor):
            def run(self, tasks):
                for task in tasks:
                    yield from super().run([task])
                    state = self._local.module.state_dict()
                    seen.append(all(torch.equal(state[n], v) for n, v in task.state.items() if n.startswith("gen")))

        run(ServedGenerator(), gan=ring_gan(optimizer=adam), sync=self.SYNC, executor=Watch())
        assert seen
        assert all(seen)

    def test_the_server_s_step_is_that_of_a_plain_loop(self):
        """With nobody's update (learning rate 0), n rounds of one step are n steps against one discriminator."""

        def nothing(parameters):
            return torch.optim.SGD(parameters, lr=0.0)

        def made():
            gan = ring_gan(optimizer=sgd).double()
            gan.discriminator_optimizer = nothing
            return gan

        server, _, _ = run(ServedGenerator(generator_steps=3, num_samples=8), gan=made(), sync=self.SYNC, rounds=1)
        gan = made()
        plain = torch.optim.SGD(gan.generator.parameters(), lr=0.05)
        from fedgan_lightning.seeding import make_generator

        noise = make_generator(0, "served generator", 0)
        for _ in range(3):
            z = gan.prior.sample(8, gan.latent_dim, generator=noise, device="cpu", dtype=torch.float64)
            loss = NonSaturating().generator(gan.discriminator(gan.generator(z, None), None))
            plain.zero_grad()
            loss.backward()
            plain.step()
        assert_states_equal(server.model.generator.state_dict(), gan.generator.state_dict(), atol=1e-14)

    @pytest.mark.parametrize("executor", EXECUTORS)
    def test_it_resumes_to_the_bit(self, executor, tmp_path):
        def options(rounds):
            return {"sync": self.SYNC, "rounds": rounds, "executor": EXECUTORS[executor]()}

        whole, _, _ = run(ServedGenerator(generator_steps=2), gan=ring_gan(optimizer=adam), **options(5))
        _, _, trainer = run(ServedGenerator(generator_steps=2), gan=ring_gan(optimizer=adam), **options(2))
        trainer.save_checkpoint(tmp_path / "cut.ckpt")
        from fedgan_lightning import FederatedOrchestrator, ServerModule

        again = FederatedOrchestrator(local_steps=2, algorithm=ServedGenerator(generator_steps=2), **options(5))
        server = ServerModule(ring_gan(optimizer=adam, seed=3))
        quiet_trainer(again).fit(server, datamodule=ring_data(), ckpt_path=tmp_path / "cut.ckpt")
        assert_states_equal(server.model.state_dict(), whole.model.state_dict())

    def test_checks_leave_the_generator_and_the_random_state_alone(self):
        generator = DCGANGenerator(8, latent_dim=4, width=4)
        gan = GAN(generator, DCGANDiscriminator(8, width=4))
        before = {name: value.clone() for name, value in gan.state_dict().items()}
        random = torch.get_rng_state()
        server = ServerModule(gan)
        assert ServedGenerator().server_optimizers(server).keys() == {"generator"}
        assert_states_equal(gan.state_dict(), before)
        assert torch.equal(torch.get_rng_state(), random)

    def test_the_noise_follows_the_federation_s_seed(self):
        found = [
            run(ServedGenerator(), sync=self.SYNC, seed=seed)[0].model.generator.state_dict() for seed in (1, 1, 2)
        ]
        assert_states_equal(found[0], found[1])
        assert any(not torch.equal(found[0][name], value) for name, value in found[2].items())

    def test_stacked_clients_are_each_alone(self):
        found = [
            run(ServedGenerator(), sync=self.SYNC, executor=own())[0].model.state_dict() for own in EXECUTORS.values()
        ]
        assert_states_equal(*found, atol=1e-12, rtol=1e-10)

    @pytest.mark.parametrize(
        "options, words",
        [
            ({"sync": {}}, "got sync.generator: average. Set federation.sync to"),
            (
                {"gan": ring_gan(optimizer=sgd, loss=RelativisticPairing())},
                "got RelativisticPairing. Use another",
            ),
        ],
        ids=["averaged", "a loss of pairs"],
    )
    def test_what_cannot_be_is_refused(self, options, words):
        with pytest.raises(ConfigurationError, match=words):
            run(ServedGenerator(), **{"sync": self.SYNC, **options})

    def test_a_module_without_the_ability_is_refused_by_name(self):
        torch.manual_seed(0)
        module = SomebodysGAN()
        module.generator, module.decoder = module.decoder, None
        with pytest.raises(ConfigurationError, match="got SomebodysGAN without them. Add them"):
            run(ServedGenerator(), gan=module, sync=self.SYNC)


class TestExchange:
    SYNC = {"discriminator": "exchange"}

    def test_everybody_goes_on_with_somebody_else_s(self):
        """After a round networks are where the permutation puts them, and nowhere else."""
        _, before, _ = run(FedGAN(exchange_every=100), sync=self.SYNC, rounds=1)
        _, after, _ = run(FedGAN(), sync=self.SYNC, rounds=1)
        moves = FedGAN().hand_on(round=0, clients=range(4), seed=0)
        assert sorted(moves.values()) == [0, 1, 2, 3]
        assert all(moves[k] != k for k in moves)
        old, new = discriminators(before), discriminators(after)
        for k, source in moves.items():
            assert_states_equal(new[k], old[source])

    @pytest.mark.parametrize("num_clients", [2, 3, 7])
    def test_a_cycle_brings_everything_home(self, num_clients):
        moves, where = (
            FedGAN().hand_on(round=3, clients=range(num_clients), seed=1),
            dict(enumerate(range(num_clients))),
        )
        for _ in range(num_clients):
            where = {k: where[source] for k, source in moves.items()}
        assert where == {k: k for k in range(num_clients)}

    def test_moments_move_along_and_stay_elsewhere(self):
        gan = ring_gan(optimizer=adam)
        _, before, _ = run(FedGAN(exchange_every=100), gan=gan, sync=self.SYNC, rounds=1, optimizer_state="keep")
        _, after, _ = run(FedGAN(), gan=ring_gan(optimizer=adam), sync=self.SYNC, rounds=1, optimizer_state="keep")
        old, new = before.store.state_dict(), after.store.state_dict()
        for k, source in FedGAN().hand_on(round=0, clients=range(4), seed=0).items():
            for name, value in new[str(k)].items():
                owner = source if "discriminator" in name else k
                assert torch.equal(value, old[str(owner)][name]), name

    def test_only_every_second_round_exchanges(self):
        algorithm = FedGAN(exchange_every=2)
        moved = [bool(algorithm.hand_on(round=round, clients=range(4), seed=0)) for round in range(4)]
        assert moved == [False, True, False, True]

    def test_who_gets_nothing_keeps_nothing(self):
        """Client 1 was never there: whoever gets its discriminator begins anew, and keeps no copy of its own."""
        store = ClientStore()
        store.write(0, {"discriminator.w": torch.zeros(2)})
        store.commit()
        store.hand_on({0: 1, 1: 0}, lambda name: name.startswith("discriminator"))
        assert store.state_dict().keys() == {"1"}

    def test_metrics_leave_the_server_s_alone(self):
        """The server's discriminator was never trained, and was measured all the same."""
        seen = []

        class Look(Metric):
            networks = ("discriminator",)

            def prepare(self, data, device):
                pass

            def compute(self, samples, labels):
                return {}

            def inspect(self, model):
                seen.append(model)
                return {}

        for sync, looks in ((self.SYNC, 0), (None, 1)):
            seen.clear()
            server, _, trainer = run(FedGAN(), sync=sync, rounds=1)
            evaluation = Evaluation(metrics=[])
            evaluation._ready = [Look()]
            evaluation.evaluate(trainer, server)
            assert len(seen) == looks

    @pytest.mark.parametrize("sync", [SYNC, {"discriminator.features.1.*": "exchange"}], ids=["network", "pattern"])
    def test_nobody_hands_on_what_masks_would_hide(self, sync):
        context = SimpleNamespace(policy=resolve(ring_gan(), sync=sync, optimizer_state=None, buffers="merge"))
        with pytest.raises(ConfigurationError, match="under secure aggregation sites must keep their own networks"):
            refuse_exchange(context)

    def test_stacked_clients_are_each_alone(self):
        found = []
        for own in EXECUTORS.values():
            server, orchestrator, _ = run(FedGAN(), sync=self.SYNC, executor=own())
            private = {f"{k} {n}": v for k, d in discriminators(orchestrator).items() for n, v in d.items()}
            found.append({**server.model.state_dict(), **private})
        assert_states_equal(*found, atol=1e-12, rtol=1e-10)

    def test_it_resumes_to_the_bit(self, tmp_path):
        from fedgan_lightning import FederatedOrchestrator, ServerModule

        whole, whole_orchestrator, _ = run(FedGAN(), sync=self.SYNC, rounds=5)
        _, _, trainer = run(FedGAN(), sync=self.SYNC, rounds=2)
        trainer.save_checkpoint(tmp_path / "cut.ckpt")
        options = {"local_steps": 2, "executor": SequentialExecutor(), "sync": self.SYNC}
        again, server = FederatedOrchestrator(rounds=5, **options), ServerModule(ring_gan(optimizer=sgd).double())
        quiet_trainer(again).fit(server, datamodule=ring_data(), ckpt_path=tmp_path / "cut.ckpt")
        assert_states_equal(server.model.state_dict(), whole.model.state_dict())
        for k, own in discriminators(whole_orchestrator).items():
            assert_states_equal(discriminators(again)[k], own)


# ---------------------------------------------------------------------- abilities


class TestAbilities:
    def test_feedback_is_the_gradient_of_the_logits(self):
        gan = ring_gan(penalties=[R1(0.1)]).double()
        x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
        logits, gradients = gan.feedback(x, torch.zeros(5, dtype=torch.int64))
        expected = gan.discriminator(x, None)
        torch.testing.assert_close(logits, expected.detach())
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), x)[0])
        assert all(own.grad is None for own in gan.parameters())

    def test_the_generator_s_loss_needs_no_data(self):
        gan = ring_gan().double()
        loss = gan.generator_loss(16, generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(loss, gan.generator.parameters(), allow_unused=True)[:1]
        assert loss.dim() == 0
        assert float(gradient.abs().sum()) > 0
