"""Every algorithm, with every executor: closed forms, parity, state that settles and resumes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import toy2d
from fedgan_lightning import (
    ClientError,
    ConfigurationError,
    RoundRules,
    SecureAggregation,
    SequentialExecutor,
    UpdateError,
    UpdateValidator,
    VectorizedExecutor,
)
from fedgan_lightning.aggregators import CoordinateMedian, Krum, WeightedMean
from fedgan_lightning.algorithms import FederatedAlgorithm, FedGAN, FedProx, Scaffold, UpdateEntry
from fedgan_lightning.executors import FaultyExecutor
from fedgan_lightning.losses import Hinge, LeastSquares, NonSaturating, RelativisticPairing
from fedgan_lightning.networks import MLPDiscriminator
from fedgan_lightning.partitions import Dirichlet
from fedgan_lightning.samplers import FractionOfClients
from fedgan_lightning.transforms import ClipUpdates, SignCompression
from tests.conftest import adam, assert_states_equal, digits_data, federate, ring_data, ring_gan, sgd
from tests.contracts.test_executors import FAMILIES, gentle
from tests.foreign import SomebodysGAN
from tests.unit.test_secure import Summing

ALGORITHMS = {"FedGAN": FedGAN, "FedProx": lambda: FedProx(mu=0.5), "Scaffold": Scaffold}
EXECUTORS = {
    "sequential": SequentialExecutor,
    "vectorized": VectorizedExecutor,
    "stacks of two": lambda: VectorizedExecutor(chunk_size=2),
}


def run(algorithm, executor=None, *, gan=None, data=None, **options):
    gan = ring_gan(optimizer=sgd) if gan is None else gan
    data = ring_data() if data is None else data
    executor = SequentialExecutor() if executor is None else executor
    options = {"rounds": 3, "local_steps": 3, **options}
    server, orchestrator, trainer = federate(gan, data, algorithm=algorithm, executor=executor, **options)
    return server, orchestrator, trainer


def everything(result) -> dict[str, torch.Tensor]:
    """Return all that training goes on from."""
    server, orchestrator, _ = result
    private = {f"{k} {n}": v for k, own in orchestrator.store.state_dict().items() for n, v in own.items()}
    return {**server.model.state_dict(), **server.algorithm_state, **server.moments, **private}


# ---------------------------------------------------------------------- closed forms


class TestTwoDimensionalSystem:
    """Five clients with unlike data; the stationary point of K = 1 is (1, 0)."""

    @pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (1, 2, 4, 1, 1)], ids=["equal", "unequal"])
    @pytest.mark.parametrize("algorithm, options", [("FedProx", {"mu": 1.0}), ("Scaffold", {"controls": True})])
    def test_the_path_is_that_of_numpy(self, algorithm, options, sizes):
        found = toy2d.federated(20, 0.1, 400, algorithm=algorithm, executor="vectorized", sizes=sizes)
        assert found == pytest.approx(toy2d.reference(20, 0.1, 400, sizes=sizes, **options), abs=1e-12)

    @pytest.mark.parametrize("local_steps", [5, 20, 50])
    def test_the_path_ends_where_it_should(self, local_steps):
        """Of the computation in NumPy, which the framework equals step by step; FedGAN ends at .996, .983, .966."""
        assert toy2d.reference(local_steps, 0.1, 8000, controls=True) == pytest.approx((1.0, 0.0), abs=1e-6)
        expected = toy2d.STATIONARY_OF["FedProx"][local_steps]
        assert toy2d.reference(local_steps, 0.1, toy2d.STEPS_OF["FedProx"], mu=1.0) == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize("algorithm", ["FedProx", "Scaffold"])
    def test_with_one_step_a_round_it_is_fedgan(self, algorithm):
        found, expected = (toy2d.federated(1, 0.1, 40, algorithm=name) for name in (algorithm, "FedGAN"))
        assert found == pytest.approx(expected, abs=1e-13)

    def test_controls_weigh_like_updates(self):
        """With one control, one vote, beside updates weighed by N_k, the end would be (1, 0)."""
        found = toy2d.reference(20, 0.1, 8000, controls=True, sizes=(1, 2, 4, 1, 1))
        assert found == pytest.approx(toy2d.UNEQUAL, abs=1e-4)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"sizes": (1, 2, 4, 1, 1)},
            {"sampler": FractionOfClients(0.4)},
            {"transforms": (ClipUpdates(max_norm=0.02),)},
            {"transforms": (SignCompression(),), "sampler": FractionOfClients(0.6)},
            {
                "transforms": (ClipUpdates(max_norm=0.05), SignCompression(error_feedback=False)),
                "sizes": (3, 1, 1, 2, 1),
            },
        ],
        ids=["all", "unequal", "some", "clipped", "signs", "clipped signs"],
    )
    def test_the_server_s_control_is_the_mean_of_the_clients(self, options):
        sizes = options.get("sizes", (1, 1, 1, 1, 1))
        _, server, orchestrator = toy2d.run(5, 0.1, 150, algorithm="Scaffold", executor="sequential", **options)
        stored = {int(k): own for k, own in orchestrator.store.state_dict().items()}
        assert server.algorithm_state
        for name, control in server.algorithm_state.items():
            zero = torch.zeros_like(control)
            each = [stored.get(k, {}).get(f"algorithm/{name}", zero) for k in range(5)]
            mean = sum(size * own for size, own in zip(sizes, each)) / sum(sizes)
            assert float((control - mean).abs().max()) <= 1e-12


# ---------------------------------------------------------------------- parity, over losses and networks

LOSSES = [NonSaturating, Hinge, LeastSquares, RelativisticPairing]
#: Every pair of an algorithm and a family, each with a loss and a condition.
CASES = [
    (algorithm, family, LOSSES[(a + f) % len(LOSSES)], conditions[(a + f) % len(conditions)])
    for a, algorithm in enumerate(("FedProx", "Scaffold"))
    for f, (family, (_, conditions)) in enumerate(FAMILIES.items())
    if family not in ("ACGAN", "profile")
]


def double_gan(family, condition, loss, **options):
    from fedgan_lightning import GAN

    torch.manual_seed(0)
    make, _ = FAMILIES[family]
    return GAN(
        *make(condition), loss=loss(), generator_optimizer=gentle, discriminator_optimizer=gentle, **options
    ).double()


@pytest.mark.parametrize(
    "algorithm, family, loss, condition",
    [
        pytest.param(*case, marks=[pytest.mark.slow] if index % 3 else [], id=f"{case[0]}-{case[1]}-{case[2].__name__}")
        for index, case in enumerate(CASES)
    ],
)
def test_stacked_clients_are_each_alone(algorithm, family, loss, condition):
    found = []
    for executor in ("sequential", "vectorized"):
        gan = double_gan(family, condition, loss, clip_gradient_norm=0.5)
        options = {"gan": gan, "data": digits_data(num_clients=3), "rounds": 2, "local_steps": 2}
        found.append(everything(run(ALGORITHMS[algorithm](), EXECUTORS[executor](), **options)))
    assert_states_equal(*found, atol=1e-12, rtol=1e-10)


class TestStacks:
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    @pytest.mark.parametrize(
        "options",
        [
            {"local_steps": None, "local_epochs": 1},
            pytest.param({"clients": FractionOfClients(0.5), "rounds": 5}, marks=pytest.mark.slow),
            {"transforms": [ClipUpdates(max_norm=0.05)], "clients": FractionOfClients(0.5), "rounds": 4},
            pytest.param(
                {"transforms": [SignCompression()], "local_steps": None, "local_epochs": 1}, marks=pytest.mark.slow
            ),
            pytest.param({"sync": {"discriminator": "local"}}, marks=pytest.mark.slow),
            {"sync": {"discriminator.features.1.*": "local"}},
        ],
        ids=["ragged", "newcomers beside veterans", "clipped", "signs", "local network", "local layer"],
    )
    def test_whatever_the_stack_it_is_each_alone(self, algorithm, options):
        """Clients hold unequal data, and are as many as the first dimension of a weight."""
        found = []
        for executor in EXECUTORS.values():
            torch.manual_seed(0)
            gan = ring_gan(optimizer=sgd, clip_gradient_norm=1.0)
            gan.discriminator = MLPDiscriminator((2,), hidden=(4, 4))
            data = ring_data(partition=Dirichlet(0.5, min_samples=16))
            found.append(everything(run(ALGORITHMS[algorithm](), executor(), gan=gan.double(), data=data, **options)))
        for other in found[1:]:
            assert_states_equal(other, found[0], atol=1e-12, rtol=1e-9)

    def test_norms_and_factors_are_each_client_s(self):
        """A clip that took the norm of a whole stack would mix clients."""
        found = [
            everything(run(ClipSteps(), make(), gan=ring_gan(optimizer=sgd).double())) for make in EXECUTORS.values()
        ]
        for other in found[1:]:
            assert_states_equal(other, found[0], atol=1e-12, rtol=1e-9)


class ClipSteps(FederatedAlgorithm):
    """Clips every step's gradient of a client by its own norm."""

    def before_step(self, visit, gradients):
        norms = visit.norms(gradients)
        visit.scale_(gradients, (0.05 / norms).clamp(max=1.0))


