"""Partitions that are made elsewhere: lists of positions, and partitioners of Flower's data sets."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedgan_lightning.data.partition import Indices, Partition
from fedgan_lightning.data.reading import reason
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.errors import ConfigurationError, DataError, message
from fedgan_lightning.options import checked

#: The column in which a partitioner carries where a row comes from.
POSITION = "position"


class GivenIndices(Partition):
    """The positions of every client, listed.

    Args:
        indices: One list of positions per client; those in none are left out.
        min_samples: Fewest samples of any client.
    """

    @checked(min_samples="[1, inf)")
    def __init__(self, indices: Sequence[Any], *, min_samples: int = 1) -> None:
        super().__init__(min_samples=min_samples)
        self.indices = [np.asarray(own, dtype=np.int64).reshape(-1) for own in indices]

    def assign(self, samples: Samples, *, num_clients: int, generator: np.random.Generator) -> list[Indices]:
        joined = np.concatenate([np.empty(0, dtype=np.int64), *self.indices])
        inside = ((joined >= 0) & (joined < len(samples))).all()
        if len(self.indices) != num_clients or not inside or len(np.unique(joined)) != len(joined):
            raise DataError(
                message(
                    f"GivenIndices must list different positions in [0, {len(samples)}) for {num_clients} clients",
                    received=f"{len(self.indices)} lists, {len(joined)} positions, {len(np.unique(joined))} different",
                    fix="give one list per client, and every position once",
                )
            )
        return list(self.indices)


class FlowerPartitioner(Partition):
    """A partitioner of ``flwr-datasets``, or any object with its interface: ``dataset``, ``num_partitions``,
    ``load_partition(i)``.

    It divides a table of the labels and the natural columns, with a row for each sample, as a ``datasets.Dataset`` (the
    extra ``huggingface``). Its own seed counts.

    Args:
        partitioner: The partitioner, to which no data set has been given.
        label: What it calls the column of labels.
        min_samples: Fewest samples of any client.
    """

    @checked(min_samples="[1, inf)")
    def __init__(self, partitioner: Any, *, label: str = "label", min_samples: int = 1) -> None:
        super().__init__(min_samples=min_samples)
        if not is_partitioner(partitioner):
            raise ConfigurationError(
                message(
                    "partitioner of FlowerPartitioner must have dataset, num_partitions and load_partition",
                    received=f"an object of type {type(partitioner).__name__}",
                    fix="give one of flwr_datasets.partitioner",
                )
            )
        self.partitioner, self.label = partitioner, label

    def assign(self, samples: Samples, *, num_clients: int, generator: np.random.Generator) -> list[Indices]:
        partitioner = copy.deepcopy(self.partitioner)  # it takes one data set in its life
        table = self._table(samples)
        try:
            partitioner.dataset = table
            count = int(partitioner.num_partitions)
            parts = [partitioner.load_partition(k)[POSITION] for k in range(count)] if count == num_clients else []
        except ImportError:
            raise
        except Exception as error:  # somebody's code raises anything
            raise DataError(
                message(
                    f"{type(partitioner).__name__} must divide the data",
                    received=reason(error),
                    fix=f"name its columns as the data do ({sorted([self.label, *samples.columns])})",
                )
            ) from error
        if count != num_clients:
            raise DataError(
                message(
                    f"{type(partitioner).__name__} must have one part per client",
                    received=f"{count} parts for {num_clients} clients",
                    fix=f"set num_clients to {count}",
                )
            )
        return [np.asarray(part, dtype=np.int64).reshape(-1) for part in parts]

    def _table(self, samples: Samples) -> Any:
        """Return labels and columns as a data set of Hugging Face's."""
        try:
            from datasets import Dataset
        except ImportError as error:
            raise ConfigurationError(
                message(
                    "FlowerPartitioner must have the package datasets",
                    received="none",
                    fix="pip install 'fedgan-lightning[huggingface]'",
                )
            ) from error
        columns = {name: np.asarray(column) for name, column in samples.columns.items()}
        if samples.y is not None:
            columns[self.label] = samples.y.numpy()
        return Dataset.from_dict({**columns, POSITION: np.arange(len(samples))})


def is_partitioner(value: Any) -> bool:
    """Whether an object has the interface of Flower's partitioners."""
    return {"dataset", "num_partitions", "load_partition"} <= {*dir(value)}  # of some a number needs the data
