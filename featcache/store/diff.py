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
from .format import FINGERPRINT_FIELDS, ROLES, StoredArray, array_name, differing, label_names
from .reader import iterate_rows, map_array

_NAMED = 3  # ids that a report names of each kind
# Fields of the format itself, or compared separately.
_NOT_COMPARED = frozenset(("class_names", "fingerprint", "format", "format_version"))


@dataclass(frozen=True)
class FieldDiff:
    """A field of the provenance that differs.

    Parameters
    ----------
    name : str
        ``"weights_sha256"``; ``"preprocess.size"`` of a nested one.
    a, b : object
        Its value in either cache; None where there is none.
    """

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class SplitDiff:
    """A split in both caches.

    Parameters
    ----------
    role : str
        ``"train"`` or ``"test"``.
    n_a, n_b, n_both : int
        Images in either, and in both.
    only_a, only_b : tuple of str
        The first few ids that are in one alone.
    same_order : bool
        Whether the images that both have come in the same order.
    n_relabelled : int
        Images that have the name of another class.
    relabelled : tuple of tuple of str
        The first few: id, class in a, class in b.
    features : tuple of FeatureDiff
        One per cut and view that either has.
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
    """What two caches differ in.

    Parameters
    ----------
    a, b : Path
        The caches.
    same : bool
        Whether either can stand for the other: nothing that matters differs, and every
        feature is the same to the bit.
    fields : tuple of FieldDiff
        Of the fingerprint, and the class names.
    other_fields : tuple of FieldDiff
        Of the rest of the provenance, which changes no feature.
    train, test : SplitDiff
        Images, labels and features.
    """

    a: Path
    b: Path
    same: bool
    fields: tuple[FieldDiff, ...]
    other_fields: tuple[FieldDiff, ...]
    train: SplitDiff
    test: SplitDiff


def diff(
    a: str | Path | Cache, b: str | Path | Cache, *, on_progress: OnProgress = silent
) -> DiffReport:
    """Compare two caches: provenance, images, labels, and the features of the same images.

    Images are matched by their ids, labels by the names of their classes. Every array
    that is compared is verified. Memory stays the same however large the caches are.

    Parameters
    ----------
    a, b : str, Path or Cache
        The caches.
    on_progress : callable
        Hears of rows.

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
    splits = [_diff_split(one, other, role, count) for role in ROLES]
    return DiffReport(
        a=one.path,
        b=other.path,
        same=not fields and all(map(_is_same, splits)),
        fields=fields,
        other_fields=tuple(FieldDiff(*line) for line in differing(one.meta, other.meta, rest)),
        train=splits[0],
        test=splits[1],
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
    """Return what is told of rows of a that have been compared, and tells of all."""
    done, total = 0, sum(len(getattr(a, role)) * len(_features(a, b, role)) for role in ROLES)

    def count(n_rows: int) -> None:
        nonlocal done
        done += n_rows
        on_progress(Progress("comparing", done, total, "row"))

    count(0)
    return count


def _diff_split(a: Cache, b: Cache, role: str, on_rows: Callable[[int], None]) -> SplitDiff:
    ids_a, ids_b = (_rows_by_id(cache, role) for cache in (a, b))
    # The row in b of every row in a; -1 where there is none.
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
            diff_features(a, b, role, cut, view, partner, on_rows)
            for cut, view in _features(a, b, role)
        ),
    )


def _rows_by_id(cache: Cache, role: str) -> dict[str, int]:
    ids = getattr(cache, role).ids
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
    """Yield the images that both have, under the names of two classes."""
    labels_a, labels_b = (getattr(cache, role).labels for cache in (a, b))
    names_a, names_b = (label_names(cache.class_names) for cache in (a, b))
    for name in filter(ids_b.__contains__, ids_a):
        was, now = names_a[labels_a[ids_a[name]]], names_b[labels_b[ids_b[name]]]
        if was != now:
            yield name, was, now


def _features(a: Cache, b: Cache, role: str) -> list[tuple[str, str]]:
    """Return the cuts and views that either cache has of a split."""
    return [
        (cut, view)
        for cut in dict.fromkeys(a.cuts + b.cuts)
        for view in dict.fromkeys(a.views + b.views)
        if stored_features(a, role, cut, view) or stored_features(b, role, cut, view)
    ]


@dataclass(frozen=True)
class FeatureDiff:
    """How far the features of the same images are apart.

    Parameters
    ----------
    cut, view : str
        Which features: ``"avgpool"``, ``"identity"``.
    shape_a, shape_b : tuple of int
        Of one image's features; () where a cache has none.
    n_rows : int
        Images that were compared: those that both have; 0 where the shapes differ, and
        then the numbers below say nothing.
    n_different : int
        Of these, how many differ at all.
    max_abs : float
        Largest absolute difference of two numbers.
    mean_cosine, min_cosine : float
        Over the images.
    farthest : str
        The image of the smallest cosine; "" where there is none.
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


def stored_features(cache: Cache, role: str, cut: str, view: str) -> StoredArray | None:
    """Return where the features of a cut and view lie; None where the cache has none."""
    return cache.index.arrays.get(f"{role}/{array_name(cut, view, cache.cuts[0])}")


def diff_features(
    a: Cache,
    b: Cache,
    role: str,
    cut: str,
    view: str,
    partner: np.ndarray,
    on_rows: Callable[[int], None],
) -> FeatureDiff:
    """Compare the features of one cut and view, a few rows at a time.

    Parameters
    ----------
    a, b : Cache
        At least one of them has such features.
    role, cut, view : str
        Which.
    partner : numpy.ndarray
        int64 (N of a,): the row in b of the same image; -1 where it has none.
    on_rows : callable
        Hears how many more rows of a have been seen.

    Raises
    ------
    CacheCorruptError
        A block is not what was written.
    """
    one, other = (stored_features(cache, role, cut, view) for cache in (a, b))
    gap = _Gap()
    if one and other and one.row_shape == other.row_shape:
        for _ in iterate_rows(other):  # verifies what is then looked up in any order
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
    """How far rows are apart, taken in piece by piece."""

    def __init__(self) -> None:
        self.n_rows = self.n_different = self.farthest = 0
        self.max_abs = self.sum_cosine = 0.0
        self.min_cosine = 1.0

    def add(self, numbers: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
        """Take in rows (n, …) that belong together, and their numbers in the split (n,)."""
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
