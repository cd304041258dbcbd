"""What sites answer, before anything is done with it: errors in words, and what a site says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedgan_lightning.deployment import wire
from fedgan_lightning.federation.aggregation import MOST_EXAMPLES
from fedgan_lightning.federation.schema import is_whole, printable

#: Letters that are kept of what a site says is wrong, and of a hash.
MOST_LETTERS, MOST_DIGITS = 500, 64


class Refusal(str):
    """What a site itself says of why it does not answer."""


class Malformed(str):
    """What is wrong with an answer that is none: that counts against the site."""


def trouble_in(reply: Any) -> str | None:
    """Return what is wrong with a reply, in words: a :class:`Refusal` where the site says so, :class:`Malformed` where
    it is no answer, else what Flower says.
    """
    if isinstance(reply, Malformed):
        return reply
    if reply.has_error():
        return printable(f"Flower error {reply.error.code}: {reply.error.reason}", most=MOST_LETTERS)
    if "facts" not in reply.content:
        return Malformed("an answer without facts")
    try:
        trouble = wire.facts_of(reply.content).get("error")
    except Exception as error:  # records of another kind by that name
        return Malformed(f"an answer without facts ({type(error).__name__})")
    return None if trouble is None else Refusal(printable(trouble, most=MOST_LETTERS))


def checked_facts(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a site says of itself.

    Raises:
        ValueError: If it is none: sizes are whole numbers that a server can add up, and those of labels sum to N_k.
    """
    facts: dict[str, Any] = {name: answer[name] for name in ("client_id", "num_examples")}
    facts["label_counts"] = list(answer["label_counts"])
    facts["is_image"], facts["data"] = bool(answer["is_image"]), printable(answer["data"])[:MOST_DIGITS]
    size, counts = facts["num_examples"], facts["label_counts"]
    if not all(map(is_whole, (*facts.values(),)[:2])) or not all(map(is_whole, counts)):
        raise ValueError("sizes are whole numbers")
    if not 1 <= size <= MOST_EXAMPLES:
        raise ValueError(f"{printable(size)} examples, not between 1 and {MOST_EXAMPLES}")
    if min(counts, default=-1) < 0 or sum(counts) != size:
        raise ValueError(f"labels of {printable(sum(counts))} examples, and {size} examples")
    return facts


def only_plain(error: BaseException) -> str:
    """Return an error in one line, for the other side."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
