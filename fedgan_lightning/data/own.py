"""A data module over clients' own data, read as needed: any items, any number of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch

from fedgan_lightning.data.clients import Client, StreamOptions, client_of, named_clients
from fedgan_lightning.data.given_partitions import GivenIndices
from fedgan_lightning.data.in_memory import ItemsSource, form_of_first, read_samples
from fedgan_lightning.data.items import form_of, structure_of
from fedgan_lightning.data.streams import MapStream, Window
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.seeding import isolated_rng


class RoundTick:
    """A loader of one item: the tick of a round."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[int]:
        return iter((0,))


class TickingDataModule(L.LightningDataModule):
    """For the Trainer of the server a data module yields one item per epoch, because an epoch is a round."""

    def train_dataloader(self) -> RoundTick:
        return RoundTick()

    def val_dataloader(self) -> RoundTick:
        return RoundTick()

    def test_dataloader(self) -> RoundTick:
        return RoundTick()

    def predict_dataloader(self) -> RoundTick:
        return RoundTick()


class ClientDatasets(TickingDataModule):
    """Clients' own data, read minibatch by minibatch.

    Built by ``FederatedDataModule.from_datasets`` and its sisters. Metrics and pictures of real samples need samples in
    memory, which it does not have.

    Args:
        clients: Each client's data, in the order of their numbers.
        names: What the user calls them.
        options: Seed, and how items become minibatches where no loader says so.

    Attributes:
        has_samples: Whether all samples are in memory: no.
        client_names: What the user calls the clients.

    Raises:
        DataError: If clients' items are built differently; names the client.
    """

    has_samples: ClassVar[bool] = False

    def __init__(self, clients: Sequence[Client], *, names: Sequence[Any], options: StreamOptions) -> None:
        super().__init__()
        self.clients, self.client_names, self.options = list(clients), tuple(names), options
        for own in self.clients:
            own.stream.try_out()
        first = [own.stream.first_item() for own in self.clients]
        for name, item, own in zip(self.client_names, first, self.clients):
            kind, known = isinstance(own.stream, MapStream), isinstance(self.clients[0].stream, MapStream)
            if kind == known and structure_of(item) != structure_of(first[0]):
                raise DataError(
                    message(
                        "the items of all clients must be built alike",
                        received=f"{form_of(item)} from client {name}, {form_of(first[0])} from {self.client_names[0]}",
                        fix="give all the same keys and as many values",
                    )
                )

    def setup(self, stage: str | None = None) -> None:
        """Lend the clients' data modules the Trainer, which their hooks may ask."""
        for own in self.clients:
            if own.module is not None:
                own.module.trainer = self.trainer

    @classmethod
    def of(cls, clients: Mapping[Any, Any] | Sequence[Any], *, options: StreamOptions) -> ClientDatasets:
        """Return the data module of clients' data sets, loaders or data modules.

        Raises:
            DataError: If one is none of these, or holds nothing; names the client.
        """
        named = named_clients(clients)
        found = [client_of(name, own, client_id=k, options=options) for k, (name, own) in enumerate(named.items())]
        return cls(found, names=list(named), options=options)

    def in_memory(self, test: Any, *, limit: int) -> tuple[ItemsSource, GivenIndices, dict[str, Any]] | None:
        """Return all samples as a source, who holds what, and how minibatches are made of them.

        Args:
            test: A data set of held-out samples, if there is one.
            limit: Most bytes of samples to read.

        Returns:
            ``None`` where they cannot be kept so: see :mod:`.in_memory`.
        """
        with isolated_rng(self.options.seed):  # data sets may draw while they are read
            return self._in_memory(test, limit=limit)

    def _in_memory(self, test: Any, *, limit: int) -> tuple[ItemsSource, GivenIndices, dict[str, Any]] | None:
        streams = [own.stream for own in self.clients if isinstance(own.stream, MapStream) and own.changed is None]
        ways = {(own.order.batch_size, own.order.drop_last) for own in streams}
        if (
            self.validation_share
            or len(streams) < len(self.clients)
            or len(ways) > 1
            or any(own.reader.collate_fn for own in streams)
        ):
            return None
        form = form_of_first(streams[0])
        if form is None or form.bytes * sum(own.num_examples for own in streams) > limit:
            return None
        train = read_samples(streams, form)
        if train is None:
            return None
        held_out = None
        if test is not None:
            client = client_of("test", test, client_id=len(streams), options=self.options)
            own = form_of_first(client.stream) if isinstance(client.stream, MapStream) else None
            if own != form or not isinstance(client.stream, MapStream):
                raise DataError(
                    message(
                        f"test must hold items like those of the clients, {form.kind} with x {form.dtype} of shape "
                        f"{form.shape}",
                        received=form_of(client.stream.first_item()),
                        fix="treat both alike",
                    )
                )
            held_out = read_samples([client.stream], form)
        parts = GivenIndices(torch.arange(len(train)).split([own.num_examples for own in streams]))
        ((batch_size, drop_last),) = ways
        names = _class_names(streams[0].reader.dataset)
        return (
            ItemsSource(train, held_out, class_names=names),
            parts,
            {"batch_size": batch_size, "drop_last": drop_last},
        )

    # ------------------------------------------------------------------ the federation's view

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.clients)

    def num_examples(self, client_id: int) -> int:
        """Return N_k."""
        return self.clients[client_id].stream.num_examples

    def steps_per_epoch(self, client_id: int) -> int:
        """Return the minibatches in one pass over the client's data."""
        return self.clients[client_id].stream.steps_per_epoch

    def batch_sizes(self, client_id: int, *, first_step: int, num_steps: int) -> list[int] | None:
        """Return the number of samples in each of these minibatches of the client's stream, where it is known."""
        return self.clients[client_id].stream.sizes(first_step, num_steps)

    def client_batches(self, client_id: int, *, first_step: int, num_steps: int) -> Window:
        """Return minibatches ``first_step, ..., first_step + num_steps - 1`` of the client's stream."""
        client = self.clients[client_id]
        return Window(client.stream, first_step=first_step, num_steps=num_steps, changed=client.changed)

    @property
    def validation_share(self) -> float:
        """Whether clients bring data for validation: 1 if one does, with the ``val_dataloader`` of its data module."""
        return float(any(own.module is not None and _has_validation(own.module) for own in self.clients))

    def client_validation_batches(self, client_id: int) -> Any:
        """Return the client's own minibatches for validation; ``None`` if it brings none."""
        module = self.clients[client_id].module
        return module.val_dataloader() if module is not None and _has_validation(module) else None

    def client_datamodule(self, client_id: int) -> L.LightningDataModule | None:
        """Return the client's own data module, if its data come in one."""
        return self.clients[client_id].module

    def fingerprint(self) -> str:
        """Return a hash of sizes, of the minibatch stream, and of a few items of every client.

        A resumed run must have the same.
        """
        facts = [str(self.options.seed), *(own.stream.facts() for own in self.clients)]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _has_validation(module: L.LightningDataModule) -> bool:
    return type(module).val_dataloader is not L.LightningDataModule.val_dataloader


def _class_names(dataset: Any) -> list[str]:
    """Return the names of the classes, where a data set, or the one that it is a part of, knows them."""
    found = getattr(dataset, "classes", None) or getattr(getattr(dataset, "dataset", None), "classes", None)
    return list(map(str, found)) if isinstance(found, (list, tuple)) else []


def check_no_share(validation_share: float) -> None:
    """Refuse to hold out a share of what is read as needed.

    Raises:
        DataError: If there is one.
    """
    if validation_share:
        raise DataError(
            message(
                "validation_share must have samples that are read into memory",
                received=f"{validation_share} of data that are read as needed",
                fix="give clients LightningDataModules with a val_dataloader, or raise memory_limit",
            )
        )
