"""Metrics of the text-GAN literature: BLEU for quality, self-BLEU for diversity, likelihood of held-out text.

Sentences are lists of words; n-grams of order n = 2, ..., 5.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.data.vocabulary import UNKNOWN, Vocabulary
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.evaluation.metrics import Metric
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_generator

Gram = tuple[str, ...]
Sentences = Sequence[Sequence[str]]

ORDERS = (2, 3, 4, 5)
#: What a precision of zero matches becomes: this many matches (smoothing method 1 of Chen and Cherry 2014).
EPSILON = 0.1
#: Held-out sentences whose likelihood is taken at a time.
CHUNK = 250


class References:
    """Sentences to compare with, indexed once: the largest count of every n-gram in one of them, and who has it.

    n-grams with an unknown word are left out: two words that are not known need not be the same.

    Args:
        sentences: The references.
        largest: Largest n.
    """

    def __init__(self, sentences: Sentences, *, largest: int = max(ORDERS)) -> None:
        self.largest = largest
        self.lengths = sorted({len(sentence) for sentence in sentences})
        self.number_of_length = Counter(len(sentence) for sentence in sentences)
        #: n-gram -> (largest count, its sentence, largest count in any other sentence).
        self.best: dict[Gram, tuple[int, int, int]] = {}
        for place, sentence in enumerate(sentences):
            for gram, count in grams(sentence, largest).items():
                top, owner, second = self.best.get(gram, (0, -1, 0))
                if UNKNOWN in gram:
                    continue
                if count > top:
                    self.best[gram] = (count, place, top)
                elif count > second:
                    self.best[gram] = (top, owner, count)

    def bleu(self, sentence: Sequence[str], *, place: int | None = None) -> list[float]:
        """Return BLEU of orders 1, ..., ``largest`` of a sentence.

        BLEU_n = BP (p_1 ... p_n)^(1/n) with clipped precisions p, and the brevity penalty BP = min(1, exp(1 - r / c))
        for c words against the closest length r of a reference. Zero without any known word. Source: Papineni et al.
        2002, section 2.3.

        Args:
            sentence: The words.
            place: Its own position among the references, which is then left out (self-BLEU).
        """
        matched, total = [0] * (self.largest + 1), [0] * (self.largest + 1)
        for gram, count in grams(sentence, self.largest).items():
            top, owner, second = self.best.get(gram, (0, -1, 0))
            matched[len(gram)] += min(count, second if place is not None and owner == place else top)
            total[len(gram)] += count
        if matched[1] == 0:
            return [0.0] * self.largest
        penalty = min(1.0, math.exp(1 - self._closest(len(sentence), own=place is not None) / len(sentence)))
        values, logarithms = [], 0.0
        for n in range(1, self.largest + 1):
            logarithms += math.log((matched[n] or EPSILON) / max(total[n], 1))
            values.append(penalty * math.exp(logarithms / n))
        return values

    def _closest(self, length: int, *, own: bool) -> int:
        """Return the reference length nearest to ``length``, the shorter of two; one's own sentence does not count."""
        known = self.lengths
        if own and self.number_of_length[length] == 1 and len(known) > 1:
            known = [other for other in known if other != length]
        place = bisect_left(known, length)
        return min(known[max(place - 1, 0) : place + 1], key=lambda other: (abs(other - length), other))


def grams(sentence: Sequence[str], largest: int) -> Counter[Gram]:
    """Return the counts of all n-grams, n = 1, ..., ``largest``."""
    return Counter(tuple(sentence[i : i + n]) for n in range(1, largest + 1) for i in range(len(sentence) - n + 1))


def mean_bleu(sentences: Sentences, references: References, *, own: bool = False) -> dict[int, float]:
    """Return the mean BLEU of sentences by order; with ``own`` they are the references, each left out in turn."""
    rows = [references.bleu(s, place=i if own else None) for i, s in enumerate(sentences)]
    return {n: sum(row[n - 1] for row in rows) / max(len(rows), 1) for n in range(1, references.largest + 1)}


class BLEU(Metric):
    """Mean sentence BLEU-2 to BLEU-5 of generated against all held-out sentences: ``bleu_2`` ... in [0, 1].

    Beside it, once, stands ``bleu_N_of_reals``: training sentences against the same references. Words outside the
    vocabulary match nothing, in either. Also reports ``length``, the mean number of words, and ``distinct``, the share
    of different sentences. Sources: Papineni et al. 2002; Yu et al. 2017 (SeqGAN), section 5.

    Args:
        max_sentences: Sentences of the test split, and of the training split for the fact, that are used at most.
    """

    needs_server_samples = True
    larger_is_better = (*(f"bleu_{n}" for n in ORDERS), "distinct")

    @checked(max_sentences="[1, inf)")
    def __init__(self, *, max_sentences: int = 5000) -> None:
        self.max_sentences = _positive(max_sentences)
        self.vocabulary: Vocabulary | None = None
        self.references = References([])

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.vocabulary = _vocabulary(data, self)
        held_out = self.vocabulary.decode(drawn(data.test_samples.x, self.max_sentences))
        self.references = References(held_out)
        real = self.vocabulary.decode(drawn(data.train_samples.x, 1000))
        values = mean_bleu(real, self.references)
        return {"bleu_num_references": len(held_out)} | {f"bleu_{n}_of_reals": values[n] for n in ORDERS}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        assert self.vocabulary is not None
        sentences = self.vocabulary.decode(samples)
        values = mean_bleu(sentences, self.references)
        different = len({tuple(sentence) for sentence in sentences}) / len(sentences)
        length = sum(map(len, sentences)) / len(sentences)
        return {f"bleu_{n}": values[n] for n in ORDERS} | {"length": length, "distinct": different}


