"""The model card of a run: what it is, what it was trained on and how, what it may reveal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedgan_lightning.dp.statement import words_of

#: Name of the file in the run directory.
CARD = "model_card.md"


def card(summary: Mapping[str, Any], *, model: Any, data: Any) -> str:
    """Return a model card in Markdown.

    Args:
        summary: What ``summary.json`` holds.
        model: The global module.
        data: Its data module.
    """
    children = [(name, child) for name, child in model.named_children() if any(True for _ in child.parameters())]
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in children}
    source = getattr(data, "source", None)
    trained_on, clients = type(data if source is None else source).__name__, getattr(data, "num_clients", 0)
    lines = [
        f"# {type(model).__name__} trained by a federation",
        "",
        "## What it is, in parameters",
        "",
        *(f"- {n}: {type(getattr(model, n)).__name__}, {count:,}" for n, count in sizes.items()),
        f"- Status: {summary['status']}, after {summary['rounds']} rounds.",
        f"- Trained on: {trained_on}, {clients} clients.",
        f"- Seed: {summary['seed']}.",
        "",
        "## Privacy",
        "",
        *(f"- {line}" for line in words_of(summary.get("privacy"))),
        "",
        "## What was measured",
        "",
        *_measured(summary),
        "",
        "## What it is not for",
        "",
        "Samples of a generator are not data: they must not replace records in a decision about a person, and they "
        "have the gaps and the biases of what the clients hold.",
    ]
    return "\n".join(lines) + "\n"


def _measured(summary: Mapping[str, Any]) -> list[str]:
    final = {name: value for name, value in summary.get("final", {}).items() if name != "rounds"}
    if not final:
        return ["Nothing."]
    rows = [f"| {name} | {value:.5g} |" for name, value in final.items() if isinstance(value, (int, float))]
    return ["| metric | last value |", "| --- | --- |", *rows]
