"""Pictures of 16 bits and of several pages in a folder of pictures."""

from __future__ import annotations

import inspect
import io
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from fedgan_lightning.data.levels import Levels
from fedgan_lightning.data.pictures import read_pages, read_picture
from fedgan_lightning.errors import DataError
from fedgan_lightning.sources import ImageFolder
from tests.conftest import ROOT


def read_all(root, split="train", **options):
    return ImageFolder(str(root), **{"image_size": 8, "channels": 1, **options}).load(split)


def measured(dtype=np.uint16, high=65535):
    return np.linspace(0, high, 64).reshape(8, 8).astype(dtype)


def page(path, *, levels=None, channels=1):
    return [own.numpy() for own in read_pages(path, channels=channels, levels=levels or Levels()).pictures]


def test_the_page_on_formats_names_every_option_and_its_example_is_one():
    text = (ROOT / "docs" / "data_formats.md").read_text()
    options = inspect.signature(ImageFolder.__init__).parameters
    new = list(options)[list(options).index("window") :]
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == new
    example = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])["data"]
    source = ImageFolder(**example["source"]["init_args"])
    assert example["partition"]["init_args"]["column"] == source.group == "patient"


class TestSixteenBits:
    @pytest.mark.parametrize("suffix", ["png", "tif", "TIFF"])
    @pytest.mark.parametrize("high", [65535, 4095])
    def test_the_full_range_becomes_bytes(self, tmp_path, suffix, high):
        values = measured(high=high)
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        np.testing.assert_allclose(page(tmp_path / f"a.{suffix}")[0][0], values / 257, atol=0.51)
        picture = read_picture(tmp_path / f"a.{suffix}", channels=3)
        assert (picture.numpy() == page(tmp_path / f"a.{suffix}")[0]).all(), "as pictures to complete are read"

    def test_big_endian_signed_and_inverted_tiffs(self, tmp_path):
        tifffile = pytest.importorskip("tifffile", reason="writes TIFFs that Pillow does not")
        tifffile.imwrite(tmp_path / "big.tif", measured(), byteorder=">")
        tifffile.imwrite(tmp_path / "white.tif", measured(), photometric="miniswhite")
        tifffile.imwrite(tmp_path / "signed.tif", (measured().astype(int) - 32768).astype(np.int16))
        wanted = np.rint(measured() / 257)
        for name, expected in (("big", wanted), ("signed", wanted), ("white", 255 - wanted)):
            np.testing.assert_allclose(page(tmp_path / f"{name}.tif")[0][0], expected, atol=1, err_msg=name)

    def test_a_range_that_is_given_is_used(self, tmp_path):
        values = measured(high=4095)
        Image.fromarray(values).save(tmp_path / "a.png")
        found = page(tmp_path / "a.png", levels=Levels(window=(2000, 1000)))[0][0]
        np.testing.assert_allclose(found, np.clip((values - 1500.0) / 1000 * 255, 0, 255), atol=0.51)
        found = page(tmp_path / "a.png", levels=Levels(percentiles=(0, 100)))[0][0]
        assert (found.min(), found.max()) == (0, 255)

    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    def test_32_bits_and_fractions_are_read_with_a_range_that_is_given(self, tmp_path, dtype):
        for index in range(3):
            Image.fromarray(measured(dtype, high=4095)).save(tmp_path / f"{index}.tif")
        found = read_all(tmp_path, window=[2047.5, 4095]).x
        np.testing.assert_allclose(found[0, 0].numpy(), measured(dtype, high=4095) / 4095 * 255, atol=1)
        with pytest.raises(DataError, match="8 or 16 bits a channel.*Set data.source.window"):
            read_all(tmp_path)
        with pytest.raises(DataError, match=r"of mode [IF]\. Rescale"):
            read_picture(tmp_path / "0.tif", channels=1)

    def test_pictures_of_8_bits_beside_them_are_as_they_were(self, tmp_path):
        for index in range(4):
            Image.fromarray(measured()).save(tmp_path / f"{index}.png")
            Image.new("L", (8, 8), 77).save(tmp_path / f"{index}e.png")
        found = read_all(tmp_path, window=[10, 5]).x
        assert {77} in [set(picture.flatten().tolist()) for picture in found]

    def test_a_window_means_nothing_for_8_bits(self, tmp_path):
        for index in range(3):
            Image.new("L", (8, 8), 77).save(tmp_path / f"{index}.png")
        with pytest.raises(DataError, match="window or percentiles must have what it is for"):
            read_all(tmp_path, percentiles=[1, 99])

    def test_colours_of_16_bits_become_bytes(self, tmp_path):
        tifffile = pytest.importorskip("tifffile", reason="writes TIFFs that Pillow does not")
        colours = np.random.default_rng(0).integers(0, 65535, (8, 8, 3), np.uint16)
        tifffile.imwrite(tmp_path / "a.tif", colours, photometric="rgb")
        found = page(tmp_path / "a.tif", channels=3)[0].transpose(1, 2, 0)
        np.testing.assert_allclose(found, colours / 257, atol=1)

    def test_what_is_transparent_shows_white_and_exif_turns(self, tmp_path):
        values, exif = measured(), Image.Exif()
        exif[0x0112] = 3
        Image.fromarray(values).save(tmp_path / "a.png", transparency=int(values[0, 0]), exif=exif)
        found = page(tmp_path / "a.png")[0][0]
        assert found[-1, -1] == 255
        np.testing.assert_allclose(found.flatten()[:-1], np.rint(values / 257)[::-1, ::-1].flatten()[:-1], atol=1)


