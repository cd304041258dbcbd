"""One data set of a user's, divided among clients by a partition that sees labels and columns, and no samples."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgan_lightning.data.clients import Part
from fedgan_lightning.data.given_partitions import FlowerPartitioner, is_partitioner
from fedgan_lightning.data.items import ItemReader, form_of
from fedgan_lightning.data.partition import IID, FeatureShift, Natural, Partition
from fedgan_lightning.data.streams import length_of
from fedgan_lightning.errors import ConfigurationError, DataError, message
from fedgan_lightning.seeding import isolated_rng

#: Clients where nothing says how many there are.
NUM_CLIENTS = 10
#: Attributes under which data sets keep their labels.
LABELS = ("targets", "labels")


class DatasetView:
    """What a partition sees of a data set; labels are read when it asks for them.

    Args:
        dataset: The data set.
        labels: Labels of the items, or the name of the column of labels.
        by: The natural column's name, or its values.
    """

    is_image = True

    def __init__(self, dataset: Any, *, labels: Any, by: Any) -> None:
        self.dataset, self._labels, self._by = dataset, labels, by
        count = length_of(dataset)
        if count is None or not hasattr(dataset, "__getitem__"):
            raise DataError(
                message(
                    "a data set that is divided must have a length, and items by number",
                    received=f"an object of type {type(dataset).__name__}",
                    fix="make it a map-style Dataset, or give each client its own to from_datasets",
                )
            )
        if not count:
            raise DataError(message("a data set must hold at least one sample", received="none", fix="check its path"))
        self.count = count
        self.reader = ItemReader(dataset, client="of all", collate_fn=list)

    def __len__(self) -> int:
        return self.count

    @cached_property
    def x(self) -> Tensor:
        """No samples: as many rows, without numbers."""
        return torch.empty(self.count, 0)

    @cached_property
    def y(self) -> Tensor | None:
        """The labels: those given, of an attribute of the data set, or of the items (x, y); else ``None``."""
        if self._labels is not None:
            values = self.column(self._labels) if isinstance(self._labels, str) else self._labels
        else:
            own = (getattr(self.dataset, name, None) for name in LABELS)
            values = next((found for found in own if length_of(found) == self.count), None)
            if values is None:
                values = self._labels_of_items()
        return None if values is None else self._numbers(values)

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The natural column, if one is named."""
        if self._by is None:
            return {}
        if isinstance(self._by, str):
            return {self._by: np.asarray(self.column(self._by))}
        return {"by": self._checked(np.asarray(self._by), "by")}

    def column(self, name: str) -> list[Any]:
        """Return a column of items that are mappings, or of a data set that has columns.

        Raises:
            DataError: If there is none.
        """
        if name in (getattr(self.dataset, "column_names", None) or ()):
            return list(self.dataset[name])
        values = []
        for position in range(self.count):
            item = self.reader.raw(position)
            if not isinstance(item, Mapping) or name not in item:
                keys = f"the keys {sorted(map(str, item))}" if isinstance(item, Mapping) else form_of(item)
                fix = "name one of the items' keys, or give the values themselves"
                raise self.reader.unfit(position, f"must have a value of {name!r}", keys, fix)
            values.append(item[name])
        return values

    def _labels_of_items(self) -> list[Any] | None:
        first = self.reader.raw(0)
        if isinstance(first, (tuple, list)) and len(first) == 2:
            return [self.reader.raw(position)[1] for position in range(self.count)]
        if isinstance(first, Mapping) and "label" in first:
            return self.column("label")
        return None

    def _numbers(self, values: Any) -> Tensor:
        """Return labels as numbers; texts are numbered in their order."""
        if isinstance(values, (list, tuple)) and any(isinstance(own, Tensor) for own in values):
            values = [own.item() if isinstance(own, Tensor) and own.numel() == 1 else own for own in values]
        known = self._checked(np.asarray(values), "labels")
        if known.dtype.kind in "US":
            known = np.unique(known, return_inverse=True)[1]
        if known.dtype.kind not in "iub" or known.ndim != 1:
            raise DataError(
                message(
                    "labels that a partition divides by must be whole numbers or texts, one for each item",
                    received=f"{known.dtype} of shape {known.shape}",
                    fix="give labels=",
                )
            )
        return torch.from_numpy(known.astype(np.int64))

    def _checked(self, values: np.ndarray, option: str) -> np.ndarray:
        if len(np.atleast_1d(values)) != self.count:
            raise DataError(
                message(
                    f"{option} must have a value for each of {self.count} items",
                    received=f"{len(np.atleast_1d(values))} values",
                    fix="give one for each",
                )
            )
        return values


def divided(
    dataset: Any, *, partition: Any, by: Any, labels: Any, num_clients: int | None, seed: int
) -> tuple[dict[Any, Part], Partition]:
    """Return what every client holds, by its name, and the partition.

    Args:
        dataset: The data set.
        partition: A :class:`Partition`, or a partitioner of ``flwr-datasets``; default IID, or by the natural column.
        by: The natural column's name, or its values.
        labels: Labels of the items, or the name of the column of labels.
        num_clients: Number of clients; default one for each value of the natural column, or else 10.
        seed: Root seed.

    Raises:
        ConfigurationError: If ``partition`` is none, or a second one beside ``by``.
        DataError: If the data cannot be divided so.
    """
    view: Any = DatasetView(dataset, labels=labels, by=by)
    with isolated_rng(seed):  # data sets may draw while their labels are read
        return _divided(view, partition=partition, by=by, num_clients=num_clients, seed=seed)


def _divided(
    view: Any, *, partition: Any, by: Any, num_clients: int | None, seed: int
) -> tuple[dict[Any, Part], Partition]:
    if partition is not None and not isinstance(partition, Partition):
        if not is_partitioner(partition):
            raise ConfigurationError(
                message(
                    "partition must be a Partition, or a partitioner of flwr-datasets",
                    received=f"an object of type {type(partition).__name__}",
                    fix="choose one of fedgan_lightning.partitions",
                )
            )
        num_clients = num_clients or int(_parts_of(partition) or 0) or None
        partition = FlowerPartitioner(partition)
    if by is not None and partition is None:
        (name,) = view.columns
        partition = Natural(name)
        values = np.unique(view.columns[name])
        count = num_clients or len(values)
        names = values.tolist() if count == len(values) else list(range(count))
    else:
        partition = IID() if partition is None else partition
        count = num_clients or NUM_CLIENTS
        names = list(range(count))
    held = partition.split(view, num_clients=count, seed=seed)
    return {name: Part(view.dataset, torch.from_numpy(own)) for name, own in zip(names, held)}, partition


def _parts_of(partitioner: Any) -> Any:
    """Return how many parts a partitioner makes, where it knows before it has the data."""
    try:
        return partitioner.num_partitions
    except Exception:  # of some only the data tell
        return getattr(partitioner, "_num_partitions", None)


def check_no_shifts(partition: Partition) -> None:
    """Refuse a shift of samples that are not in memory.

    Raises:
        ConfigurationError: If the partition has one.
    """
    if isinstance(partition, FeatureShift):
        raise ConfigurationError(
            message(
                "FeatureShift must have samples in memory",
                received="data that are read as needed",
                fix="shift them in the data set itself, or use its base alone",
            )
        )


def given_like(partition: Partition, given: Partition) -> Partition:
    """Return ``given``, with the shifts that another partition has for its clients."""
    if isinstance(partition, FeatureShift):
        return FeatureShift(given, contrast=partition.contrast, brightness=partition.brightness)
    return given
