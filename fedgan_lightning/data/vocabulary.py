"""A vocabulary that clients make together without showing a sentence: counts of common words, summed by the server.

What leaves a client is :func:`contribution`: how often it uses each word that it uses at least ``min_support`` times.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from fedgan_lightning.errors import DataError, message

#: Id 0 ends a sentence and fills the rest of it; id 1 stands for every word that is not in the vocabulary.
END, UNKNOWN = "<end>", "<unk>"
SPECIAL = (END, UNKNOWN)
#: Joins or parts letters of one word, and the pictures of one emoji.
JOINERS = "\u200c\u200d"
#: Written without a blank before them.
MARKS = re.compile(r" ([.,;:!?)\]])")

Sentence = Sequence[str]


def spelling(text: str) -> str:
    """Return text as words are compared: in lower case, letters and their accents in one piece (normal form C)."""
    return unicodedata.normalize("NFC", text.lower())


def tokens(line: str) -> list[str]:
    """Return the lower-case words and marks of a line.

    A word is what stands between blanks and punctuation, with its combining marks, and with inner hyphens and
    apostrophes. Scripts that put no blanks between words, such as Chinese or Thai, have to be cut beforehand.
    """
    return _pattern().findall(spelling(line))


@cache
def _pattern() -> re.Pattern[str]:
    """Return words, and single marks of punctuation; Python's letters lack combining marks, the vowels of Hindi."""
    spans = (range(0x300, 0x1F000), range(0xE0100, 0xE01F0))  # outside of these there is none
    marks = "".join(chr(code) for span in spans for code in span if unicodedata.category(chr(code))[0] == "M")
    letters = rf"\w[\w{marks}{JOINERS}]*"
    return re.compile(rf"{letters}(?:['-]{letters})*|[^\w\s][{marks}]*(?:\u200d[^\w\s][{marks}]*)*")


def contribution(
    sentences: Iterable[Sentence], *, min_support: int = 1, once_per_sentence: bool = False
) -> dict[str, int]:
    """Return what one client tells of its words: their counts, of those with at least ``min_support``.

    Args:
        sentences: The client's sentences, as words.
        min_support: Smallest count that leaves the client; words that it uses less often stay unknown to everybody.
        once_per_sentence: Count a word once per sentence, so that a sentence changes any count by at most 1.

    Raises:
        DataError: If ``min_support`` is below 1.
    """
    if min_support < 1:
        raise DataError(message("min_support must be at least 1", received=min_support, fix="set 1 or more"))
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(set(sentence) if once_per_sentence else sentence)
    return {word: count for word, count in counts.items() if count >= min_support}


def summed(contributions: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums over clients, which is all that the server keeps."""
    total: Counter[str] = Counter()
    for counts in contributions:
        total.update(counts)
    return dict(total)


@dataclass(frozen=True)
class Vocabulary:
    """Words by id; ids 0 and 1 are :data:`END` and :data:`UNKNOWN`.

    Attributes:
        words: All words, the two special ones first.

    Raises:
        DataError: If the special words are not where they belong, or a word occurs twice.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.words[:2] != SPECIAL or len(set(self.words)) != len(self.words):
            raise DataError(
                message(
                    f"a vocabulary must begin with {END} and {UNKNOWN}, and hold every word once",
                    received=f"{len(self.words)} words, first {', '.join(self.words[:2]) or 'none'}",
                    fix="use a vocabulary.json that a run wrote",
                )
            )

    @classmethod
    def of(cls, counts: Mapping[str, int], *, max_words: int | None = None) -> Vocabulary:
        """Return the ``max_words`` words (special ones included) with the largest counts; ties in alphabetical order.

        Raises:
            DataError: If ``max_words`` leaves no room for a word.
        """
        if max_words is not None and max_words <= len(SPECIAL):
            raise DataError(
                message(
                    "max_words must be at least 3, since it counts two special words",
                    received=max_words,
                    fix="set 2000, say",
                )
            )
        ranked = sorted((word for word in counts if word not in SPECIAL), key=lambda word: (-counts[word], word))
        return cls((*SPECIAL, *ranked[: None if max_words is None else max_words - len(SPECIAL)]))

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id by word."""
        return {word: number for number, word in enumerate(self.words)}

    @cached_property
    def digest(self) -> str:
        """Hash of the words and their order."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()[:16]

    def encode(self, sentences: Sequence[Sentence], *, length: int) -> Tensor:
        """Return ids (n, length), int64: words from the left, then id 0. Sentences that are longer are cut."""
        rows = [[self.ids.get(word, 1) for word in sentence[:length]] for sentence in sentences]
        return torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int64).view(-1, length)

    def decode(self, ids: Tensor) -> list[list[str]]:
        """Return the words of ids (n, length), each sentence up to its first end; ids without a word are unknown."""
        found = []
        for row in ids.tolist():
            end = row.index(0) if 0 in row else len(row)
            found.append([self.words[number if number < len(self) else 1] for number in row[:end]])
        return found

    def write(self, ids: Tensor) -> list[str]:
        """Return ids (n, length) as lines of text."""
        return [MARKS.sub(r"\1", " ".join(words)) for words in self.decode(ids)]
