"""Clients on a second device: both executors, moments, penalties, layers, precisions, data of all kinds."""

from __future__ import annotations

import pytest
import torch

from fedgan_lightning import FederatedDataModule, SequentialExecutor
from fedgan_lightning.gan import networks
from fedgan_lightning.gan.module import GAN
from fedgan_lightning.losses import R1, R2, Augmentation, GradientPenalty, Hinge, LeCam, RelativisticPairing
from tests.conftest import adam, digits_data, ring_data, ring_gan, sgd
from tests.device.runs import EXECUTORS, executors, federate, on_both
from tests.unit import test_inpainting, test_recommendation, test_text

pytestmark = [pytest.mark.second_device, pytest.mark.timeout(900)]  # XLA compiles for a while beside busy processes
#: Biases before a normalisation have no gradient but noise, which Adam would make as large as any other.
SGD = {"generator_optimizer": sgd, "discriminator_optimizer": sgd}


def few(**options) -> FederatedDataModule:
    """Three clients with unequal numbers of digits."""
    return digits_data(num_clients=3, batch_size=8, max_samples=120, **options)


def dcgan(*, norm: str = "group", channels: int = 1, conditioning: str = "projection", **options) -> GAN:
    torch.manual_seed(0)
    sizes = {"width": 4, "num_classes": 10}
    generator_norm = "group" if norm == "spectral" else norm
    return GAN(
        networks.DCGANGenerator(8, channels, latent_dim=4, norm=generator_norm, **sizes),
        networks.DCGANDiscriminator(8, channels, norm=norm, conditioning=conditioning, **sizes),
        **{**SGD, **options},
    )


@pytest.mark.parametrize(
    "executor, policy",
    [
        ("one by one", {"optimizer_state": "average"}),
        ("stacked", {"optimizer_state": "average"}),
        ("one by one", {"optimizer_state": "keep", "client_state": "disk"}),
        ("stacked", {"optimizer_state": "keep", "client_state": "disk"}),
        ("one by one", {"optimizer_state": "reset"}),
        ("stacked", {"optimizer_state": "keep", "sync": {"discriminator": "local"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_moments(device, executor, policy):
    on_both(device, ring_gan(optimizer=adam), ring_data(num_clients=3), executor=EXECUTORS[executor], **policy)


@executors()
@pytest.mark.parametrize(
    "options",
    [
        {"penalties": [R1(0.1, interval=2), R2(0.1, interval=3)], "clip_gradient_norm": 1.0},
        {"penalties": [GradientPenalty(0.1, interval=2)]},
        {"anchor": LeCam(start_step=2), "ema_half_life_images": 50.0},
        {"loss": Hinge(), "d_steps": 2, "g_steps": 2},
        {"loss": RelativisticPairing(), "updates": "simultaneous"},
    ],
    ids=["R1 R2 clipped", "gradient penalty", "LeCam and average", "hinge two steps", "simultaneous"],
)
def test_penalties_losses_and_schedules(device, executor, options):
    """Clients of unequal sizes: they are due at different steps."""
    model = ring_gan(optimizer=sgd, generator_scheduler=halve, **options)
    data = ring_data(num_clients=3, num_samples=256)
    on_both(device, model, data, executor=executor, local_steps=None, local_epochs=1, rtol=1e-5)


def halve(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)


@executors()
@pytest.mark.parametrize(
    "options",
    [
        {"norm": "spectral", "fake_labels": "balanced"},
        {"conditioning": "auxiliary", "fake_labels": "all", "augment": Augmentation(target=0.6, images_to_full=100)},
        {"penalties": [R1(0.1)], "augment": Augmentation(("translation",))},
    ],
    ids=["spectral balanced", "auxiliary adaptive", "R1 translated"],
)
def test_pictures(device, executor, options):
    on_both(device, dcgan(**options), few(), executor=executor, rtol=1e-5)


@pytest.mark.parametrize(
    "buffers, options",
    [("merge", {"ema_half_life_images": 50.0}), ("local", {}), ("estimate", {"ema_half_life_images": 50.0})],
)
@pytest.mark.filterwarnings("ignore:buffers are local")
def test_batch_normalisation(device, buffers, options):
    """One by one only: XLA, unlike CUDA, does not write running statistics of layers that are mapped over clients."""
    on_both(device, dcgan(norm="batch", **options), few(), buffers=buffers, rtol=5e-4)


OTHERS = {
    "text": lambda: (test_text.text_gan(), test_text.module()),
    "purchases": lambda: (test_recommendation.gan(**SGD), test_recommendation.module()),
    "inpainting": lambda: (test_inpainting.digits_gan(**SGD), few(partition=None)),
}


@pytest.mark.parametrize(
    "executor, data",
    [
        ("one by one", "text"),
        ("stacked", "text"),
        ("one by one", "purchases"),
        ("stacked", "purchases"),
        ("one by one", "inpainting"),  # stacked it takes a minute
    ],
)
def test_other_data(device, executor, data):
    on_both(device, *OTHERS[data](), executor=EXECUTORS[executor], rtol=1e-3)


@pytest.mark.parametrize(
    "executor, precision, rtol",
    [
        ("stacked", "64-true", 1e-9),
        ("one by one", "bf16-mixed", 0.2),
        ("stacked", "bf16-mixed", 0.2),
        ("one by one", "bf16-true", 0.5),
    ],
)
def test_precisions(device, executor, precision, rtol):
    """Biases are a few steps long, and every one of these is rounded to three digits where a type is narrow."""
    model = dcgan(ema_half_life_images=50.0, penalties=[R1(0.1)], augment=Augmentation(target=0.6))
    on_both(device, model, few(), executor=EXECUTORS[executor], precision=precision, rtol=rtol)


class DrawsOnTheDevice(GAN):
    """A module by somebody who draws from the device's global generator."""

    def draw(self, y, **options):
        drawn = super().draw(y, **options)
        return type(drawn)(z=torch.randn(len(y), self.latent_dim, device=self.device), y=y)


def test_global_draws_on_the_device_follow_the_client_s_seed(device):
    """The device's own generator is seeded, whatever was drawn on it before."""
    model = ring_gan(optimizer=sgd)
    model.__class__ = DrawsOnTheDevice
    on_both(device, model, ring_data(num_clients=3), rtol=1e-5)
    ends = []
    for before in (0, 5):
        with device():
            torch.randn(before + 1, device="xla")
            ends.append(federate(model, ring_data(num_clients=3), on="device")[0].model.state_dict())
    assert all(torch.equal(value.cpu(), ends[1][name].cpu()) for name, value in ends[0].items())


def test_training_waits_for_the_device_a_few_times_per_client_and_never_per_step(device):
    from tests.device.second_device import SecondDevice

    counts = []
    for steps in (3, 6):
        model = dcgan(fake_labels="balanced", penalties=[R1(0.1)], ema_half_life_images=50.0)
        with device() as rules:
            federate(model, few(), on="device", local_steps=steps, executor=SequentialExecutor(), rounds=2)
            assert SecondDevice.setups == 2, "once for the server's Trainer, once for the clients'"
        counts.append(rules.waits)
    assert counts[0] == counts[1], "no more for more steps"
    lengths = sum(count for (_, place), count in counts[0].items() if "utilities/data.py" in place)
    assert lengths == 4, "Lightning asks for the lengths of the server's loop only"
    ours = {place: count for place, count in counts[0].items() if ".py:" in place[1] and "/utilities/" not in place[1]}
    assert sum(ours.values()) <= 6 * 6, "\n".join(map(str, ours.items()))  # 2 rounds of 3 clients
