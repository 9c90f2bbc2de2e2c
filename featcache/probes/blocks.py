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
from typing import Any, TypeVar

import numpy as np

from ..cores import usable_cores
from ..lookahead import Stop, work_ahead

__all__ = ["block_rows", "each_block", "one_blas_thread", "some_rows"]

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
