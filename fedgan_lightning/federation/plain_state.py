"""Python values as flat tensors by name and back, so that they lie in a client's private state like everything else.

Numbers, texts, tensors, arrays, and lists, tuples, dictionaries, sets and deques of them; objects by their
``state_dict``, or by their attributes where they have none. Nothing is pickled: a value comes back into the object that
the module was built with, and code never comes from a file.
"""

from __future__ import annotations

import copy
import json
import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.protocol import State

#: Levels that a value may be nested.
DEEPEST = 16
SHAPE = "json"
SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": (set, frozenset), "deque": deque}


def parts_of(module: nn.Module) -> dict[str, Any]:
    """Return what of a module a value may refer to without holding it: its children, parameters and buffers by name."""
    found: dict[str, Any] = {name: child for name, child in module.named_modules() if name}
    return {**found, **dict(module.named_parameters()), **dict(module.named_buffers()), "": module}


def encode(value: Any, *, what: str, parts: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Return a value as tensors.

    Args:
        value: The value.
        what: Its name, for the error.
        parts: What it may refer to by name, such as networks that a sampler draws from.

    Raises:
        ConfigurationError: If it holds something that is none of the kinds above.
    """
    tensors: dict[str, Tensor] = {}
    names = {id(part): name for name, part in (parts or {}).items()}
    shape = _encoded(value, what, tensors, names, DEEPEST)
    text = np.frombuffer(json.dumps(shape).encode(), dtype=np.uint8).copy()
    return {SHAPE: torch.from_numpy(text), **tensors}


def decode(state: State, like: Any, *, parts: Mapping[str, Any] | None = None) -> Any:
    """Return the value of :func:`encode`; objects come back as copies of those in ``like``."""
    shape = json.loads(bytes(state[SHAPE].cpu().numpy()).decode())
    return _Decoder(state, parts or {}).value(shape, like)


def _encoded(value: Any, what: str, tensors: dict[str, Tensor], names: Mapping[int, str], depth: int) -> Any:
    """Return the value as JSON, in which numbered tensors stand for what is long."""
    if id(value) in names:
        return {"part": names[id(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth == 0:
        raise _refused(what, value, "nested too deep")
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        tensors[str(len(tensors))] = found = torch.as_tensor(value).detach().clone()
        return {kind: str(len(tensors) - 1), "on": found.device.type}
    if isinstance(value, Mapping):
        pairs = [
            [_encoded(key, what, tensors, names, depth - 1), _encoded(item, what, tensors, names, depth - 1)]
            for key, item in value.items()
        ]
        return {"dict": pairs}
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        name = next(name for name, kinds in SEQUENCES.items() if isinstance(value, kinds))
        return {name: [_encoded(item, what, tensors, names, depth - 1) for item in value]}
    if isinstance(value, random.Random):
        return {"random": _encoded(value.getstate(), what, tensors, names, depth - 1)}
    if isinstance(value, torch.Generator):
        return {"generator": _encoded(value.get_state(), what, tensors, names, depth - 1)}
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return {"state_dict": _encoded(value.state_dict(), what, tensors, names, depth - 1)}
    if type(getattr(value, "__dict__", None)) is dict and not callable(value):
        return {"object": type(value).__qualname__, "own": _encoded(vars(value), what, tensors, names, depth - 1)}
    raise _refused(what, value, f"a {type(value).__name__}")


def _refused(what: str, value: Any, found: str) -> ConfigurationError:
    return ConfigurationError(
        message(
            f"{what} must be made of numbers, texts, tensors, lists, dictionaries and objects of these to be kept",
            received=found,
            fix="keep it in such values, give it state_dict() and load_state_dict(), or do not name it",
        )
    )


class _Decoder:
    """Makes values of JSON again.

    Args:
        state: The tensors.
        parts: What values refer to by name.
    """

    def __init__(self, state: State, parts: Mapping[str, Any]) -> None:
        self.state, self.parts = state, parts

    def value(self, shape: Any, like: Any) -> Any:
        """Return a value; ``like`` is what stood there when the module was built."""
        if not isinstance(shape, dict):
            return shape
        ((kind, inner), *more) = shape.items()
        if kind == "part":
            return self.parts[inner]
        if kind == "tensor":
            found = self.state[inner].clone()
            return found.cpu() if ("on", "cpu") in more else found
        if kind == "array":
            array = self.state[inner].cpu().numpy()
            return array[()] if array.ndim == 0 and not isinstance(like, np.ndarray) else array.copy()
        if kind == "dict":
            named = like if isinstance(like, Mapping) else {}
            pairs = [(self.value(key, None), item) for key, item in inner]
            return _like(like, {key: self.value(item, dict(named).get(key)) for key, item in pairs}, dict)
        if kind in SEQUENCES:
            known = list(like) if isinstance(like, (list, tuple, deque)) else []
            items = [self.value(item, known[k] if k < len(known) else None) for k, item in enumerate(inner)]
            if kind == "deque":
                return deque(items, maxlen=getattr(like, "maxlen", None))
            if kind == "tuple" and hasattr(like, "_fields"):
                return type(like)(*items)
            if kind == "set" and isinstance(like, frozenset):
                return frozenset(items)
            return _like(like, items, list) if kind == "list" else {"tuple": tuple, "set": set}[kind](items)
        return self._object(kind, inner, more, like)

    def _object(self, kind: str, inner: Any, more: list[Any], like: Any) -> Any:
        """Return a copy of ``like`` in the state that was kept; parts of the module in it stay the module's."""
        made = copy.deepcopy(like, memo={id(part): part for part in self.parts.values()})
        if kind == "random":
            version, numbers, gauss = self.value(inner, None)
            made = made if made is not None else random.Random()
            made.setstate((version, tuple(numbers), gauss))
            return made
        if kind == "generator":
            made = torch.Generator() if like is None else torch.Generator(like.device)
            made.set_state(self.value(inner, None).cpu())
            return made
        if made is None:
            raise ConfigurationError(
                message(
                    "an object that is kept for clients must be there when the module is built",
                    received=f"a {inner if kind == 'object' else 'stateful object'} that training makes",
                    fix="make it in __init__ or setup",
                )
            )
        if kind == "state_dict":
            made.load_state_dict(self.value(inner, made.state_dict()))
        else:
            vars(made).update(self.value(more[0][1], vars(made)))
        return made


def _like(like: Any, found: Any, plain: type) -> Any:
    """Return a dictionary or list as one of the class that stood there: a counter, one with defaults, a user's."""
    if not isinstance(like, plain) or type(like) is plain:
        return found
    made: Any = copy.copy(like)
    made.clear()
    made.update(found) if isinstance(made, dict) else made.extend(found)
    return made
