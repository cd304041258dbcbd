"""Who holds what: partitions as pure functions of labels or columns, number of clients and seed.

Every partition is disjoint and deterministic. It covers all samples unless it says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedgan_lightning.data.samples import Samples, Shift
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_numpy_generator

Indices = NDArray[np.int64]


class Partition(ABC):
    """Splits a data set among clients.

    Args:
        min_samples: Fewest samples of any client; fewer is an error, never a silent repair.
    """

    @checked(min_samples="[1, inf)")
    def __init__(self, *, min_samples: int = 1) -> None:
        self.min_samples = min_samples

    def split(self, samples: Samples, *, num_clients: int, seed: int) -> list[Indices]:
        """Return the positions that each client holds, in ascending order.

        Raises:
            DataError: If the data cannot be split so, or a client stays below ``min_samples``.
        """
        if num_clients < 1:
            raise DataError(
                message("a federation must have at least one client", received=num_clients, fix="set num_clients")
            )
        parts = self.assign(samples, num_clients=num_clients, generator=make_numpy_generator(seed, "partition"))
        for client_id, part in enumerate(parts):
            if len(part) < max(self.min_samples, 1):
                raise DataError(
                    message(
                        f"every client must hold at least {max(self.min_samples, 1)} samples",
                        received=f"client {client_id} with {len(part)} under {type(self).__name__}",
                        fix="use fewer clients, another seed, a milder skew, or a smaller min_samples",
                    )
                )
        return [np.sort(part) for part in parts]

    def shifts(self, *, num_clients: int, seed: int) -> list[Shift | None]:
        """Return each client's feature shift; none by default."""
        return [None] * num_clients

    @abstractmethod
    def assign(self, samples: Samples, *, num_clients: int, generator: np.random.Generator) -> list[Indices]:
        """Return one array of positions per client, in any order."""


class IID(Partition):
    """Equal shares, drawn at random."""

    def assign(self, samples: Samples, *, num_clients: int, generator: np.random.Generator) -> list[Indices]:
        return [part.astype(np.int64) for part in np.array_split(generator.permutation(len(samples)), num_clients)]


class Dirichlet(Partition):
    """Label skew: each class is divided by proportions ~ Dirichlet(alpha) over the clients.

    Draws again, up to 1000 times, until every client has ``min_samples``. Source: Yurochkin et al. 2019, section 4;
    Hsu et al. 2019 draw each client's shares of classes instead.

    Args:
        alpha: Concentration, > 0: .1 is strongly skewed, 100 nearly IID.
        min_samples: Fewest samples of any client.
    """

    @checked(alpha="(0, inf)", min_samples="[1, inf)")
    def __init__(self, alpha: float = 0.5, *, min_samples: int = 1) -> None:
        super().__init__(min_samples=min_samples)
        self.alpha = alpha

    def assign(self, samples: Samples, *, num_clients: int, generator: np.random.Generator) -> list[Indices]:
        labels = labels_of(samples, self)
        parts: list[Indices] = []
        for _ in range(1000):
            parts = _concatenate(
                [
                    _cut(generator.permutation(np.flatnonzero(labels == label)), shares)
                    for label, shares in (
                        (label, generator.dirichlet(np.full(num_clients, self.alpha))) for label in np.unique(labels)
                    )
                ],
                num_clients,
            )
            if min(map(len, parts)) >= max(self.min_samples, 1):
                break
        return parts


class ClassesPerClient(Partition):
    """Pathological label skew: every client holds ``num_classes`` classes, classes shared as evenly as possible.

    Client k holds classes k*c, ..., k*c + c - 1 modulo C of a random order of the classes; a class held by several
    clients is cut into equal parts. Classes that nobody holds are dropped, which happens if clients * c < C.

    Args:
        num_classes: Classes per client, c.
        shuffle: Whether to order the classes at random; otherwise client 0 gets classes 0, ..., c - 1.
        min_samples: Fewest samples of any client.
    """

    @checked(num_classes="[1, inf)", min_samples="[1, inf)")
    def __init__(self, num_classes: int = 2, *, shuffle: bool = False, min_samples: int = 1) -> None:
        super().__init__(min_samples=min_samples)
        self.num_classes, self.shuffle = num_classes, shuffle

    def assign(self, samples: Samples, *, num_clients: int, generator: np.random.Generator) -> list[Indices]:
        labels = labels_of(samples, self)
        classes = np.unique(labels)
        if not 1 <= self.num_classes <= len(classes):
            raise DataError(
                message(
                    f"classes per client must lie between 1 and the {len(classes)} classes of the data",
                    received=self.num_classes,
                    fix="set the partition's num_classes in that range",
                )
            )
        if self.shuffle:
            classes = generator.permutation(classes)
        count = self.num_classes
        lists = [
            [int(classes[(client * count + i) % len(classes)]) for i in range(count)] for client in range(num_clients)
        ]
        return _by_class_lists(labels, lists, generator)


