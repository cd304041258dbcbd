"""What a client's module finds as ``trainer.datamodule``."""

from __future__ import annotations

from typing import Any

import lightning as L


class ClientDataModule(L.LightningDataModule):
    """A view of a data module with everything in it, but without its hooks: those were called before the first round.

    Args:
        data: The federation's data module, or the client's own.
    """

    #: A client trains with it, and not a plain Trainer.
    is_client_view = True

    def __init__(self, data: Any) -> None:
        super().__init__()
        self._data = data

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_data":
            raise AttributeError(name)
        return getattr(self._data, name)


def datamodule_of(data: Any, client_id: int) -> ClientDataModule:
    """Return the view for a client: of the data module that it was given, or else of the federation's."""
    own = getattr(data, "client_datamodule", None)
    found = None if own is None else own(client_id)
    return ClientDataModule(data if found is None else found)
