"""Whether everything that a GPU could break works on one: a table of checks, in less than eight minutes.

    python -m benchmarks.gpu_check                  # on the first CUDA device

    python -m benchmarks.gpu_check --device cpu     # the same runs where there is none, to try the script

Every check is a small federation; what it finds is printed beside it. The exit status is 1 if one fails. Data are the
embedded digits, grey and coloured: nothing is downloaded.
"""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # has to be there before cuBLAS is first called

import argparse
import contextlib
import copy
import io
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning import GAN, Evaluation, FederatedDataModule, Federation, SequentialExecutor, VectorizedExecutor
from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources.base import Split
from fedgan_lightning.editing import edited, interpolate, project
from fedgan_lightning.gan.priors import MidpointNodes
from fedgan_lightning.losses import R1, Augmentation, LeCam
from fedgan_lightning.metrics import FrechetDistance
from fedgan_lightning.networks import DCGANDiscriminator, DCGANGenerator, MLPDiscriminator, MLPGenerator
from fedgan_lightning.partitions import ClassesPerClient
from fedgan_lightning.sources import Digits

EXECUTORS = {"sequential": SequentialExecutor, "vectorized": VectorizedExecutor}
#: Pixels of a side of the coloured digits.
SIDE = 16
#: Draws of a process that has not used the device yet, as a site of a deployment.
FRESH = """
import torch
from fedgan_lightning.seeding import isolated_rng
with isolated_rng(11, device=torch.device({device!r})):
    print(torch.rand(4, device={device!r}).tolist())
"""


class ColouredDigits(Digits):
    """The digits in a colour by class."""

    def __init__(self) -> None:
        super().__init__(image_size=SIDE)
        self.sample_shape = (3, SIDE, SIDE)

    def load(self, split: Split) -> Samples:
        grey = super().load(split)
        assert grey.y is not None
        tints = torch.stack([(grey.y * step) % 11 for step in (1, 3, 7)], dim=1).add(1).div(12)
        return replace(grey, x=(grey.x * tints[:, :, None, None]).round().to(torch.uint8))


