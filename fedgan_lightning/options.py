"""Options are checked where they are given: words against the fixed choice, numbers against their range, objects
against their type.

A constructor says in its annotations what an option may be, and in :func:`checked` in which interval its numbers lie;
nothing is said twice. Configuration files are checked by the parser as well; Python is checked by nobody else.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import math
import numbers
import os
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from fedgan_lightning.errors import ConfigurationError, message

P = ParamSpec("P")
R = TypeVar("R")

#: Attribute under which an object keeps what its constructor was given, where that is plain values.
CONSTRUCTED_WITH = "_constructed_with"


@dataclass(frozen=True)
class Interval:
    """Where a number may lie, from its usual notation: ``[0, 1)`` is 0 or more and less than 1.

    Args:
        text: The interval; ``inf`` stands for no bound.
    """

    text: str

    @property
    def bounds(self) -> tuple[float, float]:
        """Its two ends."""
        low, high = self.text[1:-1].split(",")
        return float(low), float(high)

    def __contains__(self, number: float) -> bool:
        low, high = self.bounds
        above = number >= low if self.text[0] == "[" else number > low
        return above and (number <= high if self.text[-1] == "]" else number < high)

    def __str__(self) -> str:
        low, high = self.bounds
        if math.isfinite(high):
            return f"in {self.text}"
        return f"of at least {low:g}" if self.text[0] == "[" else f"above {low:g}"


def checked(group: str = "", /, **intervals: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a constructor or function so that its arguments are checked against its annotations.

    Numbers are finite, and no other kind passes for them: neither true and false nor text. An object whose constructor
    was given plain values only keeps them, so that a checkpoint can say how it was made.

    Args:
        group: Where its options stand in every configuration, if they always stand there.
        **intervals: By parameter, where its numbers lie, those in a list too.

    Raises:
        ConfigurationError: By the decorated function, if an argument is none of what its annotation allows.
    """
    ranges = {name: Interval(text) for name, text in intervals.items()}
    prefix = group and f"{group}."

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        if unknown := sorted(ranges.keys() - signature.parameters.keys()):
            raise TypeError(f"{function.__qualname__} has no parameters {unknown}")
        is_method = next(iter(signature.parameters), "") == "self"
        is_constructor = is_method and function.__name__ == "__init__"

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = signature.bind_partial(*args, **kwargs).arguments
            except TypeError:  # too many, or unknown ones: the call says so
                return function(*args, **kwargs)
            hints = _hints(function)
            for name, value in given.items():
                kind = signature.parameters[name].kind
                if name in hints and kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                    owner = type(args[0]).__name__ if is_method else function.__name__
                    check(f"{prefix}{name} of {owner}", value, hints[name], within=ranges.get(name))
            result = function(*args, **kwargs)
            if is_constructor and type(args[0]).__init__ is call:  # and not that of a base class
                _keep(args[0], given)
            return result

        call.intervals = ranges  # type: ignore[attr-defined]
        return call

    return decorate


def _keep(owner: Any, given: Mapping[str, Any]) -> None:
    """Have an object remember what its constructor was given, unless something of it is no plain value."""
    with contextlib.suppress(TypeError):
        vars(owner)[CONSTRUCTED_WITH] = {name: as_plain(value) for name, value in given.items() if value is not owner}


