"""Comparing two caches: provenance, images, labels, and the features of images in both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError
from ..progress import OnProgress, Progress, silent
from .cache import Cache, load
from .format import (
    FINGERPRINT_FIELDS,
    StoredArray,
    array_name,
    differing,
    label_names,
    roles_of,
)
from .reader import iterate_rows, map_array

_NAMED = 3  # ids of each kind that a report names
# Fields of the format itself, or compared separately.
_NOT_COMPARED = frozenset(("class_names", "fingerprint", "format", "format_version"))


@dataclass(frozen=True)
class FieldDiff:
    """A field of the provenance that differs, with its value in each cache; None where missing."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class SplitDiff:
    """Differences in one split.

    ``only_a``, ``only_b`` and ``relabelled`` (id, class in a, class in b) have the first few;
    ``same_order`` is about the images in both; ``features`` has each cut and view of either.
    """

    role: str
    n_a: int
    n_b: int
    n_both: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    same_order: bool
    n_relabelled: int
    relabelled: tuple[tuple[str, str, str], ...]
    features: tuple[FeatureDiff, ...]


@dataclass(frozen=True)
class DiffReport:
    """The differences between two caches.

    Parameters
    ----------
    a, b : Path
        The caches.
    same : bool
        Whether they are interchangeable: same ingredients, images, labels, and features to the
        bit.
    fields : tuple of FieldDiff
        Differences in fields of the fingerprint and in the class names.
    other_fields : tuple of FieldDiff
        Differences in the rest of the provenance, which changes no feature.
    train, test : SplitDiff
        Differences in images, labels and features.
    val : SplitDiff or None
        The same of the split val, where either cache has one.
    """

    a: Path
    b: Path
    same: bool
    fields: tuple[FieldDiff, ...]
    other_fields: tuple[FieldDiff, ...]
    train: SplitDiff
    test: SplitDiff
    val: SplitDiff | None = None

    def splits(self) -> tuple[SplitDiff, ...]:
        """Return the differences of every split: train, val where there is one, test."""
        val = () if self.val is None else (self.val,)
        return (self.train, *val, self.test)


def diff(
    a: str | Path | Cache, b: str | Path | Cache, *, on_progress: OnProgress = silent
) -> DiffReport:
    """Compare two caches: provenance, images, labels, and the features of images in both.

    Images are matched by id, labels by class name. Every array that is compared is verified.
    Memory does not grow with the caches.

    Parameters
    ----------
    a, b : str, Path or Cache
        The caches.
    on_progress : callable
        Called with the progress in rows.

    Raises
    ------
    CacheError
        One of them is missing or damaged.
    """
    one, other = (cache if isinstance(cache, Cache) else load(cache) for cache in (a, b))
    matters = (*FINGERPRINT_FIELDS, "class_names")
    rest = sorted({*one.meta, *other.meta} - {*matters, *_NOT_COMPARED})
    fields = tuple(FieldDiff(*line) for line in differing(one.meta, other.meta, matters))
    count = _counter(one, other, on_progress)
    roles = roles_of({**one.index.arrays, **other.index.arrays})
    splits = {role: _diff_split(one, other, role, count) for role in roles}
    return DiffReport(
        a=one.path,
        b=other.path,
        same=not fields and all(map(_is_same, splits.values())),
        fields=fields,
        other_fields=tuple(FieldDiff(*line) for line in differing(one.meta, other.meta, rest)),
        train=splits["train"],
        test=splits["test"],
        val=splits.get("val"),
    )


def _is_same(split: SplitDiff) -> bool:
    return (
        split.n_a == split.n_b == split.n_both
        and split.same_order
        and not split.n_relabelled
        and all(
            array.shape_a == array.shape_b and not array.n_different for array in split.features
        )
    )


def _counter(a: Cache, b: Cache, on_progress: OnProgress) -> Callable[[int], None]:
    """Return a function that adds rows to the progress and reports it."""
    done = 0
    total = sum(len(split) * len(_features(a, b, role)) for role, split in a.splits())

    def count(n_rows: int) -> None:
        nonlocal done
        done += n_rows
        on_progress(Progress("comparing", done, total, "row"))

    count(0)
    return count


def _diff_split(a: Cache, b: Cache, role: str, on_rows: Callable[[int], None]) -> SplitDiff:
    ids_a, ids_b = (_rows_by_id(cache, role) for cache in (a, b))
    # The row in b of each row in a; -1 where b lacks the image.
    partner = np.array([ids_b.get(name, -1) for name in ids_a], dtype=np.int64)
    matched = partner[partner >= 0]
    relabelled = tuple(_relabelled(a, b, role, ids_a, ids_b))
    return SplitDiff(
        role=role,
        n_a=len(ids_a),
        n_b=len(ids_b),
        n_both=len(matched),
        only_a=tuple(name for name in ids_a if name not in ids_b)[:_NAMED],
        only_b=tuple(name for name in ids_b if name not in ids_a)[:_NAMED],
        same_order=bool((np.diff(matched) > 0).all()),
        n_relabelled=len(relabelled),
        relabelled=relabelled[:_NAMED],
        features=tuple(
            _diff_features(a, b, role, cut, view, partner, on_rows)
            for cut, view in _features(a, b, role)
        ),
    )


