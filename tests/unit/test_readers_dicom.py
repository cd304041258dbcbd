"""DICOM files in a folder of pictures: what is shown of them, which are refused, and that no header goes further."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import warnings
import zlib

import numpy as np
import pytest
import yaml
from PIL import Image

from fedgan_lightning.__main__ import main
from fedgan_lightning.data import dicom_header
from fedgan_lightning.data.dicom import read_dicom
from fedgan_lightning.data.levels import Levels
from fedgan_lightning.data.partition import Natural
from fedgan_lightning.errors import ConfigurationError, DataError
from fedgan_lightning.sources import ImageFolder
from tests.conftest import ROOT

pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom")
from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.pixels import apply_modality_lut, apply_windowing, get_decoder  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless, generate_uid  # noqa: E402

SECRET = "Nobody^Should^See^This"


def write(path, pixels, *, photometric="MONOCHROME2", frames=None, stored=None, **tags):
    """Write a DICOM file; its patient has a name that must never be seen."""
    with warnings.catch_warnings():  # of odd values, which are meant
        warnings.simplefilter("ignore")
        return _write(path, pixels, photometric=photometric, frames=frames, stored=stored, **tags)


def _write(path, pixels, *, photometric, frames, stored, **tags):
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.InstitutionName = SECRET, SECRET, SECRET
    dataset.Rows, dataset.Columns = pixels.shape[1:3] if frames else pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if photometric == "RGB" else 1
    if photometric == "RGB":
        dataset.PlanarConfiguration = 0
    if frames:
        dataset.NumberOfFrames = frames
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = pixels.dtype.itemsize * 8
    dataset.BitsStored = stored or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    for name, value in tags.items():
        setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def shown(path, *, channels=1, window=None, percentiles=None) -> list[np.ndarray]:
    stack = read_dicom(path, channels=channels, levels=Levels(window, percentiles))
    return [picture.squeeze(0).numpy() for picture in stack.pictures]


def ramp(dtype=np.uint16, low=0, high=1000):
    return np.linspace(low, high, 64).reshape(8, 8).astype(dtype)


def by_pydicom(path) -> np.ndarray:
    """Return what pydicom shows of a file with a window, as bytes."""
    dataset = pydicom.dcmread(path)
    values = apply_windowing(apply_modality_lut(dataset.pixel_array, dataset), dataset, index=0)
    bits, signed = dataset.BitsStored, dataset.PixelRepresentation
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1], float)
    if "RescaleSlope" in dataset:
        ends = ends * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    return (values - ends.min()) / (ends.max() - ends.min()) * 255


class TestValues:
    @pytest.mark.parametrize(
        ("dtype", "low", "high", "stored"),
        [
            (np.uint8, 0, 255, 8),
            (np.uint16, 0, 4095, 12),
            (np.uint16, 0, 65535, 16),
            (np.int16, -1024, 3000, 16),
            (np.int8, -128, 127, 8),
        ],
    )
    @pytest.mark.parametrize("rescale", [{}, {"RescaleSlope": 2, "RescaleIntercept": -100}])
    @pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
    def test_a_window_shows_what_pydicom_shows(self, tmp_path, dtype, low, high, stored, rescale, function):
        window = {"WindowCenter": 150, "WindowWidth": 200, "VOILUTFunction": function}
        path = write(tmp_path / "a.dcm", ramp(dtype, low, high), stored=stored, **rescale, **window)
        np.testing.assert_allclose(shown(path)[0], by_pydicom(path), atol=0.51)

    def test_without_a_window_the_range_of_the_values_is_shown(self, tmp_path):
        path = write(tmp_path / "a.dcm", ramp(np.int16, -1000, 500), RescaleSlope=3, RescaleIntercept=7)
        picture = shown(path)[0]
        assert (picture[0, 0], picture[-1, -1]) == (0, 255)
        assert picture[4, 0] == pytest.approx(255 * 32 / 63, abs=1)

    def test_a_window_that_is_given_goes_before_the_file_s_and_is_used_alike(self, tmp_path):
        inside = write(tmp_path / "a.dcm", ramp(), WindowCenter=300, WindowWidth=100)
        bare = write(tmp_path / "b.dcm", ramp(), WindowCenter=5, WindowWidth=3)
        np.testing.assert_array_equal(shown(inside)[0], shown(bare, window=(300.0, 100.0))[0])
        assert (shown(bare)[0] != shown(inside)[0]).any()

    def test_percentiles_go_before_the_file_s_window(self, tmp_path):
        path = write(tmp_path / "a.dcm", ramp(), WindowCenter=300, WindowWidth=1)
        picture = shown(path, percentiles=(25.0, 75.0))[0]
        assert (picture == 0).sum() == (picture == 255).sum() == 16

    def test_of_several_windows_the_first_is_taken(self, tmp_path):
        several = write(tmp_path / "a.dcm", ramp(), WindowCenter=[300, 10], WindowWidth=[100, 20])
        one = write(tmp_path / "b.dcm", ramp(), WindowCenter=300, WindowWidth=100)
        after = write(tmp_path / "c.dcm", ramp(), WindowCenter=[10, 300], WindowWidth=[0, 100])
        np.testing.assert_array_equal(shown(several)[0], shown(one)[0])
        np.testing.assert_array_equal(shown(after)[0], shown(one)[0], err_msg="one of no width is none")

    def test_a_window_of_width_1_parts_the_values(self, tmp_path):
        path = write(tmp_path / "a.dcm", np.arange(64, dtype=np.uint8).reshape(8, 8), WindowCenter=32, WindowWidth=1)
        assert shown(path)[0].flatten().tolist() == [0] * 32 + [255] * 32

    @pytest.mark.parametrize(
        "window",
        [
            {"WindowCenter": 500, "WindowWidth": 0},
            {"WindowCenter": 500, "WindowWidth": -20},
            {"WindowCenter": 500},
            {"WindowWidth": 20},
            {"WindowCenter": None, "WindowWidth": None},
            {"WindowCenter": [500, 10], "WindowWidth": [0, -1]},
        ],
    )
    def test_a_window_of_no_width_is_none(self, tmp_path, window):
        odd, none = write(tmp_path / "a.dcm", ramp(), **window), write(tmp_path / "b.dcm", ramp())
        np.testing.assert_array_equal(shown(odd)[0], shown(none)[0])

    @pytest.mark.parametrize("width", [b"wide", b" NaN", b" inf", b"-1e3"])
    def test_a_window_that_is_no_number_is_none(self, tmp_path, width):
        path = write(tmp_path / "a.dcm", ramp(), WindowCenter=50, WindowWidth="1234")
        path.write_bytes(path.read_bytes().replace(b"1234", width))
        np.testing.assert_array_equal(shown(path)[0], shown(write(tmp_path / "b.dcm", ramp()))[0])

    def test_monochrome1_is_inverted(self, tmp_path):
        tags = {"WindowCenter": 300, "WindowWidth": 500}
        one = write(tmp_path / "a.dcm", ramp(), photometric="MONOCHROME1", **tags)
        two = write(tmp_path / "b.dcm", ramp(), **tags)
        np.testing.assert_array_equal(shown(one)[0], 255 - shown(two)[0])
        np.testing.assert_array_equal(shown(one, window=(9, 5.0))[0], 255 - shown(two, window=(9, 5.0))[0])

    def test_a_picture_of_one_value_is_black(self, tmp_path):
        assert shown(write(tmp_path / "a.dcm", np.full((8, 8), 300, np.uint16)))[0].max() == 0

    @pytest.mark.parametrize(("dtype", "factor"), [(np.uint8, 1), (np.uint16, 257)])
    def test_colours_are_taken_as_they_are(self, tmp_path, dtype, factor):
        pixels = np.random.default_rng(0).integers(0, 255, (6, 5, 3))
        path = write(tmp_path / "a.dcm", (pixels * factor).astype(dtype), photometric="RGB")
        picture = read_dicom(path, channels=3, levels=Levels()).pictures[0]
        assert picture.permute(1, 2, 0).numpy().tolist() == pixels.tolist()
        grey = np.array(Image.fromarray(pixels.astype(np.uint8)).convert("L"))
        np.testing.assert_array_equal(shown(path)[0], grey)

    def test_grey_is_read_into_three_channels(self, tmp_path):
        picture = read_dicom(write(tmp_path / "a.dcm", ramp()), channels=3, levels=Levels()).pictures[0]
        assert tuple(picture.shape) == (3, 8, 8)
        assert (picture == picture[:1]).all()

    def test_frames_are_pictures_with_one_range(self, tmp_path):
        pixels = np.stack([ramp(high=100), ramp(high=1000), ramp(high=10)])
        frames = shown(write(tmp_path / "a.dcm", pixels, frames=3))
        assert [int(frame.max()) for frame in frames] == [26, 255, 3]

    def test_frames_have_slopes_and_windows_of_their_own(self, tmp_path):
        def group(slope, centre):
            transformation, window, item = Dataset(), Dataset(), Dataset()
            transformation.RescaleSlope, transformation.RescaleIntercept, transformation.RescaleType = slope, 0, "US"
            window.WindowCenter, window.WindowWidth = centre, 100
            item.PixelValueTransformationSequence, item.FrameVOILUTSequence = [transformation], [window]
            return item

        pixels = np.stack([ramp(), ramp()])
        groups = {"PerFrameFunctionalGroupsSequence": [group(1, 300), group(2, 600)]}
        frames = shown(write(tmp_path / "a.dcm", pixels, frames=2, **groups))
        singles = [
            write(
                tmp_path / f"b{slope}.dcm",
                ramp(),
                RescaleSlope=slope,
                RescaleIntercept=0,
                WindowCenter=c,
                WindowWidth=100,
            )
            for slope, c in ((1, 300), (2, 600))
        ]
        for frame, single in zip(frames, singles):
            np.testing.assert_array_equal(frame, shown(single)[0])
        shared = {"SharedFunctionalGroupsSequence": [group(2, 600)]}
        np.testing.assert_array_equal(shown(write(tmp_path / "c.dcm", ramp(), **shared))[0], frames[1])


class TestShippedFiles:
    @pytest.mark.parametrize("name", ["MR_small.dcm", "693_J2KI.dcm", "examples_overlay.dcm"])
    def test_windows_of_scanners_show_what_pydicom_shows(self, name):
        path = get_testdata_file(name)
        np.testing.assert_allclose(shown(dicom_path(path))[0], np.clip(by_pydicom(path), 0, 255), atol=0.51)

    @pytest.mark.parametrize("kind", ["RLE", "bigendian", "expb", "implicit", "jp2klossless", "padded"])
    def test_transfer_syntaxes_hold_the_same_picture(self, kind):
        plain = shown(dicom_path(get_testdata_file("MR_small.dcm")))
        other = shown(dicom_path(get_testdata_file(f"MR_small_{kind}.dcm")))
        np.testing.assert_array_equal(plain, other)

    @pytest.mark.parametrize(
        ("name", "count", "shape"),
        [
            ("CT_small.dcm", 1, (128, 128)),
            ("image_dfl.dcm", 1, (512, 512)),
            ("rtdose.dcm", 15, (10, 10)),
            ("SC_rgb_rle_16bit_2frame.dcm", 2, (100, 100)),
            ("examples_palette.dcm", 1, (350, 800)),
            ("SC_ybr_full_422_uncompressed.dcm", 1, (100, 100)),
            ("liver_1frame.dcm", 1, (512, 512)),
        ],
    )
    def test_kinds_of_files(self, name, count, shape):
        pictures = read_dicom(dicom_path(get_testdata_file(name)), channels=3, levels=Levels()).pictures
        assert len(pictures) == count
        assert tuple(pictures[0].shape) == (3, *shape)
        assert int(pictures[0].max()) > 250

    def test_a_palette_is_applied(self):
        path = dicom_path(get_testdata_file("examples_palette.dcm"))
        dataset = pydicom.dcmread(path)
        colours = pydicom.pixels.apply_color_lut(dataset.pixel_array, dataset)
        found = read_dicom(path, channels=3, levels=Levels()).pictures[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found, colours / 257, atol=0.51)

    @pytest.mark.parametrize("name", ["MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jpeg_gdcm.dcm", "JPGExtended.dcm"])
    def test_a_compression_without_a_decoder_names_file_and_packages(self, name):
        if get_decoder(JPEGLSLossless).is_available:
            pytest.skip("a decoder for JPEG-LS is installed")
        with pytest.raises(DataError, match=rf"got .*{name} \(.*pip install pylibjpeg pylibjpeg-libjpeg"):
            shown(dicom_path(get_testdata_file(name)))

    @pytest.mark.parametrize("name", ["rtplan.dcm", "test-SR.dcm", "reportsi.dcm", "waveform_ecg.dcm"])
    def test_what_is_no_picture_is_named(self, name):
        with pytest.raises(DataError, match=rf"got .*{name} \(no picture, without Rows"):
            shown(dicom_path(get_testdata_file(name)))


def dicom_path(path):
    from pathlib import Path

    return Path(path)


def break_off(path, size):
    path.write_bytes(path.read_bytes()[:size])


def bomb(path):
    """Write a deflated file that is small and inflates to more than is read."""
    original = dicom_path(get_testdata_file("image_dfl.dcm")).read_bytes()
    meta = pydicom.filereader.read_file_meta_info(get_testdata_file("image_dfl.dcm"))
    head = original[: 144 + meta.FileMetaInformationGroupLength]
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    path.write_bytes(head + b"".join(deflater.compress(bytes(2**20)) for _ in range(9)) + deflater.flush())


BROKEN = {
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "text": (lambda path: path.write_text("hello"), "no DICOM file, without the mark"),
    "mark alone": (lambda path: break_off(path, 132), "a header that cannot be read|no picture"),
    "half a header": (lambda path: break_off(path, 400), "a header that cannot be read|no picture"),
    "half the pixels": (lambda path: break_off(path, path.stat().st_size - 64), "cut off: 64 of 128 bytes of pixels"),
    "no pixels": (lambda path: write(path, ramp(), PixelData=b""), "no pixels"),
    "giant": (lambda path: write(path, ramp(), Rows=65535, Columns=65535), "65535 x 65535 pixels, where"),
    "giant film": (lambda path: write(path, ramp(), NumberOfFrames=2**31 - 1), "2147483647 frames"),
    "no lines": (lambda path: write(path, ramp(), Rows=0), "0 pixels, where"),
    "two values a pixel": (lambda path: write(path, ramp(), SamplesPerPixel=2), "2 values a pixel"),
    "kind": (lambda path: write(path, ramp(), photometric=SECRET[:16]), "colours of a kind that is not read"),
    "no kind": (lambda path: write(path, ramp(), PhotometricInterpretation=None), "without PhotometricInterpretation"),
    "no sign": (lambda path: write(path, ramp(), PixelRepresentation=None), "pixels without PixelRepresentation"),
    "no bits": (lambda path: write(path, ramp(), BitsStored=None), "pixels without BitsStored"),
    "no slope": (lambda path: write(path, ramp(), RescaleSlope=0, RescaleIntercept=0), "slope, intercept"),
    "inflated": (bomb, "more than 1048576 bytes when it is inflated"),
}


class TestRefusals:
    @pytest.mark.parametrize("name", BROKEN)
    def test_a_file_that_cannot_be_read_is_named_in_words_of_ours(self, name, tmp_path, monkeypatch):
        for index in range(3):
            write(tmp_path / "a" / f"{index}.dcm", ramp())
        path = write(tmp_path / "a" / f"{name}.dcm", ramp())
        spoil, said = BROKEN[name]
        spoil(path)
        if name == "inflated":
            monkeypatch.setattr(dicom_header, "MAX_BYTES", 2**20)
        with pytest.raises(DataError, match=f"got .*{name}.dcm .*({said})") as caught:
            [read_all(tmp_path, split) for split in ("train", "test")]
        assert SECRET not in str(caught.value)
        assert caught.value.__context__ is None, "nothing of pydicom's is printed with it"
        assert str(caught.value).isprintable()

    def test_a_file_of_too_many_bytes_is_not_opened(self, tmp_path):
        path = write(tmp_path / "a.dcm", ramp())
        os.truncate(path, 2**31 + 1)
        with pytest.raises(DataError, match=r"a.dcm \(2147483649 bytes, more than 2147483648\)"):
            shown(path)

    def test_without_the_package_it_is_named(self, tmp_path, monkeypatch):
        for index in range(3):
            write(tmp_path / f"{index}.dcm", ramp())
        monkeypatch.setitem(sys.modules, "pydicom", None)
        with pytest.raises(DataError, match=r"package pydicom .*got .*\.dcm.*pip install 'fedgan-lightning\[dicom\]'"):
            read_all(tmp_path)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"window": [40, 0]}, "window must be a centre and a width above 0; got"),
            ({"window": [40]}, "window .* a list of 2"),
            ({"percentiles": [0, 101]}, r"percentiles .* in \[0, 100\]"),
            ({"percentiles": [99, 1]}, "percentiles must be a lower and a higher one"),
            ({"window": [40, 400], "percentiles": [1, 99]}, "must not be given together"),
            ({"slice_step": 0}, "slice_step .* at least 1; got 0"),
            ({"group": "hospital"}, "group .* one of file, series, study, patient"),
            ({"axis": 3}, "axis .* one of 0, 1, 2, sagittal"),
        ],
    )
    def test_options_that_cannot_be(self, tmp_path, options, said):
        with pytest.raises(ConfigurationError, match=said):
            ImageFolder(str(tmp_path), **options)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"axis": "axial"}, "axis must have what it is for: NIfTI"),
            ({"slice_step": 2}, "slice_step must have what it is for: files with several pictures"),
            ({"slice_range": [0, 1]}, "slice_range or slice_step must have"),
        ],
    )
    def test_options_that_mean_nothing_here(self, tmp_path, options, said):
        for index in range(3):
            write(tmp_path / f"{index}.dcm", ramp())
        with pytest.raises(DataError, match=said):
            read_all(tmp_path, **options)

    def test_a_window_means_nothing_for_colours_and_bytes(self, tmp_path):
        for index in range(3):
            write(tmp_path / f"{index}.dcm", np.zeros((8, 8, 3), np.uint8), photometric="RGB")
            Image.new("L", (8, 8)).save(tmp_path / f"{index}.png")
        with pytest.raises(DataError, match="window or percentiles must have what it is for"):
            read_all(tmp_path, window=[40, 400])


def read_all(root, split="train", **options):
    return ImageFolder(str(root), **{"image_size": 8, "channels": 1, **options}).load(split)


class TestFolders:
    @pytest.mark.parametrize("name", ["a.dcm", "A.DCM", "a.Dicom", "a.IMA", "IM000001", "1.2.840.113619.2.5.17"])
    def test_names_of_dicom_files(self, tmp_path, name):
        write(tmp_path / "x" / name, ramp())
        write(tmp_path / "y" / "deep" / "er" / name, ramp())
        samples = read_all(tmp_path)
        assert len(samples) == len(read_all(tmp_path, "test")) == 1
        assert set(samples.columns["folder"]) <= {"x", "y"}

    def test_what_has_no_ending_and_no_mark_is_left_where_no_sibling_is_dicom(self, tmp_path):
        for index in range(3):
            write(tmp_path / "a" / f"{index}.dcm", ramp())
        (tmp_path / "README").write_text("about")
        (tmp_path / "a" / "LICENSE").write_text("free")
        os.mkfifo(tmp_path / "a" / "queue")
        shutil.copy(get_testdata_file("CT_small.dcm"), tmp_path / "DICOMDIR")
        assert len(read_all(tmp_path)) + len(read_all(tmp_path, "test")) == 3

    @pytest.mark.parametrize(("data", "said"), [(b"", "an empty file"), (b"DICM" * 30, "without the mark")])
    def test_a_broken_file_without_an_ending_is_named_beside_others(self, tmp_path, data, said):
        for index in range(3):
            write(tmp_path / f"IM{index}", ramp())
        (tmp_path / "IM3").write_bytes(data)
        with pytest.raises(DataError, match=rf"files without an ending are DICOM, all .* got .*IM3 \({said}"):
            read_all(tmp_path)

    def test_links_splits_and_classes_are_those_of_pictures(self, tmp_path):
        for split in ("train", "Test"):
            for name in ("normal", "pneumonia"):
                write(tmp_path / "root" / split / name / "IM1", ramp())
                write(tmp_path / "other" / "b.dcm", ramp())
                (tmp_path / "root" / split / name / "linked").symlink_to(tmp_path / "other")
        samples = read_all(tmp_path / "root", classes=True)
        assert samples.y.bincount().tolist() == [2, 2]
        (tmp_path / "root" / "train" / "normal" / "gone.dcm").symlink_to("/nowhere")
        with pytest.raises(DataError, match="every link must lead somewhere; got .*gone.dcm"):
            read_all(tmp_path / "root")

    def test_dicom_and_other_pictures_of_all_sizes_and_colours_are_read_together(self, tmp_path):
        for index in range(3):
            write(tmp_path / f"{index}.dcm", ramp()[: 4 + index])
            write(tmp_path / f"{index}c.dcm", np.zeros((9, 5, 3), np.uint8), photometric="RGB")
            Image.new("RGBA", (20, 10 + index), (9, 9, 9, 9)).save(tmp_path / f"{index}.png")
            Image.fromarray(ramp()).save(tmp_path / f"{index}.tiff")
        for channels in (1, 3):
            parts = [read_all(tmp_path, split, channels=channels) for split in ("train", "test")]
            assert sum(map(len, parts)) == 12
            assert tuple(parts[0].x.shape[1:]) == (channels, 8, 8)

    def test_frames_of_a_film_are_taken_by_range_and_step(self, tmp_path):
        pixels = np.stack([np.full((8, 8), 10 * index, np.uint8) for index in range(10)])
        for name in "ab":
            write(tmp_path / f"{name}.dcm", pixels, frames=10, WindowCenter=128, WindowWidth=256)
        every = read_all(tmp_path)
        assert every.x[:, 0, 0, 0].tolist() == [10 * index for index in range(10)]
        assert read_all(tmp_path, slice_step=4).x[:, 0, 0, 0].tolist() == [0, 40, 80]
        assert read_all(tmp_path, slice_range=[2, -3], slice_step=2).x[:, 0, 0, 0].tolist() == [20, 40, 60]
        with pytest.raises(DataError, match=r"slice_range must leave .*got \[10, 20\] of 10 in .*[ab].dcm"):
            read_all(tmp_path, slice_range=[10, 20])


class TestPatients:
    @staticmethod
    def fill(root, *, patients=("zoe", "adam", "mia"), files=4):
        for patient, name in enumerate(patients):
            for index in range(files):
                tags = {"PatientID": f"{SECRET}{name}", "StudyInstanceUID": f"1.2.{patient}.{index // 2}"}
                pixels = np.full((8, 8), 10 * patient, np.uint8)
                write(
                    root / f"{patient}{index}.dcm", pixels, WindowCenter=128, WindowWidth=256, **tags,
                    SeriesInstanceUID=f"1.2.{patient}.{index}",
                )  # fmt: skip
        return root

    def test_patients_are_numbered_and_kept_in_one_split(self, tmp_path):
        root = self.fill(tmp_path)
        parts = {split: read_all(root, split, group="patient") for split in ("train", "test")}
        assert sorted(map(len, parts.values())) == [4, 8]
        for samples in parts.values():
            column = samples.columns["patient"]
            assert column.dtype == np.int64
            assert samples.x[:, 0, 0, 0].tolist() == (10 * column).tolist(), "one number for a patient, files in order"
        train = parts["train"]
        clients = Natural("patient").split(train, num_clients=2, seed=0)
        assert [len({*train.columns["patient"][own]}) for own in clients] == [1, 1]

    @pytest.mark.parametrize(("group", "count"), [("patient", 3), ("study", 6), ("series", 12), ("file", 12)])
    def test_groups(self, tmp_path, group, count):
        root = self.fill(tmp_path)
        columns = [read_all(root, split, group=group).columns[group] for split in ("train", "test")]
        assert not {*columns[0]} & {*columns[1]}
        assert sorted({*columns[0], *columns[1]}) == list(range(count))

    def test_a_patient_in_both_splits_has_one_number(self, tmp_path):
        self.fill(tmp_path / "test", patients=("mia",))
        self.fill(tmp_path / "train", patients=("adam", "mia"))
        assert set(read_all(tmp_path, "test", group="patient").columns["patient"]) == {0}
        assert read_all(tmp_path, group="patient").columns["patient"].tolist() == [1] * 4 + [0] * 4

    @pytest.mark.parametrize("value", [None, "", "  "])
    def test_a_file_without_a_patient_is_named(self, tmp_path, value):
        self.fill(tmp_path)
        write(tmp_path / "nobody.dcm", ramp(), PatientID=value)
        with pytest.raises(DataError, match="which patient it is.*got .*nobody.dcm without PatientID"):
            read_all(tmp_path, group="patient")

    def test_a_picture_has_no_patient(self, tmp_path):
        self.fill(tmp_path)
        Image.new("L", (8, 8)).save(tmp_path / "a.png")
        with pytest.raises(DataError, match="must be DICOM where data.source.group is patient; got .*a.png"):
            read_all(tmp_path, group="patient")
        assert len(read_all(tmp_path, group="file").columns["file"]) == 12

    def test_one_patient_cannot_be_divided(self, tmp_path):
        with pytest.raises(DataError, match="got 1 patients in"):
            read_all(self.fill(tmp_path, patients=("adam",)), group="patient")


class TestHeaders:
    def test_nothing_but_what_is_asked_for_is_read(self, tmp_path):
        path = write(tmp_path / "a.dcm", ramp(), PatientBirthDate="19700101", WindowCenter=5, WindowWidth=7)
        wanted = [*dicom_header.SHAPE, *dicom_header.VALUES, *dicom_header.PALETTE, *dicom_header.PIXELS]
        header = dicom_header.header_of(path, wanted, pixels=True)
        assert {element.keyword for element in header} <= {*wanted}
        assert {"Rows", "WindowWidth", "PixelData"} <= {element.keyword for element in header}
        private = ("Patient", "Name", "Date", "Time", "Institution", "Physician", "UID", "Address", "Accession")
        assert not [name for name in wanted if any(word in name for word in private)]

    def test_no_identifier_is_in_what_a_source_loads_or_logs(self, tmp_path, caplog, recwarn):
        caplog.set_level("DEBUG")
        for index in range(4):
            write(tmp_path / f"{index}.dcm", ramp(), PatientID=f"{SECRET}{index // 2}", StudyInstanceUID="x" * 80)
        caplog.clear()
        source = ImageFolder(str(tmp_path), image_size=8, channels=1, group="patient")
        loaded = [source.load(split) for split in ("train", "test")]
        assert SECRET.encode() not in pickle.dumps((source, loaded))
        assert SECRET not in caplog.text
        assert "pydicom" not in {record.name for record in caplog.records}
        assert not recwarn.list

    def test_options_reach_the_source_from_a_configuration_and_no_identifier_a_run(self, tmp_path, capsys):
        for patient in range(4):
            for index in range(3):
                write(
                    tmp_path / "data" / f"{patient}{index}.dcm", np.stack([ramp()] * 4), frames=4,
                    PatientID=f"{SECRET}{patient}",
                )  # fmt: skip
        settings = yaml.safe_load((ROOT / "configs" / "image_folder.yaml").read_text())
        options = {"window": [300, 100], "slice_range": [1, 4], "slice_step": 2, "skip_empty": True, "group": "patient"}
        own = {"root": str(tmp_path / "data"), "image_size": 32, **options}
        settings["data"] |= {
            "source": {"class_path": "ImageFolder", "init_args": own},
            "partition": {"class_path": "Natural", "init_args": {"column": "patient"}},
            "num_clients": 3,
            "batch_size": 2,
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
        command = ["partition", "--config", str(tmp_path / "c.yaml"), "--run_dir", str(tmp_path / "run")]
        assert main(command) == 0
        out, err = capsys.readouterr()
        assert out.count(" 6 ") >= 3, f"two of four frames of three files, for each of three clients: {out}"
        written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
        assert SECRET.encode() not in written + out.encode() + err.encode()
        assert main([*command, "--data.num_clients", "4"]) == 2
        assert "4 clients, 3 values" in capsys.readouterr().err
