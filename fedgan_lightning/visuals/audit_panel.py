"""What attacks on a run have found, as a part of its page: rates with intervals, and what an update shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedgan_lightning.visuals.charts import bars, text
from fedgan_lightning.visuals.runs import Run

#: All clients at once, as the metric of the attacks calls them.
POOLED = "pooled"


def audit_panel(run: Run, name: str) -> str:
    """Return tables and bars about a run's audit as HTML; nothing without one.

    Args:
        run: The run.
        name: What the page calls it.
    """
    if not run.audit:
        return ""
    found = run.audit.get("membership", {})
    rates = [_rates(found), _charts(found, name)]
    return f"<p>{text(run.audit.get('meaning', ''))}</p>{''.join(rates)}{_inversion(run.audit.get('inversion', {}))}"


def _parts(metric: str) -> tuple[str, str, str] | None:
    """Return (attack, false-positive rate, client) of ``attack_tpr/ATTACK@FPR/CLIENT``."""
    kind, _, rest = metric.partition("/")
    attack_and_rate, _, client = rest.partition("/")
    attack, separator, rate = attack_and_rate.partition("@")
    return (attack, rate, client) if kind == "attack_tpr" and separator else None


def _rates(found: Mapping[str, Any]) -> str:
    """Return the true-positive rates over all clients, with their intervals."""
    told = [parts for parts in map(_parts, found) if parts is not None and parts[2] == POOLED]
    attacks, at = (list(dict.fromkeys(parts[place] for parts in told)) for place in (0, 1))
    if not told:
        return ""
    heads = "".join(f"<th class=n>found at {text(rate)} false positives</th>" for rate in at)
    rows = "".join(_row(found, attack, at) for attack in attacks)
    counts = [found.get(f"attack_{side}/{POOLED}", "?") for side in ("members", "others")]
    facts = f"All clients: {counts[0]} members, {counts[1]} others; 95 % intervals unless set otherwise."
    return (
        f"<p>{text(facts)}</p><div class=wide><table><tr><th>attack</th>{heads}<th class=n>advantage</th></tr>"
        f"{rows}</table></div>"
    )


def _row(found: Mapping[str, Any], attack: str, at: list[str]) -> str:
    cells = ""
    for rate in at:
        names = [f"attack_tpr{end}/{attack}@{rate}/{POOLED}" for end in ("", "_lower", "_upper")]
        value, low, high = (_share(found.get(own)) for own in names)
        cells += f"<td class=n>{value} ({low} to {high})</td>"
    label = f"{attack} (control, without a generator)" if attack == "split" else attack
    advantage = _share(found.get(f"attack_advantage/{attack}/{POOLED}"))
    return f"<tr><td>{text(label)}</td>{cells}<td class=n>{advantage}</td></tr>"


def _share(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else ""


def _charts(found: Mapping[str, Any], name: str) -> str:
    """Return bars of the rates by client, at the largest false-positive rate that was asked for."""
    told = {metric: parts for metric in found if (parts := _parts(metric)) is not None and parts[2] != POOLED}
    told = {metric: parts for metric, parts in told.items() if not parts[2].endswith("_raw")}
    if not told:
        return ""
    rate = max((parts[1] for parts in told.values()), key=float)
    series: dict[str, dict[str, float]] = {}
    for metric, (attack, own, client) in told.items():
        if own == rate:
            series.setdefault(attack, {})[client] = float(found[metric])
    charts = [
        bars(f"Members found by client, {attack}, at {rate} false positives", {"": values}, owner=name)
        for attack, values in series.items()
    ]
    return f"<div class=charts>{''.join(charts)}</div>"


def _inversion(found: Mapping[str, Any]) -> str:
    """Return what single steps of a discriminator have shown."""
    if "left_out" in found:
        return f"<p>Gradient inversion is left out: {text(found['left_out'])}.</p>"
    if not found:
        return ""
    columns = {
        "relative error": found["relative_error"],
        "cosine": found["cosine"],
        "label read": found.get("label_accuracy", {}),
    }
    columns = {title: values for title, values in columns.items() if values}
    heads = "".join(f"<th class=n>{text(title)}</th>" for title in columns)
    rows = "".join(
        f"<tr><td>{text(view)}</td>"
        + "".join(f"<td class=n>{values.get(view, float('nan')):.3g}</td>" for values in columns.values())
        + "</tr>"
        for view in found["relative_error"]
    )
    protection = found.get("protection", {})
    facts = (
        f"Samples of client {found['client']}, reconstructed from one discriminator step on each; clipped to "
        f"{protection.get('clip')}, noise {protection.get('noise_multiplier')} times that."
    )
    return (
        f"<p>{text(facts)}</p><div class=wide><table><tr><th>the server has the update</th>{heads}</tr>{rows}"
        f"</table></div>"
    )
