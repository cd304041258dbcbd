"""Plain attributes of a client's module: what is no parameter and no buffer, and must not pass to the next client.

Pools, counters, moving-average objects, optimizers made in ``__init__``, modes and ``requires_grad`` are found once, in
whatever objects they lie, and put back in place before every client: nothing is copied, so that a reset takes some
microseconds for a small module.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

logger = logging.getLogger("fedgan_lightning")

#: What torch and Lightning keep on a module themselves.
INTERNAL = frozenset({*vars(nn.Module()), *vars(L.LightningModule())}) - {"training"}
#: Of these, what training may hang on a module.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
#: Values that cannot change in place.
FIXED = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)
#: Where whatever is inside belongs to torch, Lightning or the interpreter.
FOREIGN = frozenset({"lightning", "builtins", "_thread", "logging"})
FOREIGN_PARTS = ("torch._C", "torch.cuda", "torch.distributed", "torch._dynamo")
#: Objects that are looked into, at most: a module that keeps its whole data set would take too long to walk.
MOST_OBJECTS = 20_000
#: Larger tensors and arrays are data rather than state: they are not copied, and put back only if they are replaced.
MOST_BYTES = 1 << 26

#: Puts something back; says whether it had changed, or the names of what was made since.
Restore = Callable[[], "bool | list[str]"]


class AttributeSnapshot:
    """Plain attributes of a module, or of another object, as they are now.

    Args:
        owner: The object; parameters and registered buffers of a module are left to whoever loads them.
        left: Dotted names of attributes that are left alone, since they say nothing of a client.
    """

    def __init__(self, owner: Any, *, left: frozenset[str] = frozenset()) -> None:
        walk = _Walk()
        walk.visit_module(owner, left) if isinstance(owner, nn.Module) else walk.visit(owner)
        self._found = walk.found

    def restore(self) -> list[str]:
        """Put all attributes back; return the names of those that had changed."""
        names = []
        for name, restores in self._found.items():
            found = [restore() for restore in restores]
            names += [name] if True in found else []
            names += [own for made in found if isinstance(made, list) for own in made]
        return names


class _Walk:
    """Finds, by name, what has to be put back."""

    def __init__(self) -> None:
        self.found: dict[str, list[Restore]] = {}
        self._name, self._count, self._is_full = "", 0, False
        self._seen: set[int] = set()
        self._keep: list[Any] = []  # ids are those of objects that live

    def visit_module(self, module: nn.Module, left: frozenset[str]) -> None:
        """Find what has to be put back of a module, but for the attributes that are left alone."""
        modules = list(module.named_modules())
        tensors = [*module.parameters(), *module.buffers()]
        self._seen |= {*map(id, tensors), *(id(child) for _, child in modules)}
        self._keep += tensors
        for parameter_name, parameter in module.named_parameters():
            self._name = f"{parameter_name}.requires_grad"
            self._add(_flag(parameter))
        for prefix, child in modules:
            own = vars(child)
            plain = {key: value for key, value in own.items() if key not in INTERNAL and not _is_hook(key)}
            for key in plain:
                self._name = f"{prefix}.{key}" if prefix else key
                if self._name in left:
                    continue
                self._add(_entry(own, key))
                self.visit(plain[key])
            self._name = f"{prefix}.hooks" if prefix else "hooks"
            for key in HOOKS:
                self._add(_mapping(own[key]))
            for key in ("_buffers", "_parameters"):
                self._add(_registry(own[key], f"{prefix}." if prefix else ""))
            self._name = f"{prefix}.*"
            self._add(_absent(child, frozenset(own), prefix, left))

    def _add(self, restore: Restore) -> None:
        self.found.setdefault(self._name, []).append(restore)

    def visit(self, value: Any) -> None:
        """Find what has to be put back inside a value."""
        if isinstance(value, FIXED) or id(value) in self._seen:
            return
        if self._count >= MOST_OBJECTS:
            if not self._is_full:
                logger.warning(f"only {MOST_OBJECTS} objects are put back before every client; {self._name} has more")
            self._is_full = True
            return
        self._seen.add(id(value))
        self._keep.append(value)
        self._count += 1
        if isinstance(value, (Tensor, np.ndarray)):
            is_plain = not isinstance(value, Tensor) or value.layout is torch.strided
            if is_plain and value.nbytes <= MOST_BYTES:
                self._add(_tensor(value) if isinstance(value, Tensor) else _array(value))
        elif isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
            self._add(_random(value))
        elif isinstance(value, Mapping) and hasattr(value, "clear"):
            self._add(_mapping(value))
            self._each(value.values())
        elif isinstance(value, (list, deque)):
            self._add(_sequence(value))
            self._each(value)
        elif isinstance(value, (tuple, frozenset)):
            self._each(value)
        elif isinstance(value, set):
            self._add(_set(value))
        else:
            self._object(value)

    def _each(self, values: Iterable[Any]) -> None:
        for value in list(values):
            self.visit(value)

    def _object(self, value: Any) -> None:
        own = getattr(value, "__dict__", None)
        if slots := [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]:
            self._add(_slotted(value, slots))
            self._each(getattr(value, name) for name in slots)
        if type(own) is not dict or (callable(value) and not isinstance(value, (nn.Module, Optimizer)) and not own):
            return
        home = type(value).__module__
        is_foreign = home.split(".")[0] in FOREIGN or home.startswith(FOREIGN_PARTS)
        if is_foreign and not isinstance(value, L.Callback):
            return
        if isinstance(value, nn.Module):  # not registered: hidden in a list, or in an object
            self._each([*value.parameters(), *value.buffers()])
        self._add(_mapping(own))
        self._each(item for key, item in own.items() if not _is_hook(key))


def _slots(kind: type) -> tuple[str, ...]:
    found = vars(kind).get("__slots__", ()) if kind.__module__.split(".")[0] not in FOREIGN else ()
    names = (found,) if isinstance(found, str) else tuple(found)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _slotted(value: Any, names: list[str]) -> Restore:
    kept = {name: getattr(value, name) for name in names}

    def restore() -> bool:
        changed = [name for name, own in kept.items() if getattr(value, name, restore) is not own]
        for name in changed:
            setattr(value, name, kept[name])
        return bool(changed)

    return restore


def _is_hook(key: str) -> bool:
    return "hooks" in key and key.startswith("_")


def _flag(parameter: Tensor) -> Restore:
    wanted = parameter.requires_grad

    def restore() -> bool:
        if parameter.requires_grad == wanted:
            return False
        parameter.requires_grad_(wanted)
        return True

    return restore


def _entry(own: dict[str, Any], key: str) -> Restore:
    value = own[key]
    numbers = isinstance(value, FIXED)

    def restore() -> bool:
        now = own.get(key, restore)
        if now is value:
            return False
        own[key] = value
        return not (numbers and type(now) is type(value) and now == value)

    return restore


def _registry(entries: dict[str, Tensor | None], stem: str) -> Restore:
    """Entries that were made since are taken away, those that were none are none, and others have their old shape."""
    shapes = {name: None if value is None else value.shape for name, value in entries.items()}

    def restore() -> list[str]:
        changed = [name for name in entries if name not in shapes]
        for name in changed:
            del entries[name]
        for name, shape in shapes.items():
            now = entries.get(name)
            if (None if now is None else now.shape) == shape:
                continue
            changed.append(name)
            # Its values come when the client is loaded.
            entries[name] = None if shape is None or now is None else now.detach().new_zeros(shape)
        return [f"{stem}{name}" for name in changed]

    return restore


def _absent(child: nn.Module, names: frozenset[str], prefix: str, left: frozenset[str]) -> Restore:
    """Attributes that were made since are taken away."""
    own, stem = vars(child), f"{prefix}." if prefix else ""

    def restore() -> list[str]:
        if len(own) == len(names):
            return []
        made = [key for key in own if key not in names and key not in INTERNAL and f"{stem}{key}" not in left]
        for key in made:
            del own[key]
        return [f"{stem}{key}" for key in made]

    return restore


def _tensor(value: Tensor) -> Restore:
    kept = value.detach().clone()

    def restore() -> bool:
        if value.shape == kept.shape and value.dtype == kept.dtype and torch.equal(value.detach(), kept):
            return False
        with torch.no_grad():
            if value.shape != kept.shape or value.dtype != kept.dtype:
                value.data = kept.clone()
            value.detach().copy_(kept)
        return True

    return restore


def _array(value: np.ndarray) -> Restore:
    kept = value.copy()

    def restore() -> bool:
        if value.shape == kept.shape and np.array_equal(value, kept):
            return False
        np.copyto(value, kept)
        return True

    return restore


def _random(value: Any) -> Restore:
    """Random sources go on from the same state; a torch one on its own device."""
    if isinstance(value, torch.Generator):
        first = value.get_state()

        def restore() -> bool:
            changed = not torch.equal(value.get_state(), first)
            value.set_state(first)
            return changed

        return restore
    if isinstance(value, random.Random):
        get, put = cast(Any, value.getstate), cast(Any, value.setstate)
    elif isinstance(value, np.random.RandomState):
        get, put = value.get_state, value.set_state
    else:

        def get() -> Any:
            return value.bit_generator.state

        def put(state: Any) -> None:
            value.bit_generator.state = state

    state = get()

    def restore_state() -> bool:
        put(state)
        return False

    return restore_state


def _mapping(value: Any) -> Restore:
    kept = dict(value)

    def restore() -> bool:
        if len(value) == len(kept) and all(value.get(key, restore) is item for key, item in kept.items()):
            return False
        numbers = len(value) == len(kept) and all(_is_equal(value.get(key, restore), own) for key, own in kept.items())
        for key in [key for key in value if key not in kept]:
            del value[key]
        for key, item in kept.items():
            value[key] = item
        return not numbers

    return restore


def _is_equal(now: Any, before: Any) -> bool:
    return now is before or (isinstance(before, FIXED) and type(now) is type(before) and bool(now == before))


def _sequence(value: Any) -> Restore:
    kept = list(value)

    def restore() -> bool:
        if len(value) == len(kept) and all(now is before for now, before in zip(value, kept)):
            return False
        value.clear()
        value.extend(kept)
        return True

    return restore


def _set(value: set[Any]) -> Restore:
    kept = set(value)

    def restore() -> bool:
        if value == kept:
            return False
        value.clear()
        value.update(kept)
        return True

    return restore
