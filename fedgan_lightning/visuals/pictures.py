"""Pure functions from tensors to pictures, uint8 of shape (h, w, 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgan_lightning.files import replacing
from fedgan_lightning.visuals.labels import literal

Picture = NDArray[np.uint8]

#: Small images are enlarged to about this many pixels a side, by whole factors, so that a person can see them.
CELL_PIXELS = 48


def grid(images: Tensor, *, columns: int) -> Picture:
    """Lay images (n, c, h, w) in [-1, 1] out in rows of ``columns``; one or three of their channels are shown."""
    from torchvision.utils import make_grid

    shown = images[:, : 3 if images.shape[1] >= 3 else 1]
    pixels = ((shown.detach().cpu().float() + 1) / 2).clamp(0, 1)
    factor = max(1, round(CELL_PIXELS / pixels.shape[-1]))
    pixels = pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    sheet = make_grid(pixels, nrow=columns, padding=2, pad_value=1.0)
    picture: Picture = (sheet * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return picture


#: Series in one plot.
SERIES_SHOWN = 40


def series(fake: Tensor, real: Tensor, *, title: str) -> Picture:
    """Plot generated series (N, c, T) beside real ones, if there are any, on one scale; the first channel."""
    figure, panels = _figure(7.2, 3.0, ncols=2, sharey=True)
    for axes, values, name, colour in zip(panels, (real, fake), ("real", "generated"), ("#555555", "#c23b22")):
        axes.plot(values[:SERIES_SHOWN, 0].T.float().numpy(), color=colour, alpha=0.35, linewidth=0.9)
        axes.set_title(f"{name}{', ' + title if title and name == 'generated' else ''}", fontsize=10)
    known = real if len(real) else fake
    low, high = float(known.min()), float(known.max())
    panels[0].set_ylim(low - 0.2, high + 0.2)
    return _render(figure)


#: Sentences on one page.
SENTENCES_SHOWN = 24


def page(lines: Sequence[str], *, title: str) -> Picture:
    """Set lines of text on a page, one below the other."""
    shown = lines[:SENTENCES_SHOWN]
    figure, axes = _figure(7.2, 0.5 + 0.22 * len(shown))
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    for place, line in enumerate(shown):
        height = 1 - (place + 0.5) / len(shown)
        axes.text(0.0, height, line, fontsize=9, va="center", transform=axes.transAxes, parse_math=False)
    return _render(figure)


#: Points a side at which a discriminator is read.
FIELD_SIDE = 60


def scatter(fake: Tensor, real: Tensor, *, title: str, belief: Callable[[Tensor], Tensor] | None = None) -> Picture:
    """Plot generated points over real ones, if there are any; one-dimensional samples as two histograms.

    Args:
        fake: Generated points (N, 1 or 2).
        real: Real points (M, 1 or 2).
        title: Above the picture.
        belief: Points (P, 2) -> the discriminator's D(x) (P,) in [0, 1], drawn behind the points; none for 1-D data.
    """
    figure, axes = _figure(4.2, 4.2)
    known = real if len(real) else fake
    if fake.shape[1] == 1:
        bins = np.linspace(float(known.min()) - 0.2, float(known.max()) + 0.2, 60)
        if len(real):
            axes.hist(real[:, 0].numpy(), bins=bins, density=True, color="#bbbbbb", label="real")
        axes.hist(fake[:, 0].numpy(), bins=bins, density=True, color="#c23b22", alpha=0.6, label="generated")
    else:
        if len(real):
            axes.scatter(real[:, 0], real[:, 1], s=3, c="#bbbbbb", linewidths=0, label="real")
        axes.scatter(fake[:, 0], fake[:, 1], s=3, c="#c23b22", linewidths=0, alpha=0.6, label="generated")
        low, high = known.min(0).values - 0.4, known.max(0).values + 0.4
        if belief is not None:
            _field(axes, belief, low, high)
        axes.set_xlim(float(low[0]), float(high[0]))
        axes.set_ylim(float(low[1]), float(high[1]))
        axes.set_aspect("equal")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="upper right", fontsize=7, markerscale=3)
    return _render(figure)


def _field(axes: Any, belief: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> None:
    x, y = (torch.linspace(float(low[i]), float(high[i]), FIELD_SIDE) for i in range(2))
    points = torch.cartesian_prod(x, y)
    values = belief(points).detach().cpu().view(FIELD_SIDE, FIELD_SIDE).T.numpy()
    axes.contourf(x.numpy(), y.numpy(), values, levels=np.linspace(0, 1, 11), cmap="PuOr", alpha=0.45, zorder=0)


def partition(counts: NDArray[np.int64], *, class_names: Sequence[str]) -> Picture:
    """Plot who holds what: clients across, classes up, area proportional to the number of samples."""
    clients, classes = counts.shape
    if classes == 1 or clients > 100:
        figure, axes = _figure(min(12.0, 3 + 0.25 * clients), 3.2)
        # All bars in one outline: thousands of their own take ten seconds.
        edges = np.repeat(np.arange(clients), 4) + np.tile([-0.4, -0.4, 0.4, 0.4], clients)
        axes.fill(edges, np.repeat(counts.sum(1), 4) * np.tile([0, 1, 1, 0], clients), color="#33638d", linewidth=0)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("samples")
    else:
        figure, axes = _figure(min(14.0, 2.5 + 0.4 * clients), 1.6 + 0.32 * classes)
        x, y = np.meshgrid(np.arange(clients), np.arange(classes), indexing="ij")
        axes.scatter(x, y, s=220 * counts / max(int(counts.max()), 1), c="#33638d", linewidths=0)
        axes.set_yticks(range(classes), [literal(str(name)[:24]) for name in class_names[:classes]], fontsize=8)
        axes.set_ylim(-0.7, classes - 0.3)
    if clients <= 40:
        axes.set_xticks(range(clients))
    axes.set_xlabel("client")
    axes.set_title(f"{int(counts.sum())} samples, {clients} clients", fontsize=10)
    return _render(figure)


def comparison(rows: Mapping[str, Tensor]) -> Picture:
    """Draw samples below each other, a named row for each version of them: images, or else curves of their numbers.

    A version that leaves [-1, 1], or fills less than a tenth of it, is scaled to its own range, which its name says.

    Args:
        rows: Samples (N, ...) by name; N the same in all.
    """
    count = len(next(iter(rows.values())))
    figure, axes = _figure(1.1 + 0.75 * count, 0.8 * len(rows), nrows=len(rows), ncols=count, squeeze=False)
    for panels, (name, samples) in zip(axes, rows.items()):
        values = samples.detach().cpu().float()
        largest = float(values.abs().max())
        is_scaled = not 0.1 < largest <= 1.01
        values = values / max(largest, 1e-30) if is_scaled else values
        for panel, own in zip(panels, values):
            _panel(panel, own)
        title = f"{name}\n(x {1 / max(largest, 1e-30):.1g})" if is_scaled else name
        panels[0].set_ylabel(literal(title), rotation=0, ha="right", va="center", fontsize=8)
    return _render(figure)


def _panel(axes: Any, sample: Tensor) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    if sample.dim() == 3 and min(sample.shape[1:]) > 1:
        shown = ((sample[: 3 if len(sample) >= 3 else 1] + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
        axes.imshow(shown.squeeze(-1) if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=1)
    else:
        axes.plot(sample.flatten().numpy(), color="#33638d", linewidth=0.9, marker=".", markersize=2)
        axes.set_ylim(-1.1, 1.1)


def save(picture: Picture, path: Path) -> None:
    """Write a PNG; a picture is complete or not there."""
    from PIL import Image

    with replacing(path) as file:
        Image.fromarray(picture).save(file, format="PNG")


def _figure(width: float, height: float, **panels: Any) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, hence without its process-wide state
    return figure, figure.subplots(**panels)


def _render(figure: Any) -> Picture:
    figure.canvas.draw()
    return np.ascontiguousarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
