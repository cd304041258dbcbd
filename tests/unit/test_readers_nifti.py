"""NIfTI volumes in a folder of pictures: slices, ranges, orientation, and what is refused."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedgan_lightning.__main__ import main
from fedgan_lightning.data.levels import Levels
from fedgan_lightning.data.nifti import read_nifti
from fedgan_lightning.errors import DataError
from fedgan_lightning.sources import ImageFolder
from tests.conftest import ROOT

nibabel = pytest.importorskip("nibabel", reason="needs the extra nifti")


def read_all(root, split="train", **options):
    return ImageFolder(str(root), **{"image_size": 8, "channels": 1, **options}).load(split)


def write(path, values, *, affine=None, slope=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    if slope is not None:
        image.header.set_slope_inter(*slope)
    nibabel.save(image, path)
    return path


def shown(path, *, axis=2, window=None, percentiles=None) -> np.ndarray:
    stack = read_nifti(path, channels=1, levels=Levels(window, percentiles), axis=axis)
    return np.stack([picture[0].numpy() for picture in stack.pictures])


def values_of(dtype=np.int16) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.arange(4 * 5 * 6)).reshape(4, 5, 6).astype(dtype)


def fill(root, *, volumes=3):
    for index in range(volumes):
        values = np.zeros((8, 8, 10), np.int16)
        values[:, :, 2:8] = 100 + np.arange(6)
        values[0, 0, 2:8] = 0
        write(root / f"site{index}" / "scan.nii.gz", values)
    return root


def spoil(path, name):
    data = bytearray(path.read_bytes())
    if name in ("empty", "text"):
        path.write_bytes(b"" if name == "empty" else b"hello")
    elif name.startswith("half"):
        path.write_bytes(data[: {"half a header": 200, "half": 382}.get(name, len(data) // 2)])
    elif name == "no archive":
        path.write_bytes(b"no archive at all, but long enough for a header" * 20)
    elif name in ("film", "colours", "complex"):
        colours = np.zeros((4, 5, 6), [(plane, "u1") for plane in "RGB"])
        others = {"film": np.zeros((4, 5, 6, 2), np.uint8), "colours": colours}
        write(path, others.get(name, np.zeros((4, 5, 6), np.complex64)))
    else:
        plain = bytearray(gzip.decompress(data)) if "archive" in name else data
        offset, fields = {
            "far": (108, struct.pack("<f", 1e9)),
            "pair": (344, b"ni1\0"),
            "kind": (70, struct.pack("<h", 999)),
        }.get(name, (40, struct.pack("<4h", 3, 32767, 32767, 32767)))
        plain[offset : offset + len(fields)] = fields
        path.write_bytes(gzip.compress(plain) if "archive" in name else plain)


class TestVolumes:
    @pytest.mark.parametrize("axis", [0, 1, 2])
    @pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII", "A.Nii.GZ"])
    def test_slices_along_an_axis_have_the_range_of_the_volume(self, tmp_path, axis, name):
        path = write(tmp_path / name.lower(), values_of()).rename(tmp_path / name)
        expected = np.moveaxis(values_of() / 119 * 255, axis, 0)
        np.testing.assert_allclose(shown(path, axis=axis), expected, atol=0.51)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
    def test_numbers_of_any_type_and_order_are_read_with_slope_and_intercept(self, tmp_path, dtype):
        path = write(tmp_path / "a.nii", values_of(dtype), slope=(2, -50))
        image = nibabel.load(path)
        swapped = nibabel.Nifti1Image(values_of(dtype), np.eye(4), image.header.as_byteswapped())
        nibabel.save(swapped, tmp_path / "b.nii")
        second = nibabel.Nifti2Image(values_of(dtype), np.eye(4))
        nibabel.save(second, tmp_path / "c.nii")
        wanted = np.clip((nibabel.load(path).get_fdata() - 50) / 100 * 255, 0, 255)
        np.testing.assert_allclose(shown(path, window=(100, 100)), np.moveaxis(wanted, 2, 0), atol=0.51)
        for other in ("b.nii", "c.nii"):
            np.testing.assert_array_equal(shown(tmp_path / other), shown(path))

    def test_percentiles_are_those_of_the_volume(self, tmp_path):
        found = shown(write(tmp_path / "a.nii", values_of()), percentiles=(25, 75))
        assert (found == 0).sum() == (found == 255).sum() == 30

    def test_what_is_no_number_is_black_and_no_end_of_the_range(self, tmp_path):
        values = values_of(np.float32)
        values[0, 0, :3] = np.nan, np.inf, -np.inf
        found = shown(write(tmp_path / "a.nii", values))
        assert found[:3, 0, 0].tolist() == [0, 255, 0]
        wanted = np.moveaxis(values_of() / 119 * 255, 2, 0)
        np.testing.assert_allclose(found[3:], wanted[3:], atol=5)
        everywhere = write(tmp_path / "b.nii", np.full((3, 3, 3), np.nan, np.float32))
        assert shown(everywhere, percentiles=(1, 99)).max() == shown(everywhere).max() == 0

    @pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIL"])
    def test_anatomical_planes_are_the_same_however_a_volume_is_stored(self, tmp_path, codes):
        anatomy = np.zeros((4, 5, 6), np.float32)  # right, front, up
        anatomy[-1, 2, 3], anatomy[1, -1, 3], anatomy[1, 2, -1] = 1, 2, 3
        turn = nibabel.orientations
        plain = nibabel.Nifti1Image(anatomy, np.eye(4))
        steps = turn.ornt_transform(turn.axcodes2ornt("RAS"), turn.axcodes2ornt(codes))
        stored = plain.as_reoriented(steps)
        nibabel.save(stored, tmp_path / "a.nii")
        axial, coronal, sagittal = (shown(tmp_path / "a.nii", axis=a) for a in ("axial", "coronal", "sagittal"))
        assert (axial.shape, coronal.shape, sagittal.shape) == ((6, 5, 4), (5, 6, 4), (4, 6, 5))
        assert axial[3, 2, 0] == coronal[2, 2, 0] == 85, "the patient's right is on the left"
        assert axial[3, 0, 2] == sagittal[1, 2, 0] == 170, "the front is up, or on the left"
        assert coronal[2, 0, 2] == sagittal[1, 0, 2] == 255, "what is up is up"

    def test_a_volume_that_nibabel_ships(self):
        path = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
        if not path.exists():
            pytest.skip("this nibabel ships without its data")
        values = nibabel.load(path).get_fdata()
        wanted = (values - values.min()) / (values.max() - values.min()) * 255
        np.testing.assert_allclose(shown(path, axis=1), np.moveaxis(wanted, 1, 0), atol=0.51)

    @pytest.mark.parametrize(("shape", "count"), [((4, 5), 1), ((4, 5, 6, 1), 6), ((4, 5, 6, 1, 1), 6), ((4, 5, 1), 1)])
    def test_axes_of_length_1_are_none(self, tmp_path, shape, count):
        values = np.zeros(shape, np.uint8)
        assert shown(write(tmp_path / "a.nii", values)).shape == (count, 4, 5)

    def test_volumes_are_kept_in_one_split_and_are_clients(self, tmp_path):
        root = fill(tmp_path)
        parts = [read_all(root, split, group="file") for split in ("train", "test")]
        assert [len(part) for part in parts] == [20, 10]
        assert not {*parts[0].columns["file"]} & {*parts[1].columns["file"]}
        assert not {*parts[0].columns["folder"]} & {*parts[1].columns["folder"]}
        assert len({*parts[0].columns["folder"]}) == 2
        for split in ("train", "test"):
            plain, grouped = read_all(root, split).columns, read_all(root, split, group="file").columns
            assert "file" not in plain
            assert set(plain["folder"]) == set(grouped["folder"])

    def test_range_step_and_empty_slices(self, tmp_path):
        root = fill(tmp_path)
        assert len(read_all(root, skip_empty=True)) == 12
        assert len(read_all(root, slice_step=3)) == 8
        assert len(read_all(root, slice_range=[3, 5])) == 4
        assert len(read_all(root, slice_range=[-4, 10], slice_step=2, skip_empty=True)) == 2
        assert len(read_all(root, axis=0)) == 16
        assert tuple(read_all(root, axis="coronal", channels=3).x.shape) == (16, 3, 8, 8)
        with pytest.raises(DataError, match="skip_empty must leave pictures in both splits; got none of 2 files"):
            read_all(root, slice_range=[0, 2], skip_empty=True)

    def test_one_volume_is_divided_by_slices_which_is_said(self, tmp_path, caplog):
        root = fill(tmp_path, volumes=1)
        train, test = read_all(root), read_all(root, "test")
        assert (len(train), len(test)) == (9, 1)
        assert "pictures of one file" in caplog.text
        with pytest.raises(DataError, match="got 1 files in"):
            read_all(root, group="file")

    def test_labels_are_those_of_the_folders(self, tmp_path):
        assert read_all(fill(tmp_path), classes=True).y.bincount(minlength=3).sort().values.tolist() == [0, 10, 10]

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("empty", "an empty file"),
            ("text", "no NIfTI file, or cut off in its header"),
            ("half a header", "no NIfTI file, or cut off in its header"),
            ("half", "cut off: 382 of 472 bytes"),
            ("half archive", "EOFError|Error"),
            ("no archive", "BadGzipFile"),
            ("giant", "32767 x 32767 x 32767 values, where 1 to"),
            ("giant archive", "32767 x 32767 x 32767 values, where 1 to"),
            ("film", "4 dimensions, 4 x 5 x 6 x 2.*each volume in a file of its own"),
            ("colours", "no plain numbers, RGB"),
            ("complex", "no plain numbers, complex64"),
            ("far", "values that begin at byte 1000000000"),
            ("pair", "numbers lie in another file"),
            ("kind", "999"),
        ],
    )
    def test_a_volume_that_cannot_be_read_is_named(self, tmp_path, name, said):
        fill(tmp_path)
        suffix = ".nii.gz" if "archive" in name else ".nii"
        path = write(tmp_path / "a" / f"{name}{suffix}", values_of(np.uint8))
        spoil(path, name)
        with pytest.raises(DataError, match=rf"every NIfTI file .*got .*{name}\.nii.* \(.*({said})") as caught:
            [read_all(tmp_path, split) for split in ("train", "test")]
        assert str(caught.value).isprintable()

    def test_without_the_package_it_is_named(self, tmp_path, monkeypatch):
        fill(tmp_path)
        monkeypatch.setitem(sys.modules, "nibabel", None)
        with pytest.raises(DataError, match=r"package nibabel .*got .*nii.gz.*pip install 'fedgan-lightning\[nifti\]'"):
            read_all(tmp_path)

    def test_options_reach_the_source_from_a_configuration(self, tmp_path, capsys):
        root = fill(tmp_path / "data", volumes=4)
        settings = yaml.safe_load((ROOT / "configs" / "image_folder.yaml").read_text())
        own = {"root": str(root), "image_size": 32, "axis": "axial", "percentiles": [1, 99], "slice_step": 2}
        settings["data"] |= {
            "source": {"class_path": "ImageFolder", "init_args": own},
            "partition": {"class_path": "Natural", "init_args": {"column": "folder"}},
            "num_clients": 3,
            "batch_size": 2,
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
        command = ["partition", "--config", str(tmp_path / "c.yaml"), "--run_dir", str(tmp_path / "run")]
        assert main(command) == 0
        assert capsys.readouterr().out.count(" 5 ") >= 3, "every other of ten slices, for each of three clients"
        assert main([*command, "--data.source.axis", "0", "--data.source.slice_range", "[-6, 8]"]) == 0
        assert capsys.readouterr().out.count(" 3 ") >= 3
