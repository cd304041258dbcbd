"""``python -m fedgan_lightning report RUN [RUN ...]``: one self-contained HTML page about a run, or comparing several.

Pictures are embedded and charts are vector graphics; the page loads nothing, so it can be sent by mail or archived.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgan_lightning.files import write_text
from fedgan_lightning.visuals.runs import Curve, Run, differing, read_run

#: Told apart by people who do not see all colours (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
#: Metrics that come first, and what they are called.
TITLES = {
    "fid": "FID, clients' union",
    "fid_test": "FID, test split",
    "kid": "KID, clients' union",
    "kid_test": "KID, test split",
    "classes": "Classes made",
    "class_distance": "Distance of class histograms",
    "class_accuracy": "Requested class recognised",
    "classifier_score": "Classifier score",
    "modes": "Modes",
    "high_quality": "High-quality samples",
    "sliced_wasserstein": "Sliced Wasserstein distance",
}
#: Metrics whose scale spans orders of magnitude.
LOGARITHMIC = ("fid", "kid", "intra_fid")
TRAINING = {
    "train/loss_d": "Discriminator loss",
    "train/loss_g": "Generator loss",
    "train/d_real": "D(x)",
    "train/d_fake": "D(G(z))",
    "drift/generator": "Cosine between clients' generator updates",
    "drift/discriminator": "Cosine between clients' discriminator updates",
}
STYLE = """
:root { color-scheme: light; --ink: #1a1a1a; --soft: #5f6368; --line: #dadce0; --back: #ffffff; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.2rem; color: var(--ink); background: var(--back);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p.sub { color: var(--soft); margin: 0 0 1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .6rem; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .8rem; }
.card b { display: block; font-size: 1.25rem; font-weight: 600; } .card span { color: var(--soft); font-size: .82rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: .8rem; }
.charts svg { width: 100%; height: auto; display: block; }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)); gap: .8rem; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .85rem; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); image-rendering: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; background: #f6f8fa; padding: .8rem; font-size: .8rem; border-radius: 8px; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
"""


def write_report(paths: Sequence[str | Path], *, out: str | Path | None = None) -> Path:
    """Write the page about these run directories; return its path.

    Args:
        paths: Run directories.
        out: File to write; default ``report.html`` in the run directory, or beside the first of several.

    Raises:
        ConfigurationError: If a directory holds no run.
    """
    runs = [read_run(path) for path in paths]
    default = runs[0].path if len(runs) == 1 else runs[0].path.resolve().parent
    target = Path(out) if out is not None else default / "report.html"
    write_text(target, page(runs))
    return target


def page(runs: Sequence[Run]) -> str:
    """Return the page as HTML."""
    names = _names(runs)
    title = f"Federation: {names[0]}" if len(runs) == 1 else f"{len(runs)} federations compared"
    parts = [f"<h1>{_text(title)}</h1>", f"<p class=sub>{_text(_subtitle(runs))}</p>"]
    if len(runs) > 1:
        parts.append(_comparison(runs, names))
    else:
        parts.append(_cards(runs[0]))
    parts += [_quality(runs, names), _training(runs, names)]
    for run, name in zip(runs, names):
        parts += [_grids(run, name), _partition(run, name), _bytes(run, name), _evaluation(run, name)]
    parts += [
        f"<h2>Settings of {_text(name)}</h2><details><summary>config.yaml</summary>"
        f"<pre>{_text(run.config_text)}</pre></details>"
        for run, name in zip(runs, names)
        if run.config_text
    ]
    head = f"<title>{_text(title)}</title><style>{STYLE}</style>"
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html>\n<html lang="en"><head>{meta}{head}</head><body>{"".join(parts)}</body></html>\n'


def _names(runs: Sequence[Run]) -> list[str]:
    """Return short names that tell the runs apart."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _subtitle(runs: Sequence[Run]) -> str:
    first = runs[0].summary
    versions = ", ".join(f"{name} {version}" for name, version in first.get("versions", {}).items())
    if len(runs) > 1:
        return versions
    facts = [first.get("status", ""), f"{first.get('rounds', 0)} rounds", f"seed {first.get('seed')}"]
    return "; ".join([*map(str, facts), f"{first.get('wall_seconds', 0):.0f} s", versions])


# ---------------------------------------------------------------------- what it came to


