"""A run that starts from the networks of another: adversarial training after maximum likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import Tensor, nn

from fedgan_lightning.checkpoints import read_checkpoint
from fedgan_lightning.data.datamodule import FederatedDataModule, check_shared_metadata
from fedgan_lightning.errors import CheckpointError, message
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.gan.average import IMAGES_SEEN
from fedgan_lightning.options import checked
from fedgan_lightning.states import load_entries


class StartFrom(L.Callback):
    """Loads networks of the global module from a checkpoint of another run before the first round.

    Only tensors are read, nothing in the file is executed. A run that is resumed goes on from its own checkpoint. Where
    the clients of the two runs share something, such as a vocabulary, it must be the same.

    Args:
        ckpt_path: A checkpoint that ``fit`` wrote.
        networks: Networks to take, by their names in both modules. A moving average follows its network.

    Raises:
        CheckpointError: Before training, if the file is missing or unsafe, lacks a network, or has other shapes or
            another vocabulary.
    """

    @checked()
    def __init__(self, ckpt_path: str, *, networks: Sequence[str] = ("generator",)) -> None:
        self.ckpt_path, self.networks = ckpt_path, list(networks)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load the networks, unless the Trainer has read a checkpoint by now."""
        if trainer.ckpt_path is not None:
            return
        found = read_checkpoint(self.ckpt_path)
        if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
            raise self._unfit("no networks", "use checkpoints/last.ckpt or best.ckpt of a run")
        data: Any = getattr(trainer, "datamodule", None)
        if isinstance(data, FederatedDataModule):
            check_shared_metadata(data, _shared_metadata_in(found, type(data).__qualname__), path=self.ckpt_path)
        model = pl_module.model if isinstance(pl_module, ServerModule) else pl_module
        for name in self.networks:
            self._load(model, found["state_dict"], name)

    def _load(self, model: nn.Module, state: dict[str, Tensor], name: str) -> None:
        """Copy one network, averaged if the other run kept an average, and start this run's average there."""
        own = dict(model.named_children())
        prefixes = [f"{root}{name}{tail}." for tail in ("_ema", "") for root in ("model.", "")]
        prefix = next((known for known in prefixes if any(entry.startswith(known) for entry in state)), None)
        if prefix is None or name not in own:
            raise self._unfit(f"no network {name} in {'the file' if name in own else 'this run'}", "set networks")
        values = {entry[len(prefix) :]: value for entry, value in state.items() if entry.startswith(prefix)}
        values.pop(IMAGES_SEEN, None)  # an average begins to count anew
        for target in (own[name], own.get(f"{name}_ema")):
            if target is None:
                continue
            mine = {entry: value for entry, value in target.state_dict().items() if entry != IMAGES_SEEN}
            differing = [
                e for e in {*mine, *values} if e not in mine or e not in values or mine[e].shape != values[e].shape
            ]
            if differing:
                raise self._unfit(f"a {name} that differs in {min(differing)}", "restore that run's model settings")
            load_entries(target, values)

    def _unfit(self, received: str, fix: str) -> CheckpointError:
        return CheckpointError(
            message(
                "StartFrom must have a checkpoint with networks that fit",
                received=f"{self.ckpt_path} with {received}",
                fix=fix,
            )
        )


def _shared_metadata_in(checkpoint: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what clients shared; a deployment's data module, and a simulation's, have names of their own."""
    others = (key for key in checkpoint if key.endswith("DataModule"))
    found: dict[str, Any] = checkpoint.get(name) or next((checkpoint[key] for key in others if checkpoint[key]), {})
    return found
