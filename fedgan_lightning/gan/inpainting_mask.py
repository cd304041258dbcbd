"""Pictures with a hole: the condition of inpainting, and the shapes that holes have.

Everything is a function of uniform numbers, without loops over samples, so that it maps over clients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.gan.conditions import Condition
from fedgan_lightning.options import checked

#: A box is at most so many times as long as wide, either way.
ELONGATION = 2.0
#: Segments of a stroke turn by at most this, radians.
TURN = 0.8 * math.pi
#: Segments are this long, in sides of the picture.
SEGMENT = (0.1, 0.4)


class InpaintingMask(Condition):
    """c = [x (1 - m), m]: the picture with its hole set to 0, and the mask m, 1 in the hole, as a last channel.

    A hole is a box or free-form strokes of a brush. Its share of the picture is uniform in ``area``: a brush is as wide
    as that takes. The generator's term is ``weight`` E |G - x| over the pixels of holes.
    Source: Yu et al. 2019 (free-form masks, algorithm 1; hinge and L1), Isola et al. 2017 (L1 beside an adversarial
    loss).

    Args:
        area: Least and largest share of the picture that a hole takes, within (0, 1).
        boxes: Probability in [0, 1] that a hole is a box.
        strokes: Strokes of a free-form hole.
        vertices: Segments of a stroke.
        weight: Weight of the L1 term, for pixels in [-1, 1]; 0 leaves it out.

    Raises:
        ConfigurationError: If a setting is out of its range.
    """

    modality = "fedgan_lightning.evaluation.modalities.CompletedImages"

    @checked(area="(0, 1)", boxes="[0, 1]", strokes="[1, inf)", vertices="[1, inf)", weight="[0, inf)")
    def __init__(
        self,
        *,
        area: tuple[float, float] = (0.1, 0.4),
        boxes: float = 0.5,
        strokes: int = 2,
        vertices: int = 4,
        weight: float = 1.0,
    ) -> None:
        if not 0 < area[0] <= area[1] < 1:
            raise ConfigurationError(
                message("a hole's area must be a range within (0, 1)", received=f"{list(area)}", fix="set [0.1, 0.4]")
            )
        self.area, self.boxes, self.strokes, self.vertices = (area[0], area[1]), boxes, strokes, vertices
        self.weight = weight
        self._per_stroke = 3 + 2 * vertices
        self.num_random = 5 + strokes * self._per_stroke

    def make(self, x: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return masked(x, self.masks(u, size=(x.shape[-2], x.shape[-1])))

    def masks(self, u: Tensor, *, size: tuple[int, int]) -> Tensor:
        """Return masks (N, 1, h, w), 1 in the hole, 0 elsewhere.

        Args:
            u: Uniform numbers (N, num_random) in [0, 1).
            size: Height and width of the pictures.
        """
        low, high = self.area
        area, kind, box = low + (high - low) * u[:, 0], u[:, 1], u[:, 2:5]
        walks = u[:, 5:].reshape(-1, self.strokes, self._per_stroke)
        mask = torch.where(
            (kind < self.boxes)[:, None, None],
            box_masks(box, area, size=size),
            brush_masks(walks, area, size=size),
        )
        return mask.unsqueeze(1)

    def extra_losses(self, fake: Tensor, x: Tensor, condition: Tensor) -> dict[str, Tensor]:
        if self.weight == 0:
            return {}
        mask = condition[:, -1:]
        apart = ((fake - x).abs() * mask).sum() / (mask.sum() * x.shape[1]).clamp(min=1)
        return {"hole_l1": self.weight * apart}


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return [x (1 - m), m] (N, c + 1, h, w) of pictures (N, c, h, w) and masks (N, 1, h, w)."""
    return torch.cat([x * (1 - mask), mask], dim=1)


def box_masks(u: Tensor, area: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Return boxes (N, h, w) of about these areas (N,), elongated at most twice, anywhere within the picture.

    A large box is less elongated, for it would not fit.

    Args:
        u: Uniform numbers (N, 3): elongation, place from above, place from the left.
        area: Shares of the picture.
        size: h and w.
    """
    height, width = size
    elongation = ELONGATION ** (2 * u[:, 0] - 1)
    fewest = (area * height).ceil()  # with fewer, a box of this area would be wider than the picture
    rows = (height * (area * elongation).sqrt()).round().maximum(fewest).clamp(1, height)
    columns = (area * height * width / rows).round().clamp(1, width)
    top = (u[:, 1] * (height - rows + 1)).floor()
    left = (u[:, 2] * (width - columns + 1)).floor()
    y, x = _pixels(size, like=area)
    inside_rows = (y >= top[:, None]) & (y < (top + rows)[:, None])
    inside_columns = (x >= left[:, None]) & (x < (left + columns)[:, None])
    return (inside_rows[:, :, None] & inside_columns[:, None, :]).to(area.dtype)


def brush_masks(u: Tensor, area: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Return strokes of a round brush (N, h, w), as wide as these areas (N,) take.

    A stroke is a walk of segments that turn left and right by turns, kept within the picture. The mask is made of the
    pixels nearest to it: round(area h w) of them, and those at equal distance to the last.

    Args:
        u: Uniform numbers (N, strokes, 3 + 2 vertices): start, first direction, then a turn and a length for each.
        area: Shares of the picture.
        size: h and w.
    """
    height, width = size
    vertices = (u.shape[-1] - 3) // 2
    turns, lengths = u[..., 3 : 3 + vertices], u[..., 3 + vertices :]
    sides = torch.where(torch.arange(vertices, device=u.device) % 2 == 0, 1.0, -1.0).to(u.dtype)
    angles = 2 * math.pi * u[..., 2:3] + (sides * TURN * turns).cumsum(-1)
    lengths = SEGMENT[0] + (SEGMENT[1] - SEGMENT[0]) * lengths
    steps = torch.stack([lengths * angles.sin(), lengths * angles.cos()], dim=-1)
    start = u[..., None, 0:2]
    points = torch.cat([start, start + steps.cumsum(-2)], dim=-2).clamp(0, 1)  # (N, strokes, vertices + 1, 2)
    begins, ends = points[..., :-1, :].flatten(1, 2), points[..., 1:, :].flatten(1, 2)
    distances = _to_segments(begins, ends, size=size).amin(dim=1)  # (N, h w)
    ranks = (area * height * width).round().clamp(1, height * width).long() - 1
    reach = distances.sort(dim=1).values.gather(1, ranks[:, None])
    return (distances <= reach).to(area.dtype).reshape(-1, height, width)


def _to_segments(begins: Tensor, ends: Tensor, *, size: tuple[int, int]) -> Tensor:
    """Return squared distances (N, S, h w) of pixels from segments (N, S, 2), given in shares of the picture."""
    height, width = size
    y, x = _pixels(size, like=begins)
    y, x = (y + 0.5).repeat_interleave(width), (x + 0.5).repeat(height)
    (top, left), (down, right) = (
        (ends_of[..., 0:1] * height, ends_of[..., 1:2] * width) for ends_of in (begins, ends - begins)
    )
    y, x = y - top, x - left
    share = (y * down + x * right) / (down.square() + right.square()).clamp(min=1e-12)
    share = share.clamp(0, 1)
    return (y - share * down).square() + (x - share * right).square()


def _pixels(size: tuple[int, int], *, like: Tensor) -> tuple[Tensor, Tensor]:
    height, width = size
    where = {"device": like.device, "dtype": like.dtype}
    return torch.arange(height, **where), torch.arange(width, **where)  # type: ignore[call-overload]
