"""Charts as vector graphics inside a page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedgan_lightning.visuals.labels import literal
from fedgan_lightning.visuals.runs import Curve

#: Told apart by people who do not see all colours (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
#: Most labels below bars that can be read; of more every second or third is shown.
MOST_LABELS = 32
#: Metrics whose scale spans orders of magnitude.
LOGARITHMIC = ("fid", "kid", "intra_fid")


def chart(
    title: str,
    curves: Sequence[tuple[str, Curve]],
    names: Sequence[str],
    *,
    metric: str = "",
    floor: float | None = None,
    across: str = "rounds",
    owner: str = "",
) -> str:
    """Return curves.

    Args:
        title: Above the chart.
        curves: (name, (positions, values)); a name's colour is that of its place in ``names``.
        names: Names of all runs on the page.
        metric: What is drawn; some take a logarithmic axis.
        floor: Value to draw a line at.
        across: What the horizontal axis counts.
        owner: The run, where charts of several with one title share a page.
    """
    figure, axes = _figure(title)
    for name, (steps, values) in curves:
        marker = "o" if len(steps) < 25 else None
        look: dict[str, Any] = {"marker": marker, "markersize": 3, "linewidth": 1.6}
        axes.plot(
            steps, values, label=literal(name) if len(names) > 1 else None, color=colour(names.index(name)), **look
        )
    positive = all(value > 0 for _, (_, values) in curves for value in values)
    if metric.removesuffix("_test") in LOGARITHMIC and positive:
        axes.set_yscale("log")
    if floor is not None and (positive and floor > 0):
        axes.axhline(floor, color="#777777", linewidth=1, linestyle=":", label="floor, real against real")
    axes.set_xlabel(across, fontsize=8)
    axes.grid(visible=True, color="#eeeeee")
    if len(names) > 1 or floor is not None:
        axes.legend(fontsize=7, frameon=False)
    return _drawn(figure, title, owner=owner)


def bars(title: str, series: Mapping[str, Mapping[str, float]], *, owner: str) -> str:
    """Return one bar for every label and series.

    Args:
        title: Above the chart.
        series: Values by label, by name of the series.
        owner: The run; charts of several runs share a page.
    """
    figure, axes = _figure(title)
    labels = list(dict.fromkeys(label for values in series.values() for label in values))
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        positions = [place + width * (index + 0.5) - 0.4 for place in range(len(labels))]
        heights = [values.get(label, 0.0) for label in labels]
        axes.bar(positions, heights, width=width, color=colour(index), label=literal(name) or None)
    crowded = len(labels) > 12 or max(map(len, labels)) > 3
    every = -(-len(labels) // MOST_LABELS)
    axes.set_xticks(
        range(0, len(labels), every), [literal(label[:16]) for label in labels[::every]], rotation=90 if crowded else 0
    )
    axes.grid(visible=True, axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    if any(series):
        axes.margins(y=0.2)  # room for the names above the bars
        axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=len(series), borderaxespad=0.1)
    return _drawn(figure, title, owner=owner)


def colour(index: int) -> str:
    """Return the colour of the ``index``-th thing on the page."""
    return COLOURS[index % len(COLOURS)]


def text(value: Any) -> str:
    """Return ``value`` as text that a page shows literally."""
    return html.escape(str(value), quote=True)


def _figure(title: str) -> Any:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.7), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.set_title(literal(title), fontsize=10, loc="left")
    axes.tick_params(which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _drawn(figure: Any, title: str, *, owner: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawing, count=1)
    return f'<figure role="img" aria-label="{text(title)}">{_own_names(drawing, f"{owner} {title}")}</figure>'


def _own_names(drawing: str, title: str) -> str:
    """Give the names inside a drawing a prefix: several drawings share a page."""
    prefix = re.sub(r"\W+", "_", title)
    drawing = re.sub(r'id="([^"]+)"', rf'id="{prefix}_\1"', drawing)
    drawing = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}_\1)", drawing)
    return re.sub(r'href="#([^"]+)"', rf'href="#{prefix}_\1"', drawing)