class TestPages:
    @staticmethod
    def write(path, pictures, **options):
        first, *others = pictures
        first.save(path, save_all=True, append_images=others, **options)
        return path

    def test_pages_are_pictures_of_one_file(self, tmp_path):
        for name in "ab":
            self.write(tmp_path / f"{name}.tif", [Image.new("RGB", (8, 9), (level, 0, 0)) for level in range(6)])
        train = read_all(tmp_path, channels=3, group="file")
        assert train.x[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
        assert len({*train.columns["file"]}) == 1
        assert read_all(tmp_path, channels=3, slice_range=[1, 6], slice_step=2).x[:, 0, 0, 0].tolist() == [1, 3, 5]

    def test_pages_of_16_bits_have_one_range(self, tmp_path):
        path = self.write(tmp_path / "a.tif", [Image.fromarray(measured(high=high)) for high in (100, 1000)])
        low, high = page(path, levels=Levels(percentiles=(0, 100)))
        assert (int(low.max()), int(high.max())) == (26, 255)

    def test_pages_of_all_modes_and_sizes_are_read_together(self, tmp_path):
        modes = ["L", "RGB", "RGBA", "P", "CMYK", "1", "I;16"]
        for name in "ab":
            self.write(tmp_path / f"{name}.tif", [Image.new(mode, (8 + i, 9)) for i, mode in enumerate(modes)])
        for channels in (1, 3):
            assert len(read_all(tmp_path, channels=channels)) == len(modes)

    def test_smaller_copies_and_masks_are_no_pages(self, tmp_path):
        tifffile = pytest.importorskip("tifffile", reason="writes TIFFs that Pillow does not")
        with tifffile.TiffWriter(tmp_path / "a.tif") as file:
            for kind in (0, 1, 4, 0):
                file.write(np.zeros((16, 16), bool if kind == 4 else np.uint8), subfiletype=kind)
        assert len(page(tmp_path / "a.tif")) == 2
        assert read_picture(tmp_path / "a.tif", channels=1).shape == (1, 16, 16)

    def test_a_broken_page_names_the_file(self, tmp_path):
        noise = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64), np.uint8)) for i in range(4)]
        for name in "abc":
            self.write(tmp_path / f"{name}.tif", noise)
        data = (tmp_path / "c.tif").read_bytes()
        (tmp_path / "c.tif").write_bytes(data[: len(data) // 2])
        with pytest.raises(DataError, match="every picture must be readable; got .*c.tif"):
            [read_all(tmp_path, split) for split in ("train", "test")]

    def test_more_pixels_than_are_held_in_memory_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr("fedgan_lightning.data.pictures.MAX_VALUES", 200)
        path = self.write(tmp_path / "a.tif", [Image.new("L", (8, 8))] * 4)
        with pytest.raises(DataError, match="more than 200 pixels in one file"):
            page(path)

    def test_of_an_animation_the_first_frame_is_taken(self, tmp_path):
        self.write(tmp_path / "a.gif", [Image.new("L", (8, 8), level) for level in (10, 90)])
        assert [int(own.max()) for own in page(tmp_path / "a.gif")] == [10]
        buffer = io.BytesIO()
        Image.new("L", (8, 8), 10).save(buffer, "PNG")
        (tmp_path / "b.tif").write_bytes(buffer.getvalue())
        assert len(page(tmp_path / "b.tif")) == 1, "a PNG by another name"
