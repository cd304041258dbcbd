"""Distributed noise between processes: a SuperLink and four SuperNodes, masks, and the sum that the server opens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

flwr = pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main  # noqa: E402
from fedgan_lightning.checkpoints import read_checkpoint  # noqa: E402
from fedgan_lightning.dp.accounting import Release, epsilon_of, gaussian_delta  # noqa: E402
from tests.deployment.processes import CONFIG, between_processes  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(900)]

SITES, CLIP, Z, DELTA = 4, 0.05, 1.0, 0.1
#: Client-level privacy for four sites, in rounds of one step and of two.
SCHEDULE = "{local_steps: {class_path: StepRounds, init_args: {values: {0: 1, 1: 2}}}}"
OPTIONS = [
    *("--data.num_clients", str(SITES), "--data.partition", "IID", "--federation.schedules", SCHEDULE),
    *("--model.generator.init_args.hidden", "[128, 128]", "--model.discriminator.init_args.hidden", "[128, 128]"),
    *("--federation.aggregator", "WeightedMean", "--federation.aggregator.weighting", "uniform"),
    *("--federation.optimizer_state", "reset", "--federation.privacy.clip", str(CLIP)),
    *("--federation.privacy.delta", str(DELTA), "--evaluation.metrics", "[]", "--pictures.every_n_rounds", "9"),
    *("--checkpoint.every_n_rounds", "1"),
]
#: One of four may be late, if it went by the rules of rounds and by secure aggregation alone, which needs three.
LENIENT = ["--federation.rules.min_report_fraction", "0.5", "--federation.rules.max_attempts", "1"]
NOISE = [*("--federation.privacy.noise_multiplier", str(Z)), *("--federation.privacy.noise", "distributed")]
DISTRIBUTED = [*NOISE, *LENIENT, "--federation.privacy.survivors", str(SITES), "--federation.secure"]
DISTRIBUTED += ["SecureAggregation"]


@dataclass(frozen=True)
class Ran:
    """A federation that has come to its end.

    Attributes:
        home: Has the run directory ``run``, and the sites' folders.
        code: What it ended with.
    """

    home: Path
    code: int

    @property
    def run(self) -> Path:
        return self.home / "run"


@pytest.fixture(scope="module")
def ran(tmp_path_factory, as_installed) -> Iterator[Ran]:
    """All four sites train in the first round; in the second one refuses its task, since that has two steps."""
    home = tmp_path_factory.mktemp("noised")
    policy = home / "policy.yaml"
    policy.write_text("most_local_steps: 1\n")
    nodes = [{"policy": str(policy)} if number == 2 else {} for number in range(SITES)]
    with between_processes(home, nodes=nodes, options=[*OPTIONS, *DISTRIBUTED, "--federation.rounds", "2"]) as code:
        yield Ran(home, code)


def simulated(folder: Path, *options: str) -> Path:
    arguments = ["--config", str(CONFIG), *OPTIONS, "--federation.rounds", "1", *options, "--run_dir", str(folder)]
    assert main(["fit", *arguments, "--trainer.enable_progress_bar", "false"]) == 0
    return folder


def parameters(run: Path) -> torch.Tensor:
    state = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    prefixes = ("generator.", "discriminator.")
    return torch.cat([own.double().flatten() for name, own in sorted(state.items()) if name.startswith(prefixes)])


def charged(run: Path) -> Release:
    (release,) = json.loads((run / "privacy.json").read_text())["releases"]
    return Release(**release)


def told(ran: Ran, number: int) -> list[dict]:
    return [json.loads(line) for line in (ran.home / f"site{number}" / "audit.jsonl").read_text().splitlines()]


def test_the_decoded_sum_has_the_variance_that_was_promised(ran, tmp_path):
    """Against the same round without noise in one process: all that differs is the noise of four sites together.

    Noise of the operating system's entropy, so that no two runs agree: tolerances are five standard errors, of the
    standard deviation of d normal numbers 5 / sqrt(2 d), and of their kurtosis 5 sqrt(24 / d).
    """
    plain = parameters(simulated(tmp_path / "plain", "--federation.privacy.noise_multiplier", "0"))
    noise = parameters(ran.run) - plain
    total, count = SITES * noise, len(noise)
    assert count > 50_000
    assert float(total.std()) == pytest.approx(Z * CLIP, rel=5 / (2 * count) ** 0.5)
    assert abs(float(total.mean())) < 5 * Z * CLIP / count**0.5
    kurtosis = float(((total - total.mean()) / total.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3.0, abs=5 * (24 / count) ** 0.5)


def test_it_costs_what_central_noise_of_the_same_multiplier_does(ran, tmp_path):
    """A little more: rounding to whole numbers lengthens an update. Both are one Gaussian, whose delta is known."""
    central = charged(simulated(tmp_path / "central", "--federation.privacy.noise_multiplier", str(Z)))
    distributed = replace(charged(ran.run), count=1)
    assert (central.count, central.sampling) == (1, distributed.sampling)
    costs = [epsilon_of([own], delta=DELTA) for own in (central, distributed)]
    assert costs[0] <= costs[1] * (1 + 1e-9)
    assert costs[1] == pytest.approx(costs[0], rel=1e-3)
    assert gaussian_delta(costs[0], noise_multiplier=Z) == pytest.approx(DELTA, rel=1e-2)


def test_a_sum_with_fewer_survivors_than_the_noise_counts_on_is_not_opened(ran):
    """Three of four would be enough for secure aggregation, and for the rules; their noise would be too little."""
    assert ran.code != 0
    refused = [own for own in told(ran, 2) if own["outcome"] == "refused"]
    assert [own["round"] for own in refused] == [1]
    assert "at most the 1 local steps" in refused[0]["reason"]
    for number in (0, 1, 3):
        sessions = {own["round"]: own["session"] for own in told(ran, number) if own["what"] == "train"}
        assert sorted(sessions) == [0, 1], "masked updates of both rounds had left"
        assert sessions[0] != sessions[1]
        opened = [own["session"] for own in told(ran, number) if own["what"] == "unmask"]
        assert opened == [sessions[0]], "in the second nobody is asked for what opens the sum, and nobody tells"
    assert charged(ran.run).count == 2, "it is paid for all the same"
    assert json.loads((ran.run / "status.json").read_text())["rounds"] == 1
