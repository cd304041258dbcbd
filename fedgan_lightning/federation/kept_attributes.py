"""Plain attributes of a client's module: put back before every client, but for those that the user names.

See :mod:`.attributes` for how they are put back, and :mod:`.plain_state` for how a client keeps them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedgan_lightning.errors import ConfigurationError, message
from fedgan_lightning.federation import namespaces
from fedgan_lightning.federation.attributes import AttributeSnapshot
from fedgan_lightning.federation.plain_state import decode, encode, parts_of
from fedgan_lightning.hooks import attributes_of
from fedgan_lightning.protocol import State

logger = logging.getLogger("fedgan_lightning")


class KeptAttributes:
    """Puts a module's attributes back before every client, and gives each the named ones that it has kept.

    A module may say itself which attributes begin anew with every round (``round_attributes``: no warning is due), and
    which say nothing of a client (``checked_attributes``: they are left alone).

    Args:
        module: The resident module of the clients.
        names: Dotted names of the attributes that every client keeps.
    """

    def __init__(self, module: L.LightningModule, names: Sequence[str] = ()) -> None:
        self.module, self.names = module, tuple(names)
        check_attributes(module, self.names)
        self._start = {name: _at(module, name) for name in self.names}
        self._snapshot = AttributeSnapshot(module, left=attributes_of(module, "checked_attributes"))
        self._parts = parts_of(module) if names else {}
        self._expected = attributes_of(module, "round_attributes")
        self._has_warned = False

    def load(self, private: State) -> None:
        """Put everything back, and give the client what it has kept."""
        self._warn(self._snapshot.restore())
        for name, start in self._start.items():
            kept = namespaces.inside(f"{namespaces.ATTRIBUTE}{name}/", private)
            if kept:
                owner, last = _owner(self.module, name)
                setattr(owner, last, decode(kept, start, parts=self._parts))

    def private(self) -> dict[str, Tensor]:
        """Return what the client keeps after a round."""
        found: dict[str, Tensor] = {}
        for name in self.names:
            value = encode(_at(self.module, name), what=f"client attribute {name}", parts=self._parts)
            found |= namespaces.under(f"{namespaces.ATTRIBUTE}{name}/", value)
        return found

    def _warn(self, changed: list[str]) -> None:
        """Say once which attributes training changes: users of a plain Trainer count on them from epoch to epoch."""
        if self._has_warned or not changed:
            return
        inside = tuple(f"{name}." for name in self.names)
        lost = [name for name in changed if name not in {*self.names, *self._expected} and not name.startswith(inside)]
        lost = [name for name in lost if not _is_remade(self.module, name)]
        if lost:
            self._has_warned = True
            logger.warning(
                f"training changes attributes of {type(self.module).__name__}, which are put back before every client: "
                f"{', '.join(lost[:8])}. To keep them for each client, set federation.client_attributes to their names"
            )


def check_attributes(module: nn.Module, names: Sequence[str]) -> None:
    """Refuse names of attributes that a module has not, or that travel anyway.

    Raises:
        ConfigurationError: If there is one.
    """
    entries = {*dict(module.named_parameters()), *dict(module.named_buffers()), *dict(module.named_modules())}
    for name in names:
        owner = _owner(module, name)[0]
        if name in entries or not hasattr(owner, name.rpartition(".")[2]):
            found = "an entry of its state_dict" if name in entries else "no such attribute"
            raise ConfigurationError(
                message(
                    f"federation.client_attributes must name plain attributes of {type(module).__name__}",
                    received=f"{name}, {found}",
                    fix="name one that __init__ or setup makes, by its dotted path",
                )
            )
        encode(_at(module, name), what=f"client attribute {name}", parts=parts_of(module))


def _is_remade(module: nn.Module, name: str) -> bool:
    """Whether an attribute is one that others make anew: optimizers and schedules, and weights that hooks compute."""
    owner, last = _owner(module, name)
    value = getattr(owner, last, None)
    return isinstance(value, (Optimizer, LRScheduler)) or bool(
        isinstance(value, Tensor) and getattr(owner, "_forward_pre_hooks", None)
    )


def _owner(module: nn.Module, name: str) -> tuple[Any, str]:
    *path, last = name.split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part, None)
    return owner, last


def _at(module: nn.Module, name: str) -> Any:
    owner, last = _owner(module, name)
    return getattr(owner, last)