def _cards(run: Run) -> str:
    final = run.summary.get("final", {})
    chosen = [(TITLES[name], _number(final[name])) for name in TITLES if name in final]
    facts = run.summary.get("evaluation", {})
    if "fid_floor" in facts:
        chosen.append(("FID floor, real against real", _number(facts["fid_floor"])))
    chosen.append(("bytes both ways", _size(_total_bytes(run))))
    cards = "".join(f"<div class=card><b>{_text(value)}</b><span>{_text(name)}</span></div>" for name, value in chosen)
    return f"<div class=cards>{cards}</div>"


def _comparison(runs: Sequence[Run], names: Sequence[str]) -> str:
    heads = "".join(
        f"<th class=n><span class=key style='background:{_colour(index)}'></span>{_text(name)}</th>"
        for index, name in enumerate(names)
    )
    finals = [{**run.summary.get("final", {}), **_test_values(run)} for run in runs]
    metrics = list(dict.fromkeys(name for final in finals for name in final if name != "rounds"))
    metrics.sort(key=lambda name: list(TITLES).index(name) if name in TITLES else len(TITLES))
    rows = [("rounds", [run.summary.get("rounds", "") for run in runs])]
    rows += [(TITLES.get(name, name), [_number(final.get(name)) for final in finals]) for name in metrics]
    rows += [
        ("bytes both ways", [_size(_total_bytes(run)) for run in runs]),
        ("seconds", [f"{run.summary.get('wall_seconds', 0):.0f}" for run in runs]),
    ]
    settings = [(name, [str(value) for value in values]) for name, values in differing(list(runs)).items()]
    tables = f"<h2>Results</h2>{_rows(heads, rows)}"
    return tables + (f"<h2>Settings that differ</h2>{_rows(heads, settings)}" if settings else "")


def _rows(heads: str, rows: Sequence[tuple[str, Sequence[Any]]]) -> str:
    body = "".join(
        f"<tr><td>{_text(name)}</td>" + "".join(f"<td class=n>{_text(value)}</td>" for value in values) + "</tr>"
        for name, values in rows
    )
    return f"<div class=wide><table><tr><th></th>{heads}</tr>{body}</table></div>"


def _test_values(run: Run) -> dict[str, Any]:
    found = run.summary.get("test", {})
    return {f"{name} (test command)": value for name, value in found.items() if isinstance(value, float)}


# ---------------------------------------------------------------------- curves


def _quality(runs: Sequence[Run], names: Sequence[str]) -> str:
    known = dict.fromkeys(name for run in runs for name in run.metrics if not name.endswith("_raw"))
    ordered = [name for name in TITLES if name in known] + [name for name in known if name not in TITLES]
    charts = []
    for metric in ordered:
        curves = [(name, run.metrics[metric]) for name, run in zip(names, runs) if metric in run.metrics]
        floor = runs[0].summary.get("evaluation", {}).get(f"{metric}_floor")
        charts.append(_chart(TITLES.get(metric, metric), curves, names, metric=metric, floor=floor))
    for metric in ("fid", "kid"):
        by_bytes = [(name, _against_bytes(run, metric)) for name, run in zip(names, runs) if metric in run.metrics]
        by_bytes = [(name, curve) for name, curve in by_bytes if curve[0]]
        if by_bytes:
            title = f"{metric.upper()} against megabytes sent"
            charts.append(_chart(title, by_bytes, names, metric=metric, across="MB both ways"))
    return f"<h2>Quality</h2><div class=charts>{''.join(charts)}</div>" if charts else ""


def _against_bytes(run: Run, metric: str) -> Curve:
    steps, totals = run.bytes_by_round
    sent = {0.0: 0.0, **dict(zip(steps, totals))}
    points = [(sent[step] / 1e6, value) for step, value in zip(*run.metrics[metric]) if step in sent]
    return [x for x, _ in points], [y for _, y in points]


def _training(runs: Sequence[Run], names: Sequence[str]) -> str:
    charts = []
    for tag, title in TRAINING.items():
        curves = [(name, run.scalars[tag]) for name, run in zip(names, runs) if tag in run.scalars]
        if curves:
            charts.append(_chart(title, curves, names))
    return f"<h2>Training</h2><div class=charts>{''.join(charts)}</div>" if charts else ""


