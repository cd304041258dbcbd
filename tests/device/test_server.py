"""The server on a second device: aggregators, its optimizers, faults, metrics, checkpoints, editing and samples."""

from __future__ import annotations

import copy

import pytest
import torch

from fedgan_lightning import Evaluation, Federation, RoundRules, SequentialExecutor, UpdateValidator
from fedgan_lightning.aggregators import CoordinateMedian, GeometricMedian, Krum, NearestNeighborMixing, TrimmedMean
from fedgan_lightning.callbacks import HeldAbsentGap
from fedgan_lightning.editing import edited, interpolate, project
from fedgan_lightning.evaluation.modalities import default_metrics
from fedgan_lightning.executors import FaultyExecutor
from fedgan_lightning.metrics import (
    ClassBreakdown,
    ClassCoverage,
    ClassifierFeatures,
    ClassifierScore,
    ClientAugmentation,
    ClientDistances,
    FrechetDistance,
    IntraClassDistance,
    KernelDistance,
    MembershipInference,
    Memorisation,
    PrecisionRecall,
    SlicedWasserstein,
    SyntheticTraining,
)
from tests.conftest import ring_data, ring_gan, sgd
from tests.device import second_device
from tests.device.runs import distance, everything, executors, federate, on_both
from tests.device.test_clients import dcgan, few
from tests.unit import test_inpainting, test_recommendation, test_text

pytestmark = [pytest.mark.second_device, pytest.mark.timeout(900)]  # XLA compiles for a while beside busy processes
RULES = RoundRules(min_report_fraction=0.25, stale_updates="discount")


@pytest.mark.parametrize(
    "aggregator",
    [
        CoordinateMedian(),
        TrimmedMean(0.3),
        Krum(num_bad=1),
        GeometricMedian(),
        NearestNeighborMixing(CoordinateMedian(), num_bad=1),
    ],
    ids=lambda aggregator: type(aggregator).__name__,
)
def test_aggregators(device, aggregator):
    on_both(device, ring_gan(optimizer=sgd), ring_data(num_clients=5), aggregator=aggregator, rounds=1, rtol=1e-5)


def fed_adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2, eps=1e-3)


def test_the_server_s_own_optimizer_and_schedule(device):
    server = {"optimizer": fed_adam, "scheduler": lambda own: torch.optim.lr_scheduler.StepLR(own, 1, 0.5)}
    on_both(device, ring_gan(optimizer=sgd), ring_data(num_clients=3), server=server, rtol=1e-4)


@pytest.mark.parametrize(
    "faults", [{"huge_norm": 0.2, "nan": 0.2}, {"sign_flip": 0.5, "noise": 0.5}, {"slow": 0.5}, {"crash": 0.4}]
)
def test_faults(device, faults):
    """A late update lies where it was made, one that a checkpoint held on the CPU: both are added on the device."""
    executor = FaultyExecutor(SequentialExecutor(), **faults)
    options = {"validator": UpdateValidator(max_norm=10.0), "rules": RULES, "executor": executor, "rtol": 1e-5}
    on_both(device, ring_gan(optimizer=sgd), ring_data(num_clients=4), **options)


