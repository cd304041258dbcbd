"""A site's side of secure aggregation: messages between which its secrets lie on its own disk.

Every message may find a new process. The file can be read by its owner alone; what a session needed goes when its sum
can be opened or, where it never comes to that, when the next session begins.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgan_lightning.deployment import masking, wire
from fedgan_lightning.deployment.masking import Keys, Member, Shares
from fedgan_lightning.deployment.signatures import Signatures, consent_text
from fedgan_lightning.errors import ProtocolError, message
from fedgan_lightning.federation.distributed_noise import NoiseShares
from fedgan_lightning.federation.secure import FEWEST, NARROW, SecureAggregation, Summand, sizes_of
from fedgan_lightning.files import replacing
from fedgan_lightning.packing import Layout
from fedgan_lightning.protocol import State

ADVERTISED, SHARED, MASKED, CONSENTED = "advertised", "shared", "masked", "agreed"


@dataclass(frozen=True)
class Secrets:
    """What a site keeps between two messages of a session.

    Attributes:
        session: Number of the session.
        stage: What it has answered last.
        num_examples: N_k, as it told all others.
        keys: Its private keys.
        members: Who takes part, itself included.
        subject: Hash of the task or query that the session is about.
        seed: Seed of its own mask.
        own: Its shares of its own secrets.
        held: Its shares of those of the others whose updates may be in the sum.
    """

    session: int
    stage: str
    num_examples: int
    keys: Keys
    members: Mapping[int, Member]
    subject: str = ""
    seed: bytes = b""
    own: Shares | None = None
    held: Mapping[int, Shares] | None = None

    def to_text(self) -> str:
        """Return it as text."""
        return json.dumps(_plain(self))

    @classmethod
    def from_text(cls, text: str) -> Secrets:
        """Undo :meth:`to_text`."""
        found = json.loads(text)
        return cls(
            session=int(found["session"]),
            stage=str(found["stage"]),
            num_examples=int(found["num_examples"]),
            keys=Keys(**_bytes(found["keys"])),
            members={int(k): Member(**_bytes(own)) for k, own in found["members"].items()},
            subject=str(found["subject"]),
            seed=bytes.fromhex(found["seed"]),
            own=None if found["own"] is None else Shares(**_bytes(found["own"])),
            held=None if found["held"] is None else {int(k): Shares(**_bytes(v)) for k, v in found["held"].items()},
        )


class Session:
    """What a site answers in a session of secure aggregation.

    A site gives one answer to each message and no second one: two vectors under the same masks would tell their
    difference, and shares of both secrets of a client would tell its update.

    Args:
        folder: Where its secrets lie between messages.
        client_id: The client.
        secure: Bounds and threshold, from the site's own configuration.
        weight: The aggregator's weight of N_k examples, from the site's own configuration.
        signatures: Signs this site's keys and checks those of the others; ``None`` believes the server who they are.
    """

    def __init__(
        self,
        folder: Path,
        *,
        client_id: int,
        secure: SecureAggregation,
        weight: Callable[[int], float],
        signatures: Signatures | None = None,
    ) -> None:
        self.path, self.client_id, self.secure, self.weight = folder / "secure.json", client_id, secure, weight
        self.signatures = signatures

    def advertise(self, session: int, *, num_examples: int) -> Member:
        """Begin a session; return what all others may know."""
        keys = Keys.fresh()
        own = Member(masking.public(keys.mask), masking.public(keys.seal), num_examples)
        if self.signatures is not None:
            own = replace(own, signature=self.signatures.sign(own.signed_text(session, self.client_id)))
        self._write(Secrets(session, ADVERTISED, num_examples, keys, {self.client_id: own}))
        return own

    def share(self, session: int, members: Mapping[int, Member], *, subject: str) -> dict[int, bytes]:
        """Return shares of this site's two secrets, sealed for each other member.

        Args:
            session: The session.
            members: Who takes part, itself included.
            subject: Hash of the task or query that the session is about; no other is answered under its masks.

        Raises:
            ProtocolError: If it is told of too few members, of equal keys, of no examples, of keys that are not its
                own, or of keys that their owner did not sign.
        """
        known = self._read(session, ADVERTISED)
        keys = [key for own in members.values() for key in (own.mask, own.seal)]
        if members.get(self.client_id) != known.members[self.client_id] or len(set(keys)) < len(keys):
            raise _refused("members must have keys of their own", "equal ones, or others than this site's")
        if len(members) < FEWEST:
            raise _refused(f"a session must have at least {FEWEST} members", len(members))
        if self.signatures is not None:
            self.signatures.check_members(session, members)
        if min(own.num_examples for own in members.values()) < 1:
            raise _refused("members must count at least one example", min(own.num_examples for own in members.values()))
        needed, seed = self.secure.needed(len(members)), secrets.token_bytes(masking.SEED_BYTES)
        split = [masking.split(secret, needed=needed, number=len(members)) for secret in (seed, known.keys.mask)]
        shares = {k: Shares(*pair) for k, pair in zip(sorted(members), zip(*split))}
        transcript = masking.transcript(session, members, subject)
        sealed = {
            k: shares[k].sealed(
                masking.shared_secret(known.keys.seal, own.seal), source=self.client_id, destination=k, under=transcript
            )
            for k, own in members.items()
            if k != self.client_id
        }
        own = shares[self.client_id]
        self._write(Secrets(session, SHARED, known.num_examples, known.keys, dict(members), subject, seed, own))
        return sealed

    def commitment(self, session: int) -> bytes:
        """Return a hash of the seed whose shares this site has sealed: shares that are not of it are told apart."""
        return hashlib.sha256(self._read(session, SHARED).seed).digest()

    def open(self, session: int, sealed: Mapping[int, bytes], *, subject: str) -> None:
        """Take the shares that others sealed for this site: their updates, and its own, are to be in the sum.

        Args:
            session: The session.
            sealed: The shares, by who sealed them.
            subject: Hash of what is asked now.

        Raises:
            ProtocolError: If they are too few, not what their members sealed, or something else is asked than all were
                told.
        """
        known = self._read(session, SHARED)
        if subject != known.subject:
            raise _refused("a session must be about the task or query that all members were told of", "another one")
        if not {*sealed} <= {*known.members} - {self.client_id}:
            raise _refused("shares must come from other members", sorted(sealed))
        if len(sealed) + 1 < self.secure.needed(len(known.members)):
            raise _refused(f"{self.secure.needed(len(known.members))} members must be left", len(sealed) + 1)
        transcript = masking.transcript(session, known.members, known.subject)
        assert known.own is not None
        held = {self.client_id: known.own}
        for k, text in sealed.items():
            secret = masking.shared_secret(known.keys.seal, known.members[k].seal)
            try:
                held[k] = Shares.opened(text, secret, source=k, destination=self.client_id, under=transcript)
            except ValueError as error:
                raise _refused("shares must be for this session and its members", error) from error
        # From here on nothing but the answer to the last message is left to be asked for: no vector is masked twice.
        self._write(replace(known, stage=MASKED, held=held))

    def masked(self, session: int, groups: Mapping[str, State], *, noise: NoiseShares | None = None) -> Summand:
        """Return this site's states under its masks, weighted as :func:`shares_of` says.

        Args:
            session: The session, whose shares :meth:`open` took.
            groups: States by group.
            noise: Its share of a noise that no server can take away.

        Raises:
            UpdateError: If an entry is not finite or out of range.
            ProtocolError: If the session is not as far as that.
        """
        known = self._read(session, MASKED)
        assert known.held is not None
        shares = shares_of(known.members, [self.client_id], weight=self.weight)
        found = Summand.of(groups, shares=shares, secure=self.secure)
        narrow, wide = sizes_of(found.layouts)
        if noise is not None:
            options: dict[str, Any] = {"num_members": len(known.members), "purpose": (session, self.client_id)}
            share = noise.shares(found.layouts[NARROW], **options)
            found = found.plus(share, np.zeros(wide, np.uint64))
        found = found.plus(*masking.mask(known.seed, narrow=narrow, wide=wide))
        for k in sorted(known.held):
            if k == self.client_id:
                continue
            seed = masking.pair_seed(masking.shared_secret(known.keys.mask, known.members[k].mask))
            vectors = masking.mask(seed, narrow=narrow, wide=wide)
            found = found.plus(*vectors) if self.client_id < k else found.minus(*vectors)
        return found

    def unmask(
        self,
        session: int,
        survivors: Iterable[int],
        *,
        consents: Mapping[int, bytes] | None = None,
        allow: Callable[[str, list[int]], None] = lambda subject, left: None,
    ) -> dict[int, bytes]:
        """Return a share by member, and forget everything: of the seed for those whose vectors are in, else of the key.

        Args:
            session: The session.
            survivors: Whose vectors are in the sum.
            consents: Signatures of this list by those who agree to it, where ``secure.consistency`` asks for them.
            allow: Called with the subject and the list before anything is told; raises an error where it must not be.

        Raises:
            ProtocolError: If survivors are too few, or no members, or too few have agreed to the list.
        """
        known = self._read(session, CONSENTED if self.secure.consistency else MASKED)
        assert known.held is not None
        self.path.unlink()
        left = {*survivors}
        if self.client_id not in left or not left <= {*known.held}:
            raise _refused("survivors must be members whose shares are known", sorted(left))
        needed = self.secure.needed(len(known.members))
        if len(left) < needed:
            raise _refused(f"{needed} members must be left", len(left))
        if self.secure.consistency:
            transcript = masking.transcript(session, known.members, known.subject)
            self._signing().check_consents(session, sorted(left), consents or {}, transcript=transcript, needed=needed)
        allow(known.subject, sorted(left))
        return {k: own.seed if k in left else own.key for k, own in known.held.items()}

    def consent(self, session: int, survivors: Iterable[int]) -> bytes:
        """Return a signature of whose vectors are in the sum: all must have been told the same.

        Raises:
            ProtocolError: If they are no members, or this site has agreed to another list before.
        """
        known = self._read(session, MASKED)
        assert known.held is not None
        left = sorted({*survivors})
        if self.client_id not in left or not {*left} <= {*known.held}:
            raise _refused("survivors must be members whose shares are known", left)
        transcript = masking.transcript(session, known.members, known.subject)
        signed = self._signing().sign(consent_text(session, left, transcript))
        self._write(replace(known, stage=CONSENTED))
        return signed

    def _signing(self) -> Signatures:
        if self.signatures is None:
            raise _refused(
                "a site must have the public keys of all sites where secure.consistency is set", "none (--members)"
            )
        return self.signatures

    # ------------------------------------------------------------------ on disk

    def _read(self, session: int, stage: str) -> Secrets:
        known = Secrets.from_text(self.path.read_text()) if self.path.exists() else None
        if known is None or known.session != session or known.stage != stage:
            have = "none" if known is None else f"session {known.session}, {known.stage}"
            raise _refused(f"session {session} must be {stage} and go on from there, once", have)
        return known

    def _write(self, known: Secrets) -> None:
        with replacing(self.path, mode=0o600) as file:
            file.write(known.to_text().encode())


def shares_of(
    members: Mapping[int, Member], clients: Iterable[int], *, weight: Callable[[int], float]
) -> dict[str, float]:
    """Return the weight of these clients by group, over the sum of all members': the aggregator's for ``delta`` and
    ``extras``, N_k for ``metrics``, 1 for ``sums``.
    """
    listed = list(clients)

    def share(own: Callable[[int], float]) -> float:
        total = sum(own(member.num_examples) for member in members.values())
        return sum(own(members[k].num_examples) for k in listed) / total

    weighted = share(weight)
    return {"delta": weighted, "extras": weighted, "metrics": share(float), "sums": len(listed) / len(members)}


def _refused(rule: str, received: object) -> ProtocolError:
    return ProtocolError(message(rule, received=received, fix="the round is tried again; look at the server's log"))


def _plain(value: Any) -> Any:
    """Return nested records as plain values; bytes in hexadecimal."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(name): _plain(own) for name, own in value.items()}
    return _plain(vars(value)) if hasattr(value, "__dataclass_fields__") else value


