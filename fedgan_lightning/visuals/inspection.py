"""Pictures of the full evaluation: the way between latents, and the training images nearest to generated ones."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.evaluation import neighbours
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.gan.priors import Normal, Prior
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_generator
from fedgan_lightning.visuals import pictures
from fedgan_lightning.visuals.tensorboard import publish


class Inspection(L.Callback):
    """Writes pictures of images in ``test``: ``interpolation.png``, and each client's ``neighbours.png``.

    A row of the first goes from one latent to another, with the class held fixed: smooth ways speak for a generator
    that has not learned its images by heart. The second shows generated images over the client's own images nearest to
    them in pixels. It holds real images, so it lies in a folder of its own for each client,
    ``on_clients/clientNNNNN/``, and no report shows it.

    Args:
        rows: Ways, or for each client generated images, to show.
        columns: Steps of a way.
        clients: Clients for which neighbours are drawn, at most.
        seed: Seed of the latents.
    """

    @checked("inspection", rows="[1, inf)", columns="[2, inf)", clients="[0, inf)", seed="[0, inf)")
    def __init__(self, *, rows: int = 8, columns: int = 10, clients: int = 10, seed: int = 0) -> None:
        self.rows, self.columns, self.clients, self.seed = rows, columns, clients, seed

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not getattr(data, "has_samples", False) or not isinstance(pl_module, ServerModule):
            return
        if not trainer.is_global_zero or len(data.sample_shape) != 3 or not pl_module.can_sample:
            return
        root = Path(trainer.default_root_dir)
        model: Any = pl_module.model
        if hasattr(model, "latent_dim") and "latents" in inspect.signature(model.sample).parameters:
            publish(trainer, self.interpolation(pl_module), name="interpolation.png", tag="samples/interpolation")
        if not data.has_client_samples:
            return
        for client_id in range(min(self.clients, data.num_clients)):
            path = root / "on_clients" / f"client{client_id:05d}" / "neighbours.png"
            pictures.save(self.neighbours(pl_module, data, client_id), path)

    def interpolation(self, server: ServerModule) -> pictures.Picture:
        """Return ways from one latent to another, one in a row, each of one class."""
        model: Any = server.model
        prior: Prior = getattr(model, "prior", None) or Normal()
        where: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
        generator = make_generator(self.seed, "interpolation")
        first, second = (prior.sample(self.rows, model.latent_dim, generator=generator, **where) for _ in range(2))
        way = prior.between(first, second, torch.linspace(0, 1, self.columns))
        latents = way.transpose(0, 1).flatten(0, 1)
        labels = self._labels(server, repeats=self.columns)
        images = server.sample(len(latents), latents=latents, labels=labels)
        return pictures.grid(images, columns=self.columns)

    def neighbours(self, server: ServerModule, data: FederatedDataModule, client_id: int) -> pictures.Picture:
        """Return generated images, of classes that the client holds, over its own images nearest to them."""
        view = data.client_samples(client_id)
        x, y = view.take(torch.arange(len(view)))
        held = y.unique()
        conditional = bool(getattr(server.model, "num_classes", 0))
        labels = held[torch.arange(self.columns) % len(held)] if conditional else None
        images = server.sample(self.columns, labels=labels, generator=make_generator(self.seed, "neighbours")).cpu()
        _, nearest = neighbours.nearest(images.flatten(1).float(), x.flatten(1).float())
        return pictures.grid(torch.cat([images.float(), x[nearest]]), columns=self.columns)

    def _labels(self, server: ServerModule, *, repeats: int) -> Tensor | None:
        classes = int(getattr(server.model, "num_classes", 0))
        return (torch.arange(self.rows) % classes).repeat_interleave(repeats) if classes else None
