"""InpaintingMask filled without a network: what a completed picture must be better than."""

from __future__ import annotations

import torch
from torch import Tensor

from fedgan_lightning.data.samples import of_bytes, to_bytes
from fedgan_lightning.errors import ConfigurationError, message

#: Radius in pixels of the neighbourhood that Telea's method reads.
TELEA_RADIUS = 3


def mean_fill(pictures: Tensor, mask: Tensor) -> Tensor:
    """Return pictures (N, c, h, w) whose holes (N, 1, h, w) have the mean of the picture's known pixels, by channel."""
    known = 1 - mask
    means = (pictures * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)
    return pictures * known + means * mask


def nearest_fill(pictures: Tensor, mask: Tensor) -> Tensor:
    """Return pictures (N, c, h, w) whose holes (N, 1, h, w) have the value of the nearest known pixel."""
    from scipy.ndimage import distance_transform_edt

    filled = []
    for picture, hole in zip(pictures, mask[:, 0]):
        rows, columns = distance_transform_edt(hole.numpy() > 0.5, return_distances=False, return_indices=True)
        filled.append(picture[:, torch.from_numpy(rows).long(), torch.from_numpy(columns).long()])
    return torch.stack(filled)


def telea_fill(pictures: Tensor, mask: Tensor) -> Tensor:
    """Return pictures (N, 1 or 3, h, w) in [-1, 1] whose holes (N, 1, h, w) are filled by fast marching, in OpenCV.

    Source: Telea 2004.

    Raises:
        ConfigurationError: If OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ConfigurationError(
            message(
                "OpenCV must be installed for Telea's method",
                received="no module cv2",
                fix="run pip install 'fedgan-lightning[editing]'",
            )
        ) from error

    filled = []
    for picture, hole in zip(pictures, mask[:, 0]):
        pixels = to_bytes(picture).permute(1, 2, 0).contiguous().numpy()
        done = cv2.inpaint(pixels, (hole > 0.5).to(torch.uint8).numpy(), TELEA_RADIUS, cv2.INPAINT_TELEA)
        filled.append(torch.from_numpy(done).reshape(*picture.shape[1:], -1).permute(2, 0, 1))
    return of_bytes(torch.stack(filled))


#: Fills by the names under which they are reported.
FILLS = {"mean_fill": mean_fill, "nearest_fill": nearest_fill, "telea_fill": telea_fill}
