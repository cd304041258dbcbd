"""What an operator looks for in a report: who answered in which round, how long it took, and what travelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from fedgan_lightning.visuals.charts import bars, chart, text
from fedgan_lightning.visuals.participation import OUTCOMES, Participation
from fedgan_lightning.visuals.runs import Curve, Run

#: Told apart by people who do not see all colours (Okabe and Ito 2008), and from dark to light in print.
SHADES = dict(zip(OUTCOMES, ("#eef0f2", "#8fd3b6", "#56b4e9", "#e69f00", "#cc79a7", "#a63a00")))
#: Rows of the table where there are too many clients for one each.
FEW_ROWS = 10
STYLE = """
.matrix { font-size: .75rem; line-height: 1; } .matrix div { display: flex; align-items: center; gap: .5rem; }
.matrix b { flex: 0 0 4.5rem; text-align: right; font-weight: 400; white-space: nowrap; color: var(--soft); }
.matrix svg { flex: 1; min-width: 0; height: .85rem; margin: 1px 0; display: block; }
.matrix p { flex: 1; display: flex; justify-content: space-between; margin: .2rem 0 0; color: var(--soft); }
.matrix + .charts, .charts + .wide { margin-top: 1rem; } .wide th { white-space: nowrap; }
.legend { font-size: .82rem; color: var(--soft); margin: .2rem 0 .6rem; }
.legend span { white-space: nowrap; margin-right: .9em; display: inline-block; }
"""


def participation_panel(run: Run, name: str) -> str:
    """Return the part of the page about who took part; nothing for a run without a round log."""
    seen = run.participation
    if not seen.seconds:
        return ""
    asked = sum(own.asked for own in seen.clients.values())
    outcomes = ", ".join(f"{sum(counts)} {outcome}" for outcome, counts in seen.counts.items() if any(counts))
    tries = "; 1 try was abandoned" if seen.abandoned == 1 else f"; {seen.abandoned} tries were abandoned"
    facts = f"{len(seen.seconds)} rounds, {len(seen.clients)} clients asked {asked} times: {outcomes}"
    parts = [f"<h2>Who took part in {text(name)}</h2><p>{text(facts + (tries if seen.abandoned else ''))}.</p>"]
    rows = seen.rows()
    parts += [_matrix(seen, rows, name)] if rows else []
    parts += [
        f"<div class=charts>{''.join(_charts(seen, name, by_client=bool(rows)))}</div>",
        _table(seen, all_=bool(rows)),
    ]
    return "".join(parts)


def _matrix(seen: Participation, rows: Mapping[int, Sequence[int]], name: str) -> str:
    """Return a row for every client and a column for every round: an SVG each, so that labels keep their size."""
    known = {code for row in rows.values() for code in row}
    keys = "".join(
        f"<span><span class=key style='background:{shade}'></span>{outcome}</span>"
        for code, (outcome, shade) in enumerate(SHADES.items())
        if code in known
    )
    width = seen.rounds_per_column
    shared = f" A column is {width} rounds, and shows the worst of them." if width > 1 else ""
    lines = "".join(f"<div><b>client {k}</b>{_row(row)}</div>" for k, row in rows.items())
    axis = f"<div><b>round</b><p><span>0</span><span>{len(seen.seconds) - 1}</span></p></div>"
    title = f"Who answered in which round of {name}"
    late = " A late answer counts as failed in its round, too." if OUTCOMES.index("late") in known else ""
    legend = f"<p class=legend>{keys}{shared}{late} Rounds are counted from 0, as in the log.</p>"
    return f'{legend}<figure role="img" aria-label="{text(title)}" class=matrix>{lines}{axis}</figure>'


def _row(codes: Sequence[int]) -> str:
    """Return one client's row; neighbours of one shade are one rectangle."""
    start, found = 0, []
    for code, run in groupby(codes):
        length = len(list(run))
        found.append(f'<rect x="{start}" width="{length}" height="1" fill="{SHADES[OUTCOMES[code]]}"/>')
        start += length
    box = f'viewBox="0 0 {len(codes)} 1" preserveAspectRatio="none" shape-rendering="crispEdges"'
    return f"<svg {box}>{''.join(found)}</svg>"


def _charts(seen: Participation, name: str, *, by_client: bool) -> list[str]:
    rounds = [float(number + 1) for number in range(len(seen.seconds))]
    trips = any(own.round_trip[1] for own in seen.clients.values())
    kind = "task to answer" if trips else "work"
    seconds = {"the round": (rounds, seen.seconds), f"slowest client, {kind}": _curve(seen.slowest)}
    seconds[f"median client, {kind}"] = _curve(seen.median)
    found = [chart("Seconds per round", list(seconds.items()), list(seconds), owner=name)]
    if by_client:
        ways: dict[str, dict[str, float]] = {"to the client": {}, "from the client": {}}
        for k, own in sorted(seen.clients.items()):
            ways["to the client"][str(k)], ways["from the client"][str(k)] = own.bytes_down / 1e6, own.bytes_up / 1e6
        found.append(bars("Megabytes by client, all rounds", ways, owner=name))
    else:
        counts = {o: (rounds, [float(c) for c in counts]) for o, counts in seen.counts.items() if any(counts)}
        found.append(chart("Clients by what came of them", list(counts.items()), list(counts), owner=name))
    return found


def _curve(values: Mapping[int, float]) -> Curve:
    return [float(round + 1) for round in values], list(values.values())


def _table(seen: Participation, *, all_: bool) -> str:
    """Return totals by client; where there are too many, of those with most troubles."""
    chosen = sorted(seen.clients.items())
    if not all_:
        chosen = sorted(chosen, key=lambda own: (-own[1].troubles, own[0]))[:FEW_ROWS]
    outcomes = [outcome for outcome, counts in seen.counts.items() if any(counts)]
    trips = any(own.round_trip[1] for _, own in chosen)
    heads = ["client", "asked", *outcomes, "s of work", *(["s to answer"] if trips else []), "MB to it", "MB from it"]
    rows = []
    for k, own in chosen:
        cells = [str(k), str(own.asked), *(str(own.outcomes[outcome]) for outcome in outcomes), _mean(own.seconds)]
        cells += [_mean(own.round_trip)] if trips else []
        rows.append([*cells, f"{own.bytes_down / 1e6:.3g}", f"{own.bytes_up / 1e6:.3g}"])
    head = "".join(f"<th class=n>{text(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td class=n>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    note = "" if all_ else f"<p class=legend>The {len(chosen)} clients with most troubles, of {len(seen.clients)}.</p>"
    return f"{note}<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _mean(total: tuple[float, int]) -> str:
    return f"{total[0] / total[1]:.3g}" if total[1] else ""
