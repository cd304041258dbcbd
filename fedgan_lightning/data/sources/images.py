"""Image sources on disk: torchvision's data sets and folders of pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgan_lightning.data.folders import Splits, files_below, folders_in, named, refuse_splits_below, splits_of
from fedgan_lightning.data.formats import (
    ENDINGS,
    Found,
    Group,
    Reading,
    is_picture,
    numbers_of,
    refuse_unmarked,
)
from fedgan_lightning.data.levels import Levels
from fedgan_lightning.data.nifti import Axis
from fedgan_lightning.data.pictures import read_picture
from fedgan_lightning.data.reading import reason, user_path
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources.base import Source, Split, hold_out, resize, to_pixels
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.options import checked

logger = logging.getLogger("fedgan_lightning")
_DIGITS = tuple(str(digit) for digit in range(10))
_FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class TorchvisionImages(Source):
    """MNIST, FashionMNIST or CIFAR10 through torchvision.

    Args:
        name: The data set.
        root: Folder of the data sets; files lie in ``root/NAME`` as torchvision keeps them.
        image_size: Side in pixels; default the data set's own (28, 28, 32).
        download: Whether to download what is missing.
    """

    @checked(image_size="[1, inf)")
    def __init__(
        self,
        name: Literal["MNIST", "FashionMNIST", "CIFAR10"],
        root: str = "data",
        *,
        image_size: int | None = None,
        download: bool = True,
    ) -> None:
        self.name, self.root, self.download = name, str(user_path(root)), download
        self.image_size = image_size or (32 if name == "CIFAR10" else 28)
        self.sample_shape = (3 if name == "CIFAR10" else 1, self.image_size, self.image_size)
        self.class_names = {"MNIST": _DIGITS, "FashionMNIST": _FASHION, "CIFAR10": _CIFAR10}[name]

    def prepare(self) -> None:
        for train in (True, False):
            self._open(train=train, download=self.download)

    def load(self, split: Split) -> Samples:
        dataset = self._open(train=split == "train", download=False)
        pixels = to_pixels(torch.as_tensor(dataset.data))
        if len(pixels) != len(dataset.targets):
            raise DataError(
                message(
                    f"{self.name} must have a label for every image",
                    received=f"{len(pixels)} images and {len(dataset.targets)} labels in {self.root}",
                    fix="download it again",
                )
            )
        return Samples(x=resize(pixels, self.image_size), y=torch.as_tensor(dataset.targets, dtype=torch.int64))

    def _open(self, *, train: bool, download: bool) -> Any:
        from torchvision import datasets

        try:
            return getattr(datasets, self.name)(self.root, train=train, download=download)
        except Exception as error:  # torchvision reads broken files without looking
            raise DataError(
                message(
                    f"{self.name} must lie in the folder data.source.root, or be downloadable",
                    received=f"root={self.root!r}, download={download} ({reason(error)})",
                    fix="set data.source.root to the folder that holds it whole, or allow the download",
                )
            ) from error


class CelebA(Source):
    """CelebA through torchvision, with FedGAN's 16 classes: Eyeglasses x Male x Smiling x Young.

    Column ``identity`` holds the person, for a natural partition. Images are cropped to the central 178x178 pixels.

    Args:
        root: Folder of the data sets.
        image_size: Side in pixels, 48 in the paper.
        max_images: Keep only the first so many of a split; ``None`` keeps all (202 599 images, 1.4 GB at 48 pixels).
        download: Whether to download what is missing (needs ``gdown``).
    """

    attributes = ("Eyeglasses", "Male", "Smiling", "Young")

    @checked(image_size="[1, inf)", max_images="[1, inf)")
    def __init__(
        self, root: str = "data", *, image_size: int = 48, max_images: int | None = None, download: bool = True
    ) -> None:
        self.root, self.image_size, self.download = str(user_path(root)), image_size, download
        self.max_images = max_images
        self.sample_shape = (3, image_size, image_size)
        self.class_names = tuple(
            " ".join(name if code >> bit & 1 else f"no {name}" for bit, name in enumerate(self.attributes))
            for code in range(16)
        )

    def prepare(self) -> None:
        self._open("train", download=self.download)

    def load(self, split: Split) -> Samples:
        from torchvision.transforms.v2 import functional as transforms

        dataset = self._open(split, download=False)
        count = len(dataset) if self.max_images is None else min(self.max_images, len(dataset))
        folder = Path(self.root) / "celeba" / "img_align_celeba"
        images = torch.empty(count, *self.sample_shape, dtype=torch.uint8)
        for index in range(count):
            square = transforms.center_crop(read_picture(folder / dataset.filename[index], channels=3), [178, 178])
            images[index] = transforms.resize(square, [self.image_size, self.image_size], antialias=True)
        columns = [dataset.attr_names.index(name) for name in self.attributes]
        bits = dataset.attr[:count, columns].to(torch.int64)
        labels = (bits * torch.tensor([1, 2, 4, 8])).sum(1)
        return Samples(x=images, y=labels, columns={"identity": dataset.identity[:count].flatten().numpy()})

    def _open(self, split: Split, *, download: bool) -> Any:
        from torchvision import datasets

        try:
            return datasets.CelebA(self.root, split=split, target_type=["attr", "identity"], download=download)
        except Exception as error:  # torchvision reads broken files without looking
            raise DataError(
                message(
                    "CelebA must lie in ROOT/celeba, or be downloadable",
                    received=f"root={self.root!r}, download={download} ({reason(error)})",
                    fix="set data.source.root, or install gdown and allow the download",
                )
            ) from error


class ImageFolder(Source):
    """A folder of pictures, DICOM files or NIfTI volumes, with one subfolder per class or without classes.

    Links are followed. Column ``folder`` holds each picture's first folder below the root, for a natural partition by
    site. Where the folder has subfolders ``train`` and ``test``, in any letter case, these are the splits; without
    ``test``, ``val`` (or ``valid``, ``validation``, ``dev``) is the test split, and beside ``test`` it is not used.
    Otherwise a fixed share of the files, or of the groups, is held out. Such folders elsewhere, or beside others, are
    refused. Transparent pictures are laid over white.

    All slices of a volume, frames of a DICOM file and pages of a TIFF are pictures, never shared between the splits
    where there are two files. Measured values (DICOM, NIfTI, grey pictures of 16 bits) become bytes by one range.

    Args:
        root: The folder.
        image_size: Side in pixels; pictures are resized and centre-cropped.
        channels: 3 for colour, 1 for grey.
        classes: Whether the folders are classes.
        class_names: Names of all classes, in order, where this folder may hold only some of them, as a site of a
            federation does, or where a class has the name of a split; default the folders' names, sorted.
        test_fraction: Share held out as the test split where the folder has none of its own, in (0, 1).
        window: Centre and width of the values that are shown; default a DICOM file's own window, without one the range
            of the values in a file, and the full range of pictures of 16 bits.
        percentiles: The lower and the upper percentile of the values in a file, in place of a window.
        axis: Along which slices of a NIfTI volume are taken: of the array as it is stored, or, turned and upright,
            ``sagittal``, ``coronal`` or ``axial``.
        slice_range: First slice, frame or page of a file, and the one after the last; below 0 from the end.
        slice_step: Take every n-th of them.
        skip_empty: Whether to leave out pictures of one level throughout.
        group: What is kept in one split and numbered in a column of this name, for a natural partition: ``file``, or,
            where all files are DICOM, ``series``, ``study`` or ``patient``. Numbers follow the order of the files;
            identifiers in headers are read for no other purpose, and kept nowhere.

    Raises:
        DataError: If the folder holds no pictures, or folders that can be read in two ways, or pictures that cannot be
            read, or nothing that an option is for.
    """

    @checked(image_size="[1, inf)", test_fraction="(0, 1)", percentiles="[0, 100]", slice_step="[1, inf)")
    def __init__(
        self,
        root: str,
        *,
        image_size: int = 64,
        channels: Literal[1, 3] = 3,
        classes: bool = False,
        class_names: Sequence[str] | None = None,
        test_fraction: float = 0.1,
        window: tuple[float, float] | None = None,
        percentiles: tuple[float, float] | None = None,
        axis: Axis = 2,
        slice_range: tuple[int, int] | None = None,
        slice_step: int = 1,
        skip_empty: bool = False,
        group: Group | None = None,
    ) -> None:
        self.root, self.image_size, self.channels = user_path(root), image_size, channels
        self.classes, self.test_fraction, self.group = classes, test_fraction, group
        self.reading = Reading(channels, Levels(window, percentiles), axis, slice_range, slice_step, skip_empty)
        self.sample_shape = (channels, image_size, image_size)
        given = tuple(normalize("NFC", name) for name in class_names or ())
        if len(set(given)) != len(given):
            raise DataError(
                message("data.source.class_names must be different", received=list(given), fix="list each class once")
            )
        self._listed = given
        self.splits = Splits(None, None, None)
        if self.root.is_dir():
            self.splits = splits_of(self.root, is_wanted=is_picture, classes=given)
        if classes and given:
            self.class_names = given
        elif classes and self.root.is_dir():
            self.class_names = tuple(sorted(map(named, folders_in(self.splits.train or self.root))))

    def load(self, split: Split) -> Samples:
        base = (self.splits.train if split == "train" else self.splits.test) or self.root
        files = self._files(base)
        numbers = self._numbers(files)
        if self.splits.unused is not None and split == "train":
            unused = self.splits.unused
            logger.info(f"{unused} is not used: train is trained on, and test is what results are measured on")
        is_divided = self.splits.train is None
        single = is_divided and self.group is None and len(files) == 1  # its pictures are divided, where it has several
        if is_divided and not single:
            kept = self._held_out(numbers)[split == "test"]
            files = [path for path, number in zip(files, numbers) if number in kept]
            numbers = numbers[np.isin(numbers, kept)]
        found = [self._read(path) for path in files]
        if split == "train":
            self.reading.refuse_unused(found, files)
        owners = np.repeat(np.arange(len(files)), [len(own.pictures) for own in found])
        x = [picture for own in found for picture in own.pictures]
        if single:
            x = self._part_of_one(x, files[0], split)
            owners = owners[: len(x)]
        if not x:
            raise DataError(
                message(
                    "data.source.skip_empty must leave pictures in both splits",
                    received=f"none of {len(files)} files in {base} for {split}",
                    fix="set it to false, or check the window",
                )
            )
        groups = np.array([normalize("NFC", (*path.relative_to(base).parts[:-1], ".")[0]) for path in files])[owners]
        columns: dict[str, NDArray[Any]] = {"folder": groups}
        if self.group is not None:
            columns[self.group] = numbers[owners]
        return Samples(x=torch.stack(x), y=self._labels(groups) if self.classes else None, columns=columns)

    def _files(self, base: Path) -> list[Path]:
        files = list(files_below(base, is_picture)) if base.is_dir() else []
        if not files:
            raise DataError(
                message(
                    f"an image folder must hold pictures ({ENDINGS}, or DICOM without an ending)",
                    received=f"{base} with none",
                    fix="set data.source.root to the folder",
                )
            )
        refuse_splits_below(files, base, classes=self._listed)
        refuse_unmarked(files)
        return files

    def _numbers(self, files: list[Path]) -> NDArray[np.int64]:
        """Return the group of each file; a patient in both splits has one number."""
        if self.group is None or self.splits.train is None:
            return numbers_of(files, self.group or "file")
        everywhere = list(files_below(self.root, is_picture))
        known = dict(zip(everywhere, numbers_of(everywhere, self.group)))
        return np.array([known[path] for path in files], dtype=np.int64)

    def _held_out(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        names = {"file": "files", "series": "series", "study": "studies", "patient": "patients"}
        whole = "pictures" if self.group is None else names[self.group]
        what = f"{whole} in {self.root}"
        return hold_out(int(numbers.max()) + 1, self.test_fraction, name="image folder split", what=what)

    def _part_of_one(self, pictures: list[Tensor], path: Path, split: Split) -> list[Tensor]:
        """Return the part of one file's pictures that is a split."""
        what = f"pictures in {self.root}"
        parts = hold_out(len(pictures), self.test_fraction, name="image folder split", what=what)
        logger.warning(
            f"training and test split are pictures of one file, {path}: they are alike, and what is measured looks "
            "better than it is. Add another file"
        )
        return [pictures[index] for index in parts[split == "test"]]

    def _labels(self, groups: NDArray[np.str_]) -> Tensor:
        unknown = sorted({str(group) for group in groups} - set(self.class_names))
        if unknown:
            raise DataError(
                message(
                    "every picture must lie in the folder of its class",
                    received=f"{unknown} beside classes {list(self.class_names)}",
                    fix="move the pictures, or set classes: false",
                )
            )
        return torch.tensor([self.class_names.index(group) for group in groups], dtype=torch.int64)

    def _read(self, path: Path) -> Found:
        """Return what is taken from a file, in the size of samples."""
        found = self.reading.read(path)
        return found._replace(pictures=[resize(own.unsqueeze(0), self.image_size)[0] for own in found.pictures])