def _bytes(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: bytes.fromhex(own) if isinstance(own, str) else own for name, own in fields.items()}


# ---------------------------------------------------------------------- on the wire


def members_to_facts(members: Mapping[int, Member]) -> dict[str, Any]:
    """Return members as plain values."""
    listed = sorted(members.items())
    return {
        "clients": [k for k, _ in listed],
        "mask_keys": [own.mask for _, own in listed],
        "seal_keys": [own.seal for _, own in listed],
        "sizes": [own.num_examples for _, own in listed],
        "signatures": [own.signature for _, own in listed],
    }


def members_of_facts(facts: Mapping[str, Any]) -> dict[int, Member]:
    """Undo :func:`members_to_facts`."""
    columns = (facts[name] for name in ("clients", "mask_keys", "seal_keys", "sizes", "signatures"))
    listed = list(zip(*columns, strict=True))
    return {int(k): Member(bytes(mask), bytes(seal), int(size), bytes(own)) for k, mask, seal, size, own in listed}


def sealed_to_facts(sealed: Mapping[int, bytes]) -> dict[str, Any]:
    """Return bytes by client as plain values."""
    return {"others": sorted(sealed), "texts": [sealed[k] for k in sorted(sealed)]}


def sealed_of_facts(facts: Mapping[str, Any]) -> dict[int, bytes]:
    """Undo :func:`sealed_to_facts`."""
    return {int(k): bytes(text) for k, text in zip(facts["others"], facts["texts"])}


