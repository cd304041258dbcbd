"""A pair for sentences: a recurrent generator with Gumbel-softmax, and a convolutional discriminator.

Shapes: N sentences, T words of a sentence at most, V words of the vocabulary, E embedding, H hidden. Id 0 ends a
sentence and fills the rest of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.gan.priors import Gumbel
from fedgan_lightning.options import checked


class TextGenerator(nn.Module):
    """z -> sentences (N, T, V), rows of probabilities: a language model that is sampled by Gumbel-softmax.

    Word t: s_t = logits(h_t) + g_t with Gumbel noise g_t, the t-th part of z; the word is argmax s_t, an exact sample
    of softmax(logits), and is what the next step sees. The output is softmax(s_t / temperature), through which the
    discriminator's gradient flows; after the end it is exactly the end. Input and output share one embedding. It is a
    function of z alone, so clients can be stacked. Sources: Jang et al. 2017, equation 2 (Gumbel-softmax); Nie et al.
    2019 (RelGAN), section 3.2; Cho et al. 2014 (the recurrent unit).

    Args:
        num_words: V.
        max_length: T.
        embedding: E.
        hidden: H.
        temperature: The temperature, > 0, in the buffer ``temperature``; ``federation.schedules`` changes it by
            rounds as ``generator.temperature``.

    Raises:
        ConfigurationError: If a number is out of range.
    """

    #: What z must be drawn from.
    prior: ClassVar[type] = Gumbel
    temperature: Tensor

    @checked(
        num_words="[3, inf)", max_length="[1, inf)", embedding="[1, inf)", hidden="[1, inf)", temperature="(0, inf)"
    )
    def __init__(
        self,
        num_words: int = 2000,
        max_length: int = 16,
        *,
        embedding: int = 64,
        hidden: int = 128,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_words, self.max_length, self.num_classes = num_words, max_length, 0
        self.latent_dim, self.sample_shape = max_length * num_words, (max_length, num_words)
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.start = nn.Parameter(0.1 * torch.randn(embedding))
        self.embedding = nn.Embedding(num_words, embedding)
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)
        self.seen, self.kept = nn.Linear(embedding, 3 * hidden), nn.Linear(hidden, 3 * hidden)
        self.project, self.bias = nn.Linear(hidden, embedding), nn.Parameter(torch.zeros(num_words))

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Map Gumbel noise (N, T * V) to sentences (N, T, V); labels are ignored."""
        noise = z.reshape(-1, self.max_length, self.num_words)
        word, state = self._begin(len(noise))
        going, end = noise.new_ones(len(noise), 1), torch.eye(1, self.num_words, dtype=z.dtype, device=z.device)
        sentence = []
        for gumbel in noise.unbind(1):
            state = self._step(word, state)
            scores = self._logits(state) + gumbel
            chosen = scores.argmax(-1)
            sentence.append(going * (scores / self.temperature).softmax(-1) + (1 - going) * end)
            word = self.embedding(chosen)
            going = going * (chosen != 0).to(going.dtype).unsqueeze(1)
        return torch.stack(sentence, dim=1)

    def log_probabilities(self, ids: Tensor) -> Tensor:
        """Return log P(word t = v | the words before) (N, T, V) along given sentences (N, T)."""
        word, state = self._begin(len(ids))
        words, states = self.embedding(ids), []
        for position in range(ids.shape[1]):
            state = self._step(word, state)
            states.append(state)
            word = words[:, position]
        return self._logits(torch.stack(states, dim=1)).log_softmax(-1)

    def log_likelihood(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood (N,) of sentences (N, T) in nats, the end included, and their numbers of words."""
        log_likelihoods = self.log_probabilities(ids).gather(2, ids.unsqueeze(2)).squeeze(2)
        counted = counts(ids)
        return (log_likelihoods * counted.to(log_likelihoods.dtype)).sum(1), counted.sum(1)

    def _begin(self, count: int) -> tuple[Tensor, Tensor]:
        hidden = self.kept.in_features
        return self.start.expand(count, -1), self.start.new_zeros(count, hidden)

    def _step(self, word: Tensor, state: Tensor) -> Tensor:
        seen_reset, seen_update, seen_new = self.seen(word).chunk(3, dim=-1)
        kept_reset, kept_update, kept_new = self.kept(state).chunk(3, dim=-1)
        update = (seen_update + kept_update).sigmoid()
        new = (seen_new + (seen_reset + kept_reset).sigmoid() * kept_new).tanh()
        return torch.lerp(new, state, update)

    def _logits(self, state: Tensor) -> Tensor:
        logits: Tensor = self.project(state) @ self.embedding.weight.transpose(0, 1) + self.bias
        return logits


class TextDiscriminator(nn.Module):
    """Sentences (N, T, V) -> logits (N, 1): convolutions over embedded words, and their largest response in time.

    A word is embedded by a matrix, so that probabilities of words are embedded as their mean. There is no dropout: all
    randomness of a step comes from outside of networks. Source: Kim 2014, section 2.

    Args:
        num_words: V.
        max_length: T.
        embedding: E.
        widths: Words that a convolution sees, T at most.
        filters: Channels of each convolution.

    Raises:
        ConfigurationError: If a number is out of range.
    """

    #: Nothing passes between samples.
    per_sample = True

    @checked(num_words="[3, inf)", max_length="[1, inf)", embedding="[1, inf)", widths="[1, inf)", filters="[1, inf)")
    def __init__(
        self,
        num_words: int = 2000,
        max_length: int = 16,
        *,
        embedding: int = 64,
        widths: Sequence[int] = (2, 3, 4, 5),
        filters: int = 64,
    ) -> None:
        super().__init__()
        if not widths or not 1 <= min(widths) <= max(widths) <= max_length:
            raise ConfigurationError(
                message(
                    f"widths of convolutions must lie between 1 and max_length={max_length}",
                    received=list(widths),
                    fix="drop the larger ones",
                )
            )
        self.sample_shape, self.num_classes, self.conditioning = (max_length, num_words), 0, "none"
        self.embedding = nn.Linear(num_words, embedding, bias=False)
        nn.init.normal_(self.embedding.weight, std=1.0)  # a word picks one column, whatever the size of the vocabulary
        self.looks = nn.ModuleList(nn.Conv1d(embedding, filters, width) for width in widths)
        wide = filters * len(widths)
        self.mix, self.head = nn.Linear(wide, wide), nn.Linear(wide, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Map sentences (N, T, V) to logits (N, 1); labels are ignored."""
        words = self.embedding(x).transpose(1, 2)
        features = torch.cat([nn.functional.leaky_relu(look(words), 0.2).amax(2) for look in self.looks], dim=1)
        logits: Tensor = self.head(features + nn.functional.leaky_relu(self.mix(features), 0.2))
        return logits


def counts(ids: Tensor) -> Tensor:
    """Return where sentences (N, T) are: True up to their first end, and for it."""
    ended = (ids == 0).cumsum(1)
    return (ended == 0) | ((ended == 1) & (ids == 0))
