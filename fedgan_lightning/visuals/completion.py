"""Pictures before and after: real, with a hole, completed; and the completion of a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from fedgan_lightning.data.folders import is_shown
from fedgan_lightning.data.pictures import BLACK, EXTENSIONS, WHITE, read_picture
from fedgan_lightning.data.reading import reason, user_path
from fedgan_lightning.data.samples import of_bytes, to_bytes
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.evaluation.completion import check_completes, completed, pictures_with_holes
from fedgan_lightning.federation.server import ServerModule
from fedgan_lightning.gan.inpainting_mask import InpaintingMask, masked
from fedgan_lightning.hooks import completed_rounds
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_generator
from fedgan_lightning.visuals import pictures
from fedgan_lightning.visuals.tensorboard import publish

#: A mask is white, and the picture has a hole, from this value on.
HOLE = 128


class CompletionPictures(L.Callback):
    """Writes ``completed_init.png`` and ``completed_roundNNNN.png``, rows of real, with a hole, completed;
    ``completed_test.png`` in ``test``; in ``predict`` completes the pictures of a folder.

    The pictures are of the test split, with holes and noise from a fixed seed. ``predict`` reads ``NAME.png`` and
    ``NAME_mask.png``, white where the hole is, of the size that the generator has, and writes
    ``predictions/NAME_completed.png`` and ``predictions/before_after.png``; without a folder it completes pictures of
    the test split.

    Args:
        every_n_rounds: Rounds between pictures; the last round always has one.
        columns: Pictures in a row.
        rows: Rows of three.
        folder: Pictures and masks that ``predict`` completes.
        holes: The holes; default those of :class:`~fedgan_lightning.gan.inpainting_mask.InpaintingMask`.
        seed: Seed of pictures, holes and noise.

    Raises:
        ConfigurationError: If a number is less than 1.
    """

    @checked(every_n_rounds="[1, inf)", columns="[1, inf)", rows="[1, inf)", seed="[0, inf)")
    def __init__(
        self,
        *,
        every_n_rounds: int = 10,
        columns: int = 12,
        rows: int = 2,
        folder: str | None = None,
        holes: InpaintingMask | None = None,
        seed: int = 0,
    ) -> None:
        self.every_n_rounds, self.columns, self.rows, self.seed = every_n_rounds, columns, rows, seed
        self.folder, self.holes = folder, holes if holes is not None else InpaintingMask()
        self._last_round = -1
        self._own: tuple[list[str], Tensor, Tensor] | None = None

    # ------------------------------------------------------------------ training

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_completes(_model(pl_module))
        if stage == "predict" and self.folder is not None:
            self._own = read_folder(self.folder, shape=tuple(trainer.datamodule.sample_shape))  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if completed_rounds(trainer) == 0:
            self._publish(trainer, pl_module, name="completed_init.png")

    def on_round_end(self, trainer: L.Trainer, server: ServerModule, info: Any, metrics: Any) -> None:
        """Draw a picture every ``every_n_rounds``."""
        if completed_rounds(trainer) % self.every_n_rounds == 0:
            self._publish(trainer, server, name=f"completed_round{completed_rounds(trainer):04d}.png")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._last_round != completed_rounds(trainer):
            self._publish(trainer, pl_module, name=f"completed_round{completed_rounds(trainer):04d}.png")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``completed_test.png``."""
        self._publish(trainer, pl_module, name="completed_test.png")

    def draw(self, data: Any, module: L.LightningModule) -> pictures.Picture:
        """Return the picture of the test split's pictures, with their holes, completed by the global generator."""
        real, holed = pictures_with_holes(data, self.holes, count=self.columns * self.rows, seed=self.seed)
        return before_after(real, holed, self._completed(module, holed), columns=self.columns)

    def _completed(self, module: L.LightningModule, holed: Tensor) -> Tensor:
        return completed(_model(module), holed, generator=make_generator(self.seed, "fixed z"))

    def _publish(self, trainer: L.Trainer, module: L.LightningModule, *, name: str) -> None:
        self._last_round = completed_rounds(trainer)
        if not getattr(trainer.datamodule, "has_server_samples", True):  # type: ignore[attr-defined]
            return  # there are no pictures here to complete
        if trainer.is_global_zero:
            publish(trainer, self.draw(trainer.datamodule, module), name=name, tag="samples/completed")  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ predict

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the completed pictures, and the grid of before and after."""
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "predictions"
        if self._own is None:
            pictures.save(self.draw(trainer.datamodule, pl_module), folder / "before_after.png")  # type: ignore[attr-defined]
            print(f"wrote {folder / 'before_after.png'}")
            return
        names, x, mask = self._own
        holed = masked(x, mask)
        made = self._completed(pl_module, holed)
        for name, picture in zip(names, made):
            pictures.save(as_bytes(picture), folder / f"{name}_completed.png")
        columns = min(self.columns, len(names))
        pictures.save(before_after(x, holed, made, columns=columns), folder / "before_after.png")
        print(f"wrote {len(names)} completed pictures and {folder / 'before_after.png'}")


def before_after(real: Tensor, holed: Tensor, made: Tensor, *, columns: int) -> pictures.Picture:
    """Return rows of real pictures (n, c, h, w), of the same with holes (n, c + 1, h, w), and of the completed ones."""
    rows = []
    for start in range(0, len(real), columns):
        part = slice(start, start + columns)
        missing = columns - len(real[part])
        for row in (real[part], holed[part, :-1], made[part]):
            rows.append(torch.cat([row, row.new_ones(missing, *row.shape[1:])]))
    return pictures.grid(torch.cat(rows), columns=columns)


def read_folder(folder: str | Path, *, shape: tuple[int, ...]) -> tuple[list[str], Tensor, Tensor]:
    """Return names, pictures (n, c, h, w) in [-1, 1] and masks (n, 1, h, w) in {0, 1} of a folder.

    Args:
        folder: Holds NAME.png and NAME_mask.png, white in the hole; other suffixes of pictures are read as well.
        shape: c, h and w that the generator completes.

    Raises:
        DataError: If the folder is missing or holds no picture, a mask or its picture is missing, a file cannot be
            read, or one is of another size.
    """
    place = user_path(folder)
    files = sorted(p for p in _listed(place) if p.suffix.lower() in EXTENSIONS and is_shown(p.name))
    masks = {p.stem.removesuffix("_mask"): p for p in files if p.stem.endswith("_mask")}
    found = {p.stem: p for p in files if not p.stem.endswith("_mask")}
    if len(masks) + len(found) < len(files):
        stems = [path.stem for path in files]
        twice = next(path.name for path in files if stems.count(path.stem) > 1)
        raise DataError(
            message(
                "files of a folder to complete must differ before the dot", received=f"{twice} in {place}", fix="rename"
            )
        )
    if not found:
        raise DataError(
            message(
                "the folder to complete must hold pictures NAME.png", received=f"none in {place}", fix="check the path"
            )
        )
    alone = sorted({*found} ^ {*masks})
    if alone:
        lacking = f"{alone[0]}_mask.png" if alone[0] in found else f"{alone[0]}.png"
        raise DataError(
            message(
                "every picture NAME.png must have a mask NAME_mask.png, white in the hole",
                received=f"{len(alone)} without the other, no {lacking} in {place}",
                fix="add it",
            )
        )
    size = (shape[1], shape[2])
    names = sorted(found)
    x = torch.stack([_read(found[name], channels=shape[0], size=size, background=WHITE) for name in names])
    mask = torch.stack([_read(masks[name], channels=1, size=size, background=BLACK) for name in names])
    return names, of_bytes(x), (mask >= HOLE).float()


def _listed(place: Path) -> list[Path]:
    try:
        return list(place.iterdir()) if place.is_dir() else []
    except OSError as error:
        raise DataError(
            message(
                "the folder to complete must be listable", received=f"{place} ({reason(error)})", fix="check its rights"
            )
        ) from error


def _read(path: Path, *, channels: int, size: tuple[int, int], background: int) -> Tensor:
    pixels = read_picture(path, channels=channels, background=background)
    height, width = pixels.shape[1:]
    if (height, width) != size:
        raise DataError(
            message(
                f"pictures and masks must be {size[1]} x {size[0]} pixels, as the generator's",
                received=f"{width} x {height} in {path}",
                fix="resize it",
            )
        )
    return pixels


def as_bytes(picture: Tensor) -> pictures.Picture:
    """Return a picture (c, h, w) in [-1, 1] as bytes (h, w, 3)."""
    pixels: pictures.Picture = to_bytes(picture).permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
    return pixels


def _model(module: L.LightningModule) -> torch.nn.Module:
    return module.model if isinstance(module, ServerModule) else module
