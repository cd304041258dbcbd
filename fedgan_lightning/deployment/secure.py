"""The server's side of secure aggregation: three messages to each client, after which it knows a sum and no summand.

Advertise keys, share secrets, collect masked vectors, unmask: Bonawitz et al. 2017, protocol 1, where the keys of a
session come along with the last message of the one before. It is as in Flower's SecAgg+ but over the messages of this
package, since Flower's own runs on its legacy interface only. Every client shares a mask with every other: the sparse
graph of SecAgg+ (Bell et al. 2020) pays off from hundreds of clients a round.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgan_lightning.deployment import masking, wire
from fedgan_lightning.deployment.masking import Member
from fedgan_lightning.deployment.opened import OVERHEAD, Opened, fitting, masked_bytes
from fedgan_lightning.deployment.session import (
    members_of_facts,
    members_to_facts,
    sealed_of_facts,
    sealed_to_facts,
    shares_of,
    summand_of_content,
)
from fedgan_lightning.deployment.signatures import Signatures, consent_text
from fedgan_lightning.deployment.sites import ANSWER_SECONDS, Sites
from fedgan_lightning.errors import UpdateError
from fedgan_lightning.federation.client_context import never
from fedgan_lightning.federation.schema import printable
from fedgan_lightning.federation.secure import SecureAggregation, Summand
from fedgan_lightning.packing import Layout

logger = logging.getLogger("fedgan_lightning")

#: What a client says that cannot open another's share: see :meth:`Shares.opened`.
BLAMED = re.compile(r"shares from client (\d+) cannot be opened")
#: Longest sealed share that is passed on, in bytes.
MOST_SEALED = 10_000


class SecureSessions:
    """Sums over sites that no single summand can be told from.

    Args:
        sites: The sites.
        secure: Bounds and threshold.
        weight: The aggregator's weight of N_k examples.
        timeout: Seconds that clients have for each of the four answers; ``None`` waits for vectors as long as sites are
            connected.
        keys: Folder with the public node key of every site, ``siteN.pub``: one that others would not believe is
            refused before they are asked. ``None`` believes all.
    """

    def __init__(
        self,
        sites: Sites,
        *,
        secure: SecureAggregation,
        weight: Callable[[int], float],
        timeout: float | None = None,
        keys: Path | None = None,
    ) -> None:
        self.sites, self.secure, self.weight, self.timeout = sites, secure, weight, timeout
        self.signatures = None if keys is None else Signatures(None, keys)
        self._ahead: tuple[int, dict[int, Member]] = (secrets.randbits(62), {})

    def run(
        self,
        clients: Sequence[int],
        query: Callable[[int], Any],
        *,
        kind: str,
        subject: str,
        group: str = "",
        complete: bool = False,
        size_of: Callable[[int], int] | None = None,
        check: Callable[[int, Mapping[str, Layout], Mapping[str, Any]], None] | None = None,
        stop_requested: Callable[[], bool] = never,
    ) -> Opened:
        """Return the sum of what these clients answer to ``query``.

        Args:
            clients: Who is asked.
            query: Records for a client; the session's are added to them.
            kind: Type of the message that carries them.
            subject: Hash of what is asked, which all clients are told before they share secrets.
            group: Name under which Flower lists the messages.
            complete: Whether to open the sum of all of them or none. What sites answer every time alike would otherwise
                be told apart: the sum with a site, less the sum without it.
            size_of: N_k as clients stated it when they joined; one that says otherwise is left out.
            check: Called with client, layouts and facts of what came, before anything is opened; one for whom it raises
                an error is left out.
            stop_requested: Whether to give up.

        Raises:
            RoundInterrupted: If the user asks to stop.
        """
        about = {"kind": kind, "subject": subject, "group": group}
        number, ahead = self._ahead
        session = _Run(self, number, stop_requested, size_of=size_of, check=check, ahead=ahead, **about)
        self._ahead = (session.next, session.told_ahead)  # filled with the last message, where it comes to that
        return session.opened(clients, query, complete=complete)


class _Run:
    """One session."""

    def __init__(
        self,
        owner: SecureSessions,
        session: int,
        stop_requested: Callable[[], bool],
        *,
        kind: str,
        subject: str,
        group: str,
        size_of: Callable[[int], int] | None,
        check: Callable[[int, Mapping[str, Layout], Mapping[str, Any]], None] | None,
        ahead: Mapping[int, Member],
    ) -> None:
        self.commitments: dict[int, bytes] = {}
        self.ahead, self.next, self.told_ahead = ahead, secrets.randbits(62), dict[int, Member]()
        self.size_of, self.check = size_of, check
        self.owner, self.session, self.kind, self.subject, self.group = owner, session, kind, subject, group
        self.stop_requested, self.result = stop_requested, Opened()

    def opened(self, clients: Sequence[int], query: Callable[[int], Any], *, complete: bool) -> Opened:
        members = self._advertised(clients)
        needed = self.owner.secure.needed(len(members))
        least = max(needed, len(clients)) if complete else needed
        if not self._enough(members, least, "advertise"):
            return self.result
        self.result.members = members
        sealed = self._sealed(members)
        if not self._enough(sealed, least, "share"):
            return self.result
        vectors = self._masked(sealed, query)
        if not self._enough(vectors, least, "mask"):
            return self.result
        answers = self._unmasked(vectors)
        if len(answers) < needed:
            return self._given_up(vectors, "unmask", f"{len(answers)} of at least {needed} clients answered")
        try:
            total = self._sum(sealed, vectors, answers, needed)
            weights = shares_of(members, vectors, weight=self.owner.weight) | {"sums": 1 / len(members)}
            self.result.means = total.means(weights, secure=self.owner.secure)
        except Exception as error:  # shares are what somebody sent
            return self._given_up(vectors, "unmask", printable(f"shares or masks do not fit: {error}"))
        return self.result

    # ------------------------------------------------------------------ four stages

    def _advertised(self, clients: Sequence[int]) -> dict[int, Member]:
        """Return the keys of these clients: told with the last message of the session before, or asked for now."""
        early = {k: own for k, own in self.ahead.items() if k in clients and self.owner.sites.node_of(k) is not None}
        asked = [k for k in clients if k not in early]
        contents = {k: wire.content({"ask": "advertise", "session": self.session}) for k in asked}
        told = {k: members_to_facts({k: own}) for k, own in early.items()}
        answers = self._ask(contents, "advertise") if contents else {}
        told |= {k: wire.facts_of(records) for k, records in answers.items()}
        found: dict[int, Member] = {}
        probe, taken = masking.Keys.fresh().mask, set[bytes]()
        for k, facts in sorted(told.items()):
            try:
                (own,) = members_of_facts(facts).values()
                self._check_member(k, own, probe, taken)
            except Exception as error:  # what comes can be anything, and must not end the server
                self._refuse(k, "advertise", printable(f"no keys ({error})"))
                continue
            found[k] = own
            taken |= {own.mask, own.seal}
            self._count(k, {OVERHEAD: len(own.mask) + len(own.seal) + len(own.signature)})
        if any(own.signature for own in found.values()):  # those who sign believe nobody who does not
            for k in [k for k, own in found.items() if not own.signature]:
                self._refuse(k, "advertise", "keys without a signature, where others sign theirs")
                del found[k]
        return found

    def _check_member(self, client_id: int, own: Member, probe: bytes, taken: set[bytes]) -> None:
        """Refuse keys with which all others would refuse the session, and another size than was stated before.

        Raises:
            ValueError: If they are none, or somebody else's, or the size differs.
        """
        stated = None if self.size_of is None else self.size_of(client_id)
        if own.num_examples < 1 or own.num_examples != (stated or own.num_examples):
            raise ValueError(f"{own.num_examples} examples" + (f", and {stated} when it joined" if stated else ""))
        if max(map(len, (own.mask, own.seal, own.signature))) > MOST_SEALED:
            raise ValueError(f"more than {MOST_SEALED} bytes")
        if self.owner.signatures is not None and own.signature:
            self.owner.signatures.check_members(self.session, {client_id: own})
        if own.mask == own.seal or {own.mask, own.seal} & taken:
            raise ValueError("keys that another has, too")
        for key in (own.mask, own.seal):
            masking.shared_secret(probe, key)

    def _sealed(self, members: Mapping[int, Member]) -> dict[int, dict[int, bytes]]:
        """Return the sealed shares, by source and destination."""
        request = {"ask": "share", "session": self.session, "subject": self.subject, **members_to_facts(members)}
        found: dict[int, dict[int, bytes]] = {}
        for k, records in self._ask({k: wire.content(request) for k in members}, "share").items():
            try:
                own = sealed_of_facts(wire.facts_of(records))
                if {*own} != {*members} - {k}:
                    raise ValueError(f"for clients {sorted(own)}")
                commitment = bytes(wire.facts_of(records)["commitment"])
                if max(map(len, (*own.values(), commitment))) > MOST_SEALED:
                    raise ValueError(f"more than {MOST_SEALED} bytes")
            except Exception as error:
                self._refuse(k, "share", printable(f"no shares ({error})"))
                continue
            found[k], self.commitments[k] = own, commitment
            self._count(k, {OVERHEAD: sum(map(len, own.values()))})
        return found

    def _masked(self, sealed: Mapping[int, Mapping[int, bytes]], query: Callable[[int], Any]) -> dict[int, Summand]:
        """Return the masked vectors of those whose entries are those of most."""
        contents = {}
        for k in sealed:
            own = {source: texts[k] for source, texts in sealed.items() if source != k}
            contents[k] = query(k)
            for name, value in {"session": self.session, **sealed_to_facts(own)}.items():
                contents[k]["facts"][name] = value
        found: dict[int, Summand] = {}
        seconds = self.owner.timeout if self.kind == wire.TRAIN else ANSWER_SECONDS
        for k, records in self._ask(contents, "reply", kind=self.kind, seconds=seconds).items():
            try:
                summand, facts = summand_of_content(records)
                if self.check is not None:
                    self.check(k, summand.layouts, facts)
            except UpdateError as error:
                self._refuse(k, "reply", printable(error))
            except Exception as error:
                self._refuse(k, "reply", printable(f"no masked vector ({error})"))
            else:
                found[k], self.result.facts[k] = summand, facts
        layouts = [own.layouts for own in found.values()]
        usual = max(layouts, key=layouts.count, default={})
        for k in [k for k, own in found.items() if own.layouts != usual]:
            self._refuse(k, "reply", "its update differs from the others' in entries, shapes or dtypes")
            del found[k]
        for k, vector in found.items():
            self._count(k, masked_bytes(vector.layouts))
        self._name_the_liar({*sealed})
        return found

    def _name_the_liar(self, members: set[int]) -> None:
        """Refuse a client whose shares most others could not open, and say of these that it was not they."""
        causes = {k: BLAMED.search(cause) for k, (stage, cause) in self.result.lost.items() if stage == "reply"}
        blamed = Counter(int(own[1]) for own in causes.values() if own is not None)
        for suspect, count in blamed.items():
            if suspect in members and 2 * count > len(members) - 1:
                self._refuse(suspect, "share", f"{count} of {len(members) - 1} others cannot open its shares")

    def _unmasked(self, vectors: Mapping[int, Summand]) -> dict[int, dict[int, bytes]]:
        """Return the shares that the secrets are made of again, by who holds them and whose they are."""
        request = {"ask": "unmask", "session": self.session, "survivors": sorted(vectors)}
        if self.owner.secure.consistency:
            consents = self._consents(vectors)
            request |= {"consenting": sorted(consents), "consents": [consents[k] for k in sorted(consents)]}
        request["next"] = self.next  # the keys of the next session come along: three messages a round and not four
        found: dict[int, dict[int, bytes]] = {}
        answers = self._ask({k: wire.content(request) for k in vectors}, "unmask", is_loss=False)
        for k, records in answers.items():
            try:
                found[k] = sealed_of_facts(wire.facts_of(records))
            except Exception:
                logger.warning(f"client {k} answers the last message of a session without shares")
                continue
            self._count(k, {OVERHEAD: sum(map(len, found[k].values()))})
            with contextlib.suppress(Exception):  # who tells none is asked for them
                (self.told_ahead[k],) = members_of_facts(wire.facts_of(records)).values()
        return found

    def _consents(self, vectors: Mapping[int, Summand]) -> dict[int, bytes]:
        """Return signatures of the list of those whose vectors came, by who signs it."""
        request = {"ask": "consent", "session": self.session, "survivors": sorted(vectors)}
        transcript = masking.transcript(self.session, self.result.members, self.subject)
        text = consent_text(self.session, sorted(vectors), transcript)
        found: dict[int, bytes] = {}
        for k, records in self._ask({k: wire.content(request) for k in vectors}, "consent", is_loss=False).items():
            signature = wire.facts_of(records).get("consent")
            try:
                if not isinstance(signature, bytes) or len(signature) > MOST_SEALED:
                    raise ValueError("no signature")
                if self.owner.signatures is not None:  # one that is none would make all others refuse
                    self.owner.signatures.check_consent(k, text, signature)
            except Exception as error:
                logger.warning(f"client {k} signs no list of survivors: {printable(error)}")
                continue
            found[k] = signature
            self._count(k, {OVERHEAD: len(signature)})
        return found

    def _sum(
        self,
        sealed: Mapping[int, Any],
        vectors: Mapping[int, Summand],
        answers: Mapping[int, Mapping[int, bytes]],
        needed: int,
    ) -> Summand:
        """Return the sum of the vectors without their masks.

        Raises:
            ValueError: If shares are not of one secret.
        """
        members, (first, *others) = self.result.members, list(vectors.values())
        total = first
        for own in others:
            total = total.plus(own.narrow, own.wide)
        sizes = {"narrow": first.narrow.size, "wide": first.wide.size}

        def is_seed(client_id: int, found: bytes) -> bool:
            return hashlib.sha256(found).digest() == self.commitments[client_id]

        def is_key(client_id: int, found: bytes) -> bool:
            return masking.public(found) == members[client_id].mask

        for k in vectors:
            total = total.minus(*masking.mask(fitting(answers, k, needed=needed, is_right=is_seed), **sizes))
        for k in sorted({*sealed} - {*vectors}):  # lost after the others had put its mask on
            key = fitting(answers, k, needed=needed, is_right=is_key)
            for other in vectors:
                vectors_of_pair = masking.mask(
                    masking.pair_seed(masking.shared_secret(key, members[other].mask)), **sizes
                )
                total = total.minus(*vectors_of_pair) if other < k else total.plus(*vectors_of_pair)
        return total

    # ------------------------------------------------------------------ messages

    def _ask(
        self,
        contents: Mapping[int, Any],
        stage: str,
        *,
        kind: str = wire.QUERY,
        seconds: float | None = ANSWER_SECONDS,
        is_loss: bool = True,
    ) -> dict[int, Any]:
        """Return the answers by client, of those that answer."""
        sites, nodes = self.owner.sites, {k: self.owner.sites.node_of(k) for k in contents}
        asked = {node: k for k, node in nodes.items() if node is not None}
        clock: dict[int, float] = {}
        if self.owner.timeout is not None:
            seconds = self.owner.timeout
        found, troubles = sites.exchange(
            {node: contents[k] for node, k in asked.items()},
            seconds=seconds,
            kind=kind,
            group=self.group,
            stop_requested=self.stop_requested,
            clock=clock,
        )
        for node, took in clock.items():
            self.result.seconds[asked[node]] = self.result.seconds.get(asked[node], 0.0) + took
        causes = {asked[node]: trouble for node, trouble in troubles.items()}
        causes |= {k: "its site is not connected" for k, node in nodes.items() if node is None}
        for k, cause in sorted(causes.items()):
            if is_loss:
                self._lose(k, stage, cause)
            else:
                logger.warning(f"client {k} does not answer the last message of a session: {cause}")
        return {k: found[node] for node, k in sorted(asked.items(), key=lambda pair: pair[1]) if node in found}

    def _lose(self, client_id: int, stage: str, cause: str) -> None:
        self.result.lost[client_id] = (stage, cause)

    def _refuse(self, client_id: int, stage: str, cause: str) -> None:
        self.result.refused.add(client_id)
        self._lose(client_id, stage, cause)

    def _enough(self, left: Mapping[int, Any], needed: int, stage: str) -> bool:
        if len(left) < needed:
            self._given_up(left, stage, f"{len(left)} of at least {needed} clients are left")
        return len(left) >= needed

    def _given_up(self, left: Iterable[int], stage: str, cause: str) -> Opened:
        for k in {*left} - self.result.refused:
            self._lose(k, stage, f"the sum cannot be opened: {cause}")
        return self.result

    def _count(self, client_id: int, sizes: Mapping[str, int]) -> None:
        self.result.bytes_up.setdefault(client_id, Counter()).update(sizes)
