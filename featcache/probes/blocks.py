"""Passes over features: in blocks of rows, by one thread per core, in the order of the rows.

NumPy leaves Python's lock free inside its loops and products, so that threads that each
take the next block keep every core busy with all of a pass: reading, converting, products,
softmax. BLAS's own threads share the products alone and wait in between. Blocks are cut by
the size of the features and summed in their order: the result does not depend on the
number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, TypeAlias, TypeVar

import numpy as np

from ..cores import usable_cores
from ..process import Stop, work_ahead

_BLOCK_BYTES = 4 << 20  # of features at once: what fits a core's cache is read from memory once

R = TypeVar("R")


def block_rows(numbers_per_row: int) -> int:
    """Return how many rows of so many float32 numbers make a block: a multiple of 256."""
    return max(1, _BLOCK_BYTES // (4 * 256 * numbers_per_row)) * 256


def each_block(
    views: Sequence[Any], work: Callable[[Any, slice], R], numbers_per_row: int
) -> Generator[R, None, None]:
    """Yield ``work(view, rows)`` of every block of every view, in order.

    Parameters
    ----------
    views : sequence of array
        (N, …) each.
    work : callable
        Runs in a thread; takes the view and a slice of its rows.
    numbers_per_row : int
        How many float32 numbers ``work`` needs for each row, its results not counted.
    """
    rows = block_rows(numbers_per_row)
    blocks = [
        (view, slice(first, min(first + rows, len(view))))
        for view in views
        for first in range(0, len(view), rows)
    ]
    if len(blocks) < 2:
        yield from (work(view, part) for view, part in blocks)
        return

    def one(block: tuple[Any, slice], _: Stop) -> R:
        return work(*block)

    with one_blas_thread() as workers:
        results = work_ahead(one, blocks, workers=workers, ahead=2 * workers)
        with closing(results):
            yield from results


class _Blas:
    """BLAS's number of threads, which belongs to the process: set by the first, reset by the last.

    Each limiter of threadpoolctl alone puts back what it found, so that two that overlap in two
    threads could leave the process with one thread for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limiter: Any = None
        self._workers = 1

    def enter(self) -> int:
        """Set one thread; return how many threads of our own may take their place."""
        from threadpoolctl import ThreadpoolController

        with self._lock:
            if self._inside == 0:
                controller = ThreadpoolController().select(user_api="blas")
                # Someone who gave BLAS fewer threads, as joblib's workers do, meant us too.
                allowed = [library["num_threads"] for library in controller.info()]
                self._workers = min([usable_cores(), *([max(allowed)] if allowed else [])])
                self._limiter = controller.limit(limits=1)
            self._inside += 1
            return self._workers

    def leave(self) -> None:
        """Put back what was found, after the last."""
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limiter.restore_original_limits()


_blas = _Blas()


@contextmanager
def one_blas_thread() -> Iterator[int]:
    """Let every product run in the thread that asks for it; yields how many threads may ask.

    To be entered around many passes, since finding the libraries takes a millisecond.
    """
    workers = _blas.enter()
    try:
        yield workers
    finally:
        _blas.leave()


def some_rows(n: int, limit: int) -> np.ndarray:
    """Return sorted rows, always the same: a stride could fall into step with the labels."""
    if limit >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, limit, replace=False))


class Rows:
    """Some rows of an array (N, D), in an order of one's own.

    Indexed by a slice or by numbers (n,) of rows it gives an array (n, D), which is all
    that an exact solver asks of features.

    Parameters
    ----------
    features : array
        (N, D): in memory, mapped, or again `Rows`.
    numbers : numpy.ndarray, optional
        int64 (n,), which rows; all by default.
    change : callable, optional
        Takes rows (n, D) and returns them as float32 (n, D), such as `Scaling.apply`.
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
        """Return n."""
        return self.shape[0]

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Read rows."""
        chosen = index if self._numbers is None else self._numbers[index]
        rows: np.ndarray = self._features[chosen]
        return self._change(rows) if self._change else rows

    @property
    def in_memory(self) -> bool:
        """Whether nothing is read from the disk."""
        return in_memory(self._features)


Features: TypeAlias = "np.ndarray | Rows"  # (N, D): an array, mapped or not, or some of its rows


def in_memory(features: Features) -> bool:
    """Return whether features lie in memory: neither mapped nor a cache's shards."""
    return features.in_memory if isinstance(features, Rows) else type(features) is np.ndarray


def loaded(features: Features) -> Features:
    """Return features as a float32 array where they lie in memory, and as they are elsewhere.

    What was mapped was mapped because it is too large; it is read again in every pass.
    """
    if not in_memory(features):
        return features
    if isinstance(features, np.ndarray):
        return np.asarray(features, np.float32)
    whole = np.empty(features.shape, np.float32)
    rows = 512  # at once, so that nothing but the result needs memory
    for first in range(0, len(features), rows):
        whole[first : first + rows] = features[first : first + rows]
    return whole
