"""The sites of a federation as its server sees them: who is connected, what each said of itself, how to ask them."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from fedgan_lightning.deployment import wire
from fedgan_lightning.deployment.answers import Answers
from fedgan_lightning.deployment.replies import Malformed, Refusal, checked_facts, trouble_in
from fedgan_lightning.errors import QuorumError, RefusedError, RoundInterrupted, message
from fedgan_lightning.federation.client_context import never
from fedgan_lightning.federation.schema import printable
from fedgan_lightning.files import write_text
from fedgan_lightning.protocol import State

logger = logging.getLogger("fedgan_lightning")

#: Seconds between two lines that say who is waited for.
TELL_SECONDS = 60.0
#: Seconds between two looks for answers: Flower's own loop takes three.
POLL_SECONDS = 0.2
#: Seconds between two looks at who is connected, while answers are waited for.
WATCH_SECONDS = 10.0
#: Seconds to wait for all sites at the start, for those to come back that a restarted server knows, and for the answer
#: to a query.
JOIN_SECONDS, RETURN_SECONDS, ANSWER_SECONDS = 600.0, 90.0, 600.0


#: Looks at a client's sums; of all clients' together, where there are no others, ``None``.
Check: TypeAlias = Callable[[int | None, State], None]


def no_check(client_id: int | None, sums: State) -> None:
    """Find nothing."""


class Sites:
    """The sites that are connected to a Flower grid, by client.

    Args:
        grid: Flower's grid.
        num_clients: Sites that the federation has.
        digest: Hash of what all share.
        memory: File for what sites said of themselves when the federation began; beside it lies what they tell of their
            samples.
        needed: Sites with which a server goes on that finds the others in ``memory``; ``None`` begins anew, with all.
        accept_changes: Whether ``memory`` counts for a federation whose settings have changed since.
        expelled: Clients that are neither waited for nor let in.
        owners: Client by node, as their keys have them; a node that is not listed is believed.
        strikes: Answers to queries that are none, after which a site is not asked any more; ``None`` asks for ever.

    Attributes:
        on_change: Called when who is connected, or refused, has changed.
        left_out: Why clients are not in the sums of a query, by its hash and by client.
        run: Name of the run, by which sites know what they have told of it; the same after a restart.
    """

    #: Whether :meth:`sums` are those of all sites together.
    sums_only: ClassVar[bool] = False

    def __init__(
        self,
        grid: Any,
        *,
        num_clients: int,
        digest: str,
        memory: Path | None = None,
        needed: int | None = None,
        strikes: int | None = None,
        accept_changes: bool = False,
        expelled: Collection[int] = (),
        owners: Mapping[int, int] | None = None,
    ) -> None:
        self.accept_changes, self.expelled, self.owners = accept_changes, frozenset(expelled), owners or {}
        self.grid, self.num_clients, self.digest = grid, num_clients, digest
        self.memory, self.needed, self.run, self._is_new = memory, needed, secrets.token_hex(8), True
        self.strikes, self.struck = strikes, Counter[int]()
        self.left_out: dict[str, dict[int, str]] = {}
        self.on_change: Callable[[], None] = lambda: None
        self.answers = Answers(None if memory is None else memory.with_name("answers"))
        self._facts: dict[int, dict[str, Any]] = {} if needed is None else self._remembered()
        self._has_begun = False
        self._nodes: dict[int, int] = {}
        self._connected: set[int] = set()
        self._present: set[int] = set()
        self._watched = time.monotonic()
        self._refused: dict[int, str] = {}
        self._troubles: dict[int, str] = {}

    def facts(self) -> dict[int, dict[str, Any]]:
        """Return what every site said of itself, once all are there, or enough of those that are known of old.

        Raises:
            QuorumError: If they are not, in time.
        """
        began = told = time.monotonic()
        while not self._has_begun:
            self.refresh()
            waited = time.monotonic() - began
            missing = self._missing()
            self._has_begun = not missing or (waited >= RETURN_SECONDS and self._may_begin_without(missing))
            if self._has_begun:
                self._remember()
            elif waited > JOIN_SECONDS:
                raise self._too_few(missing)
            else:
                if time.monotonic() - told > TELL_SECONDS or told == began:
                    told = time.monotonic()
                    logger.info(f"waiting for {_clients(missing)}, {JOIN_SECONDS - waited:.0f} s more")
                time.sleep(1.0)
        return dict(self._facts)

    def _too_few(self, missing: list[int]) -> QuorumError:
        """Return the error that these clients' sites did not come, with what is wrong with those that did."""
        refused = "; ".join(dict.fromkeys(self._refused.values()))
        return QuorumError(
            message(
                f"a federation must have its {self.num_clients} sites there to begin",
                received=f"none for clients {missing} within {JOIN_SECONDS:.0f} s"
                + (f", and {len(self._refused)} refused: {refused}" if refused else ""),
                fix=("mend those, " if refused else "") + "start their SuperNodes, or lower data.num_clients",
            )
        )

    def _missing(self) -> list[int]:
        """Return the clients whose sites have not come since the server's start."""
        return [k for k in range(self.num_clients) if k not in self._nodes and k not in self.expelled]

    def _may_begin_without(self, missing: list[int]) -> bool:
        """Whether these sites are known, and the others enough for a round."""
        if self.needed is None or not self._facts.keys() >= {*missing} or self.num_connected < max(1, self.needed):
            return False
        logger.warning(f"going on without {_clients(missing)}, not back within {RETURN_SECONDS:.0f} s")
        return True

    def _remembered(self) -> dict[int, dict[str, Any]]:
        """Return what the file says of this federation's clients; nothing where it is another's, or none."""
        if self.memory is None or not self.memory.exists():
            return {}
        try:
            kept = json.loads(self.memory.read_text())
            is_ours = kept["digest"] == self.digest or self.accept_changes
            known = {int(k): dict(own) for k, own in kept["sites"].items()} if is_ours else {}
            self.run, self._is_new = (str(kept["run"]), False) if known else (self.run, True)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning(
                f"{self.memory} cannot be read, so all sites are waited for: {type(error).__name__}: {error}"
            )
            return {}
        return {k: own for k, own in known.items() if 0 <= k < self.num_clients}

    def _remember(self) -> None:
        """Write the file at the beginning of a federation, and when sites have joined it since: it tells what its
        checkpoints are about.
        """
        if self.memory is not None and (self.needed is None or self.accept_changes or self._is_new):
            known = {"digest": self.digest, "run": self.run, "sites": self._facts}
            write_text(self.memory, json.dumps(known, indent=1, sort_keys=True))

    @property
    def num_connected(self) -> int:
        """Number of clients whose sites were connected when last looked at."""
        return len(self._present)

    def watch(self) -> None:
        """Look who is connected, unless that was a moment ago."""
        if time.monotonic() - self._watched > WATCH_SECONDS:
            self._look()
            self._announce()

    def pause(self) -> None:
        """Wait a moment before the next look for answers."""
        self.watch()
        time.sleep(POLL_SECONDS)

    def _look(self) -> None:
        self._connected = {int(node_id) for node_id in self.grid.get_node_ids()}
        # One that comes back may have been mended.
        self._refused = {node: reason for node, reason in self._refused.items() if node in self._connected}
        self._watched = time.monotonic()

    def _announce(self) -> None:
        """Say who is connected, once for every change."""
        present = {client_id for client_id, node_id in self._nodes.items() if node_id in self._connected}
        changes = {"gone": self._present - present, "here": present - self._present}
        if any(changes.values()):
            changed = "; ".join(f"{word}: {_clients(own)}" for word, own in changes.items() if own)
            logger.info(f"{len(present)} of {self.num_clients} sites connected ({changed})")
        self._present = present
        if any(changes.values()):
            self.on_change()

    def status(self) -> dict[str, Any]:
        """Return who is connected, who is missing, and who was refused and why, as plain values."""
        missing = sorted({*range(self.num_clients)} - self._present)
        refused = {str(node_id): reason for node_id, reason in self._refused.items()}
        return {"connected": sorted(self._present), "missing": missing, "refused": refused}

    def stamp(self, content: Any, node_id: int) -> Any:
        """Return records that say, beside all else, of which run they are, and what the site said of its samples."""
        client_id = next((k for k, node in self._nodes.items() if node == node_id), None)
        content["facts"]["run"] = self.run
        content["facts"]["joined"] = "" if client_id is None else str(self._facts[client_id].get("data", ""))
        return content

    def refresh(self) -> None:
        """Look who is connected, and ask those that are new who they are."""
        self._look()
        new = sorted(self._connected - {*self._nodes.values()} - self._refused.keys())
        for node_id, facts in self._ask({node_id: wire.content({"ask": "facts"}) for node_id in new}).items():
            self._introduce(node_id, wire.facts_of(facts))
        self._announce()

    def _introduce(self, node_id: int, answer: dict[str, Any]) -> None:
        """Let a site take part, or refuse it by name."""
        try:
            facts = checked_facts(answer)
            reason = self._objection(node_id, facts, printable(answer["digest"]))
        except Exception as error:  # what comes can be anything, and must not end the server
            reason = printable(f"answers with no facts ({type(error).__name__}: {error})")
        if reason is not None:
            self._refused[node_id] = reason
            logger.warning(f"site {node_id} refused: it {reason}")
            self.on_change()
            return
        self._nodes[facts["client_id"]], self._facts[facts["client_id"]] = node_id, facts
        logger.info(f"client {facts['client_id']} joined with {facts['num_examples']} samples")

    def _objection(self, node_id: int, facts: dict[str, Any], digest: str) -> str | None:
        """Return why a site must not take part, or ``None``."""
        client_id = facts["client_id"]
        if not 0 <= client_id < self.num_clients:
            return f"says that it is client {client_id} of {self.num_clients}"
        if (owner := self.owners.get(node_id, client_id)) != client_id:
            return f"says that it is client {client_id}, and has the key of client {owner}"
        if client_id in self.expelled:
            return f"is client {client_id}, which was expelled"
        if digest != self.digest:
            return f"does not share {wire.SHARED} ({digest}, here {self.digest})"
        if self._nodes.get(client_id) in self._connected - {node_id}:
            return f"says that it is client {client_id}, which another site is"
        if (known := self._facts.get(client_id, facts)) != facts:
            sizes = f"{facts['num_examples']} now, {known['num_examples']} then"
            return f"is client {client_id}, and holds other samples than when the federation began ({sizes})"
        return None

    def node_of(self, client_id: int) -> int | None:
        """Return the node of a client; ``None`` if it is not connected."""
        node_id = self._nodes.get(client_id)
        return node_id if node_id in self._connected else None

    def sums(self, facts: dict[str, Any], state: State, *, check: Check = no_check) -> list[State]:
        """Return the sums that sites make of their own samples; each tells them once in a run.

        A site that refuses, or answers with what is no answer, is left out by name, here and whenever the same is asked
        again.

        Args:
            facts: A query's, with its ``query``.
            state: Its tensors.
            check: Called with client and sums; raises an error if these cannot be right.

        Raises:
            QuorumError: If a site is away: it may come back, and sums of some are not those of all.
            RefusedError: If none tells any.
        """
        self.facts()
        key = wire.hash_of({**facts, "digest": self.digest}, state)
        left_out = self.left_out.setdefault(key, {})
        clients = [k for k in range(self.num_clients) if k not in left_out and not self.is_benched(k)]
        known = {int(k): own for k, own in self.answers.of(key).items()}
        asked = [k for k in clients if k not in known]
        if missing := sorted({*asked} & {*self._missing()}):
            raise _incomplete(dict.fromkeys(missing, "not connected since the server's start"))
        contents = {self._nodes[k]: wire.content({**facts, "ask": "sums"}, state=state) for k in asked}
        answers, away = self._ask(contents), dict[int, str]()
        for client_id in asked:
            node = self._nodes[client_id]
            if node not in answers:
                trouble = self._troubles.get(node, "")
                (left_out if isinstance(trouble, (Refusal, Malformed)) else away)[client_id] = trouble
                if isinstance(trouble, Malformed):
                    self.strike(client_id)
                continue
            try:
                found = wire.state_of(answers[node], "sums")
                check(client_id, found)
            except Exception as error:  # what comes can be anything, and its site has to be named
                left_out[client_id] = printable(f"no sums ({error})")
                self.strike(client_id)
            else:
                known[client_id] = found
                self.answers.keep(key, str(client_id), found)
        for client_id in sorted({*asked} & left_out.keys()):
            logger.warning(f"{facts['query']} are summed up without client {client_id}: {left_out[client_id]}")
        if away:
            raise _incomplete(away)
        if not known:
            raise RefusedError(str(_incomplete(left_out)))
        return [known[client_id] for client_id in clients if client_id in known]

    def strike(self, client_id: int) -> None:
        """Count an answer that is none."""
        self.struck[client_id] += 1
        if self.is_benched(client_id):
            logger.warning(f"client {client_id} is not asked about its samples any more: metrics go without it")

    def is_benched(self, client_id: int) -> bool:
        """Whether a client has answered so often with what is no answer that it is not asked any more."""
        return client_id in self.expelled or (self.strikes is not None and self.struck[client_id] >= self.strikes)

    def pull(self, keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Yield the answers that have come, by the message that they answer; what cannot be read is :class:`Malformed`.

        Each is pulled by itself: one that cannot be read would take others along, and says itself what it answers.
        """
        for key in keys:
            try:
                replies = list(self.grid.pull_messages([key]))
            except Exception as error:
                if isinstance(error, OSError) or type(error).__module__.startswith("http"):
                    raise  # of the way to the SuperLink, and not of a site
                yield key, Malformed(printable(f"an answer that cannot be read ({type(error).__name__}: {error})"))
                continue
            for reply in replies[:1]:
                is_its = reply.metadata.reply_to_message_id == key
                yield key, reply if is_its else Malformed("an answer to another message")

    def _ask(self, contents: Mapping[int, Any]) -> dict[int, Any]:
        """Return the answers by node, of those that answer in time and without an error."""
        found, troubles = self.exchange(contents, seconds=ANSWER_SECONDS)
        for node_id, trouble in troubles.items():
            if self._troubles.get(node_id) != trouble:  # a site that is waited for is asked again and again
                logger.warning(f"site {node_id} could not answer: {trouble}")
        self._troubles |= troubles
        return found

    def exchange(
        self,
        contents: Mapping[int, Any],
        *,
        seconds: float | None,
        kind: str = wire.QUERY,
        group: str = "",
        stop_requested: Callable[[], bool] = never,
        clock: dict[int, float] | None = None,
    ) -> tuple[dict[int, Any], dict[int, str]]:
        """Ask nodes, and wait for all of them; return the answers, and what went wrong with the others, by node.

        Args:
            contents: What each is asked.
            seconds: Time they have; ``None`` waits as long as they are connected.
            kind: Type of the messages.
            group: Name under which Flower lists them.
            stop_requested: Whether to give up.
            clock: The seconds that an answer took are added here, by node.

        Raises:
            RoundInterrupted: If the user asks to stop.
        """
        from flwr.app import Message

        messages = [
            Message(self.stamp(content, node_id), dst_node_id=node_id, message_type=kind, group_id=group)
            for node_id, content in contents.items()
        ]
        waiting = dict(zip(self.grid.push_messages(messages), contents)) if messages else {}
        found: dict[int, Any] = {}
        troubles: dict[int, str] = {}
        started = time.monotonic()
        deadline = None if seconds is None else started + seconds
        while waiting:
            if stop_requested():
                raise RoundInterrupted("the user asked to stop")
            for key, reply in self.pull(list(waiting)):
                node_id, trouble = waiting.pop(key), trouble_in(reply)
                if trouble is None:
                    found[node_id] = reply.content
                    if clock is not None:
                        clock[node_id] = clock.get(node_id, 0.0) + time.monotonic() - started
                else:
                    troubles[node_id] = trouble
            if deadline is not None and time.monotonic() > deadline:
                break
            if waiting:
                self.pause()
        silent = "" if seconds is None else f"no answer within {seconds:.0f} s"
        return found, {**troubles, **dict.fromkeys(waiting.values(), silent)}


def _incomplete(causes: Mapping[int, str]) -> QuorumError:
    """Return the error that sums are not those of all sites, by client and cause."""
    return QuorumError(
        message(
            "every site must answer what the evaluation asks",
            received=f"no sums from clients {sorted(causes)} ({'; '.join(dict.fromkeys(causes.values()))})",
            fix="look at their logs",
        )
    )


def _clients(ids: Iterable[int]) -> str:
    """Return clients in words; of many the first ten."""
    listed = sorted(ids)
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return f"client{'s' if len(listed) > 1 else ''} {', '.join(map(str, listed[:10]))}{more}"