def as_plain(value: Any) -> Any:
    """Return a value as exact plain types, which a checkpoint can hold: other libraries have numbers of their own.

    Raises:
        TypeError: If it is neither a number, a text, true, false or None, nor a list or mapping of these.
    """
    if value is None or isinstance(value, str):
        return value
    if _is_truth(value):
        return bool(value)
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, (list, tuple)):
        return [as_plain(own) for own in value]
    if isinstance(value, Mapping):
        return {str(name): as_plain(own) for name, own in value.items()}
    raise TypeError(f"{type(value).__name__} is no plain value")


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function as types; when it is first called, since they may name later classes."""
    return get_type_hints(function)


def check(option: str, value: Any, hint: Any, *, within: Interval | None = None) -> None:
    """Refuse a value that is none of what an annotation allows.

    Args:
        option: What the user calls it.
        value: What was given.
        hint: The annotation: a type, a ``Literal``, or several of them.
        within: Where its numbers lie.

    Raises:
        ConfigurationError: If it is not allowed.
    """
    if not _fits(value, hint, within):
        rule = f"{option} must be {_described(hint, within)}"
        raise ConfigurationError(message(rule, received=_shown(value), fix=_fix(value, hint)))


# ---------------------------------------------------------------------- what fits


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # NumPy's is no subclass


def _is_word(value: Any, word: Any) -> bool:
    """Whether a value is a fixed word; other libraries have texts and whole numbers of their own."""
    alike = isinstance(value, type(word)) or (isinstance(word, int) and isinstance(value, numbers.Integral))
    return alike and _is_truth(value) == _is_truth(word) and bool(value == word)


def _fits(value: Any, hint: Any, within: Interval | None) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, own, within) for own in inner)
    if origin is Literal:
        return any(_is_word(value, own) for own in inner)
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return _is_truth(value)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        is_number = isinstance(value, kind) and not _is_truth(value)
        return is_number and abs(value) < math.inf and (within is None or value in within)
    if hint is str:
        return isinstance(value, (str, os.PathLike))
    if hint is Any:
        return True
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, inner[0], within) and _fits(own, inner[1], within) for key, own in value.items()
        )
    if inspect.isclass(origin) and issubclass(origin, Callable):  # type: ignore[arg-type]
        return callable(value)
    if inspect.isclass(origin) and hasattr(origin, "__iter__"):
        return _fits_list(value, inner, within, is_fixed=origin is tuple and ... not in inner)
    if inspect.isclass(hint):
        return isinstance(value, hint)
    return True


def _fits_list(value: Any, inner: tuple[Any, ...], within: Interval | None, *, is_fixed: bool) -> bool:
    """Whether a value is a list of such things; arrays are, text is not."""
    if isinstance(value, (str, bytes, Mapping)) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        return False
    if is_fixed:
        return len(value) == len(inner) and all(_fits(own, hint, within) for own, hint in zip(value, inner))
    return all(_fits(own, inner[0], within) for own in value)


# ---------------------------------------------------------------------- what is said


def _described(hint: Any, within: Interval | None) -> str:
    """Return what an annotation allows, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(own, within) for own in inner)
    if origin is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(map(str, inner))
    if hint in (int, float):
        return f"{'an integer' if hint is int else 'a finite number'}{'' if within is None else f' {within}'}"
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return f"a mapping from {_described(inner[0], within)} to {_described(inner[1], within)}"
    if inspect.isclass(origin) and issubclass(origin, Callable):  # type: ignore[arg-type]
        return "a function"
    if inspect.isclass(origin) and hasattr(origin, "__iter__"):
        if origin is tuple and ... not in inner:
            return f"a list of {len(inner)}, each {_described(inner[0], within)}"
        return f"a list, each {_described(inner[0], within)}"
    names = {type(None): "None", bool: "True or False", str: "text"}
    return names.get(hint, f"{'an' if hint.__name__[0] in 'AEIOU' else 'a'} {hint.__name__}")


def _shown(value: Any) -> str:
    """Return a value as the user typed it, in one short line; of long ones the type."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"an object of type {type(value).__name__}"


def _fix(value: Any, hint: Any) -> str:
    """Return what to write instead."""
    words, classes = [str(own) for own in _words(hint)], list(_classes(hint))
    if inspect.isclass(value):
        return f"give an object, {value.__name__}(...), in place of the class"
    if twin := next((own for own in type(value).__mro__ if own.__name__ in _names(hint)), None):
        return f"take {twin.__name__} from lightning, not from {twin.__module__.split('.')[0]}"
    if isinstance(value, str):
        known = (own for kind in classes for own in _descendants(kind) if not inspect.isabstract(own))
        named = {own.__name__: own for own in known if own.__module__.startswith("fedgan_lightning.")}
        if near := _nearest(value, [*words, *named]):
            return f"write {near}" if near in words else f"give an object, {near}(...)"
        if _takes_numbers(hint) and value.replace(".", "", 1).removeprefix("-").isdigit():
            return f"write {value} without quotes"
    if words:
        return f"write {' or '.join(words)}"
    if not _takes_numbers(hint):
        return "give one of that kind"
    return "choose such a number" + (", or null (None from Python)" if type(None) in get_args(hint) else "")


def _nearest(word: str, known: list[str]) -> str | None:
    """Return the known word that was probably meant: near in spelling, or one that begins with it."""
    lower = {own.lower(): own for own in known}
    beginning = [own for own in lower if word and own.startswith(word.lower())]
    found = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.6) or beginning
    return lower[found[0]] if found else None


def _takes_numbers(hint: Any) -> bool:
    """Whether an annotation asks for numbers, in a list or not."""
    return hint in (int, float) or any(map(_takes_numbers, get_args(hint)))


def _words(hint: Any) -> Iterator[Any]:
    """Yield the fixed words anywhere in an annotation."""
    for own in get_args(hint):
        if get_origin(hint) is Literal:
            yield own
        else:
            yield from _words(own)


def _classes(hint: Any) -> Iterator[type[Any]]:
    """Yield the classes of this package anywhere in an annotation."""
    if inspect.isclass(hint) and hint.__module__.startswith("fedgan_lightning"):
        yield hint
    for own in get_args(hint):
        yield from _classes(own)


def _names(hint: Any) -> set[str]:
    """Return the names of Lightning's classes in an annotation: another package has classes of these names."""
    own = {hint.__name__} if inspect.isclass(hint) and hint.__module__.startswith("lightning.") else set()
    return own.union(*map(_names, get_args(hint)))


def _descendants(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for heir in kind.__subclasses__():
        yield from _descendants(heir)
