"""Distributed noise between processes: a SuperLink and four SuperNodes, masks, and the sum that the server opens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

flwr = pytest.importorskip("flwr", reason="needs the extra 'flower' (Python 3.11 or later)")

from fedgan_lightning.__main__ import main  # noqa: E402
from fedgan_lightning.checkpoints import read_checkpoint  # noqa: E402
from fedgan_lightning.deployment import launch, programs  # noqa: E402
from fedgan_lightning.dp.accounting import gaussian_delta  # noqa: E402
from tests.deployment.processes import CONFIG  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

SITES, CLIP, Z, DELTA = 4, 0.05, 1.0, 0.1
#: Client-level privacy for four sites, all of which must be in a sum; rounds of one step, so that what follows from
#: the noise of a round is not trained on.
OPTIONS = [
    *("--data.num_clients", str(SITES), "--data.partition", "IID", "--federation.rounds", "1"),
    *("--model.generator.init_args.hidden", "[128, 128]", "--model.discriminator.init_args.hidden", "[128, 128]"),
    *("--federation.aggregator", "WeightedMean", "--federation.aggregator.weighting", "uniform"),
    *("--federation.optimizer_state", "reset", "--federation.privacy.clip", str(CLIP)),
    *("--federation.privacy.delta", str(DELTA), "--evaluation.metrics", "[]", "--pictures.every_n_rounds", "9"),
]
#: One of four may be late, if it went by the rules of rounds and by secure aggregation alone, which needs three.
LENIENT = ["--federation.rules.min_report_fraction", "0.5", "--federation.rules.max_attempts", "1"]
NOISE = [*("--federation.privacy.noise_multiplier", str(Z)), *("--federation.privacy.noise", "distributed")]
DISTRIBUTED = [*NOISE, *LENIENT, "--federation.privacy.survivors", str(SITES), "--federation.secure"]
DISTRIBUTED += ["SecureAggregation"]


@dataclass(frozen=True)
class Ran:
    """Two federations of the same processes.

    Attributes:
        home: Has the run directories ``all`` and ``three``, and the sites' folders.
        codes: What they ended with.
    """

    home: Path
    codes: dict[str, int]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, as_installed) -> Iterator[Ran]:
    """The same sites twice: once all of them train, once one refuses its task, since that has two steps."""
    home = tmp_path_factory.mktemp("noised")
    keys, port, policy = home / "keys", programs.free_port(), home / "policy.yaml"
    policy.write_text("most_local_steps: 1\n")
    assert launch.main(["keys", str(keys), "--sites", str(SITES), "--host", "localhost"]) == 0
    with programs.processes() as started:
        started.append(programs.superlink(home, keys=keys, host="127.0.0.1", port=port))
        programs.await_superlink(port, keys, started[0])
        programs.register(home, keys, port)
        with programs.quick_clientapp(home) as first, programs.processes() as sites:
            for number in range(SITES):
                folder = home / f"site{number}"
                node = {"client-id": number, "state": str(folder)}
                node |= {"policy": str(policy)} if number == 2 else {}
                own = {"ca": keys / "ca.crt", "key": keys / f"site{number}", "node": node}
                command = programs.supernode(superlink=f"localhost:{port}", port=programs.free_port(), **own)
                sites.append(programs.start(command, folder, log="log", first=first))
            codes = {
                name: programs.run_app(
                    home, CONFIG, home / name, [*OPTIONS, *DISTRIBUTED, "--federation.local_steps", steps]
                )
                for name, steps in (("all", "1"), ("three", "2"))
            }
            yield Ran(home, codes)


def simulated(folder: Path, *options: str) -> Path:
    arguments = ["--config", str(CONFIG), *OPTIONS, "--federation.local_steps", "1", *options, "--run_dir", str(folder)]
    assert main(["fit", *arguments, "--trainer.enable_progress_bar", "false"]) == 0
    return folder


def parameters(run: Path) -> torch.Tensor:
    state = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    prefixes = ("model.generator.", "model.discriminator.")
    return torch.cat([own.double().flatten() for name, own in sorted(state.items()) if name.startswith(prefixes)])


def spent(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())["privacy"]["client"]


def told(ran: Ran, number: int) -> list[dict]:
    return [json.loads(line) for line in (ran.home / f"site{number}" / "audit.jsonl").read_text().splitlines()]


def test_the_decoded_sum_has_the_variance_that_was_promised(ran, tmp_path):
    """Against the same round without noise in one process: all that differs is the noise of four sites together.

    Noise of the operating system's entropy, so that no two runs agree: tolerances are five standard errors, of the
    standard deviation of d normal numbers 5 / sqrt(2 d), and of their kurtosis 5 sqrt(24 / d).
    """
    assert ran.codes["all"] == 0
    plain = parameters(simulated(tmp_path / "plain", "--federation.privacy.noise_multiplier", "0"))
    noise = parameters(ran.home / "all") - plain
    total, count = SITES * noise, len(noise)
    assert count > 50_000
    assert float(total.std()) == pytest.approx(Z * CLIP, rel=5 / (2 * count) ** 0.5)
    assert abs(float(total.mean())) < 5 * Z * CLIP / count**0.5
    kurtosis = float(((total - total.mean()) / total.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3.0, abs=5 * (24 / count) ** 0.5)


def test_it_costs_what_central_noise_of_the_same_multiplier_does(ran, tmp_path):
    """A little more: rounding to whole numbers lengthens an update. Both are one Gaussian, whose delta is known."""
    central = spent(simulated(tmp_path / "central", "--federation.privacy.noise_multiplier", str(Z)))
    distributed = spent(ran.home / "all")
    assert (central["noise"], distributed["noise"]) == ("central", "distributed")
    assert central["releases"] == distributed["releases"] == 1
    assert central["epsilon"] <= distributed["epsilon"] * (1 + 1e-9)
    assert distributed["epsilon"] == pytest.approx(central["epsilon"], rel=1e-3)
    assert gaussian_delta(central["epsilon"], noise_multiplier=Z) == pytest.approx(DELTA, rel=1e-2)


def test_a_sum_with_fewer_survivors_than_the_noise_counts_on_is_not_opened(ran):
    """Three of four would be enough for secure aggregation, and for the rules; their noise would be too little."""
    assert ran.codes["three"] != 0
    refused = [own for own in told(ran, 2) if own["outcome"] == "refused"]
    assert len(refused) == 1
    assert "at most the 1 local steps" in refused[0]["reason"]
    runs = {name: run_of(ran, name) for name in ("all", "three")}
    assert runs["all"] != runs["three"]
    for number in (0, 1, 3):
        answered = {name: [own["what"] for own in told(ran, number) if own["run"] == run] for name, run in runs.items()}
        assert answered["all"].count("unmask") == 1, "a positive control"
        assert answered["three"].count("train") == 1, "its masked update had left"
        assert "unmask" not in answered["three"], "nobody is asked for what opens the sum, and nobody tells"
    opened = ran.home / "three" / "opened"
    assert not opened.exists() or not [own for own in opened.iterdir() if own.suffix != ".json"]
    (release,) = json.loads((ran.home / "three" / "privacy.json").read_text())["releases"]
    assert release["count"] == 1, "it is paid for all the same"
    with contextlib.suppress(FileNotFoundError):
        assert json.loads((ran.home / "three" / "summary.json").read_text())["rounds"] == 0


def run_of(ran: Ran, name: str) -> str:
    """Return how sites call a run."""
    steps = {"all": 1, "three": 2}[name]
    (run,) = {own["run"] for own in told(ran, 0) if own["what"] == "train" and own.get("steps") == steps}
    return run
