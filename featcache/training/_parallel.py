"""Products on every core at once, each on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

from ..cores import usable_cores

__all__ = ["in_threads", "slices"]

T = TypeVar("T")
R = TypeVar("R")


def slices(start: int, stop: int, step: int) -> list[slice]:
    """Cut a range into slices of ``step``, the last one shorter."""
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return the results in order; the BLAS keeps to one thread meanwhile."""
    with _blas().limit(limits=1, user_api="blas"):
        return list(_pool().map(function, items))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(usable_cores(), thread_name_prefix="featcache-convolve")


@cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
