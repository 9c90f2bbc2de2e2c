"""Rows of earlier caches, found again by the content hash of the image they are of."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import CacheCorruptError, CacheError
from .cache import Cache, cache_paths, load
from .copies import hash_numbers
from .format import DTYPES, FINGERPRINT_FIELDS, StoredArray, array_name, differing
from .reader import check_whole, iterate_block, map_array, read_array

# Other images are the point. The views are looked at array by array: images without flips are
# of use to test, and those with flips to a cache without.
_MAY_DIFFER = ("dataset_digest", "views")
T = TypeVar("T")
_SAME = [name for name in FINGERPRINT_FIELDS if name not in _MAY_DIFFER]


class KnownRows:
    """Features that caches of the same ingredients have, whatever their images are.

    Of the caches in ``folders``, the newest that has an image wins. ``meta`` is the provenance of
    the cache that is made, ``shapes`` the shape of one image's features in every cut. ``notes``
    say which caches are damaged or were replaced; ``taken`` counts the rows from each path.
    """

    def __init__(
        self,
        folders: Iterable[Path],
        meta: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.notes: list[str] = []
        self.taken: Counter[Path] = Counter()
        self._meta = meta
        self._shapes = shapes
        self._caches = list(self._matching(folders))
        self._tables: dict[tuple[str, ...], _Table] = {}
        self._turn = threading.Lock()

    def __bool__(self) -> bool:
        """Tell whether there is any cache of the same ingredients."""
        return bool(self._caches)

    def has(self, hashes: np.ndarray, views: Sequence[str]) -> np.ndarray:
        """Return bool (n,): which images `find` finds, unless a cache turns out to be damaged."""
        return self._under_lock(lambda: self._table_of(tuple(views)).find(hashes)[0] >= 0)

    def find(
        self, hashes: np.ndarray, views: Sequence[str]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return which images have features in all these views, bool (n,), and the features.

        ``hashes``, uint8 (n, 32), are the SHA-256 of the images' files. The features (k, …) of
        the k images that are known come by the name of their array inside a split, in order, from
        blocks whose checksums are right. Safe from several threads.
        """
        return self._under_lock(lambda: self._find(hashes, tuple(views)))

    def _under_lock(self, ask: Callable[[], T]) -> T:
        """Ask again without each cache that cannot be used."""
        with self._turn:
            while True:
                try:
                    return ask()
                except _DamagedError as error:  # others may have its images too
                    self._caches.remove(error.cache)
                    self._tables.clear()
                    self._tell(error)

    def _find(
        self, hashes: np.ndarray, views: tuple[str, ...]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Do as `find`, or raise where a cache that has some of the images is damaged."""
        table = self._table_of(views)
        homes, rows = table.find(hashes)
        known = homes >= 0
        features = {
            name: np.empty((int(known.sum()), *shape), DTYPES[self._meta["dtype"]])
            for name, shape in self._wanted(views).items()
        }
        counts: Counter[Path] = Counter()
        for number in np.unique(homes[known]):
            here = homes == number
            cache = table.caches[number]
            counts[cache.path] += int(here.sum())
            for name, array in table.arrays[number].items():
                with _damage_of(cache):
                    features[name][here[known]] = array.take(rows[here])
        self.taken += counts
        return known, features

    def _matching(self, folders: Iterable[Path]) -> Iterator[Cache]:
        distinct = {os.path.realpath(folder): folder for folder in folders}
        for path in (path for folder in distinct.values() for path in cache_paths(folder)[::-1]):
            try:
                cache = load(path)
            except CacheCorruptError as error:
                self._tell(error)
            except CacheError:
                pass  # of another version of the format, or gone
            else:
                if not any(differing(cache.meta, self._meta, _SAME)):
                    yield cache

    def _wanted(self, views: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Return the arrays that an image needs, and the shape of its row in each."""
        cuts = self._meta["cuts"]
        return {
            array_name(cut, view, cuts[0]): tuple(self._shapes[cut])
            for cut in cuts
            for view in views
        }

    def _table_of(self, views: tuple[str, ...]) -> _Table:
        """Read the content hashes of every split that has all the arrays, once."""
        if views in self._tables:
            return self._tables[views]
        wanted = self._wanted(views)
        splits = []
        for cache in self._caches:
            arrays = cache.index.arrays
            for role, _ in cache.splits():
                stored = {name: arrays.get(f"{role}/{name}") for name in wanted}
                hashes = arrays.get(f"{role}/content_hashes")
                fitting = {
                    name: array
                    for name, array in stored.items()
                    if array and array.row_shape == wanted[name]
                }
                if hashes is None or fitting.keys() != wanted.keys():
                    continue
                with _damage_of(cache):
                    opened = {name: _SoundArray(array) for name, array in fitting.items()}
                    splits.append((cache, read_array(hashes), opened))
        self._tables[views] = _Table(splits)
        return self._tables[views]

    def _tell(self, error: Exception) -> None:
        self.notes.append(f"no rows are taken from a cache: {error}")


class _DamagedError(Exception):
    """A cache that cannot be used."""

    def __init__(self, cache: Cache, error: CacheError) -> None:
        super().__init__(str(error))
        self.cache = cache


@contextmanager
def _damage_of(cache: Cache) -> Iterator[None]:
    try:
        yield
    except CacheError as error:  # replaced, also
        raise _DamagedError(cache, error) from None


class _SoundArray:
    """A mapped array whose blocks are verified before the first row of each is taken."""

    def __init__(self, stored: StoredArray) -> None:
        self._stored = stored
        self._mapped = map_array(stored)
        self._ends = np.cumsum([block.n_rows for block in stored.blocks])
        self._verified: set[int] = set()

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return rows (n,) by their numbers; raise CacheCorruptError at a bad block."""
        for number in np.unique(np.searchsorted(self._ends, rows, side="right")).tolist():
            if number not in self._verified:
                for _ in iterate_block(self._stored, number):
                    pass
                self._verified.add(number)
        check_whole(self._mapped)
        taken: np.ndarray = self._mapped[rows]
        return taken


class _Table:
    """Where the features of an image are: content hash -> number of a split, and row in it.

    Of two splits that have an image, the first one counts.
    """

    def __init__(self, splits: Sequence[tuple[Cache, np.ndarray, dict[str, _SoundArray]]]) -> None:
        self.caches = [cache for cache, _, _ in splits]
        self.arrays = [arrays for _, _, arrays in splits]
        parts = [hashes for _, hashes, _ in splits]
        self._starts = np.cumsum([0, *map(len, parts)])
        self._hashes = np.concatenate([np.empty((0, 32), np.uint8), *parts])
        keys = hash_numbers(self._hashes)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return of each image the number of a split, or -1, and the row in it."""
        at = np.searchsorted(self._sorted, hash_numbers(hashes))
        homes = np.full(len(hashes), -1)
        rows = np.zeros(len(hashes), np.int64)
        inside = np.flatnonzero(at < len(self._order))
        found = self._order[at[inside]]
        same = (self._hashes[found] == hashes[inside]).all(axis=1)
        inside, found = inside[same], found[same]
        homes[inside] = np.searchsorted(self._starts, found, side="right") - 1
        rows[inside] = found - self._starts[homes[inside]]
        return homes, rows
