"""Placement: where networks live, who trains them and what of them travels, resolved against a module.

A network, or the entries that a name pattern matches inside one, has one of five placements:

========== =============== ============ ===== ==== =============================
placement  lives on        trained by   down  up   handed on between clients
========== =============== ============ ===== ==== =============================
average    clients, server clients      yes   yes  no
local      clients         clients      no    no   no
server     server          nobody       no    no   no
served     clients, server server       yes   no   no
exchange   clients         clients      no    no   yes
========== =============== ============ ===== ==== =============================

``average``, ``local`` and ``server`` go with every algorithm, the others with those that train or permute networks.
Of a network on the server clients have a copy as it was built, which is put back before every round, unless the module
says by ``default_sync`` that they do without it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

from torch import nn

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation.namespaces import MOMENTS, of_moment
from fedgan_lightning.hooks import PlacementHook, RecalibrationHook, offers
from fedgan_lightning.states import Entry, Kind, describe, frozen, networks

Sync = Literal["average", "local", "server", "served", "exchange"]
OptimizerState = Literal["reset", "keep", "average"]
Buffers = Literal["merge", "local", "estimate"]
IntegerBuffers = Literal["mean", "max"]
#: Buffers that travel where they are merged.
BUFFERS = (Kind.STATISTIC, Kind.VARIANCE, Kind.INTEGER)


#: Placements of networks that live on clients alone.
PRIVATE: tuple[Sync, ...] = ("local", "exchange")


@dataclass(frozen=True)
class Policy:
    """What becomes of every entry of a module.

    Attributes:
        entries: Every entry of the module's state dict.
        sync: The placement of every network.
        placements: The placement of every entry: its network's, unless a pattern says otherwise.
        optimizer_state: For every network what becomes of its optimizer's moments at a sync.
        moments: The same for every parameter.
        buffers: Buffers of averaged networks: ``merge`` (BatchNorm with pooled variance), ``local`` (FedBN), or
            ``estimate`` (local on clients; the server makes its own from noise).
        integer_buffers: What integers are merged into: their rounded ``mean``, or the ``max`` over clients.
        absent_networks: Networks on the server alone that the module does without on clients.
    """

    entries: Mapping[str, Entry]
    sync: Mapping[str, Sync]
    placements: Mapping[str, Sync]
    optimizer_state: Mapping[str, OptimizerState]
    moments: Mapping[str, OptimizerState]
    buffers: Buffers
    integer_buffers: IntegerBuffers = "mean"
    absent_networks: tuple[str, ...] = ()

    def names(self, *kinds: Kind, sync: Sync | tuple[Sync, ...]) -> list[str]:
        """Return entries of these kinds with this placement, or one of these."""
        wanted = (sync,) if isinstance(sync, str) else sync
        return [name for name, entry in self.entries.items() if entry.kind in kinds and self.placements[name] in wanted]

    @property
    def shared_networks(self) -> tuple[str, ...]:
        """Networks of which something comes up."""
        return tuple(dict.fromkeys(self.entries[name].network for name in self.shared_parameters))

    @property
    def exchanged(self) -> list[str]:
        """Private entries that clients hand on to each other."""
        return [name for name in self.private if self.is_exchanged(name)]

    @property
    def leaving_networks(self) -> tuple[str, ...]:
        """Networks that leave clients: those of which something comes up, and those that clients hand on."""
        return tuple(dict.fromkeys([*self.shared_networks, *(self.entries[name].network for name in self.exchanged)]))

    @property
    def shared_parameters(self) -> list[str]:
        """Parameters whose updates come up."""
        return self.names(Kind.PARAMETER, sync="average")

    def is_parameter(self, name: str) -> bool:
        """Whether a name is that of a parameter of the module."""
        return name in self.entries and self.entries[name].kind is Kind.PARAMETER

    @property
    def shared_buffers(self) -> list[str]:
        """Buffers that come up."""
        return self.names(*BUFFERS, sync="average") if self.buffers == "merge" else []

    @property
    def spectral_vectors(self) -> list[str]:
        """Power-iteration vectors that go down with the weights they fit, and never come up."""
        return self.names(Kind.SPECTRAL, sync="average")

    @property
    def downlink_entries(self) -> list[str]:
        """Entries that clients receive, optimizer moments aside."""
        served = self.names(Kind.PARAMETER, *BUFFERS, Kind.SPECTRAL, sync="served")
        return [*self.shared_parameters, *self.shared_buffers, *self.spectral_vectors, *served]

    @property
    def private(self) -> list[str]:
        """Entries that each client keeps for itself from round to round."""
        kept = self.names(*(kind for kind in Kind if kind is not Kind.CONSTANT), sync=PRIVATE)
        if self.buffers != "merge":
            kept += self.names(*BUFFERS, Kind.COUNTER, sync="average")
        return kept

    def is_private(self, network: str) -> bool:
        """Whether a network lives on clients alone: the server's was never trained."""
        return self.sync.get(network) in PRIVATE

    def is_exchanged(self, name: str) -> bool:
        """Whether a private entry, or an optimizer's moment, belongs to what clients hand on."""
        return self.placements.get(of_moment(name)[1] if name.startswith(MOMENTS) else name) == "exchange"

    def blind_spots(self, *, trained: Collection[str] = ()) -> list[str]:
        """Return warnings about what the server cannot know, and evaluates all the same.

        Args:
            trained: Placements of networks that the algorithm trains itself.
        """
        found = []
        if self.is_private("generator"):
            kind = self.sync["generator"]
            found.append(f"sync.generator is {kind}: metrics and pictures show the server's, which nobody trains")
        moving = {entry.network for entry in self.entries.values() if entry.kind is not Kind.CONSTANT}
        on_server = [n for n, own in self.sync.items() if own == "server" and n in moving and own not in trained]
        for network in [name for name in on_server if name not in self.absent_networks]:
            found.append(f"sync.{network} is server: what training changes of it on clients is put back")
        kinds = [entry.kind for entry in self.entries.values() if entry.network == "generator"]
        if self.buffers == "local" and Kind.VARIANCE in kinds:
            found.append("buffers are local: the server's generator is evaluated with BatchNorm's initial statistics")
        return found

    @property
    def constants(self) -> list[str]:
        """Entries that nobody trains: clients have them, and they do not travel."""
        return [name for name, entry in self.entries.items() if entry.kind is Kind.CONSTANT]

    @property
    def maxima(self) -> list[str]:
        """Buffers that come up of which the server takes the largest."""
        found = self.names(Kind.INTEGER, sync="average") if self.integer_buffers == "max" else []
        return found if self.buffers == "merge" else []