class SelfBLEU(Metric):
    """Mean BLEU of every generated sentence against the other ones: ``self_bleu_2`` ..., near 1 where all are alike.

    ``self_bleu_N_of_reals`` says how alike as many held-out sentences are: values far above it are a collapse. It grows
    with the number of sentences, so equal numbers are compared. Source: Zhu et al. 2018 (Texygen).

    Args:
        max_sentences: Generated sentences, and held-out ones, that are used at most.
    """

    needs_server_samples = True

    @checked(max_sentences="[2, inf)")
    def __init__(self, *, max_sentences: int = 500) -> None:
        self.max_sentences = _positive(max_sentences)
        self.vocabulary: Vocabulary | None = None
        self.held_out = torch.empty(0, 0, dtype=torch.int64)
        self.of_reals: dict[int, dict[str, float]] = {}

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.vocabulary = _vocabulary(data, self)
        self.held_out, self.of_reals = drawn(data.test_samples.x, self.max_sentences), {}
        return {"self_bleu_num_sentences": len(self.held_out)}  # where as many are generated

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        count = min(len(samples), len(self.held_out))
        if count not in self.of_reals:
            found = self._values(self.held_out[:count])
            self.of_reals[count] = {f"{name}_of_reals": value for name, value in found.items()}
        return self._values(samples[:count]) | self.of_reals[count]

    def _values(self, ids: Tensor) -> dict[str, float]:
        assert self.vocabulary is not None
        sentences = self.vocabulary.decode(ids)
        found = mean_bleu(sentences, References(sentences), own=True)
        return {f"self_bleu_{n}": found[n] for n in ORDERS}


class HeldOutLikelihood(Metric):
    """-log P per word of held-out sentences under the generator, ends included, in nats: ``nll``; smaller is better.

    It is read off the generator itself (its moving average where there is one), not off samples. Source: Zhu et al.
    2018 (Texygen), section 3.3 (NLL-test).

    Args:
        max_sentences: Sentences of the test split that are used at most.
    """

    needs_server_samples = True

    @checked(max_sentences="[1, inf)")
    def __init__(self, *, max_sentences: int = 2000) -> None:
        self.max_sentences = _positive(max_sentences)
        self.ids = torch.empty(0, 0, dtype=torch.int64)
        self.num_words = 0

    def prepare(self, data: FederatedDataModule, *, device: torch.device) -> dict[str, Any]:
        self.num_words = len(_vocabulary(data, self))
        self.ids = drawn(data.test_samples.x, self.max_sentences)
        unknown = float((self.ids == 1).sum() / (self.ids != 0).sum())
        return {"num_words": self.num_words, "unknown_words": unknown, "nll_num_sentences": len(self.ids)}

    def compute(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def inspect(self, model: nn.Module) -> dict[str, float]:
        network: Any = getattr(model, "generator_ema", None) or getattr(model, "generator", None)
        if not hasattr(network, "log_likelihood"):
            return {}
        if network.num_words < self.num_words:
            raise ConfigurationError(
                message(
                    "the networks must know all words of the vocabulary",
                    received=f"num_words={network.num_words}, a vocabulary of {self.num_words}",
                    fix="set num_words of the networks and the codec, and data.source.max_words, to one value",
                )
            )
        own = next(network.parameters()).device
        parts = [network.log_likelihood(ids.to(own)) for ids in self.ids.split(CHUNK)]
        terms = sum(int(counted.sum()) for _, counted in parts)
        return {"nll": -sum(float(values.double().sum()) for values, _ in parts) / terms}


def vocabulary_of(data: FederatedDataModule) -> Vocabulary | None:
    """Return the vocabulary that the clients share; ``None`` before that, and for data that is no text."""
    found = getattr(data.source, "vocabulary", None)
    return found if isinstance(found, Vocabulary) else None


def _vocabulary(data: FederatedDataModule, metric: Metric) -> Vocabulary:
    """Return the vocabulary of a metric's data.

    Raises:
        ConfigurationError: If the data is no text.
    """
    data.build_shared_metadata()
    found = vocabulary_of(data)
    if found is None:
        raise ConfigurationError(
            message(
                f"{type(metric).__name__} must have text to read",
                received=f"{type(data.source).__name__} without a vocabulary",
                fix="use it with TextFile",
            )
        )
    return found


def drawn(ids: Tensor, count: int) -> Tensor:
    """Return ``count`` rows, or all, drawn once and for all."""
    return ids[torch.randperm(len(ids), generator=make_generator(0, "sentences"))[:count]]


def _positive(count: int) -> int:
    if count < 2:
        raise ConfigurationError(message("max_sentences must be at least 2", received=count, fix="set 500, say"))
    return count
