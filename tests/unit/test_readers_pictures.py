"""Pictures, folders and arrays that people bring: splits, links, transparency, broken files."""

from __future__ import annotations

import io
import os
import struct
import unicodedata
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fedgan_lightning.data.pictures import read_picture
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources import CelebA, MedMNIST, TorchvisionImages
from fedgan_lightning.errors import ConfigurationError, DataError
from fedgan_lightning.sources import ImageFolder, MedMNISTFile
from fedgan_lightning.visuals.completion import read_folder


def draw(path, *, mode="RGB", size=(8, 8), color=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


@pytest.fixture
def folders(tmp_path):
    """Return a function that fills folders below a root with six pictures each, and returns the root."""

    def fill(*names, root="pics"):
        for name in names:
            for index in range(6):
                draw(tmp_path / root / name / f"{index}.png")
        return tmp_path / root

    return fill


def read(root, **options) -> ImageFolder:
    return ImageFolder(str(root), image_size=8, **options)


def sizes(source) -> tuple[int, int]:
    return len(source.load("train")), len(source.load("test"))


class TestSplits:
    @pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
    @pytest.mark.parametrize("held_out", ["test", "Testing", "val", "Valid", "VALIDATION", "dev"])
    def test_names_of_splits_are_splits_in_any_spelling(self, folders, train, held_out):
        root = folders(f"{train}/normal", f"{train}/pneumonia", f"{held_out}/normal", f"{held_out}/pneumonia")
        source = read(root, classes=True)
        assert source.class_names == ("normal", "pneumonia")
        assert sizes(source) == (12, 12)
        assert set(read(root).load("train").columns["folder"]) == {"normal", "pneumonia"}

    def test_beside_a_test_split_the_validation_split_is_not_used_which_is_said(self, folders, caplog):
        caplog.set_level("INFO", "fedgan_lightning")
        root = folders("train/a", "test/a", "val/a", "val/b")
        assert sizes(read(root)) == (6, 6)
        assert f"{root / 'val'} is not used" in caplog.text

    @pytest.mark.parametrize("classes", [True, False])
    @pytest.mark.parametrize(
        ("names", "said"),
        [
            (["train/a"], "got train in .*one split without the other"),
            (["val/a", "test/a"], "got test, val in .*one split without the other"),
            (["train/a", "Train/a", "test/a"], "two folders for one split"),
            (["train/a", "val/a", "valid/a"], "two folders for one split"),
            (["normal", "pneumonia", "train"], "got train, normal in .*splits beside folders that are none"),
            (["berlin/train/a", "berlin/test/a", "paris/train/a"], "berlin/test.*a split within a class or a client"),
            (["normal/test", "pneumonia"], "normal/test.*a split within"),
            (["train/train/a", "test/a"], "a split within"),
        ],
    )
    def test_what_can_be_read_in_two_ways_is_refused(self, folders, names, said, classes):
        with pytest.raises(DataError, match=said):
            read(folders(*names), classes=classes).load("train")

    def test_pictures_beside_splits_are_refused_and_what_systems_leave_there_is_not(self, folders):
        root = folders("train/a", "test/a")
        (root / "__MACOSX" / "train").mkdir(parents=True)
        (root / "__MACOSX" / "train" / "._0.png").write_bytes(b"no picture")
        (root / "train" / "a" / "._0.png").write_bytes(b"no picture")
        (root / "annotations").mkdir()
        assert read(root, classes=True).class_names == ("a",)
        assert sizes(read(root)) == (6, 6)
        draw(root / "cover.png")
        with pytest.raises(DataError, match="cover.png.*splits beside pictures in neither"):
            read(root)

    def test_a_class_may_be_called_train_where_classes_are_listed(self, folders):
        assert sum(sizes(read(folders("bus", "train"), classes=True, class_names=["bus", "train"]))) == 12
        root = folders("train/bus", "train/train", "test/bus", "test/train", root="split")
        source = read(root, classes=True, class_names=["bus", "train"])
        assert source.load("train").y.bincount().tolist() == [6, 6]

    def test_a_site_may_be_called_test_centre(self, folders):
        assert sum(sizes(read(folders("test centre", "trains")))) == 12


class TestLinks:
    def test_links_to_folders_and_files_are_followed(self, folders, tmp_path):
        root, other = folders("normal"), folders("elsewhere", root="other")
        (root / "pneumonia").symlink_to(other / "elsewhere")
        source = read(root, classes=True)
        counts = [source.load(split).y.bincount(minlength=2) for split in ("train", "test")]
        assert sum(counts).tolist() == [6, 6]
        (root / "normal" / "linked.png").symlink_to(other / "elsewhere" / "0.png")
        (tmp_path / "root").symlink_to(root)
        assert sum(sizes(read(tmp_path / "root", classes=True))) == 13

    def test_loops_are_walked_once(self, folders):
        root = folders("normal", "b")
        (root / "normal" / "up").symlink_to(root)
        (root / "b" / "self").symlink_to(root / "b")
        assert sum(sizes(read(root))) == 12

    @pytest.mark.parametrize("name", ["pneumonia", "normal/9.png"])
    def test_links_that_lead_nowhere_are_named(self, folders, name):
        root = folders("normal", "b")
        (root / name).symlink_to("/nowhere/at/all")
        with pytest.raises(DataError, match=f"every link must lead somewhere; got .*{name}"):
            read(root, classes=True).load("train")


def bytes_of(suffix: str) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, format=suffix)
    return file.getvalue()


