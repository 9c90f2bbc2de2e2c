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
from .format import DTYPES, FINGERPRINT_FIELDS, StoredArray, array_name, differing
from .reader import check_whole, iterate_block, map_array, read_array

# Other images are the point. The views are looked at array by array: images without flips are
# of use to test, and those with flips to a cache without.
_MAY_DIFFER = ("dataset_digest", "views")
T = TypeVar("T")
_SAME = [name for name in FINGERPRINT_FIELDS if name not in _MAY_DIFFER]


class KnownRows:
    """Features that caches of the same ingredients have, whatever their images are.

    Parameters
    ----------
    folders : iterable of Path
        Where the caches are; the newest that has an image wins.
    meta : mapping
        The provenance of the cache that is made.
    shapes : mapping of str to tuple of int
        Of every cut: the shape of one image's features.

    Attributes
    ----------
    notes : list of str
        Which caches are damaged or were replaced; nothing is taken from them.
    taken : Counter
        How many rows were taken from the cache at each path.
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
        """Return which images have features in all these views, and the features.

        Safe from several threads.

        Parameters
        ----------
        hashes : numpy.ndarray
            uint8 (n, 32): SHA-256 of the images' files.
        views : sequence of str
            ``"identity"``, maybe flips.

        Returns
        -------
        known : numpy.ndarray
            bool (n,).
        features : dict of str to numpy.ndarray
            By the name of the array inside a split: (k, …) for the k images that are known, in
            their order; read from blocks whose checksums are right.
        """
        return self._under_lock(lambda: self._find(hashes, tuple(views)))

    def _under_lock(self, ask: Callable[[], T]) -> T:
        """Ask again without each cache that cannot be used."""
        with self._turn:
            while True:
                try:
                    return ask()
                except _DamagedError as error:
                    self._leave_out(error.cache, error)

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
        table = _Table()
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
                    table.add(cache, read_array(hashes), opened)
        table.sort()
        self._tables[views] = table
        return table

    def _leave_out(self, cache: Cache, error: Exception) -> None:
        """Take nothing more from a cache; others may have its images too."""
        self._caches.remove(cache)
        self._tables.clear()
        self._tell(error)

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
    """Where the features of an image are: content hash -> number of a split, and row in it."""

    def __init__(self) -> None:
        self.caches: list[Cache] = []
        self.arrays: list[dict[str, _SoundArray]] = []
        self._parts: list[np.ndarray] = []

    def add(self, cache: Cache, hashes: np.ndarray, arrays: dict[str, _SoundArray]) -> None:
        """Add a split; of two that have an image, the first one counts."""
        self.caches.append(cache)
        self.arrays.append(arrays)
        self._parts.append(hashes)

    def sort(self) -> None:
        """Make the table ready for `find`."""
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self._hashes = np.concatenate([np.empty((0, 32), np.uint8), *self._parts])
        keys = _keys(self._hashes)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return of each image the number of a split, or -1, and the row in it."""
        at = np.searchsorted(self._sorted, _keys(hashes))
        homes = np.full(len(hashes), -1)
        rows = np.zeros(len(hashes), np.int64)
        inside = np.flatnonzero(at < len(self._order))
        found = self._order[at[inside]]
        same = (self._hashes[found] == hashes[inside]).all(axis=1)
        inside, found = inside[same], found[same]
        homes[inside] = np.searchsorted(self._starts, found, side="right") - 1
        rows[inside] = found - self._starts[homes[inside]]
        return homes, rows


def _keys(hashes: np.ndarray) -> np.ndarray:
    """Return the first 8 bytes of each hash as numbers (n,): equal hashes have equal ones."""
    return np.ascontiguousarray(hashes[:, :8]).view(np.uint64).reshape(-1)
