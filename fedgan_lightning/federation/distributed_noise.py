"""Distributed noise: every client adds a share before its update is masked, so that no server can take it away."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedgan_lightning.dp.randomness import SecretStream, new_key, sum_is_normal
from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.client_privacy import ClientLevelPrivacy
from fedgan_lightning.federation.secure import SecureAggregation
from fedgan_lightning.packing import Layout
from fedgan_lightning.states import network_of

#: Standard deviations of the noise that the numbers of a sum leave room for.
TAILS = 6.0
#: By how much a sum of shares may differ from a discrete Gaussian, which adds to epsilon.
SMOOTH = 1e-9


class NoiseShares:
    """Whole numbers of a discrete Gaussian, which a client adds to its rounded update (Kairouz, Liu, Steinke 2021).

    With n_min survivors, of which t tell the server their shares, the sum still has noise of standard deviation z C: a
    client's share has z C / sqrt(n_min - t). More survivors make more noise.

    Args:
        privacy: Bound, noise multiplier, scales and how many may collude.
        secure: How numbers are rounded, and how many must survive.
    """

    def __init__(self, privacy: ClientLevelPrivacy, secure: SecureAggregation) -> None:
        self.privacy, self.secure = privacy, secure

    def std(self, num_members: int, *, scale: float = 1.0) -> float:
        """Return the standard deviation of a client's share on a number of its update, in steps of the ring."""
        privacy, honest = self.privacy, self.secure.needed(num_members) - self.privacy.colluding
        step = self.secure.ring("delta", "").step
        return (privacy.noise_multiplier or 0.0) * privacy.clip * scale / (num_members * step * math.sqrt(honest))

    def shares(self, layout: Layout, *, num_members: int, purpose: object) -> NDArray[np.uint32]:
        """Return a client's share for all numbers of its parameter updates, in the order in which they travel.

        Args:
            layout: That of the updates.
            num_members: Clients of the session, which all count alike.
            purpose: Tells rounds and clients apart where a testing seed makes noise repeatable.
        """
        stream = SecretStream(new_key(self.privacy.testing_seed, "share", purpose))
        parts = [np.empty(0, np.int64)]
        for name, shape in layout.by_name.items():
            std = self.std(num_members, scale=self.privacy.scales.get(network_of(name), 1.0))
            count = math.prod(shape)
            parts.append(stream.discrete_normals(math.ceil(std), count) if std else np.zeros(count, np.int64))
        return np.concatenate(parts).astype(np.uint32)  # modulo 2^32, as everything that is masked


def check_range(privacy: ClientLevelPrivacy, secure: SecureAggregation, *, num_clients: int) -> None:
    """Refuse a ring in which a noised sum could wrap around, or whose steps are too long for the noise, and more
    colluders than a sum can bear.

    Raises:
        ConfigurationError: If it is so.
    """
    largest = max([1.0, *privacy.scales.values()]) * privacy.clip
    needed = largest * (1 + TAILS * (privacy.noise_multiplier or 0.0))
    if needed > secure.max_update:
        raise ConfigurationError(
            message(
                f"federation.secure.max_update must leave room for a clipped update and its noise, {needed:.4g}",
                received=secure.max_update,
                fix=f"set it to {needed:.4g} or more",
            )
        )
    if privacy.colluding >= secure.needed(num_clients):
        raise ConfigurationError(
            message(
                "fewer clients may collude than must survive",
                received=f"colluding={privacy.colluding} of at least {secure.needed(num_clients)}",
                fix="raise federation.privacy.survivors",
            )
        )
    smallest = min([1.0, *privacy.scales.values()])
    share = NoiseShares(privacy, secure).std(num_clients, scale=smallest)
    if privacy.noise_multiplier and sum_is_normal(share, num_clients) > SMOOTH:
        raise ConfigurationError(
            message(
                "federation.secure.max_update must be so small that a client's noise is many of its steps",
                received=f"{secure.max_update:g}, with noise of {share:.3g} steps",
                fix="lower it, or raise clip",
            )
        )


def with_survivors(secure: SecureAggregation | None, privacy: ClientLevelPrivacy | None) -> SecureAggregation | None:
    """Return secure aggregation that waits for the survivors which the noise counts on."""
    if secure is None or privacy is None:
        return secure
    return secure.of_at_least(privacy.survivors or 0)
