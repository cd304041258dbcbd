"""What users have of each client, as its stream of minibatches: a data set, a loader, or a whole data module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

from fedgan_lightning.data.items import Collate, ItemReader
from fedgan_lightning.data.order import MinibatchOrder, check_not_empty
from fedgan_lightning.data.streams import ClientStream, LoaderStream, MapStream, length_of
from fedgan_lightning.errors import ConfigurationError, DataError, message

#: What a data module may do to a minibatch before a module has it.
HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")


@dataclass(frozen=True)
class StreamOptions:
    """How items become minibatches where no loader says so.

    Attributes:
        batch_size: Samples per minibatch.
        drop_last: Whether an epoch drops its incomplete last minibatch.
        seed: Root seed.
        num_workers: Processes that read ahead.
        collate_fn: Makes a minibatch of items; default torch's.
    """

    batch_size: int = 64
    drop_last: bool = True
    seed: int = 0
    num_workers: int = 0
    collate_fn: Collate | None = None


@dataclass(frozen=True)
class Client:
    """One client's data.

    Attributes:
        stream: Its minibatches.
        changed: What becomes of every minibatch before the module has it, if anything.
        module: The data module that it comes from, if it does.
    """

    stream: ClientStream
    changed: Callable[[Any], Any] | None = None
    module: L.LightningDataModule | None = None


@dataclass(frozen=True)
class Part:
    """A client's part of a data set.

    Attributes:
        dataset: The whole data set.
        indices: The client's positions in it.
    """

    dataset: Any
    indices: Tensor


def clients_of_module(module: L.LightningDataModule) -> Any:
    """Return the clients' data of a data module that knows its clients.

    Raises:
        ConfigurationError: If it does not.
    """
    if not hasattr(module, "client_dataloaders"):
        raise ConfigurationError(
            message(
                "a data module of a federation must have a method client_dataloaders, or be a FederatedDataModule",
                received=f"{type(module).__name__} without it",
                fix="have client_dataloaders return {name: DataLoader}",
            )
        )
    module.prepare_data()
    module.setup("fit")
    return module.client_dataloaders()


def named_clients(clients: Mapping[Any, Any] | Sequence[Any]) -> dict[Any, Any]:
    """Return clients by name; those of a list are called 0, 1, 2, ...

    Raises:
        DataError: If it is neither, or there is none.
    """
    if isinstance(clients, Mapping):
        named = dict(clients)
    elif isinstance(clients, (list, tuple)):
        named = dict(enumerate(clients))
    else:
        named = None
    if not named:
        raise DataError(
            message(
                "clients must be a mapping from names to data sets, or a list of these",
                received=f"an object of type {type(clients).__name__}" if named is None else "none",
                fix="give {name: Dataset}; for one data set and a partition of it use from_dataset",
            )
        )
    return named


def client_of(name: Any, found: Any, *, client_id: int, options: StreamOptions) -> Client:
    """Return a client's data.

    Args:
        name: What the user calls the client.
        found: A data set, a loader, or a data module.
        client_id: Its number.
        options: For what is no loader.

    Raises:
        DataError: If it is none of these, or holds nothing; names the client.
    """
    if isinstance(found, Part):
        return Client(map_stream(found.dataset, name=name, client_id=client_id, options=options, indices=found.indices))
    if isinstance(found, L.LightningDataModule):
        return _of_module(name, found, client_id=client_id, options=options)
    if isinstance(found, IterableDataset):
        return Client(_of_iterable(name, found, client_id=client_id, options=options))
    if isinstance(found, DataLoader):
        return Client(_of_loader(name, found, client_id=client_id, options=options))
    if hasattr(found, "__getitem__") and not isinstance(found, (str, bytes, Mapping)):
        return Client(map_stream(found, name=name, client_id=client_id, options=options))
    if hasattr(found, "__iter__") and not isinstance(found, (str, bytes, Mapping)):
        return Client(_filled(LoaderStream(found, name=name, seed=options.seed, stream=client_id)))
    raise DataError(
        message(
            f"client {name} must be a Dataset, a DataLoader or a LightningDataModule",
            received=f"an object of type {type(found).__name__}",
            fix="give one of these",
        )
    )


def map_stream(dataset: Any, *, name: Any, client_id: int, options: StreamOptions, indices: Any = None) -> MapStream:
    """Return the stream of a map-style data set, or of the items at ``indices`` of it.

    Raises:
        DataError: If it has no length, or no items; names the client.
    """
    count = length_of(dataset) if indices is None else len(indices)
    if count is None:
        raise DataError(
            message(
                f"the data set of client {name} must have a length",
                received=f"{type(dataset).__name__} without one",
                fix="give it a method __len__, or make it an IterableDataset",
            )
        )
    check_not_empty(count, client=name)
    order = MinibatchOrder(count, options.batch_size, options.seed, client_id, options.drop_last)
    reader = ItemReader(dataset, client=name, collate_fn=options.collate_fn)
    return MapStream(reader, order, num_workers=options.num_workers, indices=indices)


def _of_iterable(name: Any, dataset: IterableDataset, *, client_id: int, options: StreamOptions) -> ClientStream:
    """Return the stream of an iterable data set; one of less than a minibatch has minibatches of all of it."""
    loaders = [
        DataLoader(
            dataset,
            batch_size=options.batch_size,
            drop_last=drop_last,
            collate_fn=options.collate_fn,
            num_workers=options.num_workers,
        )
        for drop_last in {options.drop_last: None, False: None}
    ]
    streams = (LoaderStream(loader, name=name, seed=options.seed, stream=client_id) for loader in loaders)
    stream = next((own for own in streams if own.num_examples), None)
    check_not_empty(0 if stream is None else stream.num_examples, client=name)
    assert stream is not None
    return stream


def _of_loader(name: Any, loader: DataLoader, *, client_id: int, options: StreamOptions) -> ClientStream:
    """Return the stream of a loader: in our order, unless it has an order of its own."""
    sampler, size = loader.sampler, loader.batch_size
    if isinstance(loader.dataset, IterableDataset) or size is None or not _is_plain(sampler):
        return _filled(LoaderStream(loader, name=name, seed=options.seed, stream=client_id))
    own = replace(
        options,
        batch_size=size,
        drop_last=loader.drop_last,
        num_workers=loader.num_workers,
        collate_fn=None if loader.collate_fn is default_collate else loader.collate_fn,
    )
    return map_stream(loader.dataset, name=name, client_id=client_id, options=own)


def _filled(stream: LoaderStream) -> LoaderStream:
    """Return a stream that has minibatches.

    Raises:
        DataError: If it has none.
    """
    if not stream.num_examples:
        raise stream.unfit("none", "leave that client out, or set drop_last to False")
    return stream


def _is_plain(sampler: Any) -> bool:
    """Whether a sampler goes once through all samples, in order or shuffled, as a loader without one does."""
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == length_of(sampler.data_source)
    return type(sampler) is SequentialSampler


def _of_module(name: Any, module: L.LightningDataModule, *, client_id: int, options: StreamOptions) -> Client:
    """Return the training data of a data module, which is prepared and set up."""
    module.prepare_data()
    module.setup("fit")
    loader = module.train_dataloader()
    if isinstance(loader, L.LightningDataModule) or not hasattr(loader, "__iter__") or isinstance(loader, (dict, list)):
        raise DataError(
            message(
                f"the data module of client {name} must have one train_dataloader",
                received=f"an object of type {type(loader).__name__}",
                fix="return a DataLoader from it",
            )
        )
    known = client_of(name, loader, client_id=client_id, options=options)
    hooks = [getattr(module, hook) for hook in HOOKS if is_overridden(hook, module, L.LightningDataModule)]

    def changed(batch: Any) -> Any:
        for hook in hooks:
            batch = hook(batch, 0)
        return batch

    return replace(known, changed=changed if hooks else None, module=module)
