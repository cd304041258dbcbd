"""Names in pictures."""

from __future__ import annotations


def literal(text: str) -> str:
    """Return text that matplotlib draws as it stands: between dollars it would read formulas."""
    return text.replace("$", r"\$")
