"""What a client's module writes by ``self.log`` and ``self.logger``: TensorBoard curves beside those of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger, Logger

from fedgan_lightning.hooks import nothing

#: Methods of a writer whose first argument is a tag; others would mix the clients' entries, and do nothing.
TAGGED = {f"add_{kind}" for kind in ("scalar", "scalars", "histogram", "image", "images", "image_with_boxes", "figure")}
TAGGED |= {f"add_{kind}" for kind in ("video", "audio", "text", "pr_curve", "tensor")}


class ClientLogger(Logger):
    """Writes what a client logs under ``client_NNN/NAME``, at the step that the client counts over all rounds.

    The file is made with the first entry. ``client_NNN/round`` says in which round the steps were taken.

    Args:
        folder: Where the events lie.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._writer: Any = None
        self._client_id, self._round, self._step, self._has_begun = 0, 0, 0, False

    def begin(self, client_id: int, *, round: int, step: int) -> None:
        """Write for this client from now on.

        Args:
            client_id: The client.
            round: The round that it works for.
            step: Steps that it has taken before; a scalar that is written without a step has this one.
        """
        self._client_id, self._round, self._step, self._has_begun = client_id, round, step, False

    @property
    def name(self) -> str:
        """Nothing: clients share a folder."""
        return ""

    @property
    def version(self) -> str:
        """Nothing: clients share a folder."""
        return ""

    @property
    def save_dir(self) -> str:
        """Where the events lie."""
        return str(self.folder)

    @property
    def log_dir(self) -> str:
        """Where this client may write files of its own."""
        return str(self.folder / f"client_{self._client_id:03d}")

    @property
    def experiment(self) -> TaggedWriter:
        """A ``SummaryWriter`` of this client alone."""
        return TaggedWriter(self)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            if name != "epoch":
                self.experiment.add_scalar(name, value, step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: they are the run's."""

    def save(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def __getattr__(self, name: str) -> Callable[..., None]:
        """What other loggers have (``log_image``, ``log_table``) does nothing."""
        if name.startswith("_"):
            raise AttributeError(name)
        return nothing

    def close(self) -> None:
        """End the file, if there is one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def write(self, method: str, tag: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Write an entry under the client's tag."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder))
        prefix = f"client_{self._client_id:03d}/"
        if not self._has_begun:
            self._has_begun = True
            self._writer.add_scalar(f"{prefix}round", self._round, self._step)
        if method == "add_scalar" and len(arguments) < 2:
            options.setdefault("global_step", self._step)
        getattr(self._writer, method)(f"{prefix}{tag}", *arguments, **options)


class TaggedWriter:
    """The methods of a ``SummaryWriter``, with the client in every tag.

    Modules that are written for another logger call other methods (``log``, ``log_image``): they do nothing.
    """

    def __init__(self, logger: ClientLogger) -> None:
        self._logger = logger

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in TAGGED:
            return nothing

        def method(*arguments: Any, **options: Any) -> None:
            first = options.pop("main_tag" if name == "add_scalars" else "tag", None)
            tag, rest = (arguments[0], arguments[1:]) if first is None else (first, arguments)
            self._logger.write(name, str(tag), rest, options)

        return method


class SilentLogger(DummyLogger):
    """For clients that write nothing: every method, and every one of ``experiment``, does nothing.

    Args:
        folder: Where a module finds that it may write files.
    """

    def __init__(self, folder: Path | str = "client_logs") -> None:
        super().__init__()
        self.folder = str(folder)

    @property
    def save_dir(self) -> str:
        """Where a module may write files."""
        return self.folder

    @property
    def log_dir(self) -> str:
        """Where a module may write files."""
        return self.folder


SILENT = SilentLogger()
