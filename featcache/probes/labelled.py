"""The labelled images of a cache, from which a head can learn or on which it is tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, DatasetError, RecipeError
from ..sampling import LIMIT_SEED, stratified_rows
from ..store.cache import Cache, CachedSplit, load, newest_cache
from .blocks import Features, Rows, each_block


def opened(
    cache: str | Path | Cache | None, *, mmap: bool = False, cuts: Sequence[str] = ()
) -> Cache:
    """Return a cache with features (N, D) at these cuts: the given one, or the newest."""
    if not isinstance(cache, Cache):
        cache = load(cache if cache is not None else newest_cache(), mmap=mmap)
    cache.check_vectors(cuts)
    if len(cuts) > 1 and mmap:
        raise RecipeError(
            f"cut: expected one with --mmap, found {', '.join(cuts)}, which would be copied side "
            "by side into memory; leave out --mmap"
        )
    return cache


def cut_names(cut: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the cuts that an option names, with commas between; none for the cache's first."""
    if cut is None:
        return ()
    words = cut.split(",") if isinstance(cut, str) else cut
    names = tuple(word.strip() for word in words)
    if not names or "" in names or len(set(names)) < len(names):
        raise RecipeError(f"cut: expected names, each once, found {cut!r}; try --cut cls,mean")
    return names


@dataclass(frozen=True)
class Labelled:
    """The labelled images of one split.

    ``views`` are features (N, D), the cache's own arrays where every image has a label;
    ``labels`` are int64 (N,); ``n_unlabelled`` images of the split have the label -1.
    """

    views: list[Features]
    labels: np.ndarray
    n_unlabelled: int


def labelled(
    cache: Cache,
    role: str,
    *,
    views: Sequence[str] = ("identity",),
    limit: int | None = None,
    cuts: Sequence[str] = (),
) -> Labelled:
    """Return the labelled images of a split, without copying their features.

    Several ``cuts`` stand side by side, copied; none are the cache's first. ``limit`` draws a
    stratified sample of that size, always the same. Raises DatasetError where the split has no
    labelled image, CacheCorruptError where a feature is not finite.
    """
    split = cache.train if role == "train" else cache.test
    rows = np.flatnonzero(split.labels >= 0)
    n_unlabelled = len(split.labels) - len(rows)
    if not len(rows):
        rest = f"{n_unlabelled} without a label" if n_unlabelled else "none"
        raise DatasetError(
            f"{cache.path}: expected labelled {role} images, found {rest}; extract a data set "
            f"with some in {role}"
        )
    if limit is not None:
        rows = rows[stratified_rows(split.labels[rows], limit, LIMIT_SEED, f"cached {role}")]
    arrays = [_side_by_side(split, cuts, name) for name in views]
    check_finite(cache, role, arrays)
    if len(rows) == len(split.labels):
        return Labelled(list(arrays), split.labels, n_unlabelled)
    chosen: list[Features] = [Rows(array, rows) for array in arrays]
    return Labelled(chosen, split.labels[rows], n_unlabelled)


def _side_by_side(split: CachedSplit, cuts: Sequence[str], view: str) -> Any:
    if not cuts:
        return split.view(view)
    parts = [split.cut(cut, view) for cut in cuts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def class_counts(cache: Cache, labels: np.ndarray) -> np.ndarray:
    """Return the training images of each class, int64 (K,); raise where fewer than 2 have any."""
    counts = np.bincount(labels, minlength=len(cache.class_names))
    present = np.count_nonzero(counts)
    if present < 2:
        raise DatasetError(
            f"{cache.path}: expected at least 2 classes with training images, found {present}; "
            "extract a data set with more"
        )
    return counts


def check_finite(cache: Cache, role: str, arrays: Sequence[Any]) -> None:
    """Raise CacheCorruptError where a feature of arrays (N, D) is NaN or infinite."""

    def wrong(array: Any, rows: slice) -> int | None:
        finite = np.isfinite(array[rows]).all(axis=1)
        return None if finite.all() else rows.start + int(finite.argmin())

    for row in each_block(arrays, wrong, arrays[0].shape[1]):
        if row is not None:
            raise CacheCorruptError(
                f"{cache.path}: expected finite features, found NaN or infinity in {role}, row "
                f"{row}; extract it again with featcache extract --force"
            )
