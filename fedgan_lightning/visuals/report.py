"""``python -m fedgan_lightning report RUN [RUN ...]``: one self-contained HTML page about a run, or comparing several.

Pictures are embedded and charts are vector graphics; the page loads nothing, so it can be sent by mail or archived.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgan_lightning.dp.statement import words_of
from fedgan_lightning.files import expanded, write_text
from fedgan_lightning.visuals.audit_panel import audit_panel
from fedgan_lightning.visuals.charts import bars, chart, colour, text
from fedgan_lightning.visuals.participation_charts import STYLE as MATRIX_STYLE
from fedgan_lightning.visuals.participation_charts import participation_panel
from fedgan_lightning.visuals.runs import Curve, Run, damaged, differing, read_run

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
    "mode_divergence": "Divergence of mode histograms",
    "mode_spread": "Spread within modes (the data's: .97)",
    "sliced_wasserstein": "Sliced Wasserstein distance",
}
TRAINING = {
    "train/loss_d": "Discriminator loss",
    "train/loss_g": "Generator loss",
    "train/d_real": "D(x)",
    "train/d_fake": "D(G(z))",
    "privacy/epsilon": "Epsilon spent, one client",
    "privacy/epsilon_example": "Epsilon spent, one record",
    "drift/generator": "Cosine between clients' generator updates",
    "drift/discriminator": "Cosine between clients' discriminator updates",
    "gap/held_minus_absent": "Clients' D logits, held minus absent classes",
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
        ConfigurationError: If a directory holds no run, or one with files that are not as ``fit`` wrote them.
    """
    runs = [read_run(path) for path in paths]
    default = runs[0].path if len(runs) == 1 else runs[0].path.resolve().parent
    target = expanded(out) if out is not None else default / "report.html"
    try:
        html = page(runs)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # values of another kind than fit writes
        raise damaged(runs[0].path / "summary.json", error) from error
    write_text(target, html)
    return target


def page(runs: Sequence[Run]) -> str:
    """Return the page as HTML."""
    names = _names(runs)
    title = f"Federation: {names[0]}" if len(runs) == 1 else f"{len(runs)} federations compared"
    parts = [f"<h1>{text(title)}</h1>", f"<p class=sub>{text(_subtitle(runs))}</p>"]
    if len(runs) > 1:
        parts.append(_comparison(runs, names))
    else:
        parts.append(_cards(runs[0]))
    parts += [_quality(runs, names), _training(runs, names)]
    for run, name in zip(runs, names):
        parts += [_privacy(run, name), _grids(run, name), _breakdown(run, name), _partition(run, name)]
        parts += [participation_panel(run, name), _bytes(run, name)]
        parts += [_evaluation(run, name), _audit(run, name)]
    parts += [
        f"<h2>Settings of {text(name)}</h2><details><summary>config.yaml</summary>"
        f"<pre>{text(run.config_text)}</pre></details>"
        for run, name in zip(runs, names)
        if run.config_text
    ]
    head = f"<title>{text(title)}</title><style>{STYLE}{MATRIX_STYLE}</style>"
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html>\n<html lang="en"><head>{meta}{head}</head><body>{"".join(parts)}</body></html>\n'


def _privacy(run: Run, name: str) -> str:
    """Return what the run guarantees, in words; that there is nothing, where there is nothing."""
    listed = "".join(f"<li>{text(line)}</li>" for line in words_of(run.summary.get("privacy")))
    return f"<h2>Privacy of {text(name)}</h2><ul class=privacy>{listed}</ul>"


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
    cards = "".join(f"<div class=card><b>{text(value)}</b><span>{text(name)}</span></div>" for name, value in chosen)
    return f"<div class=cards>{cards}</div>"


def _comparison(runs: Sequence[Run], names: Sequence[str]) -> str:
    heads = "".join(
        f"<th class=n><span class=key style='background:{colour(index)}'></span>{text(name)}</th>"
        for index, name in enumerate(names)
    )
    finals = [{**run.summary.get("final", {}), **_test_values(run)} for run in runs]
    metrics = list(dict.fromkeys(name for final in finals for name in final if name != "rounds"))
    metrics.sort(key=lambda name: list(TITLES).index(name) if name in TITLES else len(TITLES))
    rows = [(name, [run.summary.get(name, "") for run in runs]) for name in ("status", "rounds")]
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
        f"<tr><td>{text(name)}</td>" + "".join(f"<td class=n>{text(value)}</td>" for value in values) + "</tr>"
        for name, values in rows
    )
    return f"<div class=wide><table><tr><th></th>{heads}</tr>{body}</table></div>"


def _test_values(run: Run) -> dict[str, Any]:
    """Return what the full evaluation found beyond the last one in training; what is drawn as bars is left out."""
    known = {**run.summary.get("final", {}), **run.summary.get("evaluation", {})}
    found = {name: v for name, v in run.summary.get("test", {}).items() if isinstance(v, float) and "/" not in name}
    return {f"{name} (test command)": value for name, value in found.items() if known.get(name) != value}


# ---------------------------------------------------------------------- curves


