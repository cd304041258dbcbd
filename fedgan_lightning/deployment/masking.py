"""The cryptography of secure aggregation, from libraries: key agreement, sealing and Shamir's shares as Flower has them
for its own SecAgg+ (``flwr.common.secure_aggregation``), masks from AES in counter mode.

Flower's own mask generator is not used: it folds its 256-bit seed into 32 bits, for a generator (MT19937) that is no
cryptographic one, so that whoever has a masked vector finds the mask by trying 2^32 seeds.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Length of a seed, and of a transcript's hash, in bytes.
SEED_BYTES = 32


@dataclass(frozen=True)
class Keys:
    """Two private keys of one client for one session (EC P-384, PEM): one for masks, one for sealing shares."""

    mask: bytes
    seal: bytes

    @classmethod
    def fresh(cls) -> Keys:
        """Return new keys."""
        from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes

        mask, seal = (private_key_to_bytes(generate_key_pairs()[0]) for _ in range(2))
        return cls(mask, seal)


@dataclass(frozen=True)
class Member:
    """What a client tells all others through the server: its public keys, N_k, and a signature of these.

    Attributes:
        mask: Public key for masks.
        seal: Public key for sealing shares.
        num_examples: N_k.
        signature: By the client's node key; empty without one.
    """

    mask: bytes
    seal: bytes
    num_examples: int
    signature: bytes = b""

    def signed_text(self, session: int, client_id: int) -> bytes:
        """Return what a signature is of."""
        plain = ["fedgan member", session, client_id, self.mask.hex(), self.seal.hex(), self.num_examples]
        return json.dumps(plain).encode()


def public(private: bytes) -> bytes:
    """Return the public key of a private one."""
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key, public_key_to_bytes

    return public_key_to_bytes(bytes_to_private_key(private).public_key())


def shared_secret(private: bytes, others_public: bytes) -> bytes:
    """Return the secret that two clients share, as a key for sealing (32 bytes in base64; ECDH, then HKDF-SHA256)."""
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

    return generate_shared_key(bytes_to_private_key(private), bytes_to_public_key(others_public))


def transcript(session: int, members: Mapping[int, Member], subject: str) -> bytes:
    """Return a hash of who takes part, with which keys and weights, and of what is asked: a server cannot tell it
    differently to different clients, since shares that were sealed under another one are refused.

    Args:
        session: The session.
        members: Who takes part.
        subject: Hash of the task or query that all answer.
    """
    listed = [(k, own.mask.hex(), own.seal.hex(), own.num_examples) for k, own in sorted(members.items())]
    return hashlib.sha256(json.dumps([session, listed, subject]).encode()).digest()


@dataclass(frozen=True)
class Shares:
    """One member's shares of another's two secrets: the seed of its own mask, and its private key for masks."""

    seed: bytes
    key: bytes

    def sealed(self, secret: bytes, *, source: int, destination: int, under: bytes) -> bytes:
        """Return the shares sealed for ``destination`` (Fernet: AES-128-CBC with HMAC-SHA256)."""
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt
        from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat

        return encrypt(secret, under + share_keys_plaintext_concat(source, destination, self.seed, self.key))

    @classmethod
    def opened(cls, sealed: bytes, secret: bytes, *, source: int, destination: int, under: bytes) -> Shares:
        """Undo :meth:`sealed`.

        Raises:
            ValueError: If they were sealed by or for somebody else, or under another transcript.
        """
        from cryptography.fernet import InvalidToken
        from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt
        from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_separate

        try:
            text = decrypt(secret, sealed)
        except InvalidToken as error:
            raise ValueError(f"shares from client {source} cannot be opened") from error
        found, meant, seed, key = share_keys_plaintext_separate(text[SEED_BYTES:])
        if text[:SEED_BYTES] != under or (found, meant) != (source, destination):
            raise ValueError(f"client {source} has a list of other members, keys or weights, or another task")
        return cls(seed, key)


def split(secret: bytes, *, needed: int, number: int) -> list[bytes]:
    """Return shares of a secret, any ``needed`` of which give it back. Shamir 1979, over GF(2^128)."""
    from flwr.common.secure_aggregation.crypto.shamir import create_shares

    return create_shares(secret, needed, number)


def combine(shares: Sequence[bytes]) -> bytes:
    """Undo :func:`split`.

    Raises:
        ValueError: If the shares are not of one secret.
    """
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares

    if not shares or any(len(share) != len(shares[0]) or len(share) < 20 for share in shares):
        raise ValueError("shares have different lengths")
    return combine_shares(list(shares))


def mask(seed: bytes, *, narrow: int, wide: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask of a seed: ``narrow`` numbers of 32 bits and ``wide`` of 64, uniform.

    It is the key stream of AES-256 in counter mode (Bonawitz et al. 2017, section 6). Seeds are used once.

    Args:
        seed: 32 random bytes.
        narrow: Count of numbers modulo 2^32.
        wide: Count of numbers modulo 2^64.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(4 * narrow + 8 * wide))
    first = np.frombuffer(stream, "<u4", narrow).astype(np.uint32)
    return first, np.frombuffer(stream, "<u8", wide, 4 * narrow).astype(np.uint64)


def pair_seed(secret: bytes) -> bytes:
    """Return the seed of the mask of two clients from their secret; :func:`shared_secret` gives it in base64."""
    return base64.urlsafe_b64decode(secret)