def summand_to_content(summand: Summand, *, facts: Mapping[str, Any]) -> Any:
    """Return masked states, and what may be known beside them, as records."""
    layouts = json.dumps({group: layout.plain() for group, layout in summand.layouts.items()})
    narrow, wide = torch.from_numpy(summand.narrow.view(np.int32)), torch.from_numpy(summand.wide.view(np.int64))
    return wire.content({**facts, "layouts": layouts}, masked={"narrow": narrow, "wide": wide})


def summand_of_content(records: Any) -> tuple[Summand, dict[str, Any]]:
    """Undo :func:`summand_to_content`.

    Raises:
        ValueError: If layouts and numbers do not fit each other.
    """
    facts = wire.facts_of(records)
    layouts = {str(group): Layout.from_plain(own) for group, own in json.loads(facts.pop("layouts")).items()}
    found = wire.state_of(records, "masked")
    narrow, wide = found["narrow"], found["wide"]
    fits = (narrow.dtype, wide.dtype) == (torch.int32, torch.int64) and narrow.dim() == wide.dim() == 1
    if not fits or (narrow.numel(), wide.numel()) != sizes_of(layouts):
        raise ValueError(f"{narrow.numel()} and {wide.numel()} numbers, not {sizes_of(layouts)}")
    return Summand(layouts, narrow.numpy().view(np.uint32), wide.numpy().view(np.uint64)), facts
