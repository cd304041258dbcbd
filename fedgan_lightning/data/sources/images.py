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
from fedgan_lightning.data.pictures import EXTENSIONS, read_picture
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
    """A folder of pictures, with one subfolder per class or without classes; links are followed.

    Column ``folder`` holds each picture's first folder below the root, for a natural partition by site. Where the
    folder has subfolders ``train`` and ``test``, in any letter case, these are the splits; without ``test``, ``val``
    (or ``valid``, ``validation``, ``dev``) is the test split, and beside ``test`` it is not used. Otherwise a fixed
    share is held out. Such folders elsewhere, or beside others, are refused. Transparent pictures are laid over white.

    Args:
        root: The folder.
        image_size: Side in pixels; pictures are resized and centre-cropped.
        channels: 3 for colour, 1 for grey.
        classes: Whether the folders are classes.
        class_names: Names of all classes, in order, where this folder may hold only some of them, as a site of a
            federation does, or where a class has the name of a split; default the folders' names, sorted.
        test_fraction: Share held out as the test split where the folder has none of its own, in (0, 1).

    Raises:
        DataError: If the folder holds no pictures, or folders that can be read in two ways, or pictures that cannot be
            read.
    """

    @checked(image_size="[1, inf)", test_fraction="(0, 1)")
    def __init__(
        self,
        root: str,
        *,
        image_size: int = 64,
        channels: Literal[1, 3] = 3,
        classes: bool = False,
        class_names: Sequence[str] | None = None,
        test_fraction: float = 0.1,
    ) -> None:
        self.root, self.image_size, self.channels = user_path(root), image_size, channels
        self.classes, self.test_fraction = classes, test_fraction
        self.sample_shape = (channels, image_size, image_size)
        given = tuple(normalize("NFC", name) for name in class_names or ())
        if len(set(given)) != len(given):
            raise DataError(
                message("data.source.class_names must be different", received=list(given), fix="list each class once")
            )
        self._listed = given
        self.splits = Splits(None, None, None)
        if self.root.is_dir():
            self.splits = splits_of(self.root, extensions=EXTENSIONS, classes=given)
        if classes and given:
            self.class_names = given
        elif classes and self.root.is_dir():
            self.class_names = tuple(sorted(map(named, folders_in(self.splits.train or self.root))))

    def load(self, split: Split) -> Samples:
        base = (self.splits.train if split == "train" else self.splits.test) or self.root
        files = list(files_below(base, EXTENSIONS)) if base.is_dir() else []
        if not files:
            raise DataError(
                message(
                    f"an image folder must hold pictures ({' '.join(sorted(EXTENSIONS))})",
                    received=f"{base} with none",
                    fix="set data.source.root to the folder",
                )
            )
        refuse_splits_below(files, base, classes=self._listed)
        if self.splits.train is None:
            what = f"pictures in {base}"
            chosen = hold_out(len(files), self.test_fraction, name="image folder split", what=what)[split == "test"]
            files = [files[index] for index in chosen]
        elif self.splits.unused is not None and split == "train":
            unused = self.splits.unused
            logger.info(f"{unused} is not used: train is trained on, and test is what results are measured on")
        groups = np.array([normalize("NFC", (*path.relative_to(base).parts[:-1], ".")[0]) for path in files])
        labels = self._labels(groups) if self.classes else None
        return Samples(x=torch.stack([self._read(path) for path in files]), y=labels, columns={"folder": groups})

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

    def _read(self, path: Path) -> Tensor:
        return resize(read_picture(path, channels=self.channels).unsqueeze(0), self.image_size)[0]
