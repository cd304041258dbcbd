"""Minibatches of one client that are read as needed: from a map-style data set, or from a loader with its own order."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fedgan_lightning.data.items import ItemReader, digest_of
from fedgan_lightning.data.order import MinibatchOrder
from fedgan_lightning.data.reading import reason
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.seeding import derive_seed, isolated_rng

logger = logging.getLogger("fedgan_lightning")

#: Items that the fingerprint of a client looks at.
LOOKED_AT = 8


class ClientStream(ABC):
    """All that a federation asks of one client's data.

    Attributes:
        name: What the user calls the client.
        num_examples: Its samples, N_k.
        steps_per_epoch: Minibatches in one pass over them.
    """

    name: object
    num_examples: int
    steps_per_epoch: int

    @abstractmethod
    def sizes(self, first_step: int, num_steps: int) -> list[int] | None:
        """Return the number of samples in each of these minibatches; ``None`` where it is not known."""

    @abstractmethod
    def read(self, first_step: int, num_steps: int) -> Iterator[Any]:
        """Yield minibatches ``first_step, ..., first_step + num_steps - 1`` of the client's endless stream."""

    @abstractmethod
    def first_item(self) -> Any:
        """Return what tells how the client's data are built: an item, or a minibatch."""

    def try_out(self) -> None:  # noqa: B027 - loaders make minibatches themselves
        """Make minibatches of a few items; nothing for a loader, whose first minibatch is looked at anyway."""

    @abstractmethod
    def facts(self) -> str:
        """Return a hash of a few items, and of all that decides what the minibatches are."""


class Window:
    """A round's minibatches of one client, as a loader.

    Args:
        stream: The client's.
        first_step: First minibatch of the window.
        num_steps: Minibatches in the window.
        changed: What becomes of every minibatch before the module has it.
    """

    def __init__(
        self, stream: ClientStream, *, first_step: int, num_steps: int, changed: Callable[[Any], Any] | None = None
    ) -> None:
        self.stream, self.first_step, self.num_steps, self.changed = stream, first_step, num_steps, changed

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Any]:
        batches = self.stream.read(self.first_step, self.num_steps)
        return batches if self.changed is None else map(self.changed, batches)


class MapStream(ClientStream):
    """Items of a map-style data set, in the order that they would have in memory.

    What a data set draws while it is read follows from the seed, the client and the step alone.

    Args:
        reader: Reads the items.
        order: The client's order.
        num_workers: Processes that read ahead; 0 reads in this one.
        indices: The client's positions in the data set; default all.
    """

    def __init__(
        self, reader: ItemReader, order: MinibatchOrder, *, num_workers: int = 0, indices: Tensor | None = None
    ) -> None:
        self.reader, self.order, self.num_workers, self.indices = reader, order, num_workers, indices
        self.name, self.num_examples = reader.client, order.num_samples
        self.steps_per_epoch = order.steps_per_epoch

    def sizes(self, first_step: int, num_steps: int) -> list[int]:
        return self.order.sizes(first_step, num_steps)

    def read(self, first_step: int, num_steps: int) -> Iterator[Any]:
        steps = Steps(self, first_step, num_steps)
        if not self.num_workers:
            yield from map(steps.batch, range(num_steps))
            return
        loader: DataLoader = DataLoader(
            steps,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # not the global one, from which the module draws
        )
        for batch in loader:
            if isinstance(batch, _Refusal):
                raise DataError(batch.text)
            yield batch

    def places(self, positions: Tensor) -> list[int]:
        """Return where in the data set these samples of the client are."""
        places: list[int] = (positions if self.indices is None else self.indices[positions]).tolist()
        return places

    def item(self, position: int) -> Any:
        """Return one item of the client's."""
        with isolated_rng(derive_seed(self.order.seed, "item", self.order.stream, position)):
            return self.reader.item(self.places(torch.tensor([position]))[0])

    def first_item(self) -> Any:
        return self.item(0)

    def try_out(self) -> None:
        """Make minibatches of a few items.

        Raises:
            DataError: If that is not possible; names client and item.
        """
        order = self.order
        for positions in self._some().split(order.full):
            with isolated_rng(derive_seed(order.seed, "tried", order.stream)):
                self.reader.minibatch(self.places(positions))

    def facts(self) -> str:
        order, some = self.order, [self.item(at) for at in self._some().tolist()]
        return f"{self.num_examples} {order.batch_size} {order.drop_last} {digest_of(some)}"

    def _some(self) -> Tensor:
        """Return the positions of a few items: the first, the last, and others in between."""
        some: Tensor = torch.linspace(0, self.num_examples - 1, min(LOOKED_AT, self.num_examples)).long().unique()
        return some


@dataclass(frozen=True)
class _Refusal:
    """What is wrong with an item, on its way from the process that read it."""

    text: str


