"""The sites of a federation as its server sees them: who is connected, what each said of itself, how to ask them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedgan_lightning.deployment import wire
from fedgan_lightning.errors import QuorumError, RoundInterrupted, message
from fedgan_lightning.federation.aggregation import MOST_EXAMPLES
from fedgan_lightning.federation.client_update import never
from fedgan_lightning.federation.schema import is_whole, printable
from fedgan_lightning.files import write_text
from fedgan_lightning.protocol import State

logger = logging.getLogger("fedgan_lightning")

#: Letters that are kept of what a site says is wrong.
MOST_LETTERS = 500
#: Seconds between two looks for answers: Flower's own loop takes three.
POLL_SECONDS = 0.2
#: Seconds between two looks at who is connected, while answers are waited for.
WATCH_SECONDS = 10.0
#: Seconds to wait for all sites at the start, for those to come back that a restarted server knows, and for the answer
#: to a query.
JOIN_SECONDS, RETURN_SECONDS, ANSWER_SECONDS = 600.0, 90.0, 600.0


class Sites:
    """The sites that are connected to a Flower grid, by client.

    Args:
        grid: Flower's grid.
        num_clients: Sites that the federation has.
        digest: Hash of what all share.
        memory: File for what sites said of themselves when the federation began.
        needed: Sites with which a server goes on that finds the others in ``memory``; ``None`` begins anew, with all.
    """

    #: Whether :meth:`sums` are those of all sites together.
    sums_only: ClassVar[bool] = False

    def __init__(
        self, grid: Any, *, num_clients: int, digest: str, memory: Path | None = None, needed: int | None = None
    ) -> None:
        self.grid, self.num_clients, self.digest = grid, num_clients, digest
        self.memory, self.needed = memory, needed
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
        began = time.monotonic()
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
        return [client_id for client_id in range(self.num_clients) if client_id not in self._nodes]

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
            known = {int(k): dict(own) for k, own in kept["sites"].items()} if kept["digest"] == self.digest else {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning(
                f"{self.memory} cannot be read, so all sites are waited for: {type(error).__name__}: {error}"
            )
            return {}
        return {k: own for k, own in known.items() if 0 <= k < self.num_clients}

    def _remember(self) -> None:
        """Write the file, at the beginning of a federation alone: later it tells what its checkpoints are about."""
        if self.memory is not None and self.needed is None:
            write_text(self.memory, json.dumps({"digest": self.digest, "sites": self._facts}, indent=1, sort_keys=True))

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
            return
        self._nodes[facts["client_id"]], self._facts[facts["client_id"]] = node_id, facts
        logger.info(f"client {facts['client_id']} joined with {facts['num_examples']} samples")

    def _objection(self, node_id: int, facts: dict[str, Any], digest: str) -> str | None:
        """Return why a site must not take part, or ``None``."""
        client_id = facts["client_id"]
        if not 0 <= client_id < self.num_clients:
            return f"says that it is client {client_id} of {self.num_clients}"
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

    def sums(self, facts: dict[str, Any], state: State) -> list[State]:
        """Return the sums that every site makes of its own samples.

        Args:
            facts: A query's, with its ``query``.
            state: Its tensors.

        Raises:
            QuorumError: If a site does not answer: sums of some would be mistaken for those of all.
        """
        self.facts()
        query = {**facts, "ask": "sums"}
        if missing := self._missing():
            raise _incomplete(dict.fromkeys(missing, "not connected since the server's start"))
        nodes = {client_id: self._nodes[client_id] for client_id in range(self.num_clients)}
        answers = self._ask({node: wire.content(query, state=state) for node in nodes.values()})
        found: list[State] = []
        silent: dict[int, str] = {}
        for client_id, node in nodes.items():
            try:
                found.append(wire.state_of(answers[node], "sums"))
            except Exception:  # what comes can be anything, and its site has to be named
                silent[client_id] = "an answer without sums" if node in answers else self._troubles.get(node, "")
        if silent:
            raise _incomplete(silent)
        return found

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
            Message(content, dst_node_id=node_id, message_type=kind, group_id=group)
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
            for reply in self.grid.pull_messages(list(waiting)):
                node_id, trouble = waiting.pop(reply.metadata.reply_to_message_id), trouble_in(reply)
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
            fix="look at their logs, and start again with --ckpt_path last",
        )
    )


def _clients(ids: Iterable[int]) -> str:
    """Return clients in words; of many the first ten."""
    listed = sorted(ids)
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return f"client{'s' if len(listed) > 1 else ''} {', '.join(map(str, listed[:10]))}{more}"


def trouble_in(reply: Any) -> str | None:
    """Return what is wrong with a reply, in words."""
    if reply.has_error():
        return printable(f"Flower error {reply.error.code}: {reply.error.reason}", most=MOST_LETTERS)
    if "facts" not in reply.content:
        return "an answer without facts"
    try:
        trouble = wire.facts_of(reply.content).get("error")
    except Exception as error:  # records of another kind by that name
        trouble = f"an answer without facts ({type(error).__name__})"
    return None if trouble is None else printable(trouble, most=MOST_LETTERS)


def checked_facts(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a site says of itself.

    Raises:
        ValueError: If it is none: sizes are whole numbers that a server can add up, and those of labels sum to N_k.
    """
    facts: dict[str, Any] = {name: answer[name] for name in ("client_id", "num_examples")}
    facts["label_counts"] = list(answer["label_counts"])
    size, counts = facts["num_examples"], facts["label_counts"]
    if not all(map(is_whole, (*facts.values(),)[:2])) or not all(map(is_whole, counts)):
        raise ValueError("sizes are whole numbers")
    if not 1 <= size <= MOST_EXAMPLES:
        raise ValueError(f"{printable(size)} examples, not between 1 and {MOST_EXAMPLES}")
    if min(counts, default=-1) < 0 or sum(counts) != size:
        raise ValueError(f"labels of {printable(sum(counts))} examples, and {size} examples")
    return facts


def only_plain(error: BaseException) -> str:
    """Return an error in one line, for the other side."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
