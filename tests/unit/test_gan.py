"""The client GAN as an ordinary LightningModule."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from fedgan_lightning import GAN
from fedgan_lightning.errors import ConfigurationError, DataError
from fedgan_lightning.gan import networks as nets
from fedgan_lightning.gan.priors import MidpointNodes, Normal, Uniform
from fedgan_lightning.losses import R1, Augmentation, GradientPenalty, RelativisticPairing
from fedgan_lightning.protocol import RoundInfo
from tests.conftest import adam, assert_states_equal, digits_data, quiet_trainer, ring_data, ring_gan, sgd


def fit(model: GAN, *, num_steps: int = 6, data=None):
    data = data or ring_data()
    trainer = quiet_trainer(max_epochs=1)
    torch.manual_seed(1)
    trainer.fit(model, datamodule=data.pooled(num_steps=num_steps))
    return trainer


def test_trains_alone_under_a_plain_trainer_and_logs():
    model = ring_gan()
    before = copy.deepcopy(model.state_dict())
    trainer = fit(model)
    assert trainer.global_step == 12, "two optimizer steps per local step"
    assert model.local_step == 6
    assert {"loss_d", "loss_g", "d_real", "d_fake", "penalty"} <= set(trainer.callback_metrics)
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_simultaneous_updates_step_from_the_old_point():
    """With SGD both gradients are taken at the old parameters; alternating takes the generator's at the new ones."""
    results = {}
    for updates in ("alternating", "simultaneous"):
        model = ring_gan(optimizer=sgd, updates=updates, prior=MidpointNodes(16), penalties=[])
        fit(model, num_steps=1)
        results[updates] = model.state_dict()
    for name in results["simultaneous"]:
        same = torch.equal(results["simultaneous"][name], results["alternating"][name])
        assert same == name.startswith("discriminator"), name

    model = ring_gan(optimizer=sgd, updates="simultaneous", prior=MidpointNodes(16), penalties=[])
    x, y = next(iter(ring_data().pooled(num_steps=1).train_dataloader()))
    z = model.prior.sample(16, 4, device=x.device, dtype=x.dtype)
    loss = model.loss.generator(model.discriminator(model.generator(z, y), y))
    gradients = torch.autograd.grad(loss, list(model.generator.parameters()))
    for parameter, gradient, name in zip(
        model.generator.parameters(), gradients, [n for n, _ in model.generator.named_parameters()]
    ):
        expected = parameter - 0.05 * gradient
        torch.testing.assert_close(results["simultaneous"][f"generator.{name}"], expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("d_steps, g_steps", [(2, 1), (1, 3), (4, 2)])
def test_step_counts_per_local_step(d_steps, g_steps):
    model = ring_gan(d_steps=d_steps, g_steps=g_steps)
    trainer = fit(model, num_steps=5)
    assert trainer.global_step == 5 * (d_steps + g_steps)


def test_a_minibatch_that_cannot_be_split_is_refused():
    with pytest.raises(DataError, match="divisible into d_steps=3 equal parts; got 16 samples"):
        fit(ring_gan(d_steps=3))


def test_schedules_step_once_per_local_step():
    schedule = lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=10)  # noqa: E731
    model = ring_gan(optimizer=adam, generator_scheduler=schedule)
    trainer = fit(model, num_steps=10)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    assert rates == pytest.approx([0.5e-3, 1e-3])


def test_lazy_penalties_count_local_steps_across_rounds():
    model = ring_gan(penalties=[R1(1.0, interval=4)])
    model.on_client_round_start(RoundInfo(round=1, cohort=(0,), first_step=6, num_steps=2))
    assert [model.penalties[0].is_due(model.local_step + step) for step in range(4)] == [False, False, True, False]


def test_clipping_bounds_the_gradient_that_is_applied():
    free, clipped = (ring_gan(optimizer=sgd, clip_gradient_norm=bound, penalties=[]) for bound in (None, 1e-3))
    start = copy.deepcopy(clipped.state_dict())
    fit(free, num_steps=1)
    fit(clipped, num_steps=1)
    moved = torch.cat([(clipped.state_dict()[n] - start[n]).flatten() for n in start if n.startswith("disc")])
    assert float(moved.norm()) == pytest.approx(0.05 * 1e-3, rel=1e-3)
    moved = torch.cat([(free.state_dict()[n] - start[n]).flatten() for n in start if n.startswith("disc")])
    assert float(moved.norm()) > 0.05 * 1e-2


def test_wgan_gp_relativistic_and_uniform_prior_train():
    for options in (
        {"penalties": [GradientPenalty(1.0)]},
        {"loss": RelativisticPairing()},
        {"prior": Uniform()},
    ):
        model = ring_gan(**options)
        fit(model)
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())


