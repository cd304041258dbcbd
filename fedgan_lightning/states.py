"""Pure algebra on state dicts: what an entry is, to which network it belongs, how it may be averaged.

Parameters travel as differences. Floating buffers travel as values. BatchNorm variances travel as second moments,
so that the weighted mean over clients is the variance of the pooled data and not the mean of the variances
(four clients with means 0, 2, 4, 6 and unit variances: 6.0, not 1.0). Integers travel as
float64 numbers, and their mean is rounded; BatchNorm's count of minibatches stays where it is.
Power-iteration vectors of spectral norm are never averaged, since the mean of unit vectors is not a unit vector: the
server iterates its own after every step, and sends them down with the weights they fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedgan_lightning.protocol import State

ROOT = "(root)"
#: Beyond this nobody believes a number of an answer.
BELIEVED = 1e18
#: Below 15 iterations the leading singular value of averaged weights is off by percents (measured).
SPECTRAL_ITERATIONS = 15
#: Parametrizations with vectors ``_u`` and ``_v``: torch's, and ours that can be mapped over clients.
SPECTRAL_NORMS = ("_SpectralNorm", "SpectralNorm")


class Kind(str, Enum):
    """What an entry of a state dict is."""

    PARAMETER = "parameter"
    CONSTANT = "constant"  # nobody trains it: it does not travel
    STATISTIC = "statistic"  # floating buffer: mean, or anything else that can be averaged as it is
    VARIANCE = "variance"  # running variance, with a running mean beside it
    INTEGER = "integer"  # integer or boolean buffer: the mean, rounded, is what clients have where they agree
    COUNTER = "counter"  # BatchNorm's count of minibatches, where its momentum is set and the count decides nothing
    SPECTRAL = "spectral"  # power-iteration vector


@dataclass(frozen=True)
class Entry:
    """One entry of a module's state dict: its network (top-level child) and its kind."""

    network: str
    kind: Kind


def network_of(name: str) -> str:
    """Return the top-level child that holds the entry ``name``, or ``"(root)"``."""
    return name.split(".", 1)[0] if "." in name else ROOT


def describe(module: nn.Module, *, constants: frozenset[str] = frozenset()) -> dict[str, Entry]:
    """Return an :class:`Entry` for every name in ``module.state_dict()``, in the same order, tied parameters once.

    Args:
        module: The module.
        constants: Names of the entries that nobody trains.
    """
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    first_names = {name for name, _ in module.named_parameters()}
    spectral, cumulative = _spectral_names(module), _cumulative_counts(module)
    state = module.state_dict()
    entries = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue  # of get_extra_state: it is the module's own to keep
        if name in parameters - first_names:
            continue  # a tied parameter travels once, under its first name
        if name in constants:
            kind = Kind.CONSTANT
        elif name in parameters:
            kind = Kind.PARAMETER
        elif name in spectral:
            kind = Kind.SPECTRAL
        elif not torch.is_floating_point(value):
            is_count = name.endswith("num_batches_tracked") and name not in cumulative
            kind = Kind.COUNTER if is_count else Kind.INTEGER
        elif name.endswith("running_var") and mean_name(name) in state:
            kind = Kind.VARIANCE
        else:
            kind = Kind.STATISTIC
        entries[name] = Entry(network=network_of(name), kind=kind)
    return entries


def _cumulative_counts(module: nn.Module) -> set[str]:
    """Return the counts by which BatchNorm without a momentum weighs a minibatch."""
    return {
        f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked"
        for prefix, child in module.named_modules()
        if getattr(child, "num_batches_tracked", None) is not None and getattr(child, "momentum", 0) is None
    }


def frozen(module: nn.Module) -> frozenset[str]:
    """Return the entries of a module that nobody trains: its constants.

    They are parameters without gradients, and the buffers of a child in evaluation mode that has no others. A copy of
    something that is trained, with parameters of the same names and shapes in the same order, is none: it is a moving
    average or a target, and changes. Buffers that no mean can be made of are constants, too: complex and sparse ones,
    masks with infinities, integers beyond what float64 counts.
    """
    odd = {name for name, own in module.named_buffers() if not _can_be_averaged(own)}
    found = _frozen_parameters(module) | odd
    state = module.state_dict() if found else {}
    return frozenset(name for name in found if isinstance(state.get(name), Tensor))


def _can_be_averaged(value: Tensor) -> bool:
    if value.is_complex() or value.layout is not torch.strided:
        return False
    if value.is_floating_point() or not value.numel():
        return not value.numel() or (bool(torch.isfinite(value).all()) and float(value.abs().max()) <= BELIEVED)
    return value.dtype == torch.bool or float(value.double().abs().max()) <= 2.0**53


def _frozen_parameters(module: nn.Module) -> frozenset[str]:
    parameters = dict(module.named_parameters())
    names = {name for name, own in parameters.items() if not own.requires_grad}
    if not names:
        return frozenset()
    shapes = [own.shape for own in parameters.values() if own.requires_grad]
    found = {name for name in names if "." not in name and parameters[name].shape not in shapes}
    trained = {
        _signature(child)
        for prefix, child in module.named_modules()
        if _is_network(prefix, child) and any(own.requires_grad for own in child.parameters())
    }
    _collect_frozen(module, "", names, trained, found)
    return frozenset(found)