def _rows_by_id(cache: Cache, role: str) -> dict[str, int]:
    split = dict(cache.splits()).get(role)
    ids = () if split is None else split.ids
    rows = {name: row for row, name in enumerate(ids)}
    if len(rows) < len(ids):
        raise CacheCorruptError(
            f"{cache.path}: expected an id of its own for every image of {role}, found some twice; "
            f"see featcache verify {cache.path}"
        )
    return rows


def _relabelled(
    a: Cache, b: Cache, role: str, ids_a: dict[str, int], ids_b: dict[str, int]
) -> Iterator[tuple[str, str, str]]:
    """Yield (id, class in a, class in b) of images whose class names differ."""
    both = [name for name in ids_a if name in ids_b]
    if not both:
        return
    labels_a, labels_b = (getattr(cache, role).labels for cache in (a, b))
    names_a, names_b = (label_names(cache.class_names) for cache in (a, b))
    for name in both:
        was, now = names_a[labels_a[ids_a[name]]], names_b[labels_b[ids_b[name]]]
        if was != now:
            yield name, was, now


def _features(a: Cache, b: Cache, role: str) -> list[tuple[str, str]]:
    """Return the cuts and views that either cache has of a split."""
    return [
        (cut, view)
        for cut in dict.fromkeys(a.cuts + b.cuts)
        for view in dict.fromkeys(a.views + b.views)
        if _stored(a, role, cut, view) or _stored(b, role, cut, view)
    ]


@dataclass(frozen=True)
class FeatureDiff:
    """Distances between the features of the images in both caches, of one cut and view.

    Shapes are those of one image's features, () where a cache has none. ``n_rows`` images were
    compared: 0 where the shapes differ. ``farthest`` is the image with the smallest cosine.
    """

    cut: str
    view: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    n_rows: int
    n_different: int
    max_abs: float
    mean_cosine: float
    min_cosine: float
    farthest: str


def _stored(cache: Cache, role: str, cut: str, view: str) -> StoredArray | None:
    return cache.index.arrays.get(f"{role}/{array_name(cut, view, cache.cuts[0])}")


def _diff_features(
    a: Cache,
    b: Cache,
    role: str,
    cut: str,
    view: str,
    partner: np.ndarray,
    on_rows: Callable[[int], None],
) -> FeatureDiff:
    """Compare the features of one cut and view; ``partner`` has the row in b of each row of a."""
    one, other = (_stored(cache, role, cut, view) for cache in (a, b))
    gap = _Gap()
    if one and other and one.row_shape == other.row_shape:
        for _ in iterate_rows(other):  # verifies the rows that are then read in any order
            pass
        mapped, row = map_array(other), 0
        for piece in iterate_rows(one):
            wanted = partner[row : row + len(piece)]
            known = wanted >= 0
            gap.add(row + np.flatnonzero(known), piece[known], mapped[wanted[known]])
            row += len(piece)
            on_rows(len(piece))
    else:
        on_rows(len(partner))
    return FeatureDiff(
        cut=cut,
        view=view,
        shape_a=one.row_shape if one else (),
        shape_b=other.row_shape if other else (),
        n_rows=gap.n_rows,
        n_different=gap.n_different,
        max_abs=gap.max_abs,
        mean_cosine=gap.sum_cosine / gap.n_rows if gap.n_rows else 0.0,
        min_cosine=gap.min_cosine,
        farthest=getattr(a, role).ids[gap.farthest] if gap.n_rows else "",
    )


class _Gap:
    """Distances between rows, updated piece by piece."""

    def __init__(self) -> None:
        self.n_rows = self.n_different = self.farthest = 0
        self.max_abs = self.sum_cosine = 0.0
        self.min_cosine = 1.0

    def add(self, numbers: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
        """Add pairs of rows (n, …) with their numbers in the split (n,)."""
        if not len(numbers):
            return
        left, right = (rows.reshape(len(rows), -1).astype(np.float64) for rows in (left, right))
        different = (left != right).any(axis=1)
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosine = np.einsum("ij,ij->i", left, right) / np.where(lengths > 0, lengths, 1)
        cosine[~different] = 1.0
        lowest = int(cosine.argmin())
        if not self.n_rows or cosine[lowest] < self.min_cosine:
            self.min_cosine, self.farthest = float(cosine[lowest]), int(numbers[lowest])
        self.n_rows += len(numbers)
        self.n_different += int(different.sum())
        self.max_abs = max(self.max_abs, float(np.abs(left - right).max()))
        self.sum_cosine += float(cosine.sum())
