"""Image sources on disk: torchvision's data sets and folders of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources.base import Source, Split, resize, to_pixels
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_numpy_generator

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
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
        self.name, self.root, self.download = name, root, download
        self.image_size = image_size or (32 if name == "CIFAR10" else 28)
        self.sample_shape = (3 if name == "CIFAR10" else 1, self.image_size, self.image_size)
        self.class_names = {"MNIST": _DIGITS, "FashionMNIST": _FASHION, "CIFAR10": _CIFAR10}[name]

    def prepare(self) -> None:
        for train in (True, False):
            self._open(train=train, download=self.download)

    def load(self, split: Split) -> Samples:
        dataset = self._open(train=split == "train", download=False)
        pixels = to_pixels(torch.as_tensor(dataset.data))
        return Samples(x=resize(pixels, self.image_size), y=torch.as_tensor(dataset.targets, dtype=torch.int64))

    def _open(self, *, train: bool, download: bool) -> Any:
        from torchvision import datasets

        try:
            return getattr(datasets, self.name)(self.root, train=train, download=download)
        except (RuntimeError, OSError) as error:
            raise DataError(
                message(
                    f"{self.name} lies in the folder data.source.root, or can be downloaded",
                    received=f"root={self.root!r}, download={download} ({str(error).splitlines()[0]})",
                    fix="set data.source.root to the folder that holds it, or allow the download",
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
        self.root, self.image_size, self.max_images, self.download = root, image_size, max_images, download
        self.sample_shape = (3, image_size, image_size)
        self.class_names = tuple(
            " ".join(name if code >> bit & 1 else f"no {name}" for bit, name in enumerate(self.attributes))
            for code in range(16)
        )

    def prepare(self) -> None:
        self._open("train", download=self.download)

    def load(self, split: Split) -> Samples:
        from PIL import Image
        from torchvision.transforms.v2 import functional as transforms

        dataset = self._open(split, download=False)
        count = len(dataset) if self.max_images is None else min(self.max_images, len(dataset))
        folder = Path(self.root) / "celeba" / "img_align_celeba"
        images = torch.empty(count, *self.sample_shape, dtype=torch.uint8)
        for index in range(count):
            with Image.open(folder / dataset.filename[index]) as picture:
                pixels = transforms.pil_to_tensor(picture.convert("RGB"))
            square = transforms.center_crop(pixels, [178, 178])
            images[index] = transforms.resize(square, [self.image_size, self.image_size], antialias=True)
        columns = [dataset.attr_names.index(name) for name in self.attributes]
        bits = dataset.attr[:count, columns].to(torch.int64)
        labels = (bits * torch.tensor([1, 2, 4, 8])).sum(1)
        return Samples(x=images, y=labels, columns={"identity": dataset.identity[:count].flatten().numpy()})

    def _open(self, split: Split, *, download: bool) -> Any:
        from torchvision import datasets

        try:
            return datasets.CelebA(self.root, split=split, target_type=["attr", "identity"], download=download)
        except (RuntimeError, OSError) as error:
            raise DataError(
                message(
                    "CelebA lies in ROOT/celeba, or can be downloaded",
                    received=f"root={self.root!r}, download={download} ({str(error).splitlines()[0]})",
                    fix="set data.source.root, or install gdown and allow the download",
                )
            ) from error


class ImageFolder(Source):
    """A folder of pictures, with one subfolder per class or without classes.

    Column ``folder`` holds each picture's first folder below the root, for a natural partition by site. Where the
    folder has subfolders ``train`` and ``test`` these are the splits; otherwise a fixed share is held out.

    Args:
        root: The folder.
        image_size: Side in pixels; pictures are resized and centre-cropped.
        channels: 3 for colour, 1 for grey.
        classes: Whether the folders are classes.
        class_names: Names of all classes, in order, where this folder may hold only some of them, as a site of a
            federation does; default the folders' names, sorted.
        test_fraction: Share held out as the test split where the folder has none of its own, in (0, 1).
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
        self.root, self.image_size, self.channels = Path(root), image_size, channels
        self.classes, self.test_fraction = classes, test_fraction
        self.sample_shape = (channels, image_size, image_size)
        self.has_splits = (self.root / "train").is_dir() and (self.root / "test").is_dir()
        if classes and class_names:
            self.class_names = tuple(class_names)
        elif classes and self.root.is_dir():
            base = self.root / "train" if self.has_splits else self.root
            found = (path.name for path in base.iterdir() if path.is_dir())
            self.class_names = tuple(sorted(name for name in found if name[0] != "."))

    def load(self, split: Split) -> Samples:
        base = self.root / split if self.has_splits else self.root
        files = sorted(path for path in base.rglob("*") if path.suffix.lower() in EXTENSIONS) if base.is_dir() else []
        if not files:
            raise DataError(
                message(
                    f"an image folder holds pictures ({' '.join(sorted(EXTENSIONS))})",
                    received=f"{base} with none",
                    fix="set data.source.root to the folder",
                )
            )
        if not self.has_splits:
            order = make_numpy_generator(0, "image folder split").permutation(len(files))
            cut = max(1, round(len(files) * self.test_fraction))
            if cut >= len(files):
                raise DataError(
                    message(
                        "a folder without splits holds pictures for both",
                        received=f"{len(files)} in {base} with test_fraction={self.test_fraction}",
                        fix="add pictures or lower test_fraction",
                    )
                )
            files = [files[index] for index in np.sort(order[:cut] if split == "test" else order[cut:])]
        groups = np.array([path.relative_to(base).parts[0] if path.parent != base else "." for path in files])
        labels = None
        if self.classes:
            unknown = sorted({str(group) for group in groups} - set(self.class_names))
            if unknown:
                raise DataError(
                    message(
                        "every picture lies in the folder of its class",
                        received=f"{unknown} beside classes {list(self.class_names)}",
                        fix="move the pictures, or set classes: false",
                    )
                )
            labels = torch.tensor([self.class_names.index(group) for group in groups], dtype=torch.int64)
        return Samples(x=torch.stack([self._read(path) for path in files]), y=labels, columns={"folder": groups})

    def _read(self, path: Path) -> Tensor:
        from PIL import Image, ImageOps
        from torchvision.transforms.v2 import functional as transforms

        try:
            with Image.open(path) as picture:
                if picture.mode[0] in "IF":  # Pillow would cut them off at 255: X-rays all white
                    raise DataError(
                        message(
                            "pictures have 8 bits a channel",
                            received=f"{path} of mode {picture.mode}",
                            fix="rescale the folder's pictures, with one window for all, before they are read",
                        )
                    )
                upright = ImageOps.exif_transpose(picture).convert("RGB" if self.channels == 3 else "L")
                pixels: Tensor = transforms.pil_to_tensor(upright)
        except OSError as error:
            raise DataError(
                message("every picture can be read", received=f"{path} ({error})", fix="remove or repair the file")
            ) from error
        return resize(pixels.unsqueeze(0), self.image_size)[0]
