"""Inpainting: holes, networks, metrics beside fills, pictures, and the completion of a user's folder."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedgan_lightning import GAN, Evaluation, SequentialExecutor, ServerModule, VectorizedExecutor
from fedgan_lightning.callbacks import CompletionPictures
from fedgan_lightning.errors import ConfigurationError, DataError
from fedgan_lightning.evaluation import inpainting_baselines
from fedgan_lightning.evaluation.completion import pictures_with_holes, similarity
from fedgan_lightning.gan.inpainting_mask import masked
from fedgan_lightning.losses import Hinge
from fedgan_lightning.metrics import Completion, FrechetDistance, PixelFeatures
from fedgan_lightning.networks import InpaintingGenerator, InpaintingMask, PatchDiscriminator
from fedgan_lightning.visuals.completion import before_after, read_folder
from tests.conftest import adam, digits_data, federate, quiet_trainer, ring_data, ring_gan, sgd
from tests.contracts.test_executors import assert_same, updates

CPU = torch.device("cpu")


def uniform(holes: InpaintingMask, count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, holes.num_random, generator=torch.Generator().manual_seed(seed))


def digits_gan(seed: int = 0, *, holes: InpaintingMask | None = None, **options) -> GAN:
    torch.manual_seed(seed)
    networks = InpaintingGenerator(8, 1, latent_dim=2, width=4), PatchDiscriminator(8, 1, width=4)
    settings = {"generator_optimizer": adam, "discriminator_optimizer": adam, "loss": Hinge(), **options}
    return GAN(*networks, condition=holes if holes is not None else InpaintingMask(), **settings)


def few_digits(**options):
    return digits_data(num_clients=2, partition=None, **options)


def fast(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


class TestHoles:
    @settings(max_examples=25, deadline=None)
    @given(
        low=st.floats(0.05, 0.5),
        extent=st.floats(0, 0.3),
        boxes=st.sampled_from([0.0, 0.5, 1.0]),
        strokes=st.integers(1, 3),
        vertices=st.integers(1, 4),
        size=st.sampled_from([(8, 8), (28, 28), (12, 20)]),
    )
    @example(low=0.5, extent=0.25, boxes=1.0, strokes=2, vertices=1, size=(28, 28))  # was wider than the picture
    @example(low=0.5, extent=0.3, boxes=1.0, strokes=1, vertices=1, size=(8, 8))
    def test_holes_are_binary_and_as_large_as_asked(self, low, extent, boxes, strokes, vertices, size):
        holes = InpaintingMask(area=(low, low + extent), boxes=boxes, strokes=strokes, vertices=vertices)
        u = uniform(holes, 16)
        mask = holes.masks(u, size=size)
        assert mask.shape == (16, 1, *size)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        wanted = low + extent * u[:, 0]
        rounding = 0.5 / size[0] + 1 / size[1]  # of a box: half a row, or half a column
        ties = 4 / (size[0] * size[1]) if boxes < 1 else 0
        assert (mask.mean((1, 2, 3)) - wanted).abs().max() <= rounding + ties

    def test_a_box_is_one_rectangle_and_strokes_are_none(self):
        boxes, strokes = (InpaintingMask(boxes=share) for share in (1.0, 0.0))
        for holes, rectangular in ((boxes, 1.0), (strokes, 0.0)):
            mask = holes.masks(uniform(holes, 60), size=(28, 28))[:, 0]
            spanned = mask.amax(1).sum(1) * mask.amax(2).sum(1)
            assert float((spanned == mask.sum((1, 2))).float().mean()) == pytest.approx(rectangular, abs=0.05)
        mixed = InpaintingMask(boxes=0.3)
        u = uniform(mixed, 2000)
        mask = mixed.masks(u, size=(16, 16))[:, 0]
        box = mask.amax(1).sum(1) * mask.amax(2).sum(1) == mask.sum((1, 2))
        assert bool(box[u[:, 1] < 0.3].all())
        assert float(box.float().mean()) == pytest.approx(0.3, abs=0.06)

    def test_boxes_reach_every_pixel(self):
        holes = InpaintingMask(boxes=1.0, area=(0.1, 0.1))
        share = holes.masks(uniform(holes, 4000), size=(8, 8)).mean(0)[0]
        assert float(share.min()) > 0.01
        torch.testing.assert_close(share, share.flip(0, 1), atol=0.05, rtol=0)

    def test_one_straight_stroke_covers_the_pixels_nearest_to_it(self):
        holes = InpaintingMask(boxes=0, strokes=1, vertices=1, area=(0.2, 0.2))
        u = torch.tensor([[0, 0.9, 0, 0, 0, 0.5, 0.3, 0.0, 0.0, 1.0]])  # from (1/2, .3) to the right, length .4
        mask = holes.masks(u, size=(20, 20))[0, 0]
        y, x = torch.meshgrid(torch.arange(20) + 0.5, torch.arange(20) + 0.5, indexing="ij")
        apart = (x - x.clamp(6, 14)).square() + (y - 10).square()
        inside, outside = apart[mask == 1], apart[mask == 0]
        assert inside.max() < outside.min() + 1e-4
        assert int(mask.sum()) == pytest.approx(80, abs=3)

    def test_numbers_of_strokes_and_vertices_change_the_hole(self):
        perimeters = []
        for strokes, vertices in ((1, 1), (1, 8), (4, 1)):
            holes = InpaintingMask(boxes=0, strokes=strokes, vertices=vertices, area=(0.2, 0.2))
            mask = holes.masks(uniform(holes, 200), size=(28, 28))
            perimeters.append(float(mask.diff(dim=2).abs().sum() + mask.diff(dim=3).abs().sum()))
        assert min(perimeters[1:]) > 1.2 * perimeters[0]

    def test_holes_of_stacked_clients_are_those_of_each(self):
        holes = InpaintingMask()
        x, u = torch.rand(3, 5, 2, 8, 8), uniform(holes, 15).view(3, 5, -1)
        stacked = torch.vmap(holes.make)(x, torch.zeros(3, 5), u)
        torch.testing.assert_close(stacked, torch.stack([holes.make(*own) for own in zip(x, torch.zeros(3, 5), u)]))

    def test_the_condition_hides_the_hole_and_nothing_else(self):
        holes = InpaintingMask()
        x = torch.rand(6, 3, 8, 8) + 1
        condition = holes.make(x, torch.zeros(6), uniform(holes, 6))
        mask = condition[:, 3:]
        torch.testing.assert_close(condition[:, :3], x * (1 - mask))

    def test_the_term_is_the_weighted_mean_difference_in_the_hole(self):
        holes, x = InpaintingMask(weight=3.0), torch.zeros(2, 2, 4, 4)
        mask = torch.zeros(2, 1, 4, 4)
        mask[0, 0, :2] = 1
        fake = torch.full_like(x, 0.5)
        fake[0, 1] = -1.0
        fake.requires_grad_()
        (term,) = holes.extra_losses(fake, x, masked(x, mask)).values()
        assert term.item() == pytest.approx(3 * (0.5 + 1) / 2)
        (gradient,) = torch.autograd.grad(term, [fake])
        assert torch.equal((gradient != 0).float(), mask.expand(-1, 2, -1, -1))
        assert InpaintingMask(weight=0).extra_losses(fake, x, masked(x, mask)) == {}

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"area": (0.5, 0.2)}, r"range within \(0, 1\); got \[0.5, 0.2\]"),
            ({"area": (0.0, 0.2)}, r"each a finite number in \(0, 1\); got \(0.0, 0.2\)"),
            ({"boxes": 1.5}, r"boxes .* in \[0, 1\]; got 1.5"),
            ({"strokes": 0}, "strokes .* at least 1; got 0"),
            ({"weight": -1.0}, "weight .* at least 0; got -1"),
        ],
    )
    def test_settings_out_of_range_are_refused(self, options, words):
        with pytest.raises(ConfigurationError, match=words):
            InpaintingMask(**options)


class TestNetworks:
    @pytest.mark.parametrize(
        ("side", "channels", "halvings", "cell"), [(8, 1, 2, 1), (12, 3, 1, 1), (16, 1, 3, 1), (12, 2, 1, 2)]
    )
    def test_shapes_and_gradients_of_every_parameter(self, side, channels, halvings, cell):
        torch.manual_seed(0)
        generator = InpaintingGenerator(side, channels, latent_dim=2, width=4, halvings=halvings, cell=cell)
        discriminator = PatchDiscriminator(side, channels, width=4, halvings=halvings)
        holes, x = InpaintingMask(weight=0), torch.rand(4, channels, side, side) * 2 - 1
        condition = holes.make(x, torch.zeros(4), uniform(holes, 4))
        made = generator(torch.randn(4, 2), condition)
        assert made.shape == x.shape
        assert tuple(made.shape[1:]) == generator.sample_shape == discriminator.sample_shape
        logits = discriminator(made, condition)
        assert logits.shape == (4, 1, side // 2**halvings, side // 2**halvings)
        Hinge().generator(logits).backward()
        for network in (generator, discriminator):
            for name, parameter in network.named_parameters():
                last_bias = network is discriminator and name == "trunk.6.bias"
                assert parameter.grad is not None, name
                assert parameter.grad.abs().sum() > 0 or last_bias, name

    def test_known_pixels_stay_and_noise_and_mask_matter(self):
        torch.manual_seed(0)
        generator, holes = InpaintingGenerator(8, 1, latent_dim=2, width=4).eval(), InpaintingMask()
        discriminator = PatchDiscriminator(8, 1, width=4).eval()
        x = torch.rand(4, 1, 8, 8) * 2 - 1
        condition = holes.make(x, torch.zeros(4), uniform(holes, 4))
        mask = condition[:, 1:]
        first, second = (generator(torch.randn(4, 2), condition) for _ in range(2))
        assert torch.equal(first * (1 - mask), condition[:, :1])
        assert not torch.equal(first, second)
        other = masked(first, 1 - mask)
        assert not torch.equal(discriminator(first, condition), discriminator(first, other))

    def test_evaluation_stays_in_the_range_of_pixels_and_training_has_gradients_beyond(self):
        torch.manual_seed(0)
        generator = InpaintingGenerator(8, 1, latent_dim=2, width=4)
        with torch.no_grad():
            generator.leave.bias.fill_(5.0)
        condition = masked(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))
        made = generator(torch.zeros(1, 2), condition)
        assert made.min().item() > 1
        made.sum().backward()
        assert generator.leave.bias.grad.item() == pytest.approx(64)
        assert generator.eval()(torch.zeros(1, 2), condition).max().item() == 1

    def test_the_completion_depends_on_pixels_across_the_hole(self):
        torch.manual_seed(0)
        generator = InpaintingGenerator(28, 1, latent_dim=1, width=4).eval()
        mask = torch.zeros(1, 1, 28, 28)
        mask[..., 8:20, 8:20] = 1
        x = torch.zeros(1, 1, 28, 28, requires_grad=True)
        generator(torch.zeros(1, 1), masked(x, mask))[0, 0, 14, 14].backward()
        seen = x.grad[0, 0].abs() > 0
        assert seen[:6].any()
        assert seen[22:].any()

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: InpaintingGenerator(27), "multiple of 4, for 2 halvings of cells of 1; got 27"),
            (lambda: PatchDiscriminator(28, halvings=3), "multiple of 8"),
            (lambda: InpaintingGenerator(28, width=0), "width .* at least 1; got 0"),
            (lambda: InpaintingGenerator(28, cell=2, halvings=2), "multiple of 8"),
            (lambda: InpaintingGenerator(28, latent_dim=0), "latent_dim .* at least 1; got 0"),
        ],
    )
    def test_what_cannot_be_built_says_why(self, make, words):
        with pytest.raises(ConfigurationError, match=words):
            make()


class TestFederation:
    def test_both_executors_give_the_same_weights(self):
        options = {"generator_optimizer": sgd, "discriminator_optimizer": sgd, "holes": InpaintingMask(weight=5)}
        one, other = (
            updates(executor, digits_gan(**options), few_digits(batch_size=4), work={"steps": 3})
            for executor in (VectorizedExecutor(), SequentialExecutor())
        )
        assert_same(one, other, rtol=1e-5)
        assert all(update.metrics["hole_l1"] > 0 for update in one[0].values())

    def test_a_short_federation_completes_better_than_the_untrained_generator(self):
        data, metric = few_digits(batch_size=16), Completion(features=PixelFeatures(), num_images=100)
        facts = metric.prepare(data, device=CPU)
        gan = digits_gan(holes=InpaintingMask(weight=10), generator_optimizer=fast)
        before = metric.inspect(gan)
        shown = CompletionPictures(every_n_rounds=1, columns=4, rows=2)
        federate(gan, data, shown, rounds=2, local_steps=10, optimizer_state="average")
        after = metric.inspect(gan)
        drawn = [Image.open(f"completed_{when}.png").size for when in ("init", "round0001", "round0002")]
        assert drawn == [(4 * 50 + 2, 6 * 50 + 2)] * 3
        assert after["completion_l1"] < 0.8 * before["completion_l1"]
        assert after["completion_psnr"] > before["completion_psnr"] + 1
        assert after["completion_spread"] > 0
        assert metric.inspect(gan) == after, "the same holes and the same noise"
        assert facts["completion_num_images"] == 100


class TestMetrics:
    def test_values_are_those_of_the_formulas(self):
        data, metric = digits_data(), Completion(features=PixelFeatures(), num_images=50)
        facts = metric.prepare(data, device=CPU)
        real, holed = pictures_with_holes(data, metric.holes, count=50, seed=0)
        mask = holed[:, 1:]
        black = metric.scores(real * (1 - mask) - mask)
        errors = ((real + 1) / 2 * mask).double()
        assert black["l1"] == pytest.approx(float(errors.sum() / mask.sum()), rel=1e-4)
        assert black["psnr"] == pytest.approx(-10 * math.log10(errors.square().mean()), rel=1e-4)
        perfect = metric.scores(real)
        assert (perfect["l1"], perfect["ssim"]) == (0.0, pytest.approx(1.0))
        assert perfect["fid"] == pytest.approx(facts["completion_fid_floor"])
        assert facts["completion_fid_floor"] < facts["completion_fid_mean_fill"]
        assert facts["completion_l1_mean_fill"] == pytest.approx(
            metric.scores(inpainting_baselines.mean_fill(holed[:, :1], mask))["l1"]
        )

    def test_similarity_of_large_pictures_is_torchmetrics_with_the_published_window(self):
        from torchmetrics.image import StructuralSimilarityIndexMeasure

        x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
        y = (x + 0.1).clamp(-1, 1)
        found = similarity(x, y)
        assert found["ssim"] == pytest.approx(float(StructuralSimilarityIndexMeasure(data_range=2.0)(x, y)))
        assert similarity(x, x)["psnr"] == math.inf
        assert 0 < similarity(x[..., :8, :8], y[..., :8, :8])["ssim"] < 1

    def test_fills(self):
        picture = torch.arange(16.0).view(1, 1, 4, 4)
        mask = torch.zeros(1, 1, 4, 4)
        mask[..., 0] = 1
        assert inpainting_baselines.mean_fill(picture, mask)[0, 0, :, 0].tolist() == [8.0] * 4
        assert inpainting_baselines.nearest_fill(picture, mask)[0, 0, :, 0].tolist() == [1.0, 5.0, 9.0, 13.0]
        for fill in (inpainting_baselines.mean_fill, inpainting_baselines.nearest_fill):
            assert torch.equal(fill(picture, mask)[..., 1:], picture[..., 1:])
            assert torch.equal(fill(picture * (1 - mask), mask), fill(picture, mask)), "what is hidden is not read"

    def test_telea_is_measured_where_opencv_is_there_and_named_where_it_is_not(self, monkeypatch):
        metric = Completion(features=PixelFeatures(), num_images=10)
        facts = metric.prepare(digits_data(), device=CPU)
        measured = "completion_psnr_telea_fill" in facts
        assert measured != ("completion_telea_fill" in facts)
        if measured:
            assert facts["completion_psnr_telea_fill"] > 5
        monkeypatch.setitem(sys.modules, "cv2", None)
        facts = metric.prepare(digits_data(), device=CPU)
        assert "Run pip install 'fedgan-lightning[editing]'." in facts["completion_telea_fill"]

    def test_telea_fills_holes_from_their_borders(self):
        pytest.importorskip("cv2", reason="needs OpenCV: pip install 'fedgan-lightning[editing]'")
        for channels in (1, 3):
            picture, mask = torch.full((2, channels, 8, 8), 0.5), torch.zeros(2, 1, 8, 8)
            mask[..., 2:5, 2:5] = 1
            filled = inpainting_baselines.telea_fill(picture * (1 - mask), mask)
            known = (mask == 0).expand_as(picture)
            torch.testing.assert_close(filled[known], picture[known], atol=0.5 / 127.5, rtol=0)
            # Of 255 levels OpenCV 4 is off by one, OpenCV 5 by two: they weigh neighbours in other precisions.
            torch.testing.assert_close(filled, picture, atol=2.5 / 127.5, rtol=0)
            assert (picture * (1 - mask))[~known].eq(0).all(), "what it was given"

    def test_other_models_data_and_numbers_are_refused(self):
        with pytest.raises(
            ConfigurationError, match="whose condition is InpaintingMask; got GAN with condition NoneType"
        ):
            Completion().inspect(ring_gan())
        with pytest.raises(ConfigurationError, match=r"what is completed must be pictures; got samples of shape \[2\]"):
            Completion().prepare(ring_data(), device=CPU)
        with pytest.raises(ConfigurationError, match="num_images .* at least 2; got 1"):
            Completion(num_images=1)


def write(folder, name: str, side: int = 8, *, value: int = 255) -> None:
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.full((side, side), value, dtype=np.uint8)).save(folder / name)


class TestDefaults:
    def test_completed_pictures_are_measured_unless_somebody_says_otherwise(self, tmp_path):
        holes = InpaintingMask(area=(0.2, 0.3))
        evaluation = Evaluation(num_samples=20)
        federate(digits_gan(holes=holes), few_digits(batch_size=16), evaluation, rounds=1, local_steps=1)
        assert [type(metric) for metric in evaluation.metrics] == [Completion]
        assert evaluation.metrics[0].holes is holes, "with holes as in training"
        assert "completion_l1" in evaluation.latest

    def test_metrics_that_cannot_see_completed_pictures_are_warned_of(self, tmp_path):
        evaluation = Evaluation(metrics=[FrechetDistance(PixelFeatures())], num_samples=20)
        with pytest.warns(UserWarning, match="FrechetDistance measure nothing. .*Completion"):
            federate(digits_gan(), few_digits(batch_size=16), evaluation, rounds=1, local_steps=1)
        assert evaluation.latest == {}


class TestFolders:
    def test_pictures_and_masks_are_read_in_order_of_their_names(self, tmp_path):
        folder = tmp_path / "own"
        for name, value in (("b", 255), ("a", 0)):
            write(folder, f"{name}.png", value=value)
            write(folder, f"{name}_mask.png", value=255 - value)
        (folder / "notes.txt").write_text("not a picture")
        for channels in (1, 3):
            names, x, mask = read_folder(folder, shape=(channels, 8, 8))
            assert names == ["a", "b"]
            assert x.shape == (2, channels, 8, 8)
            assert x[:, 0, 0, 0].tolist() == [-1.0, 1.0]
            assert mask[:, 0, 0, 0].tolist() == [1.0, 0.0]

    def test_what_cannot_be_completed_is_said_in_one_line(self, tmp_path):
        folder = tmp_path / "own"

        def fails(words: str) -> None:
            with pytest.raises(DataError, match=words) as caught:
                read_folder(folder, shape=(1, 8, 8))
            assert "\n" not in str(caught.value)

        fails("must hold pictures NAME.png; got none in")
        write(folder, "a.png")
        fails("must have a mask NAME_mask.png.*no a_mask.png")
        write(folder, "a_mask.png", side=9)
        fails("8 x 8 pixels, as the generator's; got 9 x 9 in .*a_mask.png")
        (folder / "a_mask.png").write_text("no picture")
        fails("must be readable; got .*a_mask.png")
        write(folder, "a_mask.png")
        write(folder, "b_mask.png")
        fails("no b.png")

    def test_before_and_after_lie_below_each_other(self):
        real, made = -torch.ones(3, 1, 48, 48), torch.ones(3, 1, 48, 48)
        holed = masked(real, torch.ones(3, 1, 48, 48))
        picture = before_after(real, holed, made, columns=2)
        assert picture[[26 + 50 * row for row in range(6)], 26, 0].tolist() == [0, 128, 255, 0, 128, 255]
        assert picture[[26 + 50 * row for row in range(6)], 76, 0].tolist() == [0, 128, 255, 255, 255, 255]

    def test_predict_completes_a_folder_and_keeps_what_is_known(self, tmp_path, capsys):
        for name, value in (("a", 10), ("b", 250)):
            write(tmp_path / "own", f"{name}.png", value=value)
            hole = np.zeros((8, 8), dtype=np.uint8)
            hole[2:5, 2:5] = 255
            Image.fromarray(hole).save(tmp_path / "own" / f"{name}_mask.png")
        trainer = quiet_trainer(CompletionPictures(folder=str(tmp_path / "own")), limit_val_batches=1)
        trainer.predict(ServerModule(digits_gan()), datamodule=few_digits(), return_predictions=False)
        assert "wrote 2 completed pictures" in capsys.readouterr().out
        made = np.array(Image.open("predictions/a_completed.png").convert("L"))
        assert (made[hole == 0] == 10).all()
        assert (made[hole > 0] != 10).any()
        assert Image.open("predictions/before_after.png").size == (2 * 50 + 2, 3 * 50 + 2)

    def test_predict_writes_nothing_where_a_mask_is_missing(self, tmp_path):
        write(tmp_path / "own", "a.png")
        trainer = quiet_trainer(CompletionPictures(folder=str(tmp_path / "own")))
        with pytest.raises(DataError, match="no a_mask.png"):
            trainer.predict(ServerModule(digits_gan()), datamodule=few_digits())
        assert not (tmp_path / "predictions").exists()

    def test_predict_without_a_folder_completes_test_pictures(self):
        quiet_trainer(CompletionPictures(columns=3, rows=1)).predict(
            ServerModule(digits_gan()), datamodule=few_digits(), return_predictions=False
        )
        assert Image.open("predictions/before_after.png").size == (3 * 50 + 2, 3 * 50 + 2)

    def test_settings_of_the_callback_are_checked(self):
        with pytest.raises(ConfigurationError, match="rows of CompletionPictures .* at least 1; got 0"):
            CompletionPictures(rows=0)