class ClassLists(Partition):
    """Label skew by hand: the classes of every client, listed.

    A class listed for several clients is cut into equal parts; classes listed for none are dropped.

    Args:
        classes: One list of classes per client.
        min_samples: Fewest samples of any client.
    """

    @checked(classes="[0, inf)", min_samples="[1, inf)")
    def __init__(self, classes: Sequence[Sequence[int]], *, min_samples: int = 1) -> None:
        super().__init__(min_samples=min_samples)
        self.classes = [list(listed) for listed in classes]

    def assign(self, samples: Samples, *, num_clients: int, generator: np.random.Generator) -> list[Indices]:
        labels = labels_of(samples, self)
        if len(self.classes) != num_clients:
            raise DataError(
                message(
                    "ClassLists must have one list per client",
                    received=f"{len(self.classes)} lists for {num_clients} clients",
                    fix="set data.num_clients to the number of lists",
                )
            )
        unknown = sorted({label for listed in self.classes for label in listed} - set(np.unique(labels).tolist()))
        if unknown:
            raise DataError(
                message(
                    "ClassLists must name classes of the data",
                    received=f"unknown {unknown}",
                    fix="remove them from the lists",
                )
            )
        return _by_class_lists(labels, self.classes, generator)


class ClassMixes(Partition):
    """Sizes and label skew by hand: the size of every client, and the share of every class in it.

    As many samples are dealt out as the scarcest class allows; the rest is dropped.

    Args:
        sizes: Relative size of every client, > 0.
        mixes: For every client the shares of all classes, >= 0; they are divided by their sum.
        min_samples: Fewest samples of any client.
    """

    @checked(min_samples="[1, inf)")
    def __init__(self, sizes: Sequence[float], mixes: Sequence[Sequence[float]], *, min_samples: int = 1) -> None:
        super().__init__(min_samples=min_samples)
        if len(sizes) != len(mixes) or min(sizes, default=0) <= 0 or any(min(mix, default=-1) < 0 for mix in mixes):
            raise DataError(
                message(
                    "ClassMixes must have a positive size and shares of classes for every client",
                    received=f"sizes {list(sizes)}, mixes {[list(mix) for mix in mixes]}",
                    fix="give one size and one list of shares per client",
                )
            )
        self.sizes, self.mixes = list(sizes), [list(mix) for mix in mixes]

    def assign(self, samples: Samples, *, num_clients: int, generator: np.random.Generator) -> list[Indices]:
        labels = labels_of(samples, self)
        held = np.bincount(labels, minlength=len(self.mixes[0]))  # a class may be in the names alone
        if len(self.sizes) != num_clients or any(len(mix) != len(held) or sum(mix) <= 0 for mix in self.mixes):
            raise DataError(
                message(
                    f"ClassMixes must describe {num_clients} clients by shares of {len(held)} classes",
                    received=f"{len(self.sizes)} clients, mixes {self.mixes}",
                    fix="set data.num_clients, or the lists",
                )
            )
        mixes = np.array(self.mixes, dtype=float)
        wanted = np.array(self.sizes)[:, None] * mixes / mixes.sum(1, keepdims=True)
        asked = wanted.sum(0)
        if absent := [label for label in range(len(held)) if asked[label] > 0 and held[label] == 0]:
            raise DataError(
                message(
                    "ClassMixes must deal out classes of which there are samples",
                    received=f"shares of classes {absent}, of which there are none",
                    fix="set their shares to 0",
                )
            )
        counts = np.floor(wanted * (held[asked > 0] / asked[asked > 0]).min() + 1e-9).astype(np.int64)
        parts: list[list[Indices]] = [[] for _ in range(num_clients)]
        for label in range(len(held)):
            order = generator.permutation(np.flatnonzero(labels == label))
            for client, part in enumerate(np.split(order, counts[:, label].cumsum())[:-1]):
                parts[client].append(part)
        return [np.concatenate(own) for own in parts]


class QuantitySkew(Partition):
    """Same distribution, unequal sizes: shares ~ Dirichlet(alpha) over the clients.

    Every client first gets ``min_samples``; the rest is shared out.

    Args:
        alpha: Concentration, > 0; small values give few large and many small clients.
        min_samples: Fewest samples of any client.
    """

    @checked(alpha="(0, inf)", min_samples="[1, inf)")
    def __init__(self, alpha: float = 1.0, *, min_samples: int = 1) -> None:
        super().__init__(min_samples=min_samples)
        self.alpha = alpha

    def assign(self, samples: Samples, *, num_clients: int, generator: np.random.Generator) -> list[Indices]:
        floor = max(self.min_samples, 1)
        if floor * num_clients > len(samples):
            raise DataError(
                message(
                    f"{num_clients} clients of at least {floor} samples must share at least {floor * num_clients}",
                    received=len(samples),
                    fix="use fewer clients or a smaller min_samples",
                )
            )
        order = generator.permutation(len(samples)).astype(np.int64)
        base, rest = order[: floor * num_clients].reshape(num_clients, floor), order[floor * num_clients :]
        extra = _cut(rest, generator.dirichlet(np.full(num_clients, self.alpha)))
        return [np.concatenate([base[client], extra[client]]) for client in range(num_clients)]