class TestMovingAverage:
    def test_half_life_is_counted_in_images(self):
        model = ring_gan(ema_half_life_images=100.0, ema_rampup=None)
        for average in model.generator_ema.parameters():
            average.data.zero_()
        for value in model.generator.parameters():
            value.data.fill_(1.0)
        for _ in range(4):
            model.update_ema(num_images=25)
        for average in model.generator_ema.parameters():
            torch.testing.assert_close(average, torch.full_like(average, 0.5))

    def test_does_not_depend_on_how_images_are_divided(self):
        averages = []
        for parts in (1, 5):
            model = ring_gan(ema_half_life_images=64.0, ema_rampup=None)
            for value in model.generator.parameters():
                value.data.add_(1.0)
            for _ in range(parts):
                model.update_ema(num_images=80 / parts)
            averages.append(torch.cat([value.flatten() for value in model.generator_ema.parameters()]))
        torch.testing.assert_close(*averages)

    def test_the_half_life_grows_with_the_images_seen(self):
        model = ring_gan(ema_half_life_images=100.0, ema_rampup=0.5)
        for average, value in zip(model.generator_ema.parameters(), model.generator.parameters()):
            average.data.zero_()
            value.data.fill_(1.0)
        left = 1.0
        for seen in (40, 80, 120, 160, 200, 240):
            model.update_ema(num_images=40)
            left *= 0.5 ** (40 / min(100.0, 0.5 * seen))
            for average in model.generator_ema.parameters():
                torch.testing.assert_close(average, torch.full_like(average, 1 - left))
        model.update_ema(num_images=0)
        assert all(torch.isfinite(average).all() for average in model.generator_ema.parameters())
        assert float(model.state_dict()["generator_ema.images_seen"]) == 240, "a resumed run goes on from there"

    def test_is_used_for_sampling_and_is_not_trained(self):
        model = ring_gan(ema_half_life_images=1e9, ema_rampup=None)
        fit(model)
        z = torch.randn(5, 4)
        assert not torch.allclose(model.sample(5, latents=z), model.sample(5, latents=z, raw=True))
        assert all(not parameter.requires_grad for parameter in model.generator_ema.parameters())


def test_sampling_is_repeatable_and_leaves_the_mode_and_the_global_generator_alone():
    model = ring_gan()
    model.generator.train()
    state = torch.random.get_rng_state()
    draws = [model.sample(1200, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].shape == (1200, 2)
    assert model.generator.training
    assert torch.equal(state, torch.random.get_rng_state())


def test_fake_labels_are_held_or_all():
    generator = nets.MLPGenerator(4, (2,), num_classes=8, hidden=(8,))
    discriminator = nets.MLPDiscriminator((2,), num_classes=8, conditioning="projection", hidden=(8,))
    y = torch.full((400,), 3)
    held = GAN(generator, discriminator).draw(y, dtype=torch.float32).y
    everything = GAN(generator, discriminator, fake_labels="all").draw(y, dtype=torch.float32).y
    assert set(held.tolist()) == {3}
    assert set(everything.tolist()) == set(range(8))


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: GAN(nets.MLPGenerator(4, (2,), num_classes=2), nets.MLPDiscriminator((2,))), "got 2 and 0"),
        (lambda: GAN(nets.MLPGenerator(4, (3,)), nets.MLPDiscriminator((2,))), r"got \[3\] and \[2\]"),
        (lambda: ring_gan(updates="simultaneous", d_steps=2), "d_steps=2, g_steps=1"),
        (lambda: ring_gan(d_steps=0), "d_steps .* at least 1; got 0"),
        (lambda: ring_gan(ema_half_life_images=0), "got 0"),
        (lambda: ring_gan(ema_half_life_images=10, ema_rampup=0), "ema_rampup .* above 0 or None; got 0"),
    ],
)
def test_contradictions_are_refused_in_the_constructor(build, words):
    with pytest.raises(ConfigurationError, match=words):
        build()


def test_networks_and_data_that_do_not_fit_are_refused_before_training():
    with pytest.raises(ConfigurationError, match=r"got \[2\] from the generator, \[1, 8, 8\] in the data"):
        ring_gan().check_data((1, 8, 8), 10)
    conditional = GAN(
        nets.MLPGenerator(4, (2,), num_classes=2),
        nets.MLPDiscriminator((2,), num_classes=2, conditioning="projection"),
    )
    with pytest.raises(ConfigurationError, match="got num_classes=2, data with 8"):
        conditional.check_data((2,), 8)


def test_bf16_runs_and_keeps_float32_weights():
    model = ring_gan()
    quiet_trainer(max_epochs=1, precision="bf16-mixed").fit(model, datamodule=ring_data().pooled(num_steps=3))
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in model.state_dict().values())