def _quality(runs: Sequence[Run], names: Sequence[str]) -> str:
    known = dict.fromkeys(name for run in runs for name in run.metrics if not name.endswith("_raw"))
    ordered = [name for name in TITLES if name in known] + [name for name in known if name not in TITLES]
    charts = []
    for metric in ordered:
        curves = [(name, run.metrics[metric]) for name, run in zip(names, runs) if metric in run.metrics]
        floor = runs[0].summary.get("evaluation", {}).get(f"{metric}_floor")
        charts.append(chart(TITLES.get(metric, metric), curves, names, metric=metric, floor=floor))
    for metric in ("fid", "kid"):
        by_bytes = [(name, _against_bytes(run, metric)) for name, run in zip(names, runs) if metric in run.metrics]
        by_bytes = [(name, curve) for name, curve in by_bytes if curve[0]]
        if by_bytes:
            title = f"{metric.upper()} against megabytes sent"
            charts.append(chart(title, by_bytes, names, metric=metric, across="MB both ways"))
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
            charts.append(chart(title, curves, names))
    return f"<h2>Training</h2><div class=charts>{''.join(charts)}</div>" if charts else ""


# ---------------------------------------------------------------------- one run after the other


def _grids(run: Run, name: str) -> str:
    more = {"interpolation.png": "from one latent to another", "reals.png": "real"}
    pictures = [*run.grids, *((title, path) for file, title in more.items() if (path := run.picture(file)))]
    figures = "".join(
        f"<figure>{_image(path, f'{name}, {title}')}<figcaption>{text(title)}</figcaption></figure>"
        for title, path in pictures
    )
    return f"<h2>Samples of {text(name)}, from one fixed z</h2><div class=grids>{figures}</div>" if figures else ""


def _breakdown(run: Run, name: str) -> str:
    """Return bars of what the full evaluation says by class and by client."""
    found, charts = run.summary.get("test", {}), []
    shares = {"generated": _by(found, "class_share"), "union": _by(found, "class_share_of_union")}
    if shares["generated"]:
        charts.append(bars("Share of each class", shares, owner=name))
    recognised = _by(found, "class_recognised")
    if recognised:
        charts.append(bars("Recognised where asked for", {"": recognised}, owner=name))
    distances = _by(found, "client_fid")
    if distances:
        charts.append(bars("FID to each client's own data", {"": distances}, owner=name))
    attacks = {
        "nearest sample": _by(found, "membership_auc"),
        "discriminator": _by(found, "membership_auc_discriminator"),
        "split alone": _by(found, "membership_auc_of_split"),
    }
    if attacks["nearest sample"]:
        known = {title: values for title, values in attacks.items() if values}
        charts.append(bars("Membership inference by client, AUC (.5 at best)", known, owner=name))
    title = f"<h2>By class and by client in {text(name)}</h2>"
    return f"{title}<div class=charts>{''.join(charts)}</div>" if charts else ""


def _by(values: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Return the values of ``metric/LABEL`` by label."""
    found = {name.split("/", 1)[1]: value for name, value in values.items() if name.split("/", 1)[0] == metric}
    return {label: value for label, value in found.items() if not label.endswith("_raw") and value is not None}


def _partition(run: Run, name: str) -> str:
    path = run.picture("partition.png")
    if path is None and not run.sizes:
        return ""
    sizes = run.sizes
    facts = f"{len(sizes)} clients with {min(sizes)} to {max(sizes)} samples, {sum(sizes)} in all" if sizes else ""
    picture = f"<figure>{_image(path, f'{name}: who holds what')}</figure>" if path else ""
    return f"<h2>Who holds what in {text(name)}</h2><p>{text(facts)}</p>{picture}"


def _bytes(run: Run, name: str) -> str:
    down, up = run.summary.get("bytes_down", {}), run.summary.get("bytes_up", {})
    if not down and not up:
        return ""
    rows = [(network, [_size(down.get(network, 0)), _size(up.get(network, 0))]) for network in {**down, **up}]
    rows.append(("all", [_size(sum(down.values())), _size(sum(up.values()))]))
    heads = "<th class=n>to clients</th><th class=n>to server</th>"
    return f"<h2>What travelled in {text(name)}</h2>{_rows(heads, rows)}"


def _evaluation(run: Run, name: str) -> str:
    columns: dict[str, Mapping[str, Any]] = {
        "final": run.summary.get("final", {}),
        "best": {metric: entry["value"] for metric, entry in run.summary.get("best", {}).items()},
        "test command": run.summary.get("test", {}),
        "of the data": run.summary.get("evaluation", {}),
    }
    columns = {title: values for title, values in columns.items() if values}
    metrics = dict.fromkeys(metric for values in columns.values() for metric in values if metric != "rounds")
    metrics = {metric: None for metric in metrics if "/" not in metric}  # what is drawn as bars
    rows = [(metric, [_number(values.get(metric)) for values in columns.values()]) for metric in metrics]
    heads = "".join(f"<th class=n>{text(title)}</th>" for title in columns)
    return f"<h2>Evaluation of {text(name)}</h2>{_rows(heads, rows)}" if rows else ""


def _audit(run: Run, name: str) -> str:
    """Return what attacks have found, where there is an audit."""
    picture = run.picture("inversion.png")
    figure = f"<figure>{_image(picture, f'{name}: samples and reconstructions')}</figure>" if picture else ""
    panel = audit_panel(run, name)
    return f"<h2>Attacks on {text(name)}</h2>{panel}{figure if run.audit else ''}" if panel else ""


# ---------------------------------------------------------------------- small things


def _image(path: Path, description: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{text(description)}" src="data:image/png;base64,{data}">'


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