def giant() -> bytes:
    """Return a PNG of 3600 megapixels, a few bytes long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


PNG, JPEG = bytes_of("PNG"), bytes_of("JPEG")
BROKEN = {
    "empty.png": (b"", "an empty file"),
    "text.png": (b"hello", "no picture in a known format"),
    "half.png": (PNG[: len(PNG) // 2], "truncated"),
    "flipped.png": (PNG[:5000] + bytes([PNG[5000] ^ 255]) + PNG[5001:], "broken|CRC|Error"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "giant.png": (giant(), "DecompressionBombError.*3600000000 pixels"),
    "new\nline.png": (b"", "an empty file"),
    os.fsdecode(b"\xff.png"): (b"", "an empty file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_picture_that_cannot_be_read_is_named_in_one_line(name, folders):
    data, said = BROKEN[name]
    root = folders("a")
    (root / "a" / name).write_bytes(data)
    with pytest.raises(DataError, match=f"every picture must be readable; got .*({said})") as caught:
        read(root).load("train")
    assert name.isprintable() is (name in str(caught.value))
    assert str(caught.value).isprintable()
    draw(root / "a" / "0_mask.png")
    with pytest.raises(DataError, match="every picture must be readable|must have a mask"):
        read_folder(root / "a", shape=(3, 8, 8))


def test_a_queue_that_is_named_as_a_picture_is_not_waited_for(folders):
    root = folders("a")
    os.mkfifo(root / "a" / "x.png")
    with pytest.raises(DataError, match=r"what is named as a picture must be a file; got .*x.png"):
        read(root).load("train")


class TestPictures:
    @pytest.mark.parametrize(
        "exif", [b"Exif\0\0garbagegarbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0"]
    )
    @pytest.mark.parametrize("suffix", ["png", "jpg"])
    def test_exif_that_cannot_be_read_is_no_orientation(self, tmp_path, exif, suffix):
        draw(tmp_path / f"a.{suffix}", size=(8, 4), color=(200, 200, 200), exif=exif)
        assert tuple(read_picture(tmp_path / f"a.{suffix}", channels=3).shape) == (3, 4, 8)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_orientation_is_undone_as_pillow_does(self, tmp_path, orientation):
        from PIL import ImageOps

        picture, exif = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)), Image.Exif()
        exif[0x0112] = orientation
        picture.save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as saved:
            upright = np.array(ImageOps.exif_transpose(saved))
        assert read_picture(tmp_path / "a.png", channels=1)[0].numpy().tolist() == upright.tolist()

    @pytest.mark.parametrize(
        ("mode", "color", "options", "shown"),
        [
            ("RGBA", (240, 30, 10, 0), {}, [255, 255, 255]),
            ("RGBA", (240, 30, 10, 255), {}, [240, 30, 10]),
            ("RGBA", (0, 0, 0, 128), {}, [127, 127, 127]),
            ("LA", (10, 0), {}, [255, 255, 255]),
            ("L", 7, {"transparency": 7}, [255, 255, 255]),
            ("RGB", (1, 2, 3), {"transparency": (1, 2, 3)}, [255, 255, 255]),
        ],
    )
    def test_what_is_transparent_shows_white(self, tmp_path, mode, color, options, shown):
        path = draw(tmp_path / "a.png", mode=mode, color=color, **options)
        assert read_picture(path, channels=3)[:, 0, 0].tolist() == shown
        assert int(read_picture(path, channels=1)[0, 0, 0]) == pytest.approx(np.mean(shown), abs=50)
        assert (int(read_picture(path, channels=1)[0, 0, 0]) == 255) is (shown[0] == 255)

    @pytest.mark.parametrize("transparency", [3, bytes([255, 255, 255, 0])])
    def test_what_is_transparent_in_a_palette_shows_white(self, tmp_path, transparency):
        picture = Image.new("P", (8, 8), 3)
        picture.putpalette([level for level in range(256) for _ in range(3)])
        picture.save(tmp_path / "a.png", transparency=transparency)
        assert read_picture(tmp_path / "a.png", channels=3)[:, 0, 0].tolist() == [255, 255, 255]

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "PA"])
    def test_modes_of_eight_bits_are_read_together(self, tmp_path, mode):
        for index, other in enumerate([mode, "RGB", "L"]):
            draw(tmp_path / "p" / f"{index}.tif", mode=other, size=(8 + index, 9))
        assert sizes(read(tmp_path / "p")) == (2, 1)

    def test_of_an_animation_the_first_frame_is_taken(self, tmp_path):
        for index in range(3):
            frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0))]
            frames[0].save(tmp_path / f"{index}.gif", save_all=True, append_images=frames[1:])
        assert read(tmp_path).load("train").x[0, :, 0, 0].tolist() == [255, 0, 0]

    def test_names_of_classes_are_one_in_any_normal_form(self, folders):
        root = folders(unicodedata.normalize("NFD", "café"), "b")
        source = read(root, classes=True, class_names=["caf\u00e9", "b"])
        assert set(source.load("train").y.tolist()) == {0, 1}
        assert "caf\u00e9" in source.load("train").columns["folder"]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"channels": 4}, "channels .* one of 1, 3; got 4"),
            ({"image_size": 0}, "image_size .* at least 1; got 0"),
            ({"test_fraction": 1.5}, r"test_fraction .* in \(0, 1\); got 1.5"),
            ({"classes": True, "class_names": ["a", "a"]}, "class_names must be different"),
        ],
    )
    def test_settings_that_cannot_be(self, folders, options, said):
        with pytest.raises((DataError, ConfigurationError), match=said):
            ImageFolder(str(folders("a")), **{"image_size": 8, **options})

    def test_pictures_to_complete_are_opened_in_the_same_way(self, tmp_path):
        draw(tmp_path / "a.png", mode="RGBA", color=(9, 9, 9, 0))
        draw(tmp_path / "a_mask.png", mode="RGBA", color=(255, 255, 255, 0))
        _, x, mask = read_folder(tmp_path, shape=(3, 8, 8))
        assert float(x.min()) == 1.0
        assert float(mask.sum()) == 0, "what is transparent in a mask is no hole"
        draw(tmp_path / "a.jpg")
        with pytest.raises(DataError, match="differ before the dot; got a.jpg"):
            read_folder(tmp_path, shape=(3, 8, 8))
        (tmp_path / "a.jpg").unlink()
        with pytest.raises(DataError, match="1 or 3 channels; got 5"):
            read_folder(tmp_path, shape=(5, 8, 8))


def arrays(path, *, without=(), **changes):
    found = {}
    for split in ("train", "test"):
        found[f"{split}_images"] = np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8)
        found[f"{split}_labels"] = (np.arange(20) % 3)[:, None]
    np.savez(path, **{name: values for name, values in {**found, **changes}.items() if name not in without})
    return path


def twenty(*values):
    return np.resize(np.array(values), 20)


LABELS = {
    "object": (twenty(0, "a").astype(object), "without unpickling; got ValueError"),
    "text": (twenty("a", "b"), "whole numbers of classes, from 0; got <U1, a at position 0"),
    "NaN": (twenty(0, np.nan), "got 10 of 20 others, nan at position 1"),
    "fractions": (twenty(0.2, 0.9, 1.7), "got 20 of 20 others, 0.2 at position 0"),
    "negative": (twenty(0, -1), "10 of 20 others, -1 at position 1"),
    "huge": (twenty(0, 10**12), "10 of 20 others, 1000000000000 at position 1"),
    "gaps": (twenty(0, 1_000_000), "must number its classes 0, 1, 2, ...; got class 1000000"),
    "dates": (twenty(np.datetime64("2020-01-01")), "got datetime64"),
    "several": (np.zeros((20, 3)), r"got multi-label \(20, 3\)"),
    "scalar": (np.array(3), r"shape \(n,\) or \(n, 1\); got shape \(\)"),
    "short": (np.zeros(19, int), "must have a label for each of 20 images; got 19"),
}
IMAGES = {
    "floats": (np.zeros((20, 8, 8)), "holds images, uint8 .*; got float64"),
    "channels first": (np.zeros((20, 3, 8, 8), np.uint8), "must have its channels last"),
    "flat": (np.zeros((20, 64), np.uint8), r"got uint8 of shape \(20, 64\)"),
    "none": (np.zeros((0, 8, 8), np.uint8), "at least one image"),
    "objects": (np.array([None] * 20), "without unpickling"),
}


class TestArrays:
    @pytest.mark.parametrize("name", LABELS)
    def test_labels_that_are_none(self, tmp_path, name):
        values, said = LABELS[name]
        with pytest.raises(DataError, match=f"array train_labels of .*a.npz .*{said}"):
            MedMNISTFile(str(arrays(tmp_path / "a.npz", train_labels=values))).load("train")

    @pytest.mark.parametrize("name", IMAGES)
    def test_images_that_are_none(self, tmp_path, name):
        values, said = IMAGES[name]
        with pytest.raises(DataError, match=f"array train_images of .*a.npz .*{said}"):
            MedMNISTFile(str(arrays(tmp_path / "a.npz", train_images=values))).load("train")

    @pytest.mark.parametrize("labels", [twenty(0.0, 1.0), twenty(False, True), twenty(0, 1).astype(np.uint64)])
    def test_whole_numbers_of_any_type_are_labels(self, tmp_path, labels):
        source = MedMNISTFile(str(arrays(tmp_path / "a.npz", train_labels=labels)))
        assert source.load("train").y.bincount().tolist() == [10, 10]

    @pytest.mark.parametrize("length", [5, 25])
    def test_a_column_of_another_length_is_named(self, tmp_path, length):
        source = MedMNISTFile(str(arrays(tmp_path / "a.npz", train_site=np.arange(length))))
        with pytest.raises(DataError, match=f"array train_site .* each of 20 samples; got {length} values"):
            source.load("train")

    def test_columns_are_vectors_and_what_is_none_is_left(self, tmp_path):
        path = arrays(tmp_path / "a.npz", train_site=np.arange(20)[:, None], train_mask=np.zeros((20, 8, 8)))
        columns = MedMNISTFile(str(path)).load("train").columns
        assert {name: column.shape for name, column in columns.items()} == {"site": (20,)}

    @pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
    def test_a_flipped_byte_names_file_and_array(self, tmp_path, share):
        data = bytearray(arrays(tmp_path / "a.npz").read_bytes())
        data[int(len(data) * share)] ^= 255
        (tmp_path / "a.npz").write_bytes(data)
        with pytest.raises(DataError, match=r"array \w+ of .*a.npz .*BadZipFile"):
            [MedMNISTFile(str(tmp_path / "a.npz")).load(split) for split in ("train", "test")]

    @pytest.mark.parametrize("length", [0, 1000, -30])
    def test_a_file_that_was_cut_off(self, tmp_path, length):
        path = arrays(tmp_path / "a.npz")
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(DataError, match="MedMNIST's layout; got .*cut off"):
            MedMNISTFile(str(path))

    def test_a_header_that_promises_more_than_there_is_memory(self, tmp_path):
        header = io.BytesIO()
        facts = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**6, 28)}
        np.lib.format.write_array_header_1_0(header, facts)
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
            for name in ("train_images", "train_labels", "test_images", "test_labels"):
                file.writestr(f"{name}.npy", header.getvalue())
        with pytest.raises(DataError, match="array train_images .*MemoryError"):
            MedMNISTFile(str(tmp_path / "a.npz"))

    def test_what_is_no_archive(self, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros(3))
        for name, said in (("a.npy", "not an .npz file"), ("b.npz", "FileNotFoundError"), (".", "IsADirectoryError")):
            with pytest.raises(DataError, match=f"MedMNIST's layout.*{said}"):
                MedMNISTFile(str(tmp_path / name))
        with pytest.raises(DataError, match=r"no arrays \['test_labels'\]"):
            MedMNISTFile(str(arrays(tmp_path / "c.npz", without=["test_labels"])))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_half_downloaded_mnist_is_one_line(tmp_path, share):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 12), ("t10k", 6)):
        images = struct.pack(">IIII", 2051, count, 28, 28) + bytes(count * 784)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images[: int(len(images) * share)])
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(count))
    with pytest.raises(DataError, match="MNIST must lie in the folder data.source.root"):
        TorchvisionImages("MNIST", root=str(tmp_path), download=False).load("train")


def test_names_and_sizes_that_do_not_exist():
    with pytest.raises(ConfigurationError, match="name .* one of MNIST, FashionMNIST, CIFAR10; got 'mnist'"):
        TorchvisionImages("mnist")
    with pytest.raises(ConfigurationError, match="size .* one of 28, 64, 128, 224; got 32"):
        MedMNIST("pneumoniamnist", size=32)
    with pytest.raises(ConfigurationError, match="max_images .* at least 1 or None; got 0"):
        CelebA(max_images=0)


class TestSamples:
    def test_a_bad_sample_is_counted_once_and_named(self):
        x = torch.zeros(9, 4)
        x[3, 1] = x[3, 2] = float("nan")
        with pytest.raises(DataError, match="NaN or infinity in 1 of 9 samples, first in sample 3"):
            Samples(x)

    @pytest.mark.parametrize(
        ("y", "columns", "said"),
        [
            (torch.zeros(9), {}, "labels must be whole numbers of shape .*got torch.float32"),
            (torch.zeros(9, 1, dtype=torch.int64), {}, r"of shape \(9, 1\)"),
            (None, {"site": np.arange(8)}, "9 samples, 8 values of site"),
        ],
    )
    def test_labels_and_columns_fit_the_samples(self, y, columns, said):
        with pytest.raises(DataError, match=said):
            Samples(torch.zeros(9, 4), y, columns)
