"""Real images that ship inside a dependency: nothing to download."""

from __future__ import annotations

import numpy as np
import torch

from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources.base import Source, Split, resize
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_numpy_generator


class Digits(Source):
    """scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels, ten classes, from UCI.

    A fifth is held out as the test split, drawn once with a fixed seed.

    Args:
        image_size: Side in pixels; 8 keeps the images as they are.
    """

    @checked(image_size="[1, inf)")
    def __init__(self, image_size: int = 8) -> None:
        self.image_size = image_size
        self.sample_shape = (1, image_size, image_size)
        self.class_names = tuple(str(digit) for digit in range(10))

    def load(self, split: Split) -> Samples:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        order = make_numpy_generator(0, "digits split").permutation(len(bunch.target))
        cut = len(order) // 5
        chosen = np.sort(order[:cut] if split == "test" else order[cut:])
        grey = np.round(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
        images = resize(torch.from_numpy(grey).unsqueeze(1), self.image_size)
        return Samples(x=images, y=torch.from_numpy(bunch.target[chosen].astype(np.int64)))
