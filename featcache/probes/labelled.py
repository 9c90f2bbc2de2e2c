"""The images of a cache that a head can learn from or be judged by: labelled, and finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, DatasetError
from ..sampling import LIMIT_SEED, stratified_rows
from ..store.cache import Cache
from .blocks import Features, Rows, each_block


@dataclass(frozen=True)
class Labelled:
    """Features and labels of one split.

    Parameters
    ----------
    views : list of numpy.ndarray or Rows
        (N, D), one per view that was asked for; the cache's own arrays where all rows count.
    labels : numpy.ndarray
        int64 (N,), from 0.
    n_unlabelled : int
        Images of the split whose label is -1: left out.
    """

    views: list[Features]
    labels: np.ndarray
    n_unlabelled: int


def labelled(
    cache: Cache, role: str, *, views: Sequence[str] = ("identity",), limit: int | None = None
) -> Labelled:
    """Return the labelled images of a split, without a copy of their features.

    Parameters
    ----------
    cache : Cache
        With features (N, D).
    role : str
        ``"train"`` or ``"test"``.
    views : sequence of str
        Which flip views; test images have but the identity.
    limit : int, optional
        A stratified draw of so many, always the same.

    Raises
    ------
    DatasetError
        No labelled image, or a limit that leaves a class without one.
    CacheCorruptError
        NaN or infinity in a feature.
    """
    split = cache.train if role == "train" else cache.test
    rows = np.flatnonzero(split.labels >= 0)
    n_unlabelled = len(split.labels) - len(rows)
    if not len(rows):
        found = f"{n_unlabelled} without a label" if n_unlabelled else "none"
        raise DatasetError(
            f"{cache.path}: expected labelled {role} images, found {found}; extract a data set "
            f"with some in {role}"
        )
    if limit is not None:
        rows = rows[stratified_rows(split.labels[rows], limit, LIMIT_SEED, f"cached {role}")]
    arrays = [split.view(name) for name in views]
    check_finite(cache, role, arrays)
    if len(rows) == len(split.labels):
        return Labelled(list(arrays), split.labels, n_unlabelled)
    chosen: list[Features] = [Rows(array, rows) for array in arrays]
    return Labelled(chosen, split.labels[rows], n_unlabelled)


def check_finite(cache: Cache, role: str, arrays: Sequence[Any]) -> None:
    """Refuse what would turn every number that is computed from it into NaN.

    Parameters
    ----------
    cache : Cache
        For the message, as ``role``.
    role : str
        ``"train"`` or ``"test"``.
    arrays : sequence of array
        (N, D) each.

    Raises
    ------
    CacheCorruptError
        NaN or infinity in a feature.
    """

    def wrong(array: Any, rows: slice) -> int | None:
        finite = np.isfinite(array[rows]).all(axis=1)
        return None if finite.all() else rows.start + int(finite.argmin())

    for row in each_block(arrays, wrong, arrays[0].shape[1]):
        if row is not None:
            raise CacheCorruptError(
                f"{cache.path}: expected finite features, found NaN or infinity in {role}, row "
                f"{row}; extract it again with featcache extract --force"
            )
