"""Secret randomness: noise, cohorts and minibatches that nobody can predict, and nobody can draw again.

Whoever knows the noise of a release can subtract it, and whoever knows the cohort has no use for the sampling that
hides it. So nothing here follows from the seed of a run. Keys come from the operating system and are used once; they
are never in settings, checkpoints or logs. A ``testing_seed`` makes a run repeatable, and its guarantee void.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgan_lightning.errors import ConfigurationError, message

#: Bytes of a key.
KEY_BYTES = 32
#: Numbers that one call of the cipher makes at most: 8 MB of key stream.
AT_A_TIME = 1 << 20


def new_key(testing_seed: int | None, *purpose: object) -> bytes:
    """Return a key: the operating system's entropy, or for tests one that follows from a seed and a purpose.

    Args:
        testing_seed: Makes the key repeatable, and worthless; ``None`` for a secret.
        purpose: Tells keys of one seed apart: what for, round, client.
    """
    if testing_seed is None:
        return secrets.token_bytes(KEY_BYTES)
    return hashlib.sha256(json.dumps(["NOT PRIVATE", testing_seed, *map(str, purpose)]).encode()).digest()


class SecretStream:
    """Random numbers from the key stream of AES-256 in counter mode.

    Args:
        key: 32 secret bytes, used for one stream.
    """

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as error:
            raise ConfigurationError(
                message(
                    "privacy must have a cipher for its noise",
                    received="no package cryptography",
                    fix='install it: pip install "fedgan-lightning[privacy]"',
                )
            ) from error
        self._cipher: Any = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def bits(self, count: int) -> NDArray[np.uint64]:
        """Return uniform integers of 64 bits (count,)."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), "<u8").astype(np.uint64)

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """Return uniform numbers in [0, 1) of 53 bits (count,)."""
        found: NDArray[np.float64] = (self.bits(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return found

    def normals(self, count: int) -> NDArray[np.float64]:
        """Return standard normal numbers (count,), after Box and Muller 1958.

        They are floating-point numbers: the holes between these can tell two inputs apart in principle (Mironov 2012).
        """
        parts = [self._normals(min(AT_A_TIME, count - start)) for start in range(0, count, AT_A_TIME)]
        return np.concatenate([np.empty(0), *parts])

    def _normals(self, count: int) -> NDArray[np.float64]:
        half = (count + 1) // 2
        first, second = np.split(self.uniforms(2 * half), 2)
        radius, angle = np.sqrt(-2.0 * np.log(1.0 - first)), 2.0 * np.pi * second
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def chosen(self, population: int, *, rate: float) -> tuple[int, ...]:
        """Return which of ``population`` records are drawn, each on its own with probability ``rate``."""
        return tuple(int(place) for place in np.flatnonzero(self.uniforms(population) < rate))

    def subset(self, population: int, *, size: int) -> tuple[int, ...]:
        """Return ``size`` of ``population`` records without replacement, all sets alike."""
        return tuple(sorted(int(place) for place in np.argsort(self.bits(population), kind="stable")[:size]))

    def below(self, limit: int) -> int:
        """Return a uniform integer in [0, limit), without bias."""
        size = (limit.bit_length() + 7) // 8
        most = (1 << 8 * size) // limit * limit
        while (drawn := int.from_bytes(self._cipher.update(bytes(size)), "big")) >= most:
            pass
        return drawn % limit

    def discrete_normals(self, sigma: int, count: int) -> NDArray[np.int64]:
        """Return integers with P(x) proportional to exp(-x^2 / (2 sigma^2)), exactly: (count,).

        Source: Canonne, Kamath, Steinke 2020, algorithms 1 to 3. All arithmetic is of integers.

        Args:
            sigma: A whole number >= 1.
            count: How many.
        """
        return np.fromiter((self._discrete_normal(sigma) for _ in range(count)), np.int64, count)

    def _discrete_normal(self, sigma: int) -> int:
        scale = sigma + 1
        while True:
            drawn = self._discrete_laplace(scale)
            # exp(-(|Y| - sigma^2 / t)^2 / (2 sigma^2)) as a fraction of integers
            above = (abs(drawn) * scale - sigma * sigma) ** 2
            if self._happens(above, 2 * sigma * sigma * scale * scale):
                return drawn

    def _discrete_laplace(self, scale: int) -> int:
        while True:
            rest = self.below(scale)
            if not self._happens(rest, scale):
                continue
            whole = 0
            while self._happens(1, 1):
                whole += 1
            value, negative = rest + scale * whole, self.below(2)
            if not (negative and value == 0):
                return -value if negative else value

    def _happens(self, above: int, under: int) -> bool:
        """Return true with probability exp(-above / under)."""
        for _ in range(above // under):
            if not self._happens_at_most_once(1, 1):
                return False
        return self._happens_at_most_once(above % under, under)

    def _happens_at_most_once(self, above: int, under: int) -> bool:
        """Return true with probability exp(-above / under), for above <= under."""
        k = 1
        while self.below(under * k) < above:
            k += 1
        return k % 2 == 1


def sum_is_normal(sigma: float, number: int) -> float:
    """Return by how much a sum of discrete normals differs from one: the tau of Kairouz, Liu, Steinke 2021, theorem 1.

    10 sum_{k=1}^{n-1} exp(-2 pi^2 sigma^2 k / (k + 1)).

    Args:
        sigma: Standard deviation of one, in steps.
        number: How many are added.
    """
    return 10.0 * sum(math.exp(-2.0 * math.pi**2 * sigma**2 * k / (k + 1)) for k in range(1, number))
