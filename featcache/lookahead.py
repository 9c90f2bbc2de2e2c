"""Work that threads do ahead of whoever wants the results: in order, and never far ahead.

Decoding, resizing and hashing leave Python's lock free while they run, so that threads
use every core without a copy of anything, and end with one word.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["Stop", "work_ahead"]

T = TypeVar("T")
R = TypeVar("R")
Stop = threading.Event


def work_ahead(
    function: Callable[[T, Stop], R], items: Iterable[T], *, workers: int, ahead: int
) -> Generator[R, None, None]:
    """Yield ``function(item, stop)`` of every item, in order, computed ahead by threads.

    Close the iterator when leaving early (``contextlib.closing``): that ends the threads,
    and waits until they have ended. An error, Ctrl-C or the last result does the same.

    Parameters
    ----------
    function : callable
        Runs in a thread. ``stop`` is set once nobody waits for results any more: work of
        several steps looks at it between two of them and then returns whatever it likes.
    items : iterable
        Read in the caller's thread, ``ahead`` items beyond the result that is waited for.
    workers : int
        Threads, at least 1.
    ahead : int
        Results that may be ready or under way while the caller is busy, at least 1: the
        bound on memory, however slow the caller is.

    Raises
    ------
    Exception
        What ``function`` raised, in the place of its result.
    """
    stop = Stop()
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="featcache")
    try:
        for item in items:
            pending.append(pool.submit(function, item, stop))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