def resolve(
    module: nn.Module,
    *,
    sync: Mapping[str, str] | None,
    optimizer_state: str | Mapping[str, str],
    buffers: str,
    integer_buffers: str = "mean",
) -> Policy:
    """Return the policy for ``module``.

    Networks not named in ``sync`` follow the module's ``default_sync()`` if it has one, else they are averaged. Keys of
    ``sync`` that are no networks are parts of networks, such as ``generator.style``, or patterns of entries, such as
    ``*.bias``; the last one that matches counts. What nobody trains is a constant, unless ``sync`` names it.

    A single ``optimizer_state`` applies to averaged networks, and ``average`` to those that a mapping does not name;
    local networks keep their moments unless named in a mapping.

    Raises:
        ConfigurationError: If a name is no network of the module and matches no entry, or a value is no policy.
    """
    entries, known = describe(module), networks(module)
    defaults: Mapping[str, str] = module.default_sync() if offers(module, PlacementHook) else {}  # type: ignore[operator]
    chosen = dict(sync or {})
    constants = frozen(module)
    if constants:  # a network that has nothing else, and is named, is where the settings say
        mixed = {entry.network for name, entry in entries.items() if name not in constants}
        named = {*defaults} | {name for name, placement in chosen.items() if placement != "server"}
        constants -= {n for n in constants if entries[n].network in named - mixed}
    resolved = _of_networks({name: own for name, own in chosen.items() if name in known}, known, defaults)
    patterns = {name: own for name, own in chosen.items() if name not in known}
    placements = {name: resolved[entry.network] for name, entry in entries.items()}
    for pattern, value in patterns.items():
        matching = _matching(pattern, placements, known)
        placements |= dict.fromkeys(matching, _pattern_value(pattern, value))
        constants -= {*matching} if value != "server" else set()
    if constants:
        entries = describe(module, constants=constants)
    moments = _optimizer_states(optimizer_state, resolved, known)
    if buffers == "estimate" and not offers(module, RecalibrationHook):
        raise ConfigurationError(
            message(
                "buffers: estimate must have a module with recalibrate()",
                received=f"{type(module).__name__} without it",
                fix="add the method, or set buffers to merge or local",
            )
        )
    parameters = [name for name, entry in entries.items() if entry.kind is Kind.PARAMETER]
    return Policy(
        entries=entries,
        sync=resolved,
        placements=placements,
        optimizer_state=moments,
        moments={name: _moment(moments[entries[name].network], placements[name]) for name in parameters},
        buffers=cast(Buffers, _checked(buffers, Buffers, "buffers")),
        integer_buffers=cast(IntegerBuffers, _checked(integer_buffers, IntegerBuffers, "integer_buffers")),
        absent_networks=tuple(n for n, own in resolved.items() if own == "server" and defaults.get(n) == "server"),
    )


