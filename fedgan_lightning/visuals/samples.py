"""Pictures of the global generator from one fixed z: as files in the run directory and in TensorBoard."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from fedgan_lightning.data.datamodule import FederatedDataModule
from fedgan_lightning.evaluation.modalities import Belief, View, modality_of
from fedgan_lightning.federation.orchestrator import FederatedOrchestrator
from fedgan_lightning.federation.personal import server_of_client
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.files import replacing, write_text
from fedgan_lightning.gan.steps import split_heads
from fedgan_lightning.hooks import completed_rounds
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_generator
from fedgan_lightning.visuals import pictures
from fedgan_lightning.visuals.tensorboard import publish, writers


class SamplePictures(L.Callback):
    """Writes ``reals.png``, ``fakes_init.png`` and ``fakes_roundNNNN.png``; in ``predict``, a picture and an .npz file.

    Class-conditional generators and labelled data give one class per row. Series give line plots, two-dimensional data
    scatter plots. Text gives a page of sentences, and the sentences as ``.txt`` files of the same names.

    Args:
        every_n_rounds: Rounds between pictures; the last round always has one. ``None`` draws none of the generator.
        columns: Images per row.
        rows: Rows, where there are no classes; columns times rows sentences.
        num_points: Points of a scatter plot.
        predict_samples: Samples that ``predict`` writes.
        predict_client: Client by whose own generator ``predict`` draws, where clients keep parts of it; it writes to
            ``predictions/clientK``. ``None`` is the global one.
        seed: Seed of the fixed z. ``predict`` takes the same.
    """

    @checked(
        "pictures",
        every_n_rounds="[1, inf)",
        columns="[1, inf)",
        rows="[1, inf)",
        num_points="[1, inf)",
        predict_samples="[1, inf)",
        predict_client="[0, inf)",
        seed="[0, inf)",
    )
    def __init__(
        self,
        *,
        every_n_rounds: int | None = 10,
        columns: int = 10,
        rows: int = 8,
        num_points: int = 2000,
        predict_samples: int = 100,
        predict_client: int | None = None,
        seed: int = 0,
    ) -> None:
        self.every_n_rounds, self.columns, self.rows = every_n_rounds, columns, rows
        self.num_points, self.predict_samples, self.seed = num_points, predict_samples, seed
        self.predict_client = predict_client
        self._last_round = -1

    # ------------------------------------------------------------------ training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_round = -1
        if not _has_samples(trainer):
            return
        data = _data(trainer)
        drawn = pictures.partition(data.label_counts(), class_names=data.class_names)
        publish(trainer, drawn, name="partition.png", tag="partition", step=0)
        if len(data.sample_shape) == 3 and data.has_client_samples:
            publish(trainer, self._reals(data), name="reals.png", tag="samples/real", step=0)
        if completed_rounds(trainer) == 0 and self.every_n_rounds is not None:
            self._draw(trainer, pl_module, name="fakes_init.png")

    def on_round_end(self, trainer: L.Trainer, server: ServerModule, info: Any, metrics: Any) -> None:
        """Draw a picture every ``every_n_rounds``."""
        if self.every_n_rounds is not None and completed_rounds(trainer) % self.every_n_rounds == 0:
            self._draw(trainer, server, name=f"fakes_round{completed_rounds(trainer):04d}.png")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_rounds is not None and self._last_round != completed_rounds(trainer):
            self._draw(trainer, pl_module, name=f"fakes_round{completed_rounds(trainer):04d}.png")

    def draw(self, data: FederatedDataModule, server: ServerModule, *, title: str = "") -> pictures.Picture:
        """Return the picture of the generator from the fixed z."""
        return self._rendered(self.shown(data, server), data, server, title=title)

    def _rendered(
        self, samples: Tensor, data: FederatedDataModule, server: ServerModule, *, title: str
    ) -> pictures.Picture:
        view = dataclasses.replace(self.view, title=title, belief=_belief(data, server))
        return modality_of(data).render(samples, data, view)

    def shown(self, data: FederatedDataModule, server: ServerModule) -> Tensor:
        """Return the samples of a picture, from the fixed z, on the CPU."""
        modality = modality_of(data)
        labels, count = modality.labels_shown(data, self.view), modality.num_shown(data, self.view)
        return server.sample(count, labels=labels, generator=self._generator()).detach().cpu()

    @property
    def view(self) -> View:
        """How much is shown."""
        return View(columns=self.columns, rows=self.rows, num_points=self.num_points, seed=self.seed)

    def _draw(self, trainer: L.Trainer, module: L.LightningModule, *, name: str) -> None:
        assert isinstance(module, ServerModule)
        if not (module.can_sample and _has_samples(trainer)):
            return
        self._last_round, data = completed_rounds(trainer), _data(trainer)
        samples, tag = self.shown(data, module), "samples/generated"
        picture = self._rendered(samples, data, module, title=f"round {completed_rounds(trainer)}")
        lines = modality_of(data).lines(samples, data)
        if lines is not None and trainer.is_global_zero:
            write_text((Path(trainer.default_root_dir) / name).with_suffix(".txt"), "\n".join(lines) + "\n")
            for writer in writers(trainer):
                writer.add_text(tag, "\n\n".join(lines), completed_rounds(trainer))
        publish(trainer, picture, name=name, tag=tag)

    def _generator(self) -> torch.Generator:
        return make_generator(self.seed, "fixed z")

    def _reals(self, data: FederatedDataModule) -> pictures.Picture:
        samples = data.train_samples
        held = torch.from_numpy(np.sort(np.concatenate(data.indices)))
        if samples.y is None or not data.num_classes:
            chosen = held[torch.randperm(len(held), generator=make_generator(self.seed, "reals"))]
            return pictures.grid(samples.take(chosen[: self.columns * self.rows])[0], columns=self.columns)
        rows = []
        for label in range(data.num_classes):
            images = samples.take(held[samples.y[held] == label][: self.columns])[0]
            missing = self.columns - len(images)
            rows.append(torch.cat([images, -torch.ones(missing, *data.sample_shape)]))
        return pictures.grid(torch.cat(rows), columns=self.columns)

    # ------------------------------------------------------------------ predict

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``predictions/samples.png`` and ``predictions/samples.npz`` (x, and y for conditional generators).

        Raises:
            ConfigurationError: If the client that was asked for keeps nothing.
        """
        assert isinstance(pl_module, ServerModule)
        if not (trainer.is_global_zero and pl_module.can_sample and _has_samples(trainer)):
            return
        data, folder = _data(trainer), Path(trainer.default_root_dir) / "predictions"
        if self.predict_client is not None:
            federation = next(own for own in trainer.callbacks if isinstance(own, FederatedOrchestrator))  # type: ignore[attr-defined]
            pl_module = server_of_client(federation, pl_module, self.predict_client)
            folder = folder / f"client{self.predict_client}"
        classes = int(getattr(pl_module.model, "num_classes", 0))
        labels = torch.arange(self.predict_samples) % classes if classes else None
        samples = pl_module.sample(self.predict_samples, labels=labels, generator=self._generator()).cpu()
        folder.mkdir(parents=True, exist_ok=True)
        modality = modality_of(data)
        drawn = samples if modality.draws_stored else self.shown(data, pl_module)
        pictures.save(self._rendered(drawn, data, pl_module, title="samples"), folder / "samples.png")
        if (lines := modality.lines(samples, data)) is not None:
            write_text(folder / "samples.txt", "\n".join(lines) + "\n")
            print(f"wrote {folder / 'samples.txt'}")
        arrays: dict[str, Any] = {"x": modality.stored(samples, data).numpy()}
        arrays |= {} if labels is None else {"y": labels.numpy()}
        with replacing(folder / "samples.npz") as file:
            np.savez_compressed(file, **arrays)
        print(f"wrote {folder / 'samples.png'} and {folder / 'samples.npz'}")


def _belief(data: FederatedDataModule, server: ServerModule) -> Belief | None:
    """Return points -> D(x), where the server has an unconditional discriminator of the plane."""
    discriminator = getattr(server.model, "discriminator", None)
    shared = server.policy.sync.get("discriminator") == "average"
    own = hasattr(server.model, "discriminate")  # of other people's nobody knows what they take
    if discriminator is None or not own or not shared or tuple(data.sample_shape) != (2,):
        return None
    if getattr(discriminator, "num_classes", 0):
        return None

    @torch.no_grad()
    def read(points: Tensor) -> Tensor:
        logits, _ = split_heads(discriminator(points.to(next(discriminator.parameters())), None))
        return logits.flatten().float().sigmoid()

    return read


def _has_samples(trainer: L.Trainer) -> bool:
    """Whether the data say what samples are: only then is it known how they are drawn."""
    return getattr(trainer.datamodule, "has_samples", False)  # type: ignore[attr-defined]


def _data(trainer: L.Trainer) -> FederatedDataModule:
    data: FederatedDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data
