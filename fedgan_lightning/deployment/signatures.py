"""Signatures between sites, by the node keys that they have anyway: a server cannot put its own keys in between."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fedgan_lightning.deployment.keys import read_pem
from fedgan_lightning.deployment.masking import Member
from fedgan_lightning.errors import ConfigurationError, ProtocolError, message

FIX = "find out who runs the server, and whether all sites have the same siteN.pub files"


class Signatures:
    """Signs with a site's node key (ECDSA, SHA-384), and checks what other sites signed.

    Args:
        key: The site's node key; a server has none.
        members: Folder with ``siteN.pub`` of every site of the federation, N being its client number.
    """

    def __init__(self, key: Path | None, members: Path) -> None:
        self.key, self.members = key, Path(members)

    def sign(self, text: bytes) -> bytes:
        """Return the signature of a text."""
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.hashes import SHA384

        signed: bytes = self._private.sign(text, ec.ECDSA(SHA384()))
        return signed

    def check_members(self, session: int, members: Mapping[int, Member]) -> None:
        """Refuse keys that are not signed by the site whose they are said to be.

        Raises:
            ProtocolError: If there are any; names the client.
        """
        for client_id, own in sorted(members.items()):
            self._check(client_id, own.signed_text(session, client_id), own.signature, "keys for a session")

    def check_consents(
        self,
        session: int,
        survivors: Sequence[int],
        consents: Mapping[int, bytes],
        *,
        transcript: bytes,
        needed: int,
    ) -> None:
        """Refuse a list of survivors that too few have agreed to (Bonawitz et al. 2017, round 3).

        Raises:
            ProtocolError: If it is so, or a signature is none.
        """
        if not {*consents} <= {*survivors} or len(consents) < needed:
            raise ProtocolError(
                message(f"{needed} sites must agree on whose updates are summed up", received=len(consents), fix=FIX)
            )
        for client_id, signature in sorted(consents.items()):
            self.check_consent(client_id, consent_text(session, survivors, transcript), signature)

    def check_consent(self, client_id: int, text: bytes, signature: bytes) -> None:
        """Refuse what is no client's signature of a list of survivors; see :func:`consent_text`.

        Raises:
            ProtocolError: If it is none.
        """
        self._check(client_id, text, signature, "a list of survivors")

    def _check(self, client_id: int, text: bytes, signature: bytes, what: str) -> None:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.hashes import SHA384

        try:
            self._public(client_id).verify(signature, text, ec.ECDSA(SHA384()))
        except InvalidSignature as error:
            raise ProtocolError(
                message(f"{what} must be signed by the site whose they are", received=f"client {client_id}'s", fix=FIX)
            ) from error

    @cached_property
    def _private(self) -> Any:
        from cryptography.hazmat.primitives import serialization

        assert self.key is not None  # whoever signs has one
        return read_pem(self.key, lambda data: serialization.load_ssh_private_key(data, password=None))

    def _public(self, client_id: int) -> Any:
        from cryptography.hazmat.primitives import serialization

        path = self.members / f"site{client_id}.pub"
        try:
            return read_pem(path, serialization.load_ssh_public_key)
        except ConfigurationError as error:
            raise ProtocolError(
                message("a site must know the public key of every other", received=str(error), fix=FIX)
            ) from error


def consent_text(session: int, survivors: Sequence[int], transcript: bytes) -> bytes:
    """Return what a site signs that agrees on whose updates are summed up: the list, of these members with these keys,
    which are fresh in every session.
    """
    return json.dumps(["fedgan survivors", session, sorted(survivors), transcript.hex()]).encode()