class Checks:
    """The checks, in order; each returns what it found, or raises.

    Args:
        device: ``cuda`` or ``cpu``.
        folder: Where runs are written.
    """

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder, self.runs = device, folder, 0

    # ------------------------------------------------------------------ what is run

    def federation(
        self,
        model: GAN,
        data: FederatedDataModule,
        *,
        on: str | None = None,
        trainer: dict[str, Any] | None = None,
        **own,
    ) -> Federation:
        """Return a small federation that is not run yet; it trains a copy of ``model``."""
        self.runs += 1
        accelerator = {"accelerator": on or self.device, "devices": 1}
        options = {
            "rounds": 3,
            "local_steps": 4,
            "evaluation": Evaluation(metrics=[]),
            "executor": SequentialExecutor(),
        }
        return Federation(
            copy.deepcopy(model),
            data,
            **{"run_dir": str(self.folder / f"run{self.runs}"), **options, **own},
            trainer={"enable_progress_bar": False, **accelerator, **(trainer or {})},
        )

    @staticmethod
    def grey(*, num_clients: int = 5) -> FederatedDataModule:
        return FederatedDataModule(Digits(), partition=ClassesPerClient(2), num_clients=num_clients, batch_size=32)

    @staticmethod
    def colour() -> FederatedDataModule:
        return FederatedDataModule(ColouredDigits(), partition=ClassesPerClient(4), num_clients=4, batch_size=16)

    @staticmethod
    def mlp(**options: Any) -> GAN:
        torch.manual_seed(0)
        return GAN(MLPGenerator(32, (1, 8, 8)), MLPDiscriminator((1, 8, 8)), **options)

    @staticmethod
    def dcgan(**options: Any) -> GAN:
        torch.manual_seed(0)
        sizes = {"width": 8, "num_classes": 10}
        networks = (
            DCGANGenerator(SIDE, 3, latent_dim=32, **sizes),
            DCGANDiscriminator(SIDE, 3, conditioning="projection", **sizes),
        )
        return GAN(*networks, **{"penalties": [R1(1.0)], "ema_half_life_images": 1000.0, **options})

    # ------------------------------------------------------------------ the checks

    def readme_example(self) -> str:
        """The README's own lines, with all metrics that suit the data."""
        run = self.federation(
            self.mlp(ema_half_life_images=5000.0),
            self.grey(),
            evaluation=None,
            executor="auto",
            rounds=2,
            local_steps=5,
        )
        values = run.fit()
        finite(values)
        return f"fid {values['fid']:.3g}, {len(values)} values"

    def cpu_and_device_agree(self) -> str:
        """Without noise and with SGD both compute the same."""
        options = {"prior": MidpointNodes(32), "generator_optimizer": sgd, "discriminator_optimizer": sgd}
        torch.manual_seed(0)
        model = GAN(MLPGenerator(1, (1, 8, 8)), MLPDiscriminator((1, 8, 8)), **options)
        found = []
        for on in ("cpu", self.device):
            for executor in EXECUTORS.values():
                run = self.federation(model, self.grey(), on=on, executor=executor())
                run.fit()
                found.append(state_of(run))
        return at_most(1e-3, *(apart(own, found[0]) for own in found[1:]))

    def executors_agree(self) -> str:
        """With noise and Adam, grey: one by one and stacked."""
        return at_most(0.05, self.both(self.mlp(ema_half_life_images=1000.0), self.grey()))

    def colour_with_r1(self) -> str:
        """Three channels, gradient penalty, class-conditional; both executors."""
        return at_most(0.05, self.both(self.dcgan(), self.colour()))

    def colour_with_everything(self) -> str:
        """Adaptive augmentation, anchors, BatchNorm, balanced labels, clipping, unequal numbers of steps."""
        extras = {"augment": Augmentation(target=0.6), "anchor": LeCam(start_step=2), "clip_gradient_norm": 1.0}
        model = self.dcgan(fake_labels="balanced", **extras)
        return at_most(0.2, self.both(model, self.colour(), local_steps=None, local_epochs=1, rounds=1))

    def both(self, model: GAN, data: FederatedDataModule, **options: Any) -> float:
        """Return how far both executors are apart, at the same draws."""
        found = []
        for executor in EXECUTORS.values():
            run = self.federation(model, data, executor=executor(), **{"rounds": 1, **options})
            run.fit()
            found.append(state_of(run))
        return apart(*found)

    def auto(self) -> str:
        """The default executor chooses by itself, and keeps its trials' errors to itself."""
        run = self.federation(self.dcgan(), self.colour(), executor="auto", rounds=2)
        run.fit()
        return str(run.orchestrator.executor.facts())[:60]

    def precisions(self) -> str:
        """Every precision that is allowed, both executors, colour."""
        for precision in ("bf16-mixed", "bf16-true", "64-true"):
            for executor in EXECUTORS.values():
                own = {"executor": executor(), "rounds": 2, "trainer": {"precision": precision}}
                # Adam's first steps are signs, which rounding turns where a gradient is nearly none.
                model = self.dcgan(generator_optimizer=sgd, discriminator_optimizer=sgd)
                run = self.federation(model, self.colour(), **own)
                run.fit()
                assert all(bool(torch.isfinite(value).all()) for value in state_of(run).values()), precision
                seen = float(run.server.model.generator_ema.images_seen)  # type: ignore[union-attr, arg-type]
                assert seen == 2 * 4 * 16, f"{seen} images seen in {precision}"
        return "bf16-mixed, bf16-true, 64-true"

    def moments(self) -> str:
        """Kept, averaged and local moments; fused Adam where there is one."""
        for fused in (False, True):
            optimizers = dict.fromkeys(("generator_optimizer", "discriminator_optimizer"), adam(fused=fused))
            for policy in (
                {},
                {"optimizer_state": "keep", "client_state": "disk"},
                {"sync": {"discriminator": "local"}},
            ):
                self.both(self.mlp(**optimizers), self.grey(), **{"rounds": 2, **policy})
        return "average, keep, local; plain and fused"

    def resumes_to_the_bit(self) -> str:
        """With ``trainer.deterministic``, both executors: 4 rounds are 2 and 2."""
        for name, executor in EXECUTORS.items():
            for policy in ("average", "keep"):

                def start(rounds: int, *, executor: Any = executor, policy: str = policy) -> Federation:
                    own = {"executor": executor(), "rounds": rounds, "optimizer_state": policy}
                    return self.federation(self.dcgan(), self.colour(), **own, trainer={"deterministic": True})

                try:
                    whole, half, again = start(4), start(2), start(4)
                    whole.fit()
                    half.fit()
                    again.fit(ckpt_path=str(Path(half.run_dir) / "checkpoints" / "last.ckpt"))
                finally:
                    torch.use_deterministic_algorithms(False)
                far = apart(state_of(again), state_of(whole))
                assert far == 0, f"{name}, {policy}: {far:.1e} apart"
        return "both executors, average and keep"

    def metrics(self) -> str:
        """All metrics of pictures; the feature network on the device and on the CPU."""
        run = self.federation(self.dcgan(), self.colour(), evaluation=Evaluation(num_samples=500), rounds=1)
        run.fit()
        there = run.test()
        finite(there)
        checkpoint = str(Path(run.run_dir) / "checkpoints" / "last.ckpt")
        again = self.federation(self.dcgan(), self.colour(), on="cpu", evaluation=Evaluation(num_samples=500))
        here = again.test(ckpt_path=checkpoint)
        far = abs(there["fid"] - here["fid"]) / here["fid"]
        assert far < 0.02, f"fid {there['fid']} there, {here['fid']} here"
        return f"{len(there)} values; fid {there['fid']:.4g}, from its checkpoint on the CPU {here['fid']:.4g}"

    def checkpoints(self) -> str:
        """What is saved lies on the CPU and holds all."""
        run = self.federation(self.mlp(), self.grey(), evaluation=Evaluation(metrics=[FrechetDistance()]), rounds=2)
        run.fit()
        saved = read_checkpoint(Path(run.run_dir) / "checkpoints" / "last.ckpt")
        names = saved["server"]["moments"]
        assert len(names) == 3 * len(list(run.server.model.parameters()))
        return f"{len(saved['state_dict'])} entries, {len(names)} moments"

    def edits(self) -> str:
        """Samples and edits from latents and labels on the CPU."""
        model = self.dcgan().to(self.device).eval()
        labels, first, second = torch.arange(3), torch.randn(3, 32), torch.randn(3, 32)
        x = model.sample(3, labels=labels, generator=torch.Generator().manual_seed(0)).cpu()
        found = project(model.generator, x, labels=labels, steps=20, starts=2)
        interpolate(model.generator, first, second, labels=labels)
        edited(model.generator, first, second[0], amounts=torch.tensor([0.0, 1.0]), labels=labels)
        return f"error {float(found.start_error.mean()):.3f} -> {float(found.error.mean()):.3f}"

    def a_fresh_process_draws_the_same(self) -> str:
        """A site's process, which has not used the device yet, draws what this one does."""
        from fedgan_lightning.seeding import isolated_rng

        with isolated_rng(11, device=torch.device(self.device)):
            expected = torch.rand(4, device=self.device).tolist()
        code = FRESH.format(device=self.device)
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
        ).stdout
        assert out.strip().splitlines()[-1] == str(expected), f"{out.strip()} there, {expected} here"
        return str([round(value, 3) for value in expected])

    def steps_do_not_wait(self) -> str:
        """Waits for the device, by torch's own count: no more for more steps."""
        if self.device == "cpu":
            return "needs a device"
        counts = []
        for steps in (4, 12):
            run = self.federation(self.dcgan(fake_labels="balanced"), self.colour(), local_steps=steps, rounds=2)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    run.fit()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchroniz" in str(own.message) for own in seen))
        assert counts[0] == counts[1], f"{counts[0]} in 4 steps, {counts[1]} in 12"
        return f"{counts[0]} in 8 client-rounds of 4 and of 12 steps"

    def speed(self) -> str:
        """Client-steps per second of 64 small clients, for information."""
        found = []
        for name, executor in EXECUTORS.items():
            data = FederatedDataModule(Digits(), num_clients=64, batch_size=16)
            run = self.federation(self.mlp(), data, executor=executor(), rounds=3, local_steps=10)
            run.fit()
            found.append(f"{name} {run.orchestrator.ledger.client_steps_per_second:.0f}")
        return ", ".join(found)