class Natural(Partition):
    """The split that the data brings along: one client per value of a column (folder, identity, writer, mode).

    With more values than clients, values are dealt out in turn, largest first.

    Args:
        column: Name of the column; ``label`` takes the labels.
        min_samples: Fewest samples of any client.
    """

    @checked(min_samples="[1, inf)")
    def __init__(self, column: str, *, min_samples: int = 1) -> None:
        super().__init__(min_samples=min_samples)
        self.column = column

    def assign(self, samples: Samples, *, num_clients: int, generator: np.random.Generator) -> list[Indices]:
        if self.column == "label":
            column = labels_of(samples, self)
        elif self.column in samples.columns:
            column = np.asarray(samples.columns[self.column])
        else:
            raise DataError(
                message(
                    "a natural partition must name a column of the data",
                    received=f"{self.column!r}",
                    fix=f"choose one of {sorted([*samples.columns, *(['label'] if samples.y is not None else [])])}",
                )
            )
        values, places, counts = np.unique(column, return_inverse=True, return_counts=True)
        if len(values) < num_clients:
            raise DataError(
                message(
                    f"a natural partition must have at most as many clients as values of {self.column!r}",
                    received=f"{num_clients} clients, {len(values)} values",
                    fix=f"set data.num_clients to {len(values)} or fewer",
                )
            )
        ranked = np.arange(len(values)) if len(values) == num_clients else np.argsort(-counts, kind="stable")
        owners = np.empty(len(values), dtype=np.int64)
        owners[ranked] = np.arange(len(values)) % num_clients
        order = np.argsort(owners[places], kind="stable")  # one pass, however many values and clients there are
        sizes = np.bincount(owners, weights=counts, minlength=num_clients).astype(np.int64)
        return [mine.astype(np.int64) for mine in np.split(order, np.cumsum(sizes)[:-1])]


class FeatureShift(Partition):
    """Any partition, plus a contrast and a brightness of its own for every client (scanners, cameras, sites).

    Client k sees scale_k x + offset_k with scale ~ U[1 - contrast, 1 + contrast], offset ~ U[-brightness, brightness].

    Args:
        base: Who holds what; default IID.
        contrast: Half-width of the scale, in [0, 1).
        brightness: Half-width of the offset; images span [-1, 1].
    """

    @checked(contrast="[0, 1)", brightness="[0, inf)")
    def __init__(self, base: Partition | None = None, *, contrast: float = 0.3, brightness: float = 0.2) -> None:
        self.base = base if base is not None else IID()
        super().__init__(min_samples=self.base.min_samples)
        if isinstance(self.base, FeatureShift):
            raise DataError(
                message(
                    "a client must have one shift",
                    received="FeatureShift of FeatureShift",
                    fix="set both on one of them",
                )
            )
        self.contrast, self.brightness = contrast, brightness

    def assign(self, samples: Samples, *, num_clients: int, generator: np.random.Generator) -> list[Indices]:
        if not (samples.is_image or samples.x.is_floating_point()):
            raise DataError(
                message(
                    "a feature shift must move pixels or measurements",
                    received=f"samples of {samples.x.dtype}, which are numbers of words or items",
                    fix="use its base alone",
                )
            )
        return self.base.assign(samples, num_clients=num_clients, generator=generator)

    def shifts(self, *, num_clients: int, seed: int) -> list[Shift | None]:
        generator = make_numpy_generator(seed, "feature_shift")
        scales = generator.uniform(1 - self.contrast, 1 + self.contrast, num_clients)
        offsets = generator.uniform(-self.brightness, self.brightness, num_clients)
        return [Shift(scale=float(scale), offset=float(offset)) for scale, offset in zip(scales, offsets)]


def labels_of(samples: Samples, partition: Partition) -> Indices:
    """Return the labels as an array.

    Raises:
        DataError: If there are none.
    """
    if samples.y is None:
        raise DataError(
            message(
                f"{type(partition).__name__} must have labels to split by",
                received="a source without labels",
                fix="use IID or QuantitySkew, or a source with labels",
            )
        )
    return samples.y.numpy().astype(np.int64)


def _cut(order: NDArray[np.int64], shares: NDArray[np.float64]) -> list[Indices]:
    """Cut ``order`` into consecutive parts in proportion to ``shares``, which sum to 1."""
    bounds = np.round(np.cumsum(shares)[:-1] * len(order)).astype(np.int64)
    return [part.astype(np.int64) for part in np.split(order, bounds)]


def _concatenate(per_class: list[list[Indices]], num_clients: int) -> list[Indices]:
    return [np.concatenate([parts[client] for parts in per_class]) for client in range(num_clients)]


def _by_class_lists(labels: Indices, lists: Sequence[Sequence[int]], generator: np.random.Generator) -> list[Indices]:
    parts: list[list[Indices]] = [[np.empty(0, dtype=np.int64)] for _ in lists]
    for label in np.unique(labels):
        holders = [client for client, listed in enumerate(lists) if label in listed]
        if holders:
            order = generator.permutation(np.flatnonzero(labels == label))
            for client, part in zip(holders, np.array_split(order, len(holders))):
                parts[client].append(part.astype(np.int64))
    return [np.concatenate(part) for part in parts]
