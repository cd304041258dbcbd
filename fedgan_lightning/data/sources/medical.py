"""Medical images: the sets of MedMNIST by name, and any .npz file in their layout."""

from __future__ import annotations

from http.client import HTTPException
from typing import Any, Literal

import torch

from fedgan_lightning.data.arrays import Arrays
from fedgan_lightning.data.reading import reason, user_path
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources.base import Source, Split, resize, to_pixels
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.options import checked


class MedMNIST(Source):
    """A 2-D set of MedMNIST with single labels, by its name: ``pneumoniamnist``, ``bloodmnist``, ``pathmnist``, ...

    Source: Yang et al. 2023. Names of the classes, the addresses and their hashes come from the package ``medmnist``
    (the extra ``medical``); a file that is there is read without it.

    Args:
        name: The set.
        root: Folder of its files, ``NAME.npz`` or ``NAME_SIZE.npz``.
        size: Side in pixels of the published images.
        download: Whether to download what is missing.

    Raises:
        DataError: If the file is missing and may not or cannot be downloaded, or the set has no single labels.
    """

    @checked()
    def __init__(
        self, name: str, root: str = "data", *, size: Literal[28, 64, 128, 224] = 28, download: bool = False
    ) -> None:
        self.name, self.root, self.suffix = name.lower(), user_path(root), "" if size == 28 else f"_{size}"
        self.path, self.download = self.root / f"{self.name}{self.suffix}.npz", download
        facts = self._facts()
        if self.path.exists():
            found = MedMNISTFile(str(self.path))
            self.sample_shape, self.class_names = found.sample_shape, found.class_names
        elif facts is None or not download:
            raise DataError(
                message(
                    f"{self.path.name} must lie in the folder data.source.root, or be downloadable by its name",
                    received=f"root={root!r}, download={download}" + ("" if facts else ", no package medmnist"),
                    fix="put it there, or set download: true (pip install 'fedgan-lightning[medical]')",
                )
            )
        if facts is not None:
            self.sample_shape = (int(facts["n_channels"]), size, size)
            self.class_names = tuple(facts["label"][str(label)] for label in range(len(facts["label"])))

    def prepare(self) -> None:
        if not self.path.exists():
            from torchvision.datasets.utils import download_url

            facts = self._facts() or {}
            try:
                address, digest = facts[f"url{self.suffix}"], facts[f"MD5{self.suffix}"]
            except KeyError as error:
                raise DataError(
                    message(
                        "the package medmnist must know the set in this size",
                        received=f"{self.path.name}, no {error}",
                        fix="update medmnist, or choose another data.source.size",
                    )
                ) from error
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                download_url(address, str(self.root), filename=self.path.name, md5=digest)
            except (OSError, RuntimeError, HTTPException) as error:
                raise DataError(
                    message(
                        "MedMNIST must be reachable, and data.source.root writable",
                        received=f"{address} ({reason(error)})",
                        fix=f"put it at {self.path}",
                    )
                ) from error

    def load(self, split: Split) -> Samples:
        return MedMNISTFile(str(self.path)).load(split)

    def _facts(self) -> dict[str, Any] | None:
        """Return what the package says of the set; ``None`` without the package."""
        try:
            from medmnist import INFO
        except ImportError:
            return None
        facts: dict[str, Any] | None = INFO.get(self.name)
        if facts is None or "3d" in self.name or "multi-label" in facts["task"]:
            single = [flag for flag, own in INFO.items() if "3d" not in flag and "multi-label" not in own["task"]]
            raise DataError(
                message(
                    "the set must be 2-D with single labels",
                    received=self.name,
                    fix=f"choose one of {', '.join(sorted(single))}",
                )
            )
        return facts


class MedMNISTFile(Source):
    """An .npz file in MedMNIST's layout: ``{train,val,test}_images`` and ``{train,val,test}_labels`` of shape (n, 1).

    Further arrays ``train_NAME`` and ``test_NAME`` of length n become columns, for a natural partition. The validation
    split is not used.

    Args:
        path: The file.
        image_size: Side in pixels; default the file's own.
        class_names: Names of the classes; default their numbers.

    Raises:
        DataError: If the file has not this layout, or labels are no class numbers.
    """

    @checked(image_size="[1, inf)")
    def __init__(self, path: str, *, image_size: int | None = None, class_names: tuple[str, ...] | None = None) -> None:
        self.path = user_path(path)
        arrays = self._open()
        shape, labels = arrays.pixels("train_images").shape, arrays.labels("train_labels")
        self.image_size = image_size or int(shape[1])
        self.sample_shape = (int(shape[3]) if len(shape) == 4 else 1, self.image_size, self.image_size)
        if not class_names:
            highest = int(labels.max(initial=0))
            if highest and highest >= len(labels):
                raise arrays.unfit("train_labels", "must number its classes 0, 1, 2, ...", f"class {highest}")
            class_names = tuple(str(label) for label in range(highest + 1))
        self.class_names = tuple(class_names)

    def load(self, split: Split) -> Samples:
        arrays = self._open()
        images, labels = arrays.pixels(f"{split}_images"), arrays.labels(f"{split}_labels")
        if len(images) != len(labels):
            raise arrays.unfit(
                f"{split}_labels", f"must have a label for each of {len(images)} images", f"{len(labels)}"
            )
        known = {f"{split}_images", f"{split}_labels"}
        columns = arrays.columns(f"{split}_", length=len(images), known=known)
        pixels = resize(to_pixels(torch.from_numpy(images)), self.image_size)
        return Samples(x=pixels, y=torch.from_numpy(labels), columns=columns)

    def _open(self) -> Arrays:
        wanted = [f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels")]
        layout = "an .npz file in MedMNIST's layout"
        return Arrays(self.path, wanted=wanted, option="data.source.path", layout=layout)
