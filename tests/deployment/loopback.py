"""Flower's grid without its processes: messages go to the ClientApp in this process, as Flower would call it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fedgan_lightning.deployment.apps import client_app


class LoopbackGrid:
    """Sites by node id; each is told its ``node_config``.

    Args:
        nodes: Node configuration by node id.
        run_config: What the server started the run with.

    Attributes:
        asked: (node id, message type) of everything that was sent.
        away: Nodes that are not connected.
        edit: Called with node, message type and reply before a reply goes back.
        silent: Nodes whose answers to ``train`` come only after :meth:`release`.
    """

    def __init__(self, nodes: dict[int, dict[str, Any]], *, run_config: dict[str, Any]) -> None:
        from flwr.app import Context, RecordDict
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # as Flower's processes do
        self.app = client_app()
        self.contexts = {
            node: Context(run_id=1, node_id=node, node_config=told, state=RecordDict(), run_config=run_config)
            for node, told in nodes.items()
        }
        self.asked: list[tuple[int, str]] = []
        self.away: set[int] = set()
        self.silent: set[int] = set()
        self.edit: Callable[[int, str, Any], None] = lambda node, kind, reply: None
        self._open: dict[str, Any] = {}

    def get_node_ids(self) -> list[int]:
        return [node for node in self.contexts if node not in self.away]

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        keys = []
        for message in messages:
            key = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = key
            self.asked.append((message.metadata.dst_node_id, message.metadata.message_type))
            self._open[key] = message
            keys.append(key)
        return keys

    def release(self) -> None:
        """Let silent nodes answer."""
        self.silent = set()

    def pull_messages(self, keys: Iterable[str]) -> Iterator[Any]:
        for key in list(keys):
            message = self._open.get(key)
            if message is None:
                continue
            node = message.metadata.dst_node_id
            if node in self.silent and message.metadata.message_type == "train":
                continue
            del self._open[key]
            reply = self.app(message, self.contexts[node])
            self.edit(node, message.metadata.message_type, reply)
            yield reply
