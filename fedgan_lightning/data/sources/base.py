"""The interface of a source: where samples come from, and what is known of them before they are read."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgan_lightning.data.reading import read_text, reason, user_path
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.errors import CheckpointError, DataError, message
from fedgan_lightning.seeding import make_numpy_generator

Split = Literal["train", "test"]


class Source(ABC):
    """A data set with a training and a test split.

    Attributes:
        sample_shape: Shape of one sample, known before anything is read.
        class_names: Names of the classes; empty without labels.
        has_shared_metadata: Whether samples mean the same to all clients. Where they depend on something that the
            clients make together, such as a vocabulary, they do after :meth:`with_shared_metadata`.
        modality: Class path of what measures and draws the samples, a
            :class:`~fedgan_lightning.evaluation.modalities.Modality`; ``None`` lets the shape of samples decide.
    """

    sample_shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    has_shared_metadata: bool = True
    modality: str | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    def prepare(self) -> None:  # noqa: B027 - most sources have nothing to download
        """Download what is missing; called once per machine."""

    @abstractmethod
    def load(self, split: Split) -> Samples:
        """Return all samples of a split.

        Raises:
            DataError: If files are missing or do not hold what they should.
        """

    def with_shared_metadata(self, samples: Samples, parts: Sequence[NDArray[np.int64]]) -> Source:
        """Return the source as all clients use it, now that it is known who holds what.

        Args:
            samples: Those of the training split, as :meth:`load` gave them.
            parts: The positions in it that each client holds.
        """
        return self

    def shared_metadata(self) -> dict[str, Any]:
        """Return, as plain values for checkpoints, what the clients share; nothing for most sources."""
        return {}


def check_shared_metadata(data: Any, found: Mapping[str, Any], *, path: str) -> None:
    """Refuse the networks of a run whose clients share something else, such as another vocabulary.

    Args:
        data: The data of this run.
        found: What a checkpoint holds of the other's shared metadata.
        path: The checkpoint, for the error.

    Raises:
        CheckpointError: If the two differ.
    """
    own = data.build_shared_metadata().shared_metadata()
    differing = [name for name in {*own, *found} if own.get(name) != found.get(name)]
    if differing:
        name = min(differing)
        sizes = [len(values.get(name, ())) for values in (found, own)]
        raise CheckpointError(
            message(
                f"a checkpoint must be used with the {name} that it was trained with",
                received=f"{path} with another {name} ({sizes[0]} entries, {sizes[1]} here)",
                fix="use the data settings of that run, or train anew",
            )
        )


def read_names(path: str | Path, *, option: str, numbered: str) -> list[str]:
    """Return the names in a JSON file that clients share.

    Args:
        path: The file, a list of text.
        option: Where it was named, for the error; runs write a file of that name.
        numbered: What the list says, such as "words by id", for the error.

    Raises:
        DataError: If the file is missing or no list of text.
    """
    text = read_text(user_path(path), option=f"data.source.{option}", what=f"a JSON list of {numbered}", settable=False)
    try:
        names = json.loads(text)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("not a list of names")
    except (ValueError, RecursionError) as error:
        raise DataError(
            message(
                f"data.source.{option} must be a JSON list of {numbered}",
                received=f"{path} ({reason(error)})",
                fix=f"name a {option}.json that a run wrote",
            )
        ) from error
    return names


def hold_out(count: int, test_fraction: float, *, name: str, what: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of the training and of the test split, drawn once with a fixed seed; each holds at least 1.

    Args:
        count: Of how many.
        test_fraction: Share of the test split.
        name: Of the draw.
        what: Which things of which file, for the error.

    Raises:
        DataError: If there are fewer than two, or none is left to train on.
    """
    order = make_numpy_generator(0, name).permutation(count)
    cut = max(1, round(count * test_fraction))
    if cut >= count:
        raise DataError(
            message(
                "what has no test split of its own must be enough for training and test",
                received=f"{count} {what} with data.source.test_fraction {test_fraction}",
                fix="add some, or lower test_fraction",
            )
        )
    return np.sort(order[cut:]), np.sort(order[:cut])


def to_pixels(images: Tensor) -> Tensor:
    """Return (n, c, h, w) uint8 images from (n, h, w) or (n, h, w, c) ones.

    Raises:
        DataError: If they are not uint8, or of another rank.
    """
    if images.dtype != torch.uint8 or images.dim() not in (3, 4):
        raise DataError(
            message(
                "images must be uint8 of shape (n, h, w) or (n, h, w, c)",
                received=f"{images.dtype} of shape {tuple(images.shape)}",
                fix="convert the file",
            )
        )
    return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()


def resize(images: Tensor, image_size: int) -> Tensor:
    """Resize and centre-crop (n, c, h, w) uint8 images to a square, antialiased bilinear as Pillow does."""
    if images.shape[-1] == images.shape[-2] == image_size:
        return images
    from torchvision.transforms.v2 import functional as transforms

    return torch.cat(
        [
            transforms.center_crop(transforms.resize(chunk, [image_size], antialias=True), [image_size, image_size])
            for chunk in images.split(1000)
        ]
    )


def check_samples(samples: Samples, *, shape: tuple[int, ...], num_classes: int) -> None:
    """Refuse samples that are not what their source promises.

    Raises:
        DataError: If they are not.
    """
    if not isinstance(samples, Samples):
        raise DataError(
            message("a source must load Samples", received=type(samples).__name__, fix="return Samples(x, y) from load")
        )
    if samples.y is not None and num_classes and not 0 <= int(samples.y.min()) <= int(samples.y.max()) < num_classes:
        raise DataError(
            message(
                f"labels must be numbers in [0, {num_classes}), one for each of class_names",
                received=f"{int(samples.y.min())} to {int(samples.y.max())}",
                fix="give the source a name for every class",
            )
        )
    if tuple(samples.x.shape[1:]) != shape:
        raise DataError(
            message(
                f"samples of the source must have the shape {list(shape)}",
                received=list(samples.x.shape[1:]),
                fix="set the source's image_size and channels to the data's",
            )
        )
