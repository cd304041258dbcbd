"""What travels and what stays: the declarative policy per network, resolved against a module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from torch import nn

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.protocol import RecalibrationHook
from fedgan_lightning.states import Entry, Kind, describe, networks

Sync = Literal["average", "local", "server"]
OptimizerState = Literal["reset", "keep", "average"]
Buffers = Literal["merge", "local", "estimate"]
#: Buffers that travel where they are merged.
BUFFERS = (Kind.STATISTIC, Kind.VARIANCE, Kind.INTEGER)


@dataclass(frozen=True)
class Policy:
    """A resolved policy: for every entry of the module, who owns it.

    Attributes:
        entries: Every entry of the module's state dict.
        sync: Every network: ``average`` (shared), ``local`` (private to each client), ``server`` (never on a client).
        optimizer_state: Every network: what becomes of its optimizer's moments at a sync.
        buffers: Buffers of averaged networks: ``merge`` (BatchNorm with pooled variance, integers by their rounded
            mean), ``local`` (FedBN), or
            ``estimate`` (local on clients; the server makes its own from noise).
    """

    entries: Mapping[str, Entry]
    sync: Mapping[str, Sync]
    optimizer_state: Mapping[str, OptimizerState]
    buffers: Buffers

    def names(self, *kinds: Kind, sync: Sync) -> list[str]:
        """Return entries of these kinds in networks with this policy."""
        return [
            name for name, entry in self.entries.items() if entry.kind in kinds and self.sync[entry.network] == sync
        ]

    @property
    def shared_parameters(self) -> list[str]:
        """Parameters that travel."""
        return self.names(Kind.PARAMETER, sync="average")

    @property
    def shared_buffers(self) -> list[str]:
        """Buffers that travel."""
        return self.names(*BUFFERS, sync="average") if self.buffers == "merge" else []

    @property
    def spectral_vectors(self) -> list[str]:
        """Power-iteration vectors that go down with the weights they fit, and never come up."""
        return self.names(Kind.SPECTRAL, sync="average")

    @property
    def downlink_entries(self) -> list[str]:
        """Entries that clients receive, optimizer moments aside."""
        return [*self.shared_parameters, *self.shared_buffers, *self.spectral_vectors]

    @property
    def private(self) -> list[str]:
        """Entries that each client keeps for itself from round to round."""
        kept = self.names(*Kind, sync="local")
        if self.buffers != "merge":
            kept += self.names(*BUFFERS, Kind.COUNTER, sync="average")
        return kept

    def blind_spots(self) -> list[str]:
        """Return warnings about what the server cannot know, and evaluates all the same."""
        found = []
        if self.sync.get("generator") == "local":
            found.append("sync.generator is local: metrics and pictures show the server's, which nobody trains")
        kinds = [entry.kind for entry in self.entries.values() if entry.network == "generator"]
        if self.buffers == "local" and Kind.VARIANCE in kinds:
            found.append("buffers are local: the server's generator is evaluated with BatchNorm's initial statistics")
        return found

    @property
    def server_networks(self) -> list[str]:
        """Networks that exist on the server only."""
        return [network for network, sync in self.sync.items() if sync == "server"]


def resolve(
    module: nn.Module,
    *,
    sync: Mapping[str, str] | None,
    optimizer_state: str | Mapping[str, str],
    buffers: str,
) -> Policy:
    """Return the policy for ``module``.

    Networks not named in ``sync`` follow the module's ``default_sync()`` if it has one, else they are averaged. A
    single
    ``optimizer_state`` applies to averaged networks, and ``average`` to those that a mapping does not name; local
    networks keep their moments unless named in a mapping.

    Raises:
        ConfigurationError: If a name is not a network of the module, or a value not a policy.
    """
    entries = describe(module)
    known = networks(module)
    defaults = module.default_sync() if hasattr(module, "default_sync") else {}  # type: ignore[operator]
    chosen = dict(sync or {})
    _check_names(chosen, known, "sync")
    resolved: dict[str, Sync] = {
        network: cast(Sync, _checked(chosen.get(network, defaults.get(network, "average")), Sync, f"sync.{network}"))
        for network in known
    }
    undeclared = [network for network in known if resolved[network] == "server" and defaults.get(network) != "server"]
    if undeclared:
        raise ConfigurationError(
            message(
                "a network lives on the server only if the module's default_sync() says that clients can do without it",
                received=f"sync.{undeclared[0]}: server",
                fix="set it to average or local",
            )
        )
    if "average" not in resolved.values():
        raise ConfigurationError(
            message("a federation averages at least one network", received=dict(resolved), fix="set one to average")
        )
    named = dict(optimizer_state) if isinstance(optimizer_state, Mapping) else {}
    _check_names(named, known, "optimizer_state")
    moments: dict[str, OptimizerState] = {}
    for network in known:
        general = optimizer_state if isinstance(optimizer_state, str) else "average"
        default = general if resolved[network] == "average" else "keep"
        value = _checked(named.get(network, default), OptimizerState, f"optimizer_state.{network}")
        if value == "average" and resolved[network] != "average":
            raise ConfigurationError(
                message(
                    "only the moments of averaged networks can be averaged",
                    received=f"optimizer_state.{network}: average with sync.{network}: {resolved[network]}",
                    fix="set it to keep or reset",
                )
            )
        moments[network] = cast(OptimizerState, value)
    if buffers == "estimate" and not isinstance(module, RecalibrationHook):
        raise ConfigurationError(
            message(
                "buffers: estimate calls the module's recalibrate()",
                received=f"{type(module).__name__} without it",
                fix="add the method, or set buffers to merge or local",
            )
        )
    return Policy(
        entries=entries,
        sync=resolved,
        optimizer_state=moments,
        buffers=cast(Buffers, _checked(buffers, Buffers, "buffers")),
    )


def _check_names(chosen: Mapping[str, str], known: tuple[str, ...], option: str) -> None:
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise ConfigurationError(
            message(
                f"federation.{option} names networks of the module",
                received=", ".join(unknown),
                fix=f"choose from {', '.join(known)}",
            )
        )


def _checked(value: str, allowed: object, option: str) -> str:
    if value not in get_args(allowed):
        raise ConfigurationError(
            message(
                f"federation.{option} is one of {', '.join(get_args(allowed))}",
                received=repr(value),
                fix="choose one of them",
            )
        )
    return value
