"""Text files, one sentence a line, as word ids over a vocabulary that the clients make together."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources.base import Source, Split, read_names
from fedgan_lightning.data.vocabulary import Sentence, Vocabulary, contribution, summed, tokens
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_numpy_generator

#: The topic of a sentence without any of the listed words.
OTHER = "other"


class TextFile(Source):
    """Sentences of a text file, or of the .txt files in a folder; samples are word ids (max_length,), int64.

    Lines are cut into lower-case words and marks of punctuation; sentences longer than ``max_length``, and empty lines,
    are left out. Id 0 ends a sentence and fills the rest, id 1 is any word outside the vocabulary. Columns for natural
    partitions: ``topic``, and ``file`` (the stem of the file's name).

    The vocabulary: every client counts its own words and tells the counts of those that it uses ``min_support`` times
    or more; the server adds them up and keeps the ``max_words`` largest sums. No sentence, and no rarer word, leaves a
    client. With ``vocabulary`` nothing is counted, which is how separate institutions do it.

    Args:
        path: The file, or a folder of them, UTF-8.
        test_path: A file of held-out sentences; without it ``test_fraction`` of the lines are held out.
        max_length: Words of a sentence at most.
        max_words: Size of the vocabulary, ids 0 and 1 included.
        min_support: Fewest uses of a word by a client for its count to leave the client.
        once_per_sentence: Count a word once per sentence.
        topics: Words by topic: a sentence's topic is that of its first word in any list, else ``other``.
        vocabulary: A ``vocabulary.json`` that another run wrote.
        test_fraction: Share of the lines that is held out without ``test_path``, in (0, 1).

    Raises:
        DataError: If a file is missing or has no usable line, or a word stands for two topics.
    """

    @checked(max_length="[1, inf)", max_words="[1, inf)", min_support="[1, inf)", test_fraction="(0, 1)")
    def __init__(
        self,
        path: str,
        *,
        test_path: str | None = None,
        max_length: int = 16,
        max_words: int = 2000,
        min_support: int = 1,
        once_per_sentence: bool = False,
        topics: dict[str, list[str]] | None = None,
        vocabulary: str | None = None,
        test_fraction: float = 0.1,
    ) -> None:
        self.path, self.test_path = Path(path), None if test_path is None else Path(test_path)
        self.max_length, self.max_words, self.test_fraction = max_length, max_words, test_fraction
        self.min_support, self.once_per_sentence = min_support, once_per_sentence
        self.topic_of = _by_word(topics or {})
        self.sample_shape = (max_length,)
        self.vocabulary = None if vocabulary is None else _vocabulary_in(vocabulary)

    @property
    def agreed(self) -> bool:  # type: ignore[override]
        """Whether there is a vocabulary."""
        return self.vocabulary is not None

    def load(self, split: Split) -> Samples:
        sentences, files = self._split(split)
        vocabulary = self.vocabulary if self.vocabulary is not None else _every_word(sentences)
        columns = {"topic": np.array([self._topic(sentence) for sentence in sentences]), "file": np.array(files)}
        return Samples(x=vocabulary.encode(sentences, length=self.max_length), columns=columns)

    def agree(self, samples: Samples, parts: Sequence[NDArray[np.int64]]) -> Source:
        """Return the source with the vocabulary that the clients' counts add up to."""
        spelled = _every_word(self._split("train")[0])  # the spelling of ``samples``, which only the simulation knows
        counts = summed(
            contribution(
                spelled.decode(samples.x[part]),
                min_support=self.min_support,
                once_per_sentence=self.once_per_sentence,
            )
            for part in parts
        )
        if not counts:
            raise DataError(
                message(
                    f"some client uses some word {self.min_support} times",
                    received="no word that may leave its client",
                    fix="lower data.source.min_support",
                )
            )
        agreed = copy.copy(self)
        agreed.vocabulary = Vocabulary.of(counts, max_words=self.max_words)
        return agreed

    def agreement(self) -> dict[str, Any]:
        return {} if self.vocabulary is None else {"vocabulary": list(self.vocabulary.words)}

    def _topic(self, sentence: Sentence) -> str:
        return next((self.topic_of[word] for word in sentence if word in self.topic_of), OTHER)

    def _split(self, split: Split) -> tuple[list[list[str]], list[str]]:
        """Return the sentences of a split, and the file of each."""
        if self.test_path is not None:
            return self._read(self.test_path if split == "test" else self.path)
        sentences, files = self._read(self.path)
        order = make_numpy_generator(0, "sentences split").permutation(len(sentences))
        cut = max(1, round(len(sentences) * self.test_fraction))
        chosen = np.sort(order[:cut] if split == "test" else order[cut:])
        return [sentences[place] for place in chosen], [files[place] for place in chosen]

    def _read(self, path: Path) -> tuple[list[list[str]], list[str]]:
        sentences, files = [], []
        try:
            for file in sorted(path.glob("*.txt")) if path.is_dir() else [path]:
                for line in file.read_text(encoding="utf-8").splitlines():
                    words = tokens(line)
                    if 0 < len(words) <= self.max_length:
                        sentences.append(words)
                        files.append(file.stem)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                message(
                    "data.source.path is a text file, or a folder of .txt files, in UTF-8",
                    received=f"{path} ({error})",
                    fix="check the path",
                )
            ) from error
        if len(sentences) < 2:
            raise DataError(
                message(
                    f"text has two sentences of at most {self.max_length} words",
                    received=f"{len(sentences)} in {path}",
                    fix="raise data.source.max_length, or check the path",
                )
            )
        return sentences, files


def _vocabulary_in(path: str) -> Vocabulary:
    return Vocabulary(tuple(read_names(path, option="vocabulary", numbered="words by id")))


def _every_word(sentences: Iterable[Sentence]) -> Vocabulary:
    """Return a vocabulary of all words, in alphabetical order."""
    return Vocabulary.of(dict.fromkeys((word for sentence in sentences for word in sentence), 1))


def _by_word(topics: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the topic of every listed word."""
    found: dict[str, str] = {}
    for topic, words in topics.items():
        for word in words:
            if found.setdefault(word.lower(), topic) != topic:
                raise DataError(
                    message(
                        "a word stands for one topic",
                        received=f"{word!r} under {found[word.lower()]} and {topic}",
                        fix="remove it from one of the lists in data.source.topics",
                    )
                )
    return found