class Steps:
    """The minibatches of a window as a map-style data set: what a worker reads is one of them."""

    def __init__(self, stream: MapStream, first_step: int, num_steps: int) -> None:
        order = stream.order
        self.stream, self.first_step = stream, first_step
        positions, sizes = order.positions(first_step, num_steps), order.sizes(first_step, num_steps)
        self.positions = positions.split(sizes) if sizes else ()

    def __len__(self) -> int:
        return len(self.positions)

    def batch(self, index: int) -> Any:
        """Return a minibatch of the window."""
        order, positions = self.stream.order, self.positions[index]
        with isolated_rng(derive_seed(order.seed, "items", order.stream, self.first_step + index)):
            return self.stream.reader.minibatch(self.stream.places(positions))

    def __getitem__(self, index: int) -> Any:
        try:
            return self.batch(index)
        except DataError as error:
            return _Refusal(str(error))


def _as_it_is(value: Any) -> Any:
    return value


class LoaderStream(ClientStream):
    """Minibatches of a loader that keeps its own order; every epoch it is iterated anew.

    What loader, sampler and data set draw in an epoch follows from the seed, the client and the epoch alone; generators
    of their own are seeded by that. A round that begins within an epoch passes over what lies before.

    Args:
        loader: Anything that can be iterated again and again.
        name: What the user calls the client.
        seed: Root seed.
        stream: Number of the stream: the client id.

    Raises:
        DataError: If it cannot be iterated twice, or read.
    """

    def __init__(self, loader: Any, *, name: object, seed: int, stream: int) -> None:
        self.loader, self.name, self.seed, self.stream = loader, name, seed, stream
        if hasattr(loader, "__next__"):
            raise self.unfit("an iterator, which can be read once", "give a DataLoader, or an IterableDataset")
        self.known = self._counted()
        self.steps_per_epoch, self.num_examples = len(self.known), sum(self.known)

    def _counted(self) -> list[int]:
        """Return the sizes of the minibatches of one epoch: from its lengths, or by reading it once."""
        count = self._stated()
        self._is_fixed = count is not None
        if count is not None:
            whole, rest = divmod(count, self.loader.batch_size)
            sizes = [self.loader.batch_size] * whole + ([rest] if rest and not self.loader.drop_last else [])
        else:
            logger.info(f"client {self.name}: its minibatches are read once to count its samples")
            sizes = [count_samples(batch) for batch in self._epoch(0)]
        return sizes

    def _stated(self) -> int | None:
        """Return the samples of an epoch, if loader and data set say so: then every minibatch but the last is full."""
        loader = self.loader
        if not isinstance(loader, DataLoader) or loader.batch_size is None:
            return None
        if isinstance(loader.dataset, IterableDataset):  # of several workers each ends with a minibatch of its own
            return None if loader.num_workers > 1 else length_of(loader.dataset)
        return length_of(loader.sampler)

    def sizes(self, first_step: int, num_steps: int) -> list[int] | None:
        if not self._is_fixed:
            return None
        return [self.known[step % self.steps_per_epoch] for step in range(first_step, first_step + num_steps)]

    def read(self, first_step: int, num_steps: int) -> Iterator[Any]:
        epoch, passed = divmod(first_step, self.steps_per_epoch)
        while num_steps:
            wanted = min(num_steps, self.steps_per_epoch - passed)
            found = 0
            for step, batch in enumerate(self._epoch(epoch)):
                if step >= passed:
                    yield batch
                    found += 1
                if found == wanted:
                    break
            if found < wanted:
                raise self.unfit(
                    f"{passed + found} minibatches in epoch {epoch}, where there were {self.steps_per_epoch}",
                    "have it yield as many in every epoch",
                )
            epoch, passed, num_steps = epoch + 1, 0, num_steps - wanted

    def _epoch(self, epoch: int) -> Iterator[Any]:
        """Yield the minibatches of an epoch; each is read with global generators of its own."""
        seed = derive_seed(self.seed, "own order", self.stream, epoch)
        for part in ("", "sampler", "batch_sampler", "dataset"):
            generator = getattr(getattr(self.loader, part, None) if part else self.loader, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
        batches: Iterator[Any] | None = None
        step = 0
        while True:
            with isolated_rng(derive_seed(seed, "step", step)):
                try:
                    batches = iter(self.loader) if batches is None else batches
                    batch = next(batches)
                except StopIteration:
                    return
                except DataError:
                    raise
                except Exception as error:
                    raise self.unfit(
                        f"{reason(error)} in minibatch {step} of epoch {epoch}", "repair the data set or its loader"
                    ) from error
            yield batch
            step += 1

    def first_item(self) -> Any:
        return next(self._epoch(0))

    def facts(self) -> str:
        return f"{self.known} {digest_of(self.first_item())}"

    def unfit(self, received: str, fix: str) -> DataError:
        """Return the error that the loader is not what it should be."""
        rule = f"the loader of client {self.name} must yield minibatches again and again"
        return DataError(message(rule, received=received, fix=fix))


def length_of(value: Any) -> int | None:
    """Return the length of something that has one."""
    try:
        return len(value)
    except (TypeError, NotImplementedError, AttributeError):
        return None


def count_samples(batch: Any) -> int:
    """Return the number of samples in a minibatch of any nesting."""
    if isinstance(batch, dict) and batch:
        return count_samples(next(iter(batch.values())))
    if isinstance(batch, (list, tuple)) and batch:
        return count_samples(batch[0]) if not isinstance(batch[0], (str, bytes, int, float)) else len(batch)
    return length_of(batch) or 1