def _chart(
    title: str,
    curves: Sequence[tuple[str, Curve]],
    names: Sequence[str],
    *,
    metric: str = "",
    floor: float | None = None,
    across: str = "rounds",
) -> str:
    """Return curves as a vector graphic."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.7), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for name, (steps, values) in curves:
        marker = "o" if len(steps) < 25 else None
        look: dict[str, Any] = {
            "marker": marker,
            "markersize": 3,
            "linewidth": 1.6,
            "color": _colour(names.index(name)),
        }
        axes.plot(steps, values, label=name if len(names) > 1 else None, **look)
    positive = all(value > 0 for _, (_, values) in curves for value in values)
    if metric.removesuffix("_test") in LOGARITHMIC and positive:
        axes.set_yscale("log")
    if floor is not None and (positive and floor > 0):
        axes.axhline(floor, color="#777777", linewidth=1, linestyle=":", label="floor, real against real")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(across, fontsize=8)
    axes.tick_params(which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#eeeeee")
    if len(names) > 1 or floor is not None:
        axes.legend(fontsize=7, frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawing, count=1)
    return f'<figure role="img" aria-label="{_text(title)}">{_own_names(drawing, title)}</figure>'


def _own_names(drawing: str, title: str) -> str:
    """Give the names inside a drawing a prefix: several drawings share a page."""
    prefix = re.sub(r"\W+", "_", title)
    drawing = re.sub(r'id="([^"]+)"', rf'id="{prefix}_\1"', drawing)
    drawing = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}_\1)", drawing)
    return re.sub(r'href="#([^"]+)"', rf'href="#{prefix}_\1"', drawing)


# ---------------------------------------------------------------------- one run after the other


def _grids(run: Run, name: str) -> str:
    pictures = [*run.grids, *([("real", path)] if (path := run.picture("reals.png")) else [])]
    figures = "".join(
        f"<figure>{_image(path, f'{name}, {title}')}<figcaption>{_text(title)}</figcaption></figure>"
        for title, path in pictures
    )
    return f"<h2>Samples of {_text(name)}, from one fixed z</h2><div class=grids>{figures}</div>" if figures else ""


def _partition(run: Run, name: str) -> str:
    path = run.picture("partition.png")
    if path is None and not run.sizes:
        return ""
    sizes = run.sizes
    facts = f"{len(sizes)} clients with {min(sizes)} to {max(sizes)} samples, {sum(sizes)} in all" if sizes else ""
    picture = f"<figure>{_image(path, f'{name}: who holds what')}</figure>" if path else ""
    return f"<h2>Who holds what in {_text(name)}</h2><p>{_text(facts)}</p>{picture}"


def _bytes(run: Run, name: str) -> str:
    down, up = run.summary.get("bytes_down", {}), run.summary.get("bytes_up", {})
    if not down and not up:
        return ""
    rows = [(network, [_size(down.get(network, 0)), _size(up.get(network, 0))]) for network in {**down, **up}]
    rows.append(("all", [_size(sum(down.values())), _size(sum(up.values()))]))
    heads = "<th class=n>to clients</th><th class=n>to server</th>"
    return f"<h2>What travelled in {_text(name)}</h2>{_rows(heads, rows)}"


def _evaluation(run: Run, name: str) -> str:
    columns: dict[str, Mapping[str, Any]] = {
        "final": run.summary.get("final", {}),
        "best": {metric: entry["value"] for metric, entry in run.summary.get("best", {}).items()},
        "test command": run.summary.get("test", {}),
        "of the data": run.summary.get("evaluation", {}),
    }
    columns = {title: values for title, values in columns.items() if values}
    metrics = dict.fromkeys(metric for values in columns.values() for metric in values if metric != "rounds")
    rows = [(metric, [_number(values.get(metric)) for values in columns.values()]) for metric in metrics]
    heads = "".join(f"<th class=n>{_text(title)}</th>" for title in columns)
    return f"<h2>Evaluation of {_text(name)}</h2>{_rows(heads, rows)}" if rows else ""


# ---------------------------------------------------------------------- small things


def _image(path: Path, description: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_text(description)}" src="data:image/png;base64,{data}">'


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3g}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def _total_bytes(run: Run) -> float:
    return float(sum(sum(run.summary.get(f"bytes_{way}", {}).values()) for way in ("down", "up")))
