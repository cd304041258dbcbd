"""One client's own module: the global one, with what this client keeps in its place."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
from torch import Tensor

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.federation.store import ClientStore

#: The moving average of a network is the network's own name and this.
AVERAGE = "_ema"


def client_module(federation: Any, server: ServerModule, client_id: int) -> L.LightningModule:
    """Return a copy of the global module in which everything that a client keeps is that client's.

    Its local networks, its entries by pattern such as ``generator.style.*``, its local buffers. Where the server keeps
    a moving average of a network, the client's entries stand in that, too.

    Args:
        federation: The orchestrator, after a run or with a checkpoint that was loaded.
        server: Holds the global module.
        client_id: The client.

    Raises:
        ConfigurationError: If it keeps nothing of the module: there is no such client, none of its networks is local,
            or it has not trained yet.
    """
    own = dict(_store(federation).read(client_id))
    model: L.LightningModule = copy.deepcopy(server.model)
    entries = model.state_dict()
    kept = {name: own[name] for name in own if name in entries}
    if not kept:
        raise ConfigurationError(
            message(
                "a client must keep a part of the module to have one of its own",
                received=f"client {client_id}, of which nothing is kept",
                fix='set federation.sync of a part to local, as in {"generator.style.*": local}, or choose a client '
                "that has trained",
            )
        )
    for name, value in kept.items():
        entries[name].copy_(value)
        network, _, rest = name.partition(".")
        average: Tensor | None = entries.get(f"{network}{AVERAGE}.{rest}")
        if average is not None:
            average.copy_(value)
    return model


def server_of_client(federation: Any, server: ServerModule, client_id: int) -> ServerModule:
    """Return a server whose module is the client's own, for pictures and samples of it.

    Args:
        federation: As in :func:`client_module`, and its errors.
        server: The server.
        client_id: The client.
    """
    found = ServerModule(client_module(federation, server, client_id))
    found.attach(server.policy, server.algorithm, seed=server.seed, data=server.data)
    found.sample_with, found.cannot_sample = server.sample_with, server.cannot_sample
    return found


def _store(federation: Any) -> ClientStore:
    """Return the clients' states: of the checkpoint that was loaded and not yet gone on with, or those in memory."""
    loaded = federation._restored
    if loaded is None:
        store: ClientStore = federation.store
        return store
    found = ClientStore()
    if "store_files" in loaded:
        found.load_files(loaded["store_files"], federation._files_at)
    else:
        found.load_state_dict(loaded["store"])
    return found
