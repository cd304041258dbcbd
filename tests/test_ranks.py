"""Several processes share a run: same weights as one, resume included; one that dies ends the run by name."""

from __future__ import annotations

import datetime
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.federation.ranks import Ranks, lost_rank
from tests.conftest import ROOT, slow
from tests.processes import children, eventually, started

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

SETTINGS = """
seed_everything: 1
model:
  class_path: GAN
  init_args:
    generator:
      class_path: MLPGenerator
      init_args: {latent_dim: 4, sample_shape: [2], hidden: [16], output: linear}
    discriminator: {class_path: MLPDiscriminator, init_args: {sample_shape: [2], hidden: [16]}}
    generator_optimizer: {class_path: torch.optim.Adam, init_args: {lr: 1.0e-3}}
    discriminator_optimizer: {class_path: torch.optim.Adam, init_args: {lr: 1.0e-3}}
    ema_half_life_images: 500
data:
  source: {class_path: Ring, init_args: {num_samples: 960}}
  partition: {class_path: QuantitySkew, init_args: {alpha: 2.0, min_samples: 32}}
  num_clients: 7
  batch_size: 16
federation:
  local_epochs: 1
  clients: {class_path: FractionOfClients, init_args: {fraction: 0.7}}
  sync: {discriminator: local}
evaluation: {every_n_rounds: 100, num_samples: 200}
pictures: {every_n_rounds: 100}
best: {monitor: null}
trainer: {accelerator: cpu, enable_progress_bar: false}
"""


def start(run_dir: Path, *arguments: str, devices: int = 2):
    settings = run_dir.parent / "settings.yaml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(SETTINGS)
    options = ["fit", "--config", str(settings), "--run_dir", str(run_dir), "--trainer.devices", str(devices)]
    said = f"{run_dir.name} said {len(list(run_dir.parent.glob(f'{run_dir.name} said *')))}"
    return started(ROOT / "tests" / "command.py", *options, *arguments, cwd=run_dir.parent, said=said)


def flat(value, prefix=""):
    if isinstance(value, torch.Tensor):
        return {prefix: value.double()}
    if isinstance(value, dict):
        return {k: v for name, own in value.items() for k, v in flat(own, f"{prefix}/{name}").items()}
    return {}


