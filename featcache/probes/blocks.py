"""Passes over features (N, D): in blocks of rows, by one thread per core, in the order of rows.

NumPy releases Python's lock inside its loops and products. Threads that each take the next block
therefore keep every core busy with all of a pass: reading, converting, products, softmax. BLAS's
own threads would share the products alone. Blocks are cut by the size of the features and summed
in their order, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, TypeAlias, TypeVar

import numpy as np

from ..cores import usable_cores
from ..process import Stop, work_ahead
from ..store.reader import check_whole

_BLOCK_BYTES = 4 << 20  # a block that fits a core's cache is read from memory once

R = TypeVar("R")


def block_rows(numbers_per_row: int) -> int:
    """Return the rows of a block, a multiple of 256, for rows of float32 numbers."""
    return max(1, _BLOCK_BYTES // (4 * 256 * numbers_per_row)) * 256


def each_block(
    views: Sequence[Any], work: Callable[[Any, slice], R], numbers_per_row: int
) -> Generator[R, None, None]:
    """Yield ``work(view, rows)`` for every block of every view, in order; it runs in threads.

    ``numbers_per_row`` is how many float32 numbers ``work`` needs for each row.
    """
    rows = block_rows(numbers_per_row)
    blocks = [
        (view, slice(first, min(first + rows, len(view))))
        for view in views
        for first in range(0, len(view), rows)
    ]

    def one(block: tuple[Any, slice], _: Stop | None = None) -> R:
        check_whole(block[0])
        return work(*block)

    if len(blocks) < 2:
        yield from map(one, blocks)
        return
    with one_blas_thread() as workers:
        results = work_ahead(one, blocks, workers=workers, ahead=2 * workers)
        with closing(results):
            yield from results


class _Blas:
    """BLAS's number of threads, which is global: the first user limits it, the last restores it.

    threadpoolctl's limiters restore the number they read. Two that overlap in two threads could
    leave the process with one thread for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limiter: Any = None
        self._workers = 1

    def enter(self) -> int:
        """Limit BLAS to one thread; return how many threads of our own may run instead."""
        from threadpoolctl import ThreadpoolController

        with self._lock:
            if self._users == 0:
                controller = ThreadpoolController().select(user_api="blas")
                # A limit that somebody set before, as joblib does in its workers, holds for us too.
                allowed = [library["num_threads"] for library in controller.info()]
                self._workers = min([usable_cores(), *([max(allowed)] if allowed else [])])
                self._limiter = controller.limit(limits=1)
            self._users += 1
            return self._workers

    def leave(self) -> None:
        """Restore the number of threads after the last user."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._limiter.restore_original_limits()


_blas = _Blas()


@contextmanager
def one_blas_thread() -> Iterator[int]:
    """Let every product run in the thread that calls it; yield how many threads may run.

    Enter it around many passes: finding the libraries takes a millisecond.
    """
    workers = _blas.enter()
    try:
        yield workers
    finally:
        _blas.leave()


def some_rows(n: int, limit: int) -> np.ndarray:
    """Return sorted random rows, always the same; a stride could coincide with the labels."""
    if limit >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, limit, replace=False))


class Rows:
    """Chosen rows of features (N, D), read and changed only when they are indexed.

    ``features`` is an array, mapped or not, or again `Rows`; ``numbers`` int64 (n,) are the rows,
    by default all; ``change`` maps rows (n, D) to float32 (n, D), such as `Scaling.apply`.
    """

    def __init__(
        self,
        features: Any,
        numbers: np.ndarray | None = None,
        change: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._features = features
        self._numbers = numbers
        self._change = change
        self.dtype: np.dtype = np.dtype(np.float32) if change else features.dtype
        count = len(features) if numbers is None else len(numbers)
        self.shape: tuple[int, int] = (count, features.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        chosen = index if self._numbers is None else self._numbers[index]
        check_whole(self._features)
        rows: np.ndarray = self._features[chosen]
        return self._change(rows) if self._change else rows

    @property
    def in_memory(self) -> bool:
        """Whether nothing is read from the disk."""
        return in_memory(self._features)


class Stacked:
    """Arrays (n, D), one after another, as features (N, D) that are copied only where indexed."""

    def __init__(self, arrays: Sequence[Any]) -> None:
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])
        self.dtype = np.result_type(*(array.dtype for array in arrays))
        self.shape: tuple[int, int] = (int(self._ends[-1]), arrays[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        rows = np.empty((len(index), self.shape[1]), self.dtype)
        of_array = np.searchsorted(self._ends, index, "right")
        for number, (array, end) in enumerate(zip(self._arrays, self._ends, strict=True)):
            check_whole(array)
            mine = of_array == number
            rows[mine] = array[index[mine] - (end - len(array))]
        return rows

    @property
    def in_memory(self) -> bool:
        """Whether nothing is read from the disk."""
        return all(in_memory(array) for array in self._arrays)


Features: TypeAlias = "np.ndarray | Rows"  # (N, D): an array, mapped or not, or some of its rows


def in_memory(features: Features | Stacked) -> bool:
    """Return whether features are in memory: neither mapped nor in a cache's shards."""
    if isinstance(features, (Rows, Stacked)):
        return features.in_memory
    return type(features) is np.ndarray


def loaded(features: Features) -> Features:
    """Return features in memory as a float32 array, and mapped ones as they are.

    Features are mapped because they are too large for memory: every pass reads them again.
    """
    if not in_memory(features):
        return features
    if isinstance(features, np.ndarray):
        return np.asarray(features, np.float32)
    whole = np.empty(features.shape, np.float32)
    rows = 512  # at once: only the result needs memory
    for first in range(0, len(features), rows):
        whole[first : first + rows] = features[first : first + rows]
    return whole
