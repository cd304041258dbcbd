"""Medical images: the sets of MedMNIST by name, and any .npz file in their layout."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

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
        self.name, self.root, self.suffix = name.lower(), Path(root), "" if size == 28 else f"_{size}"
        self.path, self.download = self.root / f"{self.name}{self.suffix}.npz", download
        facts = self._facts()
        if self.path.exists():
            found = MedMNISTFile(str(self.path))
            self.sample_shape, self.class_names = found.sample_shape, found.class_names
        elif facts is None or not download:
            raise DataError(
                message(
                    f"{self.path.name} lies in the folder data.source.root, or is downloaded by its name",
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
            address, digest = facts[f"url{self.suffix}"], facts[f"MD5{self.suffix}"]
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                download_url(address, str(self.root), filename=self.path.name, md5=digest)
            except (OSError, RuntimeError) as error:
                raise DataError(
                    message("MedMNIST can be reached", received=f"{address} ({error})", fix=f"put it at {self.path}")
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
                    "a 2-D set with single labels",
                    received=self.name,
                    fix=f"choose one of {', '.join(sorted(single))}",
                )
            )
        return facts


class MedMNISTFile(Source):
    """An .npz file in MedMNIST's layout: ``{train,val,test}_images`` and ``{train,val,test}_labels`` of shape (n, 1).

    Further arrays ``train_NAME`` and ``test_NAME`` of length n become columns, for a natural partition.

    Args:
        path: The file.
        image_size: Side in pixels; default the file's own.
        class_names: Names of the classes; default their numbers.
    """

    @checked(image_size="[1, inf)")
    def __init__(self, path: str, *, image_size: int | None = None, class_names: tuple[str, ...] | None = None) -> None:
        self.path = Path(path)
        with self._open() as arrays:
            shape, highest = arrays["train_images"].shape, int(arrays["train_labels"].max(initial=0))
        self.image_size = image_size or int(shape[1])
        self.sample_shape = (int(shape[3]) if len(shape) == 4 else 1, self.image_size, self.image_size)
        self.class_names = class_names or tuple(str(label) for label in range(highest + 1))

    def load(self, split: Split) -> Samples:
        with self._open() as arrays:
            labels = torch.from_numpy(np.asarray(arrays[f"{split}_labels"], dtype=np.int64))
            if labels.dim() == 2 and labels.shape[1] > 1:
                raise DataError(
                    message(
                        "labels are single: shape (n,) or (n, 1)",
                        received=f"multi-label {tuple(labels.shape)}",
                        fix="choose one column as the label and save the file anew",
                    )
                )
            pixels = to_pixels(torch.from_numpy(np.asarray(arrays[f"{split}_images"])))
            known = {f"{split}_images", f"{split}_labels"}
            columns = {
                name[len(split) + 1 :]: np.asarray(arrays[name])
                for name in arrays.files
                if name.startswith(f"{split}_") and name not in known
            }
        return Samples(x=resize(pixels, self.image_size), y=labels.flatten(), columns=columns)

    def _open(self) -> Any:
        try:
            arrays = np.load(self.path, allow_pickle=False)
            missing = sorted({"train_images", "train_labels", "test_images", "test_labels"} - set(arrays.files))
        except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise DataError(
                message(
                    "an .npz file in MedMNIST's layout",
                    received=f"{self.path} ({type(error).__name__}: {error})",
                    fix="set data.source.path to the downloaded file",
                )
            ) from error
        if missing:
            raise DataError(
                message(
                    "an .npz file in MedMNIST's layout",
                    received=f"no arrays {missing} in {self.path}",
                    fix="rename them",
                )
            )
        return arrays