def _is_network(prefix: str, child: nn.Module) -> bool:
    """Whether a child is one that somebody may copy: at the first level, or at the second with children of its own."""
    depth = prefix.count(".") + 1 if prefix else 0
    return depth == 1 or (depth == 2 and next(child.children(), None) is not None)


def _signature(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name.rpartition(".")[2], tuple(own.shape)) for name, own in module.named_parameters())


def _collect_frozen(module: nn.Module, prefix: str, names: set[str], trained: set[Any], found: set[str]) -> None:
    """Add the constants below a module, of which some parts may be trained and others be copies of those."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        own = [f"{path}.{inner}" for inner, _ in child.named_parameters()]
        is_frozen = bool(own) and names.issuperset(own)
        if is_frozen and _signature(child) in trained:
            continue  # a copy
        copies = any(_signature(part) in trained for _, part in child.named_modules() if part is not child)
        if is_frozen and not (copies and _is_network(path, child)):
            found.update(own if child.training else (f"{path}.{inner}" for inner in child.state_dict()))
        else:
            found.update(inner for inner in own if inner in names and "." not in inner.removeprefix(f"{path}."))
            _collect_frozen(child, f"{path}.", names, trained, found)


def mean_name(variance_name: str) -> str:
    """Return the name of the running mean that belongs to a running variance."""
    return variance_name[: -len("running_var")] + "running_mean"


def networks(module: nn.Module) -> tuple[str, ...]:
    """Return the networks of a module: top-level children with state, and ``"(root)"`` if it has state itself."""
    return tuple(dict.fromkeys(entry.network for entry in describe(module).values()))


def encode_statistics(state: State, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Return buffers in the form that may be averaged: variances as float64 second moments E[x^2] = var + mean^2."""
    encoded = {}
    for name, value in state.items():
        if entries[name].kind is Kind.VARIANCE:
            value = value.double() + state[mean_name(name)].double().square()
        elif entries[name].kind is Kind.INTEGER:
            value = value.double()  # exact up to 2^53
        encoded[name] = value.detach().clone()
    return encoded


def decode_statistics(state: State, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Undo :func:`encode_statistics` after averaging: var = E[x^2] - mean^2, never below zero."""
    decoded = {}
    for name, value in state.items():
        if entries[name].kind is Kind.VARIANCE:
            value = (value.double() - state[mean_name(name)].double().square()).clamp_min(0.0)
        elif entries[name].kind is Kind.INTEGER:
            value = value.round()
        decoded[name] = value
    return decoded


def load_entries(module: nn.Module, values: State) -> None:
    """Copy ``values`` into the entries of ``module`` that bear their names, casting to dtype and device.

    Raises:
        KeyError: If the module has no such entry.
    """
    target = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value)


def norm(values: Iterable[Tensor], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the Euclidean norm of all tensors taken as one vector, computed in ``dtype``."""
    norms = [torch.linalg.vector_norm(value.detach().to(dtype)) for value in values]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def refresh_spectral_norm(module: nn.Module, *, iterations: int = SPECTRAL_ITERATIONS) -> None:
    """Iterate every spectral-norm vector in ``module`` until it fits weights that were just loaded.

    Reading a parametrized weight in training mode runs the layer's power iteration, hence the loop. Modes are restored.
    Source: Miyato et al. 2018, algorithm 1.
    """
    for child in module.modules():
        for name in _spectral_parametrizations(child):
            parametrization: Any = child.parametrizations[name]  # type: ignore[union-attr, index]
            modes = {part: part.training for part in parametrization.modules()}
            parametrization.train()
            with torch.no_grad():
                for _ in range(iterations):
                    parametrization()
            for part, mode in modes.items():
                part.training = mode
        hooks = [hook for hook in child._forward_pre_hooks.values() if type(hook).__name__ == "SpectralNorm"]
        for hook in hooks:  # torch.nn.utils.spectral_norm, the older interface
            with torch.no_grad():
                for _ in range(iterations):
                    hook.compute_weight(child, do_power_iteration=True)  # type: ignore[attr-defined]


def _spectral_parametrizations(child: nn.Module) -> list[str]:
    if not parametrize.is_parametrized(child):
        return []
    return [
        name
        for name, chain in child.parametrizations.items()  # type: ignore[operator, union-attr]
        if any(type(part).__name__ in SPECTRAL_NORMS for part in chain)
    ]


def _spectral_names(module: nn.Module) -> set[str]:
    """Names of the u and v vectors, and of the older interface's derived ``weight``, which is no state at all."""
    found = set()
    for prefix, child in module.named_modules():
        stem = f"{prefix}." if prefix else ""
        if type(child).__name__ in SPECTRAL_NORMS:
            found |= {f"{stem}_u", f"{stem}_v"}
        for hook in child._forward_pre_hooks.values():
            if type(hook).__name__ == "SpectralNorm":
                found |= {f"{stem}{hook.name}_u", f"{stem}{hook.name}_v"}  # type: ignore[attr-defined]
    return found
