"""Text files, one sentence a line, as word ids over a vocabulary that the clients make together."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from fedgan_lightning.data.folders import is_shown
from fedgan_lightning.data.reading import check_encoding, read_text, user_path
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources.base import Source, Split, hold_out, read_names
from fedgan_lightning.data.vocabulary import Sentence, Vocabulary, contribution, spelling, summed, tokens
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.options import checked

logger = logging.getLogger("fedgan_lightning")
#: The topic of a sentence without any of the listed words.
OTHER = "other"


class TextFile(Source):
    """Sentences of a text file, or of the .txt files in a folder; samples are word ids (max_length,), int64.

    Lines are cut into lower-case words and marks of punctuation (:func:`~fedgan_lightning.data.vocabulary.tokens`);
    sentences longer than ``max_length``, whose number is logged, and empty lines are left out. Id 0 ends a sentence
    and fills the rest, id 1 is any word outside the vocabulary. Columns for natural partitions: ``topic``, and ``file``
    (the stem of the file's name).

    The vocabulary: every client counts its own words and tells the counts of those that it uses ``min_support`` times
    or more; the server adds them up and keeps the ``max_words`` largest sums. No sentence, and no rarer word, leaves a
    client. With ``vocabulary`` nothing is counted, which is how separate institutions do it.

    Args:
        path: The file, or a folder of them.
        test_path: A file of held-out sentences; without it ``test_fraction`` of the lines are held out.
        max_length: Words of a sentence at most.
        max_words: Size of the vocabulary, ids 0 and 1 included.
        min_support: Fewest uses of a word by a client for its count to leave the client.
        once_per_sentence: Count a word once per sentence.
        topics: Words by topic: a sentence's topic is that of its first word in any list, else ``other``.
        vocabulary: A ``vocabulary.json`` that another run wrote.
        test_fraction: Share of the lines that is held out without ``test_path``, in (0, 1).
        encoding: Encoding of the files; a byte order mark is no part of the text.

    Raises:
        DataError: If a file is missing or has no usable line, or a word stands for two topics.
    """

    modality = "fedgan_lightning.evaluation.modalities.Text"

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
        encoding: str = "utf-8",
    ) -> None:
        check_encoding(encoding, option="data.source.encoding")
        self.path, self.test_path = user_path(path), None if test_path is None else user_path(test_path)
        self.encoding = encoding
        self._told: set[Path] = set()
        self.max_length, self.max_words, self.test_fraction = max_length, max_words, test_fraction
        self.min_support, self.once_per_sentence = min_support, once_per_sentence
        self.topic_of = _by_word(topics or {})
        self.sample_shape = (max_length,)
        self.vocabulary = None if vocabulary is None else _vocabulary_in(vocabulary)

    @property
    def has_shared_metadata(self) -> bool:  # type: ignore[override]
        """Whether there is a vocabulary."""
        return self.vocabulary is not None

    def load(self, split: Split) -> Samples:
        sentences, files = self._split(split)
        vocabulary = self.vocabulary if self.vocabulary is not None else _every_word(sentences)
        columns = {"topic": np.array([self._topic(sentence) for sentence in sentences]), "file": np.array(files)}
        return Samples(x=vocabulary.encode(sentences, length=self.max_length), columns=columns)

    def with_shared_metadata(self, samples: Samples, parts: Sequence[NDArray[np.int64]]) -> Source:
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
                    f"some client must use some word {self.min_support} times",
                    received="no word that may leave its client",
                    fix="lower data.source.min_support",
                )
            )
        completed = copy.copy(self)
        completed.vocabulary = Vocabulary.of(counts, max_words=self.max_words)
        return completed

    def shared_metadata(self) -> dict[str, Any]:
        return {} if self.vocabulary is None else {"vocabulary": list(self.vocabulary.words)}

    def _topic(self, sentence: Sentence) -> str:
        return next((self.topic_of[word] for word in sentence if word in self.topic_of), OTHER)

    def _split(self, split: Split) -> tuple[list[list[str]], list[str]]:
        """Return the sentences of a split, and the file of each."""
        if self.test_path is not None:
            test = split == "test"
            return self._read(self.test_path if test else self.path, option="test_path" if test else "path")
        sentences, files = self._read(self.path, option="path")
        what = f"sentences in {self.path}"
        chosen = hold_out(len(sentences), self.test_fraction, name="sentences split", what=what)[split == "test"]
        return [sentences[place] for place in chosen], [files[place] for place in chosen]

    def _read(self, path: Path, *, option: str) -> tuple[list[list[str]], list[str]]:
        option = f"data.source.{option}"
        sentences: list[list[str]] = []
        files: list[str] = []
        longer: list[int] = []
        for file in _files(path, option=option):
            what = "a text file or a folder of .txt files"
            for line in read_text(file, option=option, what=what, encoding=self.encoding).splitlines():
                words = tokens(line)
                if len(words) > self.max_length:
                    longer.append(len(words))
                elif words:
                    sentences.append(words)
                    files.append(normalize("NFC", file.stem))
        count = len(sentences) + len(longer)
        left_out = f"{len(longer)} of {count} sentences in {path} are left out: they have more than "
        left_out += f"max_length={self.max_length} words, up to {max(longer, default=0)}"
        if len(sentences) < 2:
            raise DataError(
                message(
                    f"text must have two sentences of at most {self.max_length} words",
                    received=f"{len(sentences)} in {path}" + (f"; {left_out}" if longer else ""),
                    fix="raise data.source.max_length, or check the path",
                )
            )
        if longer and path not in self._told:
            self._told.add(path)  # splits and clients read the file several times
            logger.info(left_out)
        return sentences, files


def _files(path: Path, *, option: str) -> list[Path]:
    """Return the text files of a folder, or the file."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if is_shown(file.name) and file.suffix.lower() == ".txt")
    if not found:
        raise DataError(
            message(
                f"{option} must be a text file or a folder of .txt files", received=f"{path} with none", fix="check it"
            )
        )
    return found


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
            if found.setdefault(spelling(word), topic) != topic:
                raise DataError(
                    message(
                        "a word must stand for one topic",
                        received=f"{word!r} under {found[spelling(word)]} and {topic}",
                        fix="remove it from one of the lists in data.source.topics",
                    )
                )
    return found
