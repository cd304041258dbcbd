"""Modules that know nothing of federation are federated as they are: the clients of a round are plain Trainers.

The reference is in ``alone.py``: one uninterrupted ``L.Trainer`` per client, all of them averaged after every epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from fedgan_lightning import Evaluation, FederatedOrchestrator, Federation, SequentialExecutor, ServerModule
from tests import foreign_modules as foreign
from tests.conftest import assert_states_equal, federate, quiet_trainer
from tests.foreign_modules import data as foreign_data
from tests.parity.alone import clients_alone

ROUNDS = 3
CLOSE = {"atol": 1e-6, "rtol": 1e-6}

pytestmark = [
    # What Lightning says of these modules in a plain Trainer, too.
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


@dataclass(frozen=True)
class Case:
    """A module, its data, and what a user says of it.

    Attributes:
        make: Makes the module, always with the same weights.
        data: Makes the data.
        federation: Arguments of the orchestrator that the reference knows too.
        local: How long a round is.
        shares: Whether clients are validated on a share of their own data.
        draws: Whether the module needs a logger.
    """

    module: Callable[[], L.LightningModule]
    data: Callable[..., Any]
    federation: dict[str, Any] = field(default_factory=dict)
    local: dict[str, int] = field(default_factory=lambda: {"local_epochs": 1})
    shares: bool = False
    draws: bool = False

    def make(self) -> L.LightningModule:
        torch.manual_seed(0)
        return self.module()

    def options(self) -> dict[str, Any]:
        """Arguments of the orchestrator, with callbacks of their own."""
        made = {name: value() if callable(value) else value for name, value in self.federation.items()}
        return {"optimizer_state": "keep", **made}


WITH_POOLS = {"client_attributes": ["fake_A_pool", "fake_B_pool"]}
CASES = {
    "tutorial": Case(foreign.TutorialGAN, foreign_data.pictures, draws=True),
    "tutorial, validated": Case(foreign.TutorialGAN, foreign_data.pictures, draws=True, shares=True),
    "DCGAN": Case(foreign.DCGAN, foreign_data.pictures),
    "DCGAN, average": Case(foreign.DCGAN, foreign_data.pictures, {"optimizer_state": "average"}),
    "DCGAN, reset": Case(foreign.DCGAN, foreign_data.pictures, {"optimizer_state": "reset"}),
    "WGAN-GP": Case(foreign.WGANGP, foreign_data.pictures),
    "WGAN-GP, steps": Case(foreign.WGANGP, foreign_data.pictures, local={"local_steps": 4}),
    "CycleGAN": Case(foreign.CycleGAN, foreign_data.domains, WITH_POOLS),
    "CycleGAN, pools forgotten": Case(foreign.CycleGAN, foreign_data.domains),
    "pix2pix": Case(foreign.Pix2Pix, foreign_data.pairs),
    "pix2pix, average": Case(foreign.Pix2Pix, foreign_data.pairs, {"optimizer_state": "average"}),
    "SRGAN": Case(foreign.SRGAN, foreign_data.resolutions),
    "VAE, steps": Case(foreign.VAE, foreign_data.pictures, local={"local_steps": 3}),
    "VAE, accumulated": Case(
        foreign.VAE,
        foreign_data.pictures,
        {"client_trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}},
        local={"local_steps": 3},
    ),
    "VAE, epochs": Case(foreign.VAE, foreign_data.pictures),
    "DDPM": Case(
        foreign.DenoisingDiffusion,
        foreign_data.pictures,
        {"client_callbacks": lambda: [foreign.EMACallback()]},
        draws=True,
    ),
    "DDPM, validated": Case(
        foreign.DenoisingDiffusion,
        foreign_data.pictures,
        {"client_callbacks": lambda: [foreign.EMACallback()]},
        shares=True,
        draws=True,
    ),
    "StyleGAN": Case(foreign.StyleGAN, foreign_data.pictures, {"client_attributes": ["ema"]}),
    "StyleGAN, reset": Case(foreign.StyleGAN, foreign_data.pictures, {"optimizer_state": "reset"}),
    "energy": Case(
        foreign.DeepEnergyModel,
        foreign_data.pictures,
        {"client_attributes": ["sampler.examples"], "client_trainer": {"gradient_clip_val": 0.1}},
    ),
    "energy, the whole sampler": Case(
        foreign.DeepEnergyModel,
        foreign_data.pictures,
        {"client_attributes": ["sampler"], "client_trainer": {"gradient_clip_val": 0.1}},
    ),
    "energy, buffer forgotten": Case(foreign.DeepEnergyModel, foreign_data.pictures),
    "autoencoder": Case(
        foreign.AutoEncoder,
        foreign_data.pictures,
        {"client_trainer": {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}},
        shares=True,
    ),
    "autoencoder, own data": Case(
        foreign.AutoEncoder,
        foreign_data.held_out,
        {"client_trainer": {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}},
        shares=True,
    ),
    "DDPM, own data": Case(
        foreign.DenoisingDiffusion,
        foreign_data.held_out,
        {"client_callbacks": lambda: [foreign.EMACallback()]},
        shares=True,
        draws=True,
    ),
    "table": Case(foreign.TableGAN, foreign_data.points),
    "table, average": Case(foreign.TableGAN, foreign_data.points, {"optimizer_state": "average"}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
#: Cases whose clocks are followed step by step by default; the others follow with the slow ones.
CLOCKS = ("tutorial", "WGAN-GP", "VAE, epochs", "autoencoder")
with_clocks = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if name in CLOCKS else pytest.mark.slow) for name, case in CASES.items()],
    ids=CASES,
)


def data_of(case):
    return case.data(validation_share=0.25) if case.shares else case.data()


def validation_of(data, client_id):
    """Return the minibatches that a client's module is validated on: those that the client holds back."""
    return data.client_validation_batches(client_id)