def result(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights, and what every client keeps."""
    saved = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    return flat({"weights": saved["state_dict"], "clients": saved["callbacks"]["FederatedOrchestrator"]["store"]})


SGD = [
    f"--model.init_args.{network}_optimizer={{class_path: torch.optim.SGD, init_args: {{lr: 0.02}}}}"
    for network in ("generator", "discriminator")
]
ALGORITHMS = {
    "FedGAN": [],
    "SCAFFOLD, clipped, in signs, at a rate that falls": [
        "--federation.algorithm=Scaffold",
        "--federation.sync=null",
        "--federation.transforms=[{class_path: ClipUpdates, init_args: {max_norm: 0.05}}, SignCompression]",
        "--federation.schedules={learning_rate: {class_path: StepRounds, init_args: {values: {0: 1.0, 4: 0.1}}}}",
        *SGD,
    ],
    "private clients, secret cohorts, a bound that moves": [
        *("--federation.local_epochs=null", "--federation.local_steps=4", "--federation.optimizer_state=reset"),
        "--federation.aggregator={class_path: WeightedMean, init_args: {weighting: uniform}}",
        "--federation.clients={class_path: PoissonSampling, init_args: {probability: 0.7, secret: true}}",
        *(
            "--federation.privacy.clip=0.05",
            "--federation.privacy.noise_multiplier=1",
            "--federation.privacy.delta=0.1",
        ),
        *("--federation.privacy.clipping=adaptive", "--federation.privacy.count_noise=2"),
        "--federation.privacy.testing_seed=1",
    ],
    "UA-GAN, discriminators handed on": [
        "--federation.algorithm=UAGAN",
        "--federation.algorithm.num_samples=16",
        "--federation.sync={generator: server, discriminator: exchange}",
    ],
    "IFL-GAN": ["--federation.algorithm={class_path: IFLGAN, init_args: {num_samples: 8}}", *SGD],
    "arrivals of any age, in codes": [
        *("--federation.clients=AllClients", "--federation.rules.asynchronous.buffer_size=4"),
        "--federation.transforms=[{class_path: TopK, init_args: {share: 0.2}}, LogMoments]",
    ],
}
SLOW = ("arrivals of any age, in codes", "IFL-GAN")


@pytest.mark.parametrize("algorithm", [slow(name) if name in SLOW else name for name in ALGORITHMS])
def test_two_ranks_train_like_one_and_resume(algorithm, tmp_path):
    rounds = ("--federation.rounds", "5", "--federation.executor", "SequentialExecutor", *ALGORITHMS[algorithm])
    with (
        start(tmp_path / "one", *rounds, devices=1) as alone,
        start(tmp_path / "interrupted", "--federation.rounds", "3", *rounds[2:]) as begun,
    ):
        assert [alone.finish(), begun.finish()] == [0, 0], alone.said() + begun.said() + begun.said(1)
    with start(tmp_path / "interrupted", *rounds, "--ckpt_path", "last") as resumed:
        assert resumed.finish() == 0, resumed.said() + resumed.said(1)
    one, two = result(tmp_path / "one"), result(tmp_path / "interrupted")
    assert one.keys() == two.keys()
    assert len({name.split("/")[2] for name in one if name.startswith("/clients")}) >= 5
    for name, value in one.items():
        assert (value - two[name]).norm() <= 1e-6 * value.norm(), name
    assert resumed.said().count("rounds 5") == 1
    assert "rounds 5" not in resumed.said(1), "only the first rank speaks"
    ledgers = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "interrupted")]
    for counted in ("bytes_down", "bytes_up", "client_steps", "client_runs"):
        assert ledgers[0][counted] == ledgers[1][counted], counted


def test_no_process_group_outlives_its_run(tmp_path):
    """Threads of gloo abort a process that ends before them, one of two or so, after all was done."""
    script = tmp_path / "script.py"
    script.write_text(
        """
from tests.processes import write_apart
write_apart()
import atexit
import torch.distributed as dist
atexit.register(lambda: print("at the end:", dist.is_initialized(), flush=True))  # called last
from fedgan_lightning import FederatedOrchestrator, SequentialExecutor, ServerModule
from tests.conftest import quiet_trainer, ring_data, ring_gan
orchestrator = FederatedOrchestrator(rounds=1, local_steps=1, executor=SequentialExecutor())
quiet_trainer(orchestrator, devices=2).fit(ServerModule(ring_gan()), datamodule=ring_data())
print("during the run:", dist.is_initialized(), flush=True)
"""
    )
    with started(script, cwd=tmp_path) as run:
        assert run.finish() == 0, run.said()
        assert eventually(lambda: "at the end" in run.said(1)), run.said(1)
    for rank in range(2):
        assert run.said(rank).count("during the run: True\n") == 1, rank
        assert run.said(rank).count("at the end: False\n") == 1, rank


def test_a_rank_that_is_lost_in_a_collective_of_lightning_s_is_named_too(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError) as caught:
        nobody = {"init_method": "tcp://127.0.0.1:1", "timeout": datetime.timedelta(seconds=0.2)}
        dist.init_process_group("gloo", rank=1, world_size=2, **nobody)
    assert "got rank 0 of 2 lost another" in str(lost_rank(caught.value))
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert lost_rank(caught.value) is None


def test_a_rank_that_dies_ends_the_run_with_a_named_error_and_a_usable_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    with start(run_dir, "--federation.rounds", "100000") as run:
        assert eventually((run_dir / "checkpoints" / "last.ckpt").exists), run.said() + run.said(1)
        (child,) = children(run.process.pid)
        os.kill(child, signal.SIGKILL)
        assert run.finish() == 1, run.said()
    assert "all processes of a run must live until its end; got rank 0 of 2 lost another" in run.said()
    assert "continue with --ckpt_path last" in run.said()
    done = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"]
    assert done >= 1
    with start(run_dir, "--federation.rounds", str(done + 2), "--ckpt_path", "last", devices=1) as resumed:
        assert resumed.finish() == 0, resumed.said()


def test_a_process_that_does_not_notice_a_loss_is_ended_with_a_named_error(tmp_path):
    """One that is in the middle of a long round, or in a collective that never fails."""
    script = tmp_path / "script.py"
    script.write_text(
        """
from tests.processes import write_apart
write_apart()
import os, time
from fedgan_lightning.federation import rank_watch
rank_watch.GRACE_SECONDS = 1
import lightning as L
from fedgan_lightning import FederatedOrchestrator, SequentialExecutor, ServerModule
from tests.conftest import quiet_trainer, ring_data, ring_gan
class Lost(L.Callback):
    def on_fit_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            os._exit(3)
        time.sleep(1000)
orchestrator = FederatedOrchestrator(rounds=1, local_steps=1, executor=SequentialExecutor())
quiet_trainer(orchestrator, Lost(), devices=2).fit(ServerModule(ring_gan()), datamodule=ring_data())
"""
    )
    with started(script, cwd=tmp_path) as run:
        assert run.finish() == -signal.SIGKILL, run.said()
    assert "got rank 0 of 2 lost another (exit code 3). Find out why" in run.said()


class TestShares:
    def test_every_client_has_one_rank(self):
        costs = {k: (k * 7) % 5 + 1 for k in range(23)}
        shares = [Ranks(rank=rank, world_size=4).share(costs) for rank in range(4)]
        assert sorted(k for share in shares for k in share) == list(range(23))

    def test_the_longest_work_goes_first_so_loads_are_even(self):
        costs = {0: 1, 1: 1, 2: 1, 3: 1, 4: 4, 5: 4}
        loads = [sum(costs[k] for k in Ranks(rank=rank, world_size=2).share(costs)) for rank in range(2)]
        assert loads == [6, 6]

    @pytest.mark.parametrize("world_size", [1, 3])
    def test_fewer_clients_than_ranks(self, world_size):
        shares = [Ranks(rank=rank, world_size=world_size).share({5: 2}) for rank in range(world_size)]
        assert sorted(shares, reverse=True)[0] == [5]
        assert sum(map(len, shares)) == 1