CHECKS = [
    name
    for name, own in vars(Checks).items()
    if isinstance(own, FunctionType) and name not in {"__init__", "federation", "both"}
]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def adam(*, fused: bool) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999), fused=fused)


def state_of(run: Federation) -> dict[str, Tensor]:
    """Return the global module and its averaged moments, on the CPU."""
    return {n: v.cpu() for n, v in {**run.server.model.state_dict(), **run.server.moments}.items()}


def apart(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Return the distance of all entries together, over their length."""
    a, b = (torch.cat([value.double().flatten() for value in own.values()]) for own in (first, second))
    return float((a - b).norm() / b.norm())


def at_most(limit: float, *found: float) -> str:
    """Return the largest distance, which must not exceed the limit."""
    assert max(found) <= limit, f"{max(found):.1e} apart"
    return f"{max(found):.1e} apart"


def finite(values: dict[str, float]) -> None:
    wrong = {name: value for name, value in values.items() if not abs(value) < float("inf")}
    assert not wrong, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=450.0, help="no check begins later")
    parser.add_argument("checks", nargs="*", help="names; default all")
    own = parser.parse_args()
    unknown = sorted(set(own.checks) - set(CHECKS))
    if unknown:
        parser.error(f"no check {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    if own.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu tries the script")
    name = torch.cuda.get_device_name() if own.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    print("| check | | found | s |\n|---|---|---|---|", flush=True)
    started, failures = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(own.device, Path(folder))
        for check in own.checks or CHECKS:
            began = time.monotonic()
            if began - started > own.seconds:
                print(f"| {check} | not begun | no time left | |", flush=True)
                continue
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # Trainers print tables of their own
                    verdict, found = "ok", getattr(checks, check)()
            except Exception as error:
                verdict, found = "FAILED", f"{type(error).__name__}: {error}"
                failures.append(traceback.format_exc())
            shown = re.sub(r"\s+", " ", found).replace("|", "/")[:200]
            print(f"| {check} | {verdict} | {shown} | {time.monotonic() - began:.1f} |", flush=True)
    print(f"\n{time.monotonic() - started:.0f} s in all")
    print("\n".join(failures), file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
