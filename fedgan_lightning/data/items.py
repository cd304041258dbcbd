"""Items of other people's data sets: how they become a minibatch, and what is said of one that does not fit.

Pictures of Pillow, and uint8 pictures that are x of an item (x, y) or the item itself, become float32 pixels in
[-1, 1], channels first, as everywhere in the framework. Everything else is collated as torch does it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from fedgan_lightning.data.reading import reason
from fedgan_lightning.data.samples import of_bytes
from fedgan_lightning.errors import DataError, message

Collate = Callable[[list[Any]], Any]


def is_pair(item: Any) -> bool:
    """Whether an item is (x, y), or (x,)."""
    return isinstance(item, (tuple, list)) and len(item) in (1, 2)


def is_picture(value: Any) -> bool:
    """Whether a value is a picture of Pillow."""
    return type(value).__module__.startswith("PIL.") and hasattr(value, "convert")


def pixels_of(value: Any) -> Tensor | None:
    """Return a picture as uint8 (channels, h, w): one of Pillow, or a uint8 tensor or array; others are ``None``.

    Raises:
        ValueError: If it has more than 8 bits a channel.
    """
    if is_picture(value):
        if value.mode[0] in "IF":
            raise ValueError(f"a picture of mode {value.mode}, with more than 8 bits a channel")
        grey = value.mode in ("1", "L", "LA")
        value = np.array(value.convert("L" if grey else "RGB"))
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        channels_last = value.ndim == 3 and value.shape[2] <= 4
        value = torch.from_numpy(np.array(value.transpose(2, 0, 1) if channels_last else value, order="C"))
    if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() in (2, 3):
        return value if value.dim() == 3 else value.unsqueeze(0)
    return None


def plain_item(item: Any) -> Any:
    """Return an item as it is collated: with pictures as pixels in [-1, 1]."""
    if is_pair(item):
        pixels = pixels_of(item[0])
        if pixels is not None:
            return (of_bytes(pixels), *(_plain_value(own) for own in item[1:]))
    else:
        pixels = pixels_of(item)
        if pixels is not None:
            return of_bytes(pixels)
    return _plain_value(item)


def _plain_value(value: Any) -> Any:
    """Return a value with the pictures of Pillow anywhere in it as pixels, and arrays as torch can share them."""
    if is_picture(value):
        pixels = pixels_of(value)
        return None if pixels is None else of_bytes(pixels)
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        return np.array(value)
    if isinstance(value, Mapping):
        return {name: _plain_value(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)) and not (value and isinstance(value[0], (int, float, str))):
        plain = [_plain_value(own) for own in value]
        return type(value)(*plain) if hasattr(value, "_fields") else type(value)(plain)
    return value


class ItemReader:
    """Reads items of a map-style data set, and makes minibatches of them.

    Args:
        dataset: Anything with ``dataset[i]``.
        client: Whose it is, for errors.
        collate_fn: Makes a minibatch of a list of items; default torch's, of :func:`plain_item`.
    """

    def __init__(self, dataset: Any, *, client: object, collate_fn: Collate | None = None) -> None:
        self.dataset, self.client, self.collate_fn = dataset, client, collate_fn

    def items(self, positions: Sequence[int]) -> list[Any]:
        """Return the items at these positions, as they are collated.

        Raises:
            DataError: If one cannot be read; names client and item.
        """
        if hasattr(self.dataset, "__getitems__"):
            try:
                return [
                    self._plain(item, at) for item, at in zip(self.dataset.__getitems__(list(positions)), positions)
                ]
            except DataError:
                raise
            except Exception:  # which of them it is, single reads tell
                pass
        return [self.item(at) for at in positions]

    def item(self, position: int) -> Any:
        """Return one item, as it is collated."""
        return self._plain(self.raw(position), position)

    def raw(self, position: int) -> Any:
        """Return one item as the data set gives it.

        Raises:
            DataError: If it cannot be read; names client and item.
        """
        try:
            return self.dataset[position]
        except Exception as error:  # somebody's code raises anything
            raise self.unfit(position, "must be readable", reason(error), "repair or remove that item") from error

    def minibatch(self, positions: Sequence[int]) -> Any:
        """Return the minibatch of these items.

        Raises:
            DataError: If they cannot be read, or collated; names client and item.
        """
        items = self.items(positions)
        try:
            return (self.collate_fn or default_collate)(items)
        except Exception as error:
            at, what = _misfit(items)
            raise self.unfit(
                positions[at],
                "must be such as can be collated with others",
                what or f"{reason(error)} for it and {len(items) - 1} others",
                "give all items one form (a transform of the data set, say), or set collate_fn",
            ) from error

    def _plain(self, item: Any, position: int) -> Any:
        if self.collate_fn is not None:
            return item
        try:
            return plain_item(item)
        except ValueError as error:
            raise self.unfit(position, "must be such as can be trained on", str(error), "convert it") from error

    def unfit(self, position: int, rule: str, received: str, fix: str) -> DataError:
        """Return the error that an item is not what it should be."""
        return DataError(message(f"item {position} of client {self.client} {rule}", received=received, fix=fix))


def form_of(value: Any) -> Any:
    """Return kinds, shapes and dtypes of a value, nested as it is."""
    if isinstance(value, Mapping):
        return {str(name): form_of(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [form_of(own) for own in value]
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return "nothing (None)" if value is None else type(value).__name__


def structure_of(value: Any) -> Any:
    """Return the keys and places of a value, nested as it is, whatever they hold."""
    if isinstance(value, Mapping):
        return {str(name): structure_of(own) for name, own in value.items()}
    return [structure_of(own) for own in value] if isinstance(value, tuple) else None


def _misfit(items: Sequence[Any]) -> tuple[int, str]:
    """Return the first item that has another form than the one before, or holds nothing, and what it is in words."""
    forms = [form_of(item) for item in items]
    for at, form in enumerate(forms):
        if "nothing (None)" in repr(form):
            return at, f"{form}" if isinstance(form, str) else f"an item that holds None: {form}"
    for at, form in enumerate(forms):
        if form != forms[0]:
            return at, f"{form}, where another has {forms[0]}"
    return 0, ""


def digest_of(value: Any) -> str:
    """Return a hash of a value's numbers, texts and pictures, nested as it is."""
    found = hashlib.sha256()
    _add(found, value)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for name, own in value.items():
            found.update(str(name).encode())
            _add(found, own)
    elif isinstance(value, (list, tuple)):
        found.update(f"[{len(value)}]".encode())
        for own in value:
            _add(found, own)
    elif isinstance(value, Tensor):
        numbers = value.detach().cpu()
        found.update(f"{numbers.dtype} {tuple(numbers.shape)}".encode())
        found.update(numbers.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        found.update(f"{value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif is_picture(value):
        found.update(f"{value.mode} {value.size}".encode() + value.tobytes())
    elif isinstance(value, bytes):
        found.update(value)
    elif value is None or isinstance(value, (str, int, float, np.generic)):
        found.update(repr(value).encode())
    else:
        found.update(type(value).__qualname__.encode())
