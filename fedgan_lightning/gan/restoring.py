"""A module that its checkpoints alone suffice to make anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.gan.construction import CONSTRUCTION, arguments_from, describe

#: What torch puts before the names of a compiled network's entries.
COMPILED = "_orig_mod."


class Restorable:
    """Writes into checkpoints what a module was constructed with, and loads one without arguments.

    Part of :class:`~fedgan_lightning.gan.module.GAN`. A subclass with a constructor of its own gets those arguments by
    name that it takes.
    """

    @classmethod
    def constructor(cls) -> Callable[..., None]:
        """Return the constructor whose arguments checkpoints hold: of the restorable class, and not of heirs."""
        owner = next(kind for kind in reversed(cls.__mro__) if issubclass(kind, Restorable) and kind is not Restorable)
        return owner.__init__  # type: ignore[misc, no-any-return]

    @classmethod
    def has_own_constructor(cls) -> bool:
        """Whether this is a subclass with a constructor of its own."""
        return cls.__init__ is not cls.constructor()  # type: ignore[misc]

    def describe_into(self, checkpoint: dict[str, Any]) -> None:
        """Add the constructor's arguments to a checkpoint, and name its entries as if no network was compiled."""
        checkpoint[CONSTRUCTION] = describe(self, self.constructor())
        state: Mapping[str, Tensor] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.replace(COMPILED, ""): value for name, value in state.items()}

    def name_as_here(self, checkpoint: dict[str, Any]) -> None:
        """Name a checkpoint's entries as this module does, in which other networks may be compiled."""
        module: Any = self
        here = {name.replace(COMPILED, ""): name for name in module.state_dict()}
        entries = ((name.replace(COMPILED, ""), value) for name, value in checkpoint["state_dict"].items())
        checkpoint["state_dict"] = {here.get(name, name): value for name, value in entries}

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the module of a checkpoint, made of what it was made of; nothing in the file is executed.

        Args:
            checkpoint_path: A file, its path or its address.
            map_location: Where to put its tensors; by default where they were.
            hparams_file: As in Lightning.
            strict: Whether entries of module and file must have the same names.
            weights_only: ``False`` reads a file with other objects in it, from a source that you trust.
            **kwargs: Arguments of the constructor; they win over the file's. A network, loss or the like of another
                package must be among them.

        Raises:
            ConfigurationError: If one must be given whose arguments the file does not hold.
            CheckpointError: If the file is damaged, or describes what cannot be made.
        """
        contents = _contents(checkpoint_path, weights_only=weights_only)
        if isinstance(contents, Mapping) and hparams_file is None:
            required_only = cls.has_own_constructor()
            kwargs = arguments_from(
                contents, cls.__init__, owner=cls.__name__, given=kwargs, required_only=required_only
            )
        module: Any = super()
        return module.load_from_checkpoint(
            checkpoint_path,
            map_location=map_location,
            hparams_file=hparams_file,
            strict=strict,
            weights_only=weights_only,
            **kwargs,
        )


def _contents(source: Any, *, weights_only: bool | None) -> Any:
    """Return what is in a checkpoint; ``None`` for one on another machine, whose arguments are not looked at."""
    if isinstance(source, (str, PathLike)):
        if "://" in str(source):
            return None
        if weights_only is not False:
            return read_checkpoint(Path(source))
    contents = torch.load(source, map_location="cpu", weights_only=weights_only is not False)
    if not isinstance(source, (str, PathLike)):
        source.seek(0)
    return contents


def drop_hyperparameters(checkpoint: dict[str, Any], names: Sequence[str]) -> None:
    """Take out of a checkpoint what its description says: LightningCLI puts hyperparameters above the command line's.

    Args:
        checkpoint: To be written.
        names: Of the hyperparameters; others stay.
    """
    kept = {name: value for name, value in checkpoint.pop("hyper_parameters", {}).items() if name not in names}
    if kept:
        checkpoint["hyper_parameters"] = kept