def test_resume_under_a_plain_trainer_is_exact(tmp_path):
    data = ring_data()
    whole = ring_gan()
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(whole, datamodule=data.pooled(num_steps=4))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = ring_gan(seed=9)
    quiet_trainer(max_epochs=1).fit(again, datamodule=data.pooled(num_steps=4), ckpt_path=tmp_path / "a.ckpt")
    assert again.local_step == 4
    assert all(torch.equal(again.state_dict()[name], value) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("prior", [Normal(), Uniform(), MidpointNodes(32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count, dim", [(32, 4), (32, 5), (7, 3), (1, 1), (16, 1)])
def test_latents_drawn_ahead_are_those_drawn_one_by_one(prior, dtype, count, dim):
    where = {"device": torch.device("cpu"), "dtype": dtype}
    one, ahead = (torch.Generator().manual_seed(3) for _ in range(2))
    singly = [prior.draw(count, dim, generator=one, **where) for _ in range(5)]
    together = prior.draw_ahead(5, count, dim, generator=ahead, **where)
    assert torch.equal(torch.stack(singly), together)
    assert torch.equal(one.get_state(), ahead.get_state())


def test_fewer_labels_than_samples_are_refused():
    with pytest.raises(ConfigurationError, match="every sample must have a label; got 2 for 5 samples"):
        ring_gan().sample(5, labels=torch.tensor([1, 2]))


@pytest.mark.parametrize(
    "loss, prior",
    [(None, None), (RelativisticPairing(), None), (None, MidpointNodes(5))],
    ids=["non-saturating", "pairing", "five generated samples"],
)
def test_one_pass_over_real_and_generated_samples_is_two(loss, prior):
    """A discriminator that says that its samples do not see each other is called once a step, and learns the same."""
    found, calls = {}, {}
    for says in (True, False):
        model = ring_gan(loss=loss, prior=prior, optimizer=sgd, penalties=[])
        model.discriminator.per_sample = says
        seen = calls.setdefault(says, [])
        model.discriminator.register_forward_hook(lambda own, args, out, seen=seen: seen.append(len(out)))
        fit(model.double(), num_steps=3, data=ring_data())
        found[says] = model.state_dict()
    in_generator_step = 2 if loss is not None else 1  # a loss that pairs looks at real samples there, too
    fakes = 16 if prior is None else 5
    assert calls[False] == 3 * [16, fakes, fakes, *[16] * (in_generator_step - 1)]
    assert calls[True] == 3 * [16 + fakes, fakes, *[16] * (in_generator_step - 1)]
    for name, value in found[True].items():
        torch.testing.assert_close(value, found[False][name], rtol=1e-10, atol=1e-12)


def test_a_frozen_parameter_stays_where_it_is():
    """Its last gradient must not act on."""
    model = ring_gan(optimizer=adam)
    fit(model, num_steps=2)
    frozen, steps = model.discriminator.features[1].weight, []

    class Freeze(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            frozen.requires_grad_(False)
            steps.append(frozen.detach().clone())

    trainer = quiet_trainer(Freeze(), max_epochs=1)
    trainer.fit(model, datamodule=ring_data().pooled(num_steps=4))
    assert len(steps) == 4
    assert all(torch.equal(own, steps[0]) for own in steps)


def test_an_augmentation_of_another_kind_keeps_passes_apart():
    class Mixing(Augmentation):
        def transform(self, x, u, probability=None):
            return (x + x.flip(0)) / 2

    for kind, calls_a_step in ((Augmentation, 2), (Mixing, 3)):
        generator, discriminator = nets.MLPGenerator(4, (1, 8, 8), hidden=(8,)), nets.MLPDiscriminator((1, 8, 8))
        seen = []
        discriminator.register_forward_hook(lambda own, args, out, seen=seen: seen.append(len(out)))
        fit(GAN(generator, discriminator, augment=kind()), num_steps=2, data=digits_data())
        assert len(seen) == 2 * calls_a_step


@pytest.mark.parametrize("updates", ["alternating", "simultaneous"])
def test_a_loss_scaler_leaves_alternating_steps_alone_and_is_refused_for_simultaneous_ones(updates):
    """Its scale doubles after every step here: gradients of a second one, scaled before, would count half."""

    def trained(plugin):
        gan = ring_gan(optimizer=sgd, updates=updates, penalties=[])
        torch.manual_seed(1)
        trainer = quiet_trainer(max_epochs=1, plugins=[plugin] if plugin is not None else [])
        trainer.fit(gan, datamodule=ring_data().pooled(num_steps=4))
        return gan.state_dict()

    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    if updates == "simultaneous":
        with pytest.raises(ConfigurationError, match="got updates='simultaneous' with precision=16-mixed. "):
            trained(plugin)
    else:
        assert_states_equal(trained(plugin), trained(None), atol=1e-2)
        assert scaler.get_scale() == 2.0**8, "twice as large after each of eight steps"
