"""Who bought, watched or rated what, from CSV files: one sample is one user, a vector over items."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedgan_lightning.data.reading import check_encoding, user_path
from fedgan_lightning.data.samples import Samples
from fedgan_lightning.data.sources.base import Source, Split, read_names
from fedgan_lightning.data.tables import Table, check_delimiter
from fedgan_lightning.errors import DataError, message
from fedgan_lightning.options import checked
from fedgan_lightning.seeding import make_numpy_generator

Integers = NDArray[np.int64]


#: Characters of a user's or an item's name: longer ones are a broken file, and take memory for all.
LONGEST_NAME = 200


class Entry(NamedTuple):
    """What a catalogue says of an item."""

    title: str
    genres: str


NO_ENTRY = Entry("", "")


class Kept(NamedTuple):
    """Interactions after all filters: pair i is user ``users[rows[i]]`` with item ``items[columns[i]]``."""

    users: list[str]
    items: list[str]
    rows: Integers
    columns: Integers
    held: NDArray[np.bool_]


class Interactions(Source):
    """Implicit feedback: one sample is one user, the vector in {0, 1}^items of the items she interacted with.

    Of every user a share of the interactions is held out. ``load("train")`` gives the vectors of the others, and
    ``load("test")``, **row by row for the same users**, those of the held-out ones; the column ``user`` names them. A
    recommender sees the first and is asked for the second. Other columns allow natural partitions: ``activity``, the
    user's tenth by number of interactions (0 the least active), and with a catalogue ``genre``, the genre whose share
    among the user's training interactions exceeds its share among all users' by most.

    The items: without ``items`` those of this file that have most interactions, which in a simulation is everybody's
    file. Where every institution has a file of its own, columns mean the same with ``items`` alone: each tells its
    :meth:`popularity`, and :func:`most_popular` makes the list from the sums.

    Filters, in this order: ratings of at least ``threshold`` count, repeated pairs count once; users with fewer than
    ``min_user`` and items with fewer than ``min_item`` interactions leave until none is left to leave (a k-core); the
    ``num_items`` items with most interactions stay, and users with ``min_user`` of these. With ``items`` there is but
    the last.

    Args:
        path: CSV file of interactions, with a header: MovieLens' ``ratings.csv``, or any other by column names.
        num_items: Items to keep, the length of the vector; both networks need the same number.
        items: An ``items.json`` that another run wrote, or :func:`most_popular` made: names of items by column.
        catalogue: CSV file of items (MovieLens' ``movies.csv``); its column ``item`` joins it.
        user: Column of the user.
        item: Column of the item, in both files.
        rating: Column of the rating; ``None`` counts every row.
        time: Column of the time, a number; needed by ``holdout: latest`` only.
        title: Column of the item's name in the catalogue.
        genre: Column of the item's genres in the catalogue, separated by ``|``.
        threshold: Least rating that counts as an interaction.
        min_user: Fewest interactions of a user, at least 2: one is held out, one is not.
        min_item: Fewest interactions of an item.
        holdout: What is held out of every user: ``random`` interactions by ``seed``, or the ``latest``.
        holdout_fraction: Share that is held out, in (0, 1); at least one interaction.
        seed: Seed of the random hold-out.
        encoding: Encoding of both files.
        delimiter: What separates fields in both files.

    Raises:
        ConfigurationError: If a number is out of range.
        DataError: If ``items`` are not ``num_items`` different names, a file is missing, has not these columns or
            numbers, or too few items stay.
    """

    modality = "fedgan_lightning.evaluation.modalities.Interactions"

    @checked(num_items="[1, inf)", min_user="[2, inf)", min_item="[1, inf)", holdout_fraction="(0, 1)", seed="[0, inf)")
    def __init__(
        self,
        path: str,
        *,
        num_items: int,
        items: str | None = None,
        catalogue: str | None = None,
        user: str = "userId",
        item: str = "movieId",
        rating: str | None = "rating",
        time: str = "timestamp",
        title: str = "title",
        genre: str = "genres",
        threshold: float = 0.0,
        min_user: int = 10,
        min_item: int = 10,
        holdout: Literal["random", "latest"] = "random",
        holdout_fraction: float = 0.2,
        seed: int = 0,
        encoding: str = "utf-8",
        delimiter: str = ",",
    ) -> None:
        check_encoding(encoding, option="data.source.encoding")
        self.encoding, self.delimiter = encoding, check_delimiter(delimiter, option="data.source.delimiter")
        self.path, self.catalogue = user_path(path), None if catalogue is None else user_path(catalogue)
        self.user, self.item, self.rating, self.time, self.title, self.genre = user, item, rating, time, title, genre
        self.threshold, self.min_user, self.min_item = threshold, min_user, min_item
        self.holdout, self.holdout_fraction, self.seed = holdout, holdout_fraction, seed
        self.sample_shape = (num_items,)
        self._items = None if items is None else _read_items(Path(items), num_items)

    @property
    def has_shared_metadata(self) -> bool:  # type: ignore[override]
        """Whether the items are given, and not those of this file."""
        return self._items is not None

    def with_shared_metadata(self, samples: Samples, parts: Sequence[Integers]) -> Source:
        """Return the source with the items of the file: clients of a simulation share it."""
        completed = copy.copy(self)
        completed._items = self.items
        return completed

    def shared_metadata(self) -> dict[str, Any]:
        return {} if self._items is None else {"items": list(self._items)}

    def popularity(self) -> dict[str, int]:
        """Return how many users of the file have each item, of the items that at least ``min_item`` of them have.

        It is what an institution tells before the first round. Users with fewer than ``min_user`` interactions do not
        count.
        """
        pairs, _ = self._pairs()
        names, counts = np.unique(
            pairs[_core(pairs, min_user=self.min_user, min_item=self.min_item), 1], return_counts=True
        )
        return dict(zip(names.tolist(), counts.tolist()))

    def load(self, split: Split) -> Samples:
        table = self._table
        counted = table.held if split == "test" else ~table.held
        x = torch.zeros(len(table.users), len(table.items))
        x[table.rows[counted], table.columns[counted]] = 1.0
        return Samples(x=x, columns=self._columns(table))

    @property
    def users(self) -> list[str]:
        """Users' names in the file, in the order of the samples."""
        return list(self._table.users)

    @property
    def items(self) -> list[str]:
        """Items' names in the file, in the order of the vector."""
        return list(self._table.items)

    @cached_property
    def titles(self) -> list[str]:
        """Items' titles from the catalogue, in the order of the vector; without one, or for items that it lacks, their
        names.
        """
        return [self._entries.get(item, NO_ENTRY).title or item for item in self._table.items]

    # ------------------------------------------------------------------ reading

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        """The catalogue's rows by item."""
        if self.catalogue is None:
            return {}
        table = self._open(self.catalogue, option="catalogue")
        options = [f"data.source.{name}" for name in ("item", "title", "genre")]
        item, title, genre = table.positions([self.item, self.title, self.genre], named_by=options)
        return {row[item].strip(): Entry(row[title].strip(), row[genre]) for _, row in table}

    @cached_property
    def _table(self) -> Kept:
        pairs, times = self._pairs()
        if self._items is None:
            items, kept = self._popular(pairs)
        else:
            items, kept = self._items, np.arange(len(pairs))
        kept = kept[np.isin(pairs[kept, 1], items)]
        active, counts = np.unique(pairs[kept, 0], return_counts=True)
        kept = kept[np.isin(pairs[kept, 0], active[counts >= self.min_user])]
        if not len(kept):
            raise DataError(
                message(
                    f"some user must have {self.min_user} interactions with the {len(items)} items that stay",
                    received=f"none in {self.path}",
                    fix="lower data.source.min_user, raise num_items, or check that items are named as in the file",
                )
            )
        return self._named(pairs[kept], None if times is None else times[kept], items)

    def _popular(self, pairs: NDArray[np.str_]) -> tuple[list[str], Integers]:
        """Return the items that most pairs are of, in the order of their names, and where the filters' pairs are."""
        kept = _core(pairs, min_user=self.min_user, min_item=self.min_item)
        survivors, counts = np.unique(pairs[kept, 1], return_counts=True)
        (num_items,) = self.sample_shape
        if len(survivors) < num_items:
            raise DataError(
                message(
                    f"{num_items} items must have {self.min_item} interactions or more",
                    received=f"{len(survivors)} such items in {self.path}",
                    fix="lower data.source.num_items (and both networks' items), or min_item, min_user or threshold",
                )
            )
        popular = survivors[np.argsort(-counts, kind="stable")[:num_items]]
        return sorted(popular.tolist(), key=_by_number), kept

    def _named(self, pairs: NDArray[np.str_], times: NDArray[np.float64] | None, items: list[str]) -> Kept:
        users = sorted(set(pairs[:, 0].tolist()), key=_by_number)
        places = ({name: place for place, name in enumerate(names)} for names in (users, items))
        rows, columns = (np.array([place[name] for name in names.tolist()]) for place, names in zip(places, pairs.T))
        if times is None:
            order = np.lexsort((columns, rows))  # the draw depends on who has what, not on the order of the file
            keys = np.empty(len(order))
            keys[order] = make_numpy_generator(self.seed, "held-out interactions").random(len(order))
        else:
            keys = -times
        counts = np.bincount(rows, minlength=len(users))
        wanted = np.minimum(np.maximum(1, np.rint(counts * self.holdout_fraction)), counts - 1)
        order = np.lexsort((columns, keys, rows))  # user by user, those to be held out first
        ranks = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        held = np.zeros(len(rows), dtype=bool)
        held[order] = ranks < wanted[rows[order]]
        return Kept(users, items, rows, columns, held)

    def _pairs(self) -> tuple[NDArray[np.str_], NDArray[np.float64] | None]:
        """Return the (user, item) pairs that count, each once, and the last time of each where times are needed."""
        dated = self.holdout == "latest"
        table = self._open(self.path, option="path")
        named = {"user": self.user, "item": self.item}
        named |= {"rating": self.rating} if self.rating else {}
        named |= {"time": self.time} if dated else {}
        place = dict(zip(named, table.positions([*named.values()], named_by=[f"data.source.{one}" for one in named])))
        found: dict[tuple[str, str], float] = {}
        for line, row in table:
            pair = (row[place["user"]].strip(), row[place["item"]].strip())
            for name, text in zip(named, pair):
                if not 0 < len(text) <= LONGEST_NAME:
                    raise table.unfit(
                        f"a name of at most {LONGEST_NAME} characters", text, line=line, column=named[name]
                    )
            counts = True
            if self.rating:
                counts = table.number(row[place["rating"]], line=line, column=self.rating) >= self.threshold
            if counts:
                time = table.number(row[place["time"]], line=line, column=self.time) if dated else 0.0
                found[pair] = max(time, found.get(pair, -np.inf))
        pairs = np.array(list(found), dtype=np.str_).reshape(-1, 2)
        return pairs, np.array(list(found.values())) if dated else None

    def _open(self, path: Path, *, option: str) -> Table:
        return Table(path, option=f"data.source.{option}", encoding=self.encoding, delimiter=self.delimiter)

    # ------------------------------------------------------------------ natural groups of users

    def _columns(self, table: Kept) -> dict[str, NDArray]:
        counts = np.bincount(table.rows)
        ranks = np.empty(len(counts), dtype=np.int64)
        ranks[np.argsort(counts, kind="stable")] = np.arange(len(counts))
        columns: dict[str, NDArray] = {"user": np.array(table.users), "activity": 10 * ranks // len(counts)}
        if self.catalogue is not None:
            columns["genre"] = self._favourites(table)
        return columns

    def _favourites(self, table: Kept) -> NDArray:
        texts = [self._entries.get(item, NO_ENTRY).genres for item in table.items]
        listed = [[name.strip() for name in text.split("|")] for text in texts]
        names = sorted({name for own in listed for name in own if name})
        if not names:
            raise DataError(
                message(
                    "the catalogue must name genres of the items",
                    received=f"none for the {len(listed)} items in {self.catalogue}",
                    fix="check data.source.item and data.source.genre, or set catalogue: null",
                )
            )
        member = np.array([[name in own for name in names] for own in listed], dtype=np.float64)
        seen = np.zeros((len(table.users), len(table.items)))
        seen[table.rows[~table.held], table.columns[~table.held]] = 1
        shares = seen @ member / seen.sum(1, keepdims=True)
        favourites: NDArray = np.array(names)[np.argmax(shares - shares.mean(0), axis=1)]
        return favourites


def most_popular(counts: Mapping[str, int], *, num_items: int) -> list[str]:
    """Return the items with the largest counts, in the order of their names, as ``items.json`` lists them.

    Args:
        counts: Users by item, summed over institutions; see :meth:`Interactions.popularity`.
        num_items: How many. Of equal counts the names that sort first as words are taken.

    Raises:
        DataError: If there are not so many.
    """
    if len(counts) < num_items:
        raise DataError(
            message(
                f"{num_items} items must have counts",
                received=f"{len(counts)} items",
                fix="lower num_items or min_item",
            )
        )
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    return sorted(ranked[:num_items], key=_by_number)


def _read_items(path: Path, num_items: int) -> list[str]:
    names = read_names(path, option="items", numbered="items' names by column")
    if len(set(names)) != len(names) or len(names) != num_items:
        raise DataError(
            message(
                f"data.source.items must name {num_items} different items",
                received=f"{len(names)} names, {len(set(names))} different, in {path}",
                fix="set data.source.num_items (and both networks' items) to the length of the list",
            )
        )
    return names


def _core(pairs: NDArray[np.str_], *, min_user: int, min_item: int) -> Integers:
    """Return the positions of the pairs whose user and item have enough pairs among those returned."""
    kept = np.arange(len(pairs))
    while True:
        before = len(kept)
        for column, least in ((0, min_user), (1, min_item)):
            _, inverse, counts = np.unique(pairs[kept, column], return_inverse=True, return_counts=True)
            kept = kept[counts[inverse] >= least]
        if len(kept) == before:
            return kept


def _by_number(name: str) -> tuple[bool, int, str]:
    """Sort 2 before 10, and numbers before words."""
    return (True, 0, name) if not name.isdecimal() else (False, int(name), name)