def logger_of(case, folder):
    return TensorBoardLogger(folder) if case.draws else False


def steps_of(case, data):
    return [case.local.get("local_steps", data.steps_per_epoch(k)) for k in range(data.num_clients)]


def plain_clients(case, folder, **options):
    """Return (average, clients) of the reference."""
    data = data_of(case)
    if case.shares:
        options["validation"] = validation_of
    return clients_alone(
        case.make,
        data,
        rounds=ROUNDS,
        steps=steps_of(case, data),
        logger=lambda: logger_of(case, folder),
        **{**case.options(), **options},
    )


def federated(case, **options):
    """Return the server after all rounds."""
    return federate(case.make(), data_of(case), rounds=ROUNDS, **case.local, **{**case.options(), **options})[0]


def without_counts(state):
    """Return a state without the one entry that a server leaves as it is."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


# ---------------------------------------------------------------------- the modules, and the reference itself


@pytest.mark.slow  # the parity below needs both
@every_case
def test_a_module_trains_in_a_plain_trainer(case, tmp_path):
    data, module = case.data(), case.make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    batches = data.client_batches(0, first_step=0, num_steps=4)
    own = {**case.options().get("client_trainer", {}), "logger": logger_of(case, tmp_path)}
    trainer = quiet_trainer(
        *case.options().get("client_callbacks", ()), max_epochs=2, limit_val_batches=2 if case.shares else 0, **own
    )
    trainer.fit(module, batches, batches if case.shares else None)
    after = module.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained - moved <= {"critic.2.bias"}, "that one raises the critic everywhere"
    assert not any(name.startswith("perceptual") for name in moved)
    assert all(torch.isfinite(value).all() for value in after.values())


@pytest.mark.slow  # the parity below needs both
@every_case
def test_the_reference_runs(case, tmp_path):
    if case.shares:
        data = case.data()
        validation = {"validation": lambda *_: data.client_batches(2, first_step=0, num_steps=2)}
        case = Case(**{**vars(case), "shares": False})
    else:
        validation = {}
    state, clients = plain_clients(case, tmp_path, **validation)
    assert all(torch.isfinite(value).all() for value in state.values())
    assert [client.trainer.current_epoch for client in clients] == [ROUNDS] * 3
    assert not torch.equal(*(next(iter(client.module.parameters())) for client in clients[:2]))


def test_the_reference_with_one_client_is_one_fit():
    """Averaging one client changes nothing, and threads neither: deterministic steps of a momentum, 3 epochs of 6."""

    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(64, 1)

        def training_step(self, batch, batch_idx):
            return (self.net(batch[0].flatten(1)) - batch[1][:, None]).square().mean() * (1 + self.current_epoch)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.001, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]

    def make():
        torch.manual_seed(0)
        return Plain()

    data = foreign_data.pictures()
    data._num_clients = 1
    found, _ = clients_alone(make, data, rounds=3, steps=[6])
    plain = make()
    quiet_trainer(max_epochs=3).fit(plain, datamodule=data.client(0, num_steps=6))
    assert_states_equal(found, plain.state_dict(), **CLOSE)


# ---------------------------------------------------------------------- (a) a federation equals the reference


@every_case
def test_a_federation_equals_its_clients_alone(case, tmp_path):
    expected, _ = plain_clients(case, tmp_path)
    found = federated(case).model.state_dict()
    assert_states_equal(without_counts(found), without_counts(expected), **CLOSE)


class Notes(L.Callback):
    """Writes down what a module can see of time, and what is in it beside weights; for all clients in turn."""

    lines: list[Any] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        clocks = (trainer.current_epoch, pl_module.global_step, batch_idx)
        planned = (trainer.max_epochs, trainer.estimated_stepping_batches)
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.lines.append(("batch", clocks, planned, [round(rate, 9) for rate in rates]))

    def on_train_epoch_end(self, trainer, pl_module):
        others = [callback.state_dict() for callback in trainer.callbacks if isinstance(callback, foreign.EMACallback)]
        own = {name: vars(pl_module)[name] for name in ("ema", "sampler", "fake_A_pool") if name in vars(pl_module)}
        self.lines.append(("epoch", trainer.current_epoch, summary([own, others])))


def summary(value):
    """Return numbers that tell nested values apart."""
    if isinstance(value, torch.Tensor):
        return [*value.shape, round(float(value.detach().double().sum()), 4)]
    if isinstance(value, torch.nn.Module) or value is None:
        return type(value).__name__
    if isinstance(value, dict):
        return {name: summary(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [summary(own) for own in value]
    return summary(vars(value)) if hasattr(value, "__dict__") else value


@with_clocks
def test_clocks_rates_attributes_and_callbacks_are_those_of_clients_alone(case, tmp_path):
    notes = []
    own = list(case.options().get("client_callbacks", ()))
    for run in (lambda **o: plain_clients(case, tmp_path, **o), lambda **o: federated(case, **o)):
        Notes.lines = []
        run(client_callbacks=[*own, Notes()])
        notes.append(Notes.lines)
        own = list(case.options().get("client_callbacks", ()))
    expected, found = notes
    assert len(expected) == ROUNDS * (sum(steps_of(case, data_of(case))) + 3)
    for number, (mine, theirs) in enumerate(zip(found, expected)):
        assert mine == theirs, f"note {number} of {len(expected)}"
    assert len(found) == len(expected)


# ---------------------------------------------------------------------- (b) resumed equals uninterrupted


class Keep(L.Callback):
    """Writes a checkpoint at every boundary."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@every_case