def _of_networks(chosen: Mapping[str, str], known: Iterable[str], defaults: Mapping[str, str]) -> dict[str, Sync]:
    """Return the placement of every network.

    Raises:
        ConfigurationError: If a value is no placement.
    """
    return {
        network: cast(Sync, _checked(chosen.get(network, defaults.get(network, "average")), Sync, f"sync.{network}"))
        for network in known
    }


def _matching(pattern: str, names: Iterable[str], known: tuple[str, ...]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
    if not found:
        nearest = get_close_matches(pattern, list(names), n=1, cutoff=0)[0]
        raise ConfigurationError(
            message(
                "federation.sync must name networks of the module, or patterns of its entries",
                received=pattern,
                fix=f"choose from {', '.join(known)}, or write a part of one, or a pattern such as {nearest}",
            )
        )
    return found


def _pattern_value(pattern: str, value: str) -> Sync:
    return cast(Sync, _checked(value, Sync, f"sync.{pattern}"))


def _optimizer_states(
    optimizer_state: str | Mapping[str, str], resolved: Mapping[str, Sync], known: tuple[str, ...]
) -> dict[str, OptimizerState]:
    """Return what becomes of the moments of every network.

    Raises:
        ConfigurationError: If a name is no network, a value no policy, or moments are averaged that do not travel.
    """
    named = dict(optimizer_state) if isinstance(optimizer_state, Mapping) else {}
    if unknown := sorted(set(named) - set(known)):
        raise ConfigurationError(
            message(
                "federation.optimizer_state must name networks of the module",
                received=", ".join(unknown),
                fix=f"choose from {', '.join(known)}",
            )
        )
    moments: dict[str, OptimizerState] = {}
    for network in known:
        general = optimizer_state if isinstance(optimizer_state, str) else "average"
        default = {"average": general, "server": "reset"}.get(resolved[network], "keep")
        value = _checked(named.get(network, default), OptimizerState, f"optimizer_state.{network}")
        if value == "average" and resolved[network] != "average":
            raise ConfigurationError(
                message(
                    "moments must belong to averaged networks to be averaged",
                    received=f"optimizer_state.{network}: average with sync.{network}: {resolved[network]}",
                    fix="set it to keep or reset",
                )
            )
        moments[network] = cast(OptimizerState, value)
    return moments


def _moment(of_network: OptimizerState, placement: Sync) -> OptimizerState:
    """Return what becomes of the moments of one parameter: what does not come up is not averaged."""
    if placement == "server":
        return "reset"
    return "keep" if of_network == "average" and placement != "average" else of_network


def _checked(value: str, allowed: object, option: str) -> str:
    if value not in get_args(allowed):
        raise ConfigurationError(
            message(
                f"federation.{option} must be one of {', '.join(get_args(allowed))}",
                received=repr(value),
                fix="choose one of them",
            )
        )
    return value