def test_corrections_come_after_clipping():
    class Push(FederatedAlgorithm):
        def before_step(self, visit, gradients):
            for value in gradients.values():
                value.fill_(100.0)

    gan = ring_gan(optimizer=sgd, clip_gradient_norm=0.1)
    before = {name: value.detach().clone() for name, value in gan.named_parameters()}
    server, _, _ = run(Push(), gan=gan, rounds=1, local_steps=1)
    for name, value in server.model.named_parameters():
        torch.testing.assert_close(value, before[name] - 0.05 * 100.0, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- state


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_run_ends_with_the_same_bits(algorithm, executor, tmp_path):
    options = {"clients": FractionOfClients(0.5), "transforms": [SignCompression()], "optimizer_state": "reset"}
    whole = run(ALGORITHMS[algorithm](), EXECUTORS[executor](), rounds=5, **options)
    _, _, trainer = run(ALGORITHMS[algorithm](), EXECUTORS[executor](), rounds=2, **options)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    from fedgan_lightning import FederatedOrchestrator, ServerModule
    from tests.conftest import quiet_trainer

    again = FederatedOrchestrator(
        rounds=5, local_steps=3, algorithm=ALGORITHMS[algorithm](), executor=EXECUTORS[executor](), **options
    )
    server, trainer = ServerModule(ring_gan(optimizer=sgd, seed=7)), quiet_trainer(again)
    trainer.fit(server, datamodule=ring_data(), ckpt_path=tmp_path / "cut.ckpt")
    assert server.rounds_completed == 5
    assert_states_equal(everything((server, again, trainer)), everything(whole))


def test_a_client_whose_update_does_not_count_keeps_its_control():
    rules, validator = RoundRules(min_report_fraction=0.5), UpdateValidator()
    executor = FaultyExecutor(SequentialExecutor(), nan=0.3, crash=0.2)
    server, orchestrator, _ = run(Scaffold(), executor, rounds=8, rules=rules, validator=validator)
    assert {"rejected", "failed"} <= orchestrator.ledger.events.keys()
    stored = orchestrator.store.state_dict()
    sizes = [ring_data_sizes()[k] for k in range(4)]
    for name, control in server.algorithm_state.items():
        each = [stored.get(str(k), {}).get(f"algorithm/{name}", torch.zeros_like(control)) for k in range(4)]
        mean = sum(size * own.double() for size, own in zip(sizes, each)) / sum(sizes)
        torch.testing.assert_close(control.double(), mean, atol=1e-6, rtol=1e-5)


def ring_data_sizes():
    data = ring_data()
    data.setup()
    return [data.num_examples(k) for k in range(4)]


def test_another_algorithm_does_not_continue_a_run(tmp_path):
    from fedgan_lightning import CheckpointError, FederatedOrchestrator, ServerModule
    from tests.conftest import quiet_trainer

    _, _, trainer = run(Scaffold(), rounds=1)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    other = quiet_trainer(FederatedOrchestrator(rounds=2, local_steps=3, executor=SequentialExecutor()))
    with pytest.raises(CheckpointError, match="algorithm"):
        other.fit(ServerModule(ring_gan(optimizer=sgd)), datamodule=ring_data(), ckpt_path=tmp_path / "cut.ckpt")


# ---------------------------------------------------------------------- other people's modules


def test_somebody_s_module_is_held_near_the_server():
    def moved(algorithm):
        torch.manual_seed(0)
        module = SomebodysGAN()
        start = {name: value.detach().clone() for name, value in module.named_parameters()}
        server, _, _ = run(algorithm, gan=module, rounds=2, local_steps=10)
        return sum(
            float((value.detach() - start[name]).square().sum()) for name, value in server.model.named_parameters()
        )

    assert moved(FedProx(mu=20.0)) < 0.8 * moved(FedGAN())
    assert moved(FedProx(mu=0.0)) == moved(FedGAN())


class RawSteps(SomebodysGAN):
    """Steps torch's own optimizers, which Lightning's hooks do not see."""

    def training_step(self, batch, batch_idx):
        critic, decoder = self.optimizers(use_pl_optimizer=False)
        points, _ = batch
        fake = self.decoder(torch.randn(len(points), 3)) + self.bias
        critic.zero_grad()
        (
            nn.functional.softplus(self.critic(fake.detach())) + nn.functional.softplus(-self.critic(points))
        ).mean().backward()
        critic.step()
        decoder.zero_grad()
        nn.functional.softplus(-self.critic(fake)).mean().backward()
        decoder.step()


class HiddenOptimizer(SomebodysGAN):
    """Moves parameters by an optimizer that nobody else knows."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        with torch.no_grad():
            self.bias.add_(0.1)

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.critic.parameters(), lr=0.02),
            torch.optim.SGD(self.decoder.parameters(), lr=0.01),
        ]


def test_steps_of_raw_optimizers_are_corrected_too():
    def result(algorithm):
        torch.manual_seed(0)
        return run(algorithm, gan=RawSteps(), rounds=1, local_steps=8)[0].model.state_dict()

    free, held = result(FedGAN()), result(FedProx(mu=20.0))
    assert any(not torch.equal(free[name], held[name]) for name in free)


@pytest.mark.parametrize("algorithm", [FedProx(mu=0.1), Scaffold()], ids=["FedProx", "Scaffold"])
def test_parameters_that_move_without_a_step_are_refused(algorithm):
    torch.manual_seed(0)
    with pytest.raises(ClientError, match="must see every step .* which moved bias without a step"):
        run(algorithm, gan=HiddenOptimizer(), rounds=1)


# ---------------------------------------------------------------------- what is refused before the first round


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gan": ring_gan(optimizer=adam)}, "Scaffold must step by SGD without momentum.*got Adam. Set the"),
        (
            {"gan": ring_gan(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))},
            "got SGD with momentum 0.9",
        ),
        ({"aggregator": Krum(num_bad=0)}, "must be a weighted mean; got Krum. Use WeightedMean"),
        ({"rules": RoundRules(stale_updates="discount")}, "got rules.stale_updates=discount. Set"),
    ],
    ids=["Adam", "momentum", "Krum", "late"],
)
def test_scaffold_refuses_what_its_controls_are_wrong_for(options, words):
    with pytest.raises(ConfigurationError, match=words):
        run(Scaffold(), **options)


@pytest.mark.parametrize("name", ["generator", "generator.layers.0.*"])
@pytest.mark.parametrize("algorithm, placement", [(FedGAN, "served"), (Scaffold, "exchange"), (FedProx, "served")])
def test_a_placement_that_the_algorithm_does_not_serve_is_refused(algorithm, placement, name):
    with pytest.raises(
        ConfigurationError, match=f"knows the placement {placement}; got {algorithm.__name__} with sync"
    ):
        run(algorithm(), sync={name: placement})


def test_something_must_come_up():
    with pytest.raises(ConfigurationError, match="something must come up from clients"):
        run(FedGAN(), sync={"generator": "local", "discriminator": "local"})


def test_weights_of_the_mean_may_be_uniform():
    """The controls follow: pi_i = 1 / B."""
    server, orchestrator, _ = run(Scaffold(), aggregator=WeightedMean("uniform"), rounds=4)
    stored = orchestrator.store.state_dict()
    for name, control in server.algorithm_state.items():
        mean = sum(stored[str(k)][f"algorithm/{name}"].double() for k in range(4)) / 4
        torch.testing.assert_close(control.double(), mean, atol=1e-6, rtol=1e-5)


def test_every_group_of_an_optimizer_is_looked_at():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "momentum": 0.9}], lr=0.1)
    with pytest.raises(ConfigurationError, match="got SGD with momentum 0.9"):
        Scaffold().check_optimizers([optimizer])


class Told(FedGAN):
    """Clients say a number beside their updates: summed, or collected."""

    def __init__(self, rule="sum", *, bound=None, value=2.0):
        super().__init__()
        self.entry = UpdateEntry((), torch.float64, rule=rule, denominator="arrived", bound=bound)
        self.value, self.totals = value, []

    def entries(self, context):
        return {"told": self.entry}

    def answer(self, visit):
        value = torch.tensor(self.value, dtype=torch.float64)
        return {"told": value.expand(len(visit.tasks)).clone() if visit.is_stacked else value}

    def server_step(self, server, total):
        super().server_step(server, total)
        self.totals.append((total.extras.get("algorithm/told"), total.collected))


@pytest.mark.parametrize("aggregator", [WeightedMean(), CoordinateMedian(), Krum(num_bad=0)])
def test_robust_rules_combine_updates_and_leave_sums_alone(aggregator):
    algorithm = Told()
    run(algorithm, aggregator=aggregator, rounds=1)
    assert float(algorithm.totals[0][0]) == 2.0
    collecting = Told("collect")
    run(collecting, aggregator=aggregator, rounds=1)
    collected = {k: float(own["algorithm/told"]) for k, own in collecting.totals[0][1].items()}
    assert collected == dict.fromkeys(range(4), 2.0)


def test_a_number_beyond_its_own_bound_is_refused_by_name():
    run(Told(bound=2.0), rounds=1)
    with pytest.raises(UpdateError, match=r"client \d.*algorithm/told reaches 2, beyond 1.5"):
        run(Told(bound=1.5), rounds=1)


@pytest.mark.parametrize("algorithm", [Told(), Told("collect")], ids=["sum", "collect"])
def test_what_no_sum_can_show_is_refused_under_secure_aggregation(algorithm):
    with pytest.raises(ConfigurationError, match="must be summed with the weights of updates; got told of Told"):
        run(algorithm, executor=Summing(), secure=SecureAggregation(), rounds=1)


@pytest.mark.parametrize("executor", [SequentialExecutor, VectorizedExecutor])
def test_work_that_does_not_train_is_nobody_s_crash(executor):
    class Idle(FedGAN):
        def work(self, visit):
            pass

    with pytest.raises(ClientError, match="work must call visit.fit exactly once; got Idle"):
        run(Idle(), executor=executor(), rounds=1)
