"""The federated data module: a source, a partition, and the minibatches of every client.

For the Trainer of the server it yields one item per epoch, because an epoch is a round. For controls it hands out plain
Lightning data modules: :meth:`FederatedDataModule.pooled` (centralised) and :meth:`FederatedDataModule.client`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from torch import Tensor

from fedgan_lightning.data.clients import StreamOptions, clients_of_module
from fedgan_lightning.data.controls import PlainDataModule
from fedgan_lightning.data.dividing import check_no_shifts, divided, given_like
from fedgan_lightning.data.held_out import HeldOutBatches
from fedgan_lightning.data.held_out import divided as divided_off
from fedgan_lightning.data.items import Collate
from fedgan_lightning.data.order import MinibatchOrder, check_not_empty, steps_per_epoch
from fedgan_lightning.data.own import ClientDatasets, TickingDataModule, check_no_share
from fedgan_lightning.data.partition import IID, Partition
from fedgan_lightning.data.samples import BatchStream, ClientSamples, Samples, Shift, StackedBatchStream
from fedgan_lightning.data.sources import Source
from fedgan_lightning.data.sources.base import check_samples
from fedgan_lightning.data.sources.base import check_shared_metadata as check_shared_metadata
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import derive_seed

logger = logging.getLogger("fedgan_lightning")


class FederatedDataModule(TickingDataModule):
    """Real data, divided among clients that never show it to each other.

    Args:
        source: Where the samples come from.
        partition: Who holds what; default IID.
        num_clients: Number of clients.
        batch_size: Samples per local minibatch; a client with fewer has minibatches of all that it holds.
        drop_last: Whether an epoch drops its incomplete last minibatch; otherwise it ends with it.
        max_samples: Keep only so many training samples, drawn with the seed; ``None`` keeps all.
        validation_share: Share of every client's samples that it holds out, for the module's ``validation_step``; they
            are trained on by nobody, and never leave the client.
        seed: Root seed of partition and minibatch order.

    Attributes:
        sample_shape: Shape of one sample, known before ``setup``.
        num_classes: Number of classes, known before ``setup``.
        has_client_samples: Whether clients' samples are at hand, as in simulation.
        client_names: What the user calls the clients; default their numbers.
        has_server_samples: Whether whoever measures has samples to compare with.
        has_client_sums: Whether sums over each client's samples are, or only those over all clients'.
    """

    has_client_samples: ClassVar[bool] = True
    has_server_samples: bool = True
    has_client_sums: bool = True

    @checked(
        "data",
        num_clients="[1, inf)",
        batch_size="[1, inf)",
        max_samples="[1, inf)",
        validation_share="[0, 1)",
        seed="[0, inf)",
    )
    def __init__(
        self,
        source: Source,
        *,
        partition: Partition | None = None,
        num_clients: int = 10,
        batch_size: int = 64,
        drop_last: bool = True,
        max_samples: int | None = None,
        validation_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.partition = source, partition if partition is not None else IID()
        self._num_clients, self.batch_size, self.drop_last = num_clients, batch_size, drop_last
        self.max_samples, self.validation_share, self.seed = max_samples, validation_share, seed
        self.sample_shape, self.num_classes = source.sample_shape, source.num_classes
        self.class_names = source.class_names
        self.client_names: tuple[Any, ...] = tuple(range(num_clients))
        self._has_told = False

    @classmethod
    @checked(
        "",
        batch_size="[1, inf)",
        seed="[0, inf)",
        num_workers="[0, inf)",
        memory_limit="[0, inf)",
        validation_share="[0, 1)",
    )
    def from_datasets(  # type: ignore[override] # of Lightning's, which knows no clients
        cls,
        clients: Any,
        *,
        test: Any = None,
        batch_size: int = 64,
        drop_last: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        collate_fn: Collate | None = None,
        memory_limit: int = 1 << 30,
        validation_share: float = 0.0,
    ) -> FederatedDataModule | ClientDatasets:
        """Return the data module of clients that have each their own data.

        Items (x, y), (x,) or x alone, where x are pictures or floating-point tensors of one shape and y numbers of
        classes, are read into memory if they take no more than ``memory_limit`` and are the same when they are read
        again; then everything can be measured and drawn. All others are read minibatch by minibatch, in the order that
        they would have in memory, and reach the module as ``collate_fn`` makes them.

        A DataLoader brings its own ``batch_size``, ``drop_last``, ``collate_fn`` and ``num_workers``; its samples are
        shuffled by the seed whatever it says of that. One with a sampler of its own or without ``batch_size``, and one
        of an IterableDataset, keeps its own order, which begins anew every epoch; where it has no length it is read
        once to count its samples. A LightningDataModule brings its ``train_dataloader``, after ``prepare_data`` and
        ``setup("fit")``, and its hooks ``on_before_batch_transfer`` and ``on_after_batch_transfer``.

        Args:
            clients: A mapping from names to a Dataset, a DataLoader or a LightningDataModule each, or a list of these.
            test: A Dataset of held-out samples, for metrics.
            batch_size: Samples per minibatch; a client with fewer has minibatches of all that it holds.
            drop_last: Whether an epoch drops its incomplete last minibatch; otherwise it ends with it.
            seed: Root seed of the order of minibatches.
            num_workers: Processes that read ahead, for each client while it trains, what is read as needed.
            collate_fn: Makes a minibatch of a list of items; default torch's, with pictures as pixels in [-1, 1].
            memory_limit: Most bytes of samples to read into memory; 0 reads all as needed.
            validation_share: Share of every client's samples that it holds out for ``validation_step``; of samples in
                memory. A client's own LightningDataModule may have a ``val_dataloader`` instead.

        Raises:
            DataError: If a client has no data, or data that cannot be used; names client and item.
        """
        options = StreamOptions(batch_size, drop_last, seed, num_workers, collate_fn)
        found = cls._of(ClientDatasets.of(clients, options=options), test=test, limit=memory_limit)
        if isinstance(found, FederatedDataModule):
            found.validation_share = validation_share
        else:
            check_no_share(validation_share)
        return found

    @classmethod
    @checked("", num_clients="[1, inf)", seed="[0, inf)")
    def from_dataset(
        cls,
        dataset: Any,
        *,
        partition: Any = None,
        by: Any = None,
        labels: Any = None,
        num_clients: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> FederatedDataModule | ClientDatasets:
        """Return the data module of one data set that is divided among clients.

        Args:
            dataset: A map-style Dataset.
            partition: Who holds what: a Partition, or a partitioner of ``flwr-datasets``; default by the natural
                column, or IID.
            by: Values of the natural column, or its name among the keys of items.
            labels: Labels of the items for the partition, or their name among the keys; default the attribute
                ``targets`` or ``labels`` of the data set, or y of items (x, y), or the key ``label``.
            num_clients: Number of clients; default one for each value of ``by``, or else 10.
            seed: Root seed of partition and minibatch order.
            **options: Those of :meth:`from_datasets`.

        Raises:
            DataError: If the data cannot be divided so, or used; names client and item.
        """
        parts, known = divided(dataset, partition=partition, by=by, labels=labels, num_clients=num_clients, seed=seed)
        built = cls.from_datasets(parts, seed=seed, **options)
        if isinstance(built, ClientDatasets):
            check_no_shifts(known)
        else:
            built.partition = given_like(known, built.partition)
        return built

    @classmethod
    def from_datamodule(cls, module: L.LightningDataModule, **options: Any) -> FederatedDataModule | ClientDatasets:
        """Return the data module of a LightningDataModule that has a method ``client_dataloaders``.

        Args:
            module: Its ``client_dataloaders()``, after ``prepare_data`` and ``setup("fit")``, returns what
                :meth:`from_datasets` takes.
            **options: Those of :meth:`from_datasets`.

        Raises:
            ConfigurationError: If it has no such method.
        """
        return cls.from_datasets(clients_of_module(module), **options)

    @classmethod
    def _of(cls, found: ClientDatasets, *, test: Any, limit: int) -> FederatedDataModule | ClientDatasets:
        """Return the data module with all samples in memory, if they can be kept there."""
        known = found.in_memory(test, limit=limit)
        if known is None:
            if test is not None:
                logger.warning("test is not used: nothing can be measured of data that are read as needed")
            return found
        source, parts, stream = known
        built = cls(source, partition=parts, num_clients=found.num_clients, seed=found.options.seed, **stream)
        built.client_names = found.client_names
        return built

    # ------------------------------------------------------------------ Lightning

    def prepare_data(self) -> None:
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Read the training split, divide it, and refuse a division that cannot be trained on."""
        for client_id in range(self.num_clients):
            check_not_empty(self.num_examples(client_id), client=client_id)
        if self.has_client_samples and not self._has_told:
            self._has_told = True
            self._tell_what_nobody_holds()

    def _tell_what_nobody_holds(self) -> None:
        """Say which classes the partition gave to no client: nothing will ever be trained on them."""
        labels = self.train_samples.y
        if labels is None or not self.class_names:
            return
        left = labels.bincount(minlength=self.num_classes).numpy() * (self.label_counts().sum(0) == 0)
        if left.any():
            names = ", ".join(str(name) for name, count in zip(self.class_names, left) if count)
            logger.warning(
                f"no client holds a sample of {names}: {left.sum()} of {len(labels)} samples are left out. "
                "More clients, or more classes for each, would hold them"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what the clients share; it rides in checkpoints."""
        return self.source.shared_metadata()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of clients that share something else.

        Raises:
            CheckpointError: If they did.
        """
        check_shared_metadata(self, state_dict, path="a checkpoint")

    @property
    def has_samples(self) -> bool:
        """Whether samples are in memory, so that everything can be measured and drawn."""
        return isinstance(self.train_samples.x, Tensor)

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return self._num_clients

    @cached_property
    def train_samples(self) -> Samples:
        """The training split of the source, all clients together."""
        self.build_shared_metadata()
        return self._training_split()

    def build_shared_metadata(self) -> Source:
        """Return the source as all clients use it; built of all clients' unless it is there."""
        if not self.source.has_shared_metadata:
            samples = self._training_split()
            parts = self.partition.split(samples, num_clients=self.num_clients, seed=self.seed)
            self.source = self.source.with_shared_metadata(samples, parts)
        return self.source

    def _training_split(self) -> Samples:
        samples = self.source.load("train")
        check_samples(samples, shape=self.sample_shape, num_classes=self.num_classes)
        if self.max_samples is None or self.max_samples >= len(samples):
            return samples
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "subset"))
        kept = torch.randperm(len(samples), generator=generator)[: self.max_samples].sort().values
        return samples.subset(kept)

    @cached_property
    def test_samples(self) -> Samples:
        """The test split of the source, which no client holds."""
        samples = self.build_shared_metadata().load("test")
        check_samples(samples, shape=self.sample_shape, num_classes=self.num_classes)
        if (samples.y is None) != (self.train_samples.y is None):
            without = "test" if samples.y is None else "train"
            raise DataError(
                message(
                    "both splits of a source must have labels, or neither",
                    received=f"a {without} split without",
                    fix="give y for it, or leave it out of the other",
                )
            )
        return samples

    @cached_property
    def _divided(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """What each client trains on, and what it holds out, as positions in ``train_samples``."""
        parts = self.partition.split(self.train_samples, num_clients=self.num_clients, seed=self.seed)
        return [divided_off(own, self.validation_share, seed=self.seed, stream=k) for k, own in enumerate(parts)]

    @cached_property
    def indices(self) -> list[np.ndarray]:
        """The positions in ``train_samples`` that each client trains on."""
        return [train for train, _ in self._divided]

    @cached_property
    def shifts(self) -> list[Shift | None]:
        """The feature shift of each client."""
        return self.partition.shifts(num_clients=self.num_clients, seed=self.seed)

    def num_examples(self, client_id: int) -> int:
        """Return N_k."""
        return len(self.indices[client_id])

    def steps_per_epoch(self, client_id: int) -> int:
        """Return the minibatches in one pass over the client's data."""
        return steps_per_epoch(self.num_examples(client_id), batch_size=self.batch_size, drop_last=self.drop_last)

    def batch_sizes(self, client_id: int, *, first_step: int, num_steps: int) -> list[int]:
        """Return the number of samples in each of these minibatches of the client's stream."""
        order = MinibatchOrder(self.num_examples(client_id), self.batch_size, self.seed, client_id, self.drop_last)
        return order.sizes(first_step, num_steps)

    def client_samples(self, client_id: int) -> ClientSamples:
        """Return the client's samples, as a view."""
        indices = torch.from_numpy(self.indices[client_id])
        return ClientSamples(samples=self.train_samples, indices=indices, shift=self.shifts[client_id])

    def client_batches(self, client_id: int, *, first_step: int, num_steps: int) -> BatchStream:
        """Return minibatches ``first_step, ..., first_step + num_steps - 1`` of the client's stream."""
        return BatchStream(
            self.client_samples(client_id),
            stream=client_id,
            first_step=first_step,
            num_steps=num_steps,
            **self._stream_options,
        )

    def client_validation_batches(self, client_id: int) -> HeldOutBatches | None:
        """Return the minibatches of what a client holds out; ``None`` if it holds out nothing."""
        data = self.held_out_samples(client_id)
        return HeldOutBatches(data, batch_size=self.batch_size) if len(data) else None

    def held_out_samples(self, client_id: int) -> ClientSamples:
        """Return the samples that a client holds out, as a view."""
        positions = torch.from_numpy(self._divided[client_id][1])
        return ClientSamples(samples=self.train_samples, indices=positions, shift=self.shifts[client_id])

    @property
    def _stream_options(self) -> dict[str, Any]:
        """What all streams of minibatches have in common."""
        return {"batch_size": self.batch_size, "seed": self.seed, "drop_last": self.drop_last}

    def stacked_batches(
        self, client_ids: Sequence[int], *, first_steps: Sequence[int], num_steps: Sequence[int]
    ) -> StackedBatchStream:
        """Return the minibatches of several clients in one tensor, the client with most steps first."""
        streams = [
            self.client_batches(client_id, first_step=first, num_steps=count)
            for client_id, first, count in zip(client_ids, first_steps, num_steps)
        ]
        return StackedBatchStream(streams)

    def label_counts(self) -> np.ndarray:
        """Return (clients, classes) label counts; (clients, 1) sizes without labels."""
        labels = self.train_samples.y
        if labels is None:
            return np.array([[len(indices)] for indices in self.indices])
        width = max(self.num_classes, int(labels.max()) + 1)
        return np.stack([np.bincount(labels.numpy()[indices], minlength=width) for indices in self.indices])

    def fingerprint(self) -> str:
        """Return a hash of the samples, of who holds what, and of the minibatch stream.

        A resumed run must have the same.
        """
        known = f"{self.train_samples.digest} {self.batch_size} {self.seed} {self.shifts}"
        known += "" if self.drop_last else " incomplete"
        digest = hashlib.sha256(known.encode())
        for indices in self.indices:
            digest.update(len(indices).to_bytes(8, "little") + np.ascontiguousarray(indices).tobytes())
        return digest.hexdigest()[:16]

    def labels_like_union(self, num_samples: int, *, generator: torch.Generator) -> Tensor | None:
        """Return labels drawn from the union of all clients' labels; ``None`` without labels."""
        labels = self.train_samples.y
        if labels is None:
            return None
        held = labels[torch.from_numpy(np.concatenate(self.indices))]
        return held[torch.randint(len(held), (num_samples,), generator=generator)]

    # ------------------------------------------------------------------ controls

    def pooled(self, *, num_steps: int) -> PlainDataModule:
        """Return all clients' data as one plain data module, for a centralised control of ``num_steps`` minibatches."""
        if any(shift is not None for shift in self.shifts):  # as the clients see it
            parts = [view.take(torch.arange(len(view))) for view in map(self.client_samples, range(self.num_clients))]
            x, y = (torch.cat(own) for own in zip(*parts))
            union = Samples(x=x, y=y, form=self.train_samples.form)
            everything = ClientSamples(samples=union, indices=torch.arange(len(union)))
        else:
            indices = torch.from_numpy(np.sort(np.concatenate(self.indices)))
            everything = ClientSamples(samples=self.train_samples, indices=indices)
        return PlainDataModule(everything, stream=0, num_steps=num_steps, **self._stream_options)

    def client(self, client_id: int, *, num_steps: int) -> PlainDataModule:
        """Return one client's data as a plain data module, for a local-only control of ``num_steps`` minibatches."""
        data = self.client_samples(client_id)
        return PlainDataModule(data, stream=client_id, num_steps=num_steps, **self._stream_options)