@executors()
@pytest.mark.parametrize("policy", ["average", "keep"])
def test_a_resumed_run_ends_where_an_undisturbed_one_does(device, executor, policy, tmp_path):
    def start(name: str, rounds: int) -> Federation:
        return Federation(
            ring_gan(ema_half_life_images=100.0),
            ring_data(num_clients=3),
            rounds=rounds,
            local_steps=2,
            executor=FaultyExecutor(copy.deepcopy(executor), slow=0.4),
            rules=RULES,
            optimizer_state=policy,
            client_state="disk",
            run_dir=str(tmp_path / name),
            evaluation=Evaluation(metrics=[]),
            trainer={"enable_progress_bar": False, **second_device.trainer_options()},
        )

    with device():
        whole = start("whole", 3)
        whole.fit()
        start("parts", 2).fit()
        again = start("parts", 3)
        again.fit(ckpt_path=str(tmp_path / "parts" / "checkpoints" / "last.ckpt"))
    expected, found = (everything(own.server, own.orchestrator) for own in (whole, again))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def measured(device, tmp_path, model, data, metrics, *, rtol: float) -> None:
    """Assert that ``fit`` and ``test`` measure on the device what they do on the CPU."""
    values = []
    for on in ("cpu", "device"):
        options = second_device.trainer_options() if on == "device" else {"accelerator": "cpu"}
        federation = Federation(
            copy.deepcopy(model),
            data,
            rounds=1,
            local_steps=2,
            executor=SequentialExecutor(),
            run_dir=str(tmp_path / on),
            evaluation=Evaluation(metrics=copy.deepcopy(metrics), num_samples=64, every_n_rounds=1),
            trainer={"enable_progress_bar": False, **options},
        )
        if on == "cpu":
            values.append((federation.fit(), federation.test()))
            continue
        with device():
            values.append((federation.fit(), federation.test()))
    for cpu, there in zip(*values):
        assert cpu.keys() == there.keys()
        assert len(cpu) > 2
        far = {
            n: (v, there[n]) for n, v in cpu.items() if "seconds" not in n and there[n] != pytest.approx(v, rel=rtol)
        }
        assert not far, far


def test_metrics_of_pictures(device, tmp_path):
    net = ClassifierFeatures(epochs=1)
    metrics = [
        FrechetDistance(net),
        ClientDistances(net),
        KernelDistance(net),
        PrecisionRecall(net),
        ClassifierScore(net),
        IntraClassDistance(net),
        ClassCoverage(net),
        ClassBreakdown(net),
        SlicedWasserstein(),
        SyntheticTraining(epochs=1),
        ClientAugmentation(steps=10, repeats=1),
        Memorisation(),
        MembershipInference(),
    ]
    measured(device, tmp_path, dcgan(norm="batch", ema_half_life_images=50.0), few(), metrics, rtol=0.02)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (ring_gan(optimizer=sgd), ring_data(num_clients=3)),
        lambda: (test_text.text_gan(), test_text.module()),
        lambda: (test_recommendation.gan(), test_recommendation.module()),
        lambda: (test_inpainting.digits_gan(), few(partition=None)),
    ],
    ids=["points", "text", "purchases", "inpainting"],
)
def test_metrics_of_other_data(device, tmp_path, make):
    model, data = make()
    data.setup()
    measured(device, tmp_path, model, data, default_metrics(data, condition=model.condition), rtol=0.02)


def test_the_gap_between_held_and_absent_classes(device):
    gaps = []
    for on in ("cpu", "device"):
        gap = HeldAbsentGap(every_n_rounds=1)
        with device():
            federate(dcgan(), few(), on=on, callbacks=[gap], rounds=1)
        gaps.append(gap.latest)
    assert gaps[0] is not None
    assert gaps[1] == pytest.approx(gaps[0], rel=1e-4)


def test_samples_and_edits_take_what_lies_on_the_cpu(device):
    model = dcgan(ema_half_life_images=50.0).eval()
    x, labels = torch.rand(3, 1, 8, 8) * 2 - 1, torch.tensor([1, 2, 3])
    first, second = torch.randn(2, 3, 4)

    def made() -> list[torch.Tensor]:
        noise = torch.Generator().manual_seed(1)
        options = {"labels": labels, "steps": 3}
        return [
            model.sample(3, labels=labels, generator=noise),
            model.sample(3, labels=labels, latents=first),
            project(model.generator, x, noise=noise, starts=2, known=x > 0, **options).samples,
            interpolate(model.generator, first, second, **options),
            edited(model.generator, first, second[0], amounts=torch.tensor([0.0, 1.0]), labels=labels),
        ]

    expected = made()
    with device():
        model.to("xla")
        found = made()
    assert all(value.device.type == "xla" for value in found)
    assert max(distance(value.cpu(), expected[index]) for index, value in enumerate(found)) < 1e-4