def test_a_resumed_federation_ends_with_the_same_bits(case, tmp_path):
    states = []
    for start in (None, tmp_path / "2.ckpt"):
        options = {"executor": SequentialExecutor(), **case.local, **case.options()}
        orchestrator = FederatedOrchestrator(rounds=ROUNDS, **options)
        server = ServerModule(case.make())
        quiet_trainer(orchestrator, Keep(tmp_path)).fit(server, datamodule=data_of(case), ckpt_path=start)
        kept = {f"{k} {name}": value for k in range(3) for name, value in orchestrator.store.read(k).items()}
        states.append({**server.state_dict(), **server.moments, **kept})
    assert_states_equal(*states)


# ---------------------------------------------------------------------- as users run them


def run_dir_of(case, tmp_path, **options):
    """Run with everything that ``Federation`` adds; warnings are allowed."""
    data = data_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        federation = Federation(
            case.make(),
            data,
            rounds=2,
            run_dir=tmp_path / "run",
            executor=SequentialExecutor(),
            trainer={"enable_progress_bar": False, "accelerator": "cpu"},
            **{**case.local, **case.options(), **options},
        )
        federation.fit()
    return federation


@pytest.mark.parametrize("name", ["VAE, steps", "DDPM", "tutorial"])
def test_a_sample_method_of_ones_own_is_no_obstacle(name, tmp_path):
    """``sample(num_samples, current_device)``, ``sample(batch_size=16, return_intermediates=False)``, or none."""
    federation = run_dir_of(CASES[name], tmp_path)
    assert federation.server.rounds_completed == 2


def test_no_metrics_means_that_nothing_is_drawn(tmp_path):
    federation = run_dir_of(CASES["DDPM"], tmp_path, evaluation=Evaluation(metrics=[]))
    assert federation.server.rounds_completed == 2


@pytest.mark.parametrize("name", ["CycleGAN", "pix2pix", "SRGAN"])
def test_data_of_ones_own_run_with_everything(name, tmp_path):
    assert run_dir_of(CASES[name], tmp_path).server.rounds_completed == 2


def test_a_frozen_network_neither_travels_nor_moves():
    case = CASES["SRGAN"]
    server, orchestrator, _ = federate(case.make(), case.data(), rounds=2, local_epochs=1, optimizer_state="keep")
    for bytes_by_network in (orchestrator.ledger.bytes_down, orchestrator.ledger.bytes_up):
        assert bytes_by_network.get("perceptual", 0) == 0
    start = case.make().perceptual.state_dict()
    assert_states_equal(server.model.perceptual.state_dict(), start)
    assert not any(part.training for part in server.model.perceptual.vgg.modules())


def test_clients_that_never_took_the_generators_step_go_with_averaged_moments():
    """Client 2 takes two steps a round and trains the critic alone in the first: it has no moments of the generator."""
    case = CASES["WGAN-GP"]
    server = federated(case, optimizer_state="average")
    assert all(torch.isfinite(value).all() for value in server.model.state_dict().values())


class Seen(L.Callback):
    """Counts what is in a pool where an epoch begins."""

    lengths: list[int] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.lengths.append(len(pl_module.fake_A_pool.images))


@pytest.mark.parametrize("attributes, lengths", [({}, [0] * 9), (WITH_POOLS, [0, 0, 0, 4, 4, 4, 4, 4, 4])])
@pytest.mark.parametrize("is_federated", [False, True], ids=["alone", "federated"])
def test_a_pool_is_never_that_of_another_client(is_federated, attributes, lengths, tmp_path):
    """One that is named stays with its client; any other is empty again where a round begins."""
    case = Case(foreign.CycleGAN, foreign_data.domains, attributes)
    Seen.lengths = []
    if is_federated:
        federated(case, client_callbacks=[Seen()])
    else:
        plain_clients(case, tmp_path, client_callbacks=[Seen()])
    assert Seen.lengths == lengths
