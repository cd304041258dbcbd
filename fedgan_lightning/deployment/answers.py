"""What sites have told a server of their samples, on its disk: they tell it once in a run, and a server restarts."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save

from fedgan_lightning.files import replacing
from fedgan_lightning.protocol import State

#: Queries that are remembered beside those of the run's beginning: each evaluation of a recommender is a new one.
MOST_QUERIES = 50


class Answers:
    """Sums by query and by who told them.

    Args:
        folder: Where they lie; ``None`` remembers nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def of(self, query: str) -> dict[str, State]:
        """Return what is known of a query, by who told it.

        Args:
            query: Its hash.
        """
        if self.folder is None:
            return {}
        return {path.stem: load_file(path) for path in sorted((self.folder / query).glob("*.safetensors"))}

    def keep(self, query: str, who: str, sums: State) -> None:
        """Remember sums, whole or not at all."""
        if self.folder is None:
            return
        with replacing(self.folder / query / f"{who}.safetensors", mode=0o600) as file:
            file.write(save({name: value.contiguous() for name, value in sums.items()}))
        known = sorted(self.folder.iterdir(), key=lambda own: own.stat().st_mtime_ns)
        for old in known[1:-MOST_QUERIES]:
            for file_of_old in old.glob("*"):
                file_of_old.unlink(missing_ok=True)
            old.rmdir()
