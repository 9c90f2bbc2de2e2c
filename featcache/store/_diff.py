"""Two caches side by side: what they say about themselves, and the features of the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError
from ..progress import OnProgress, Progress, silent
from ._cache import Cache, load
from ._format import FINGERPRINT_FIELDS, differing, label_names
from ._gap import FeatureDiff, diff_features, stored_features

__all__ = ["DiffReport", "FieldDiff", "SplitDiff", "diff"]

_NAMED = 3  # ids that a report names of each kind
_ROLES = ("train", "test")
# Written by the format itself, or compared elsewhere.
_NOT_COMPARED = frozenset(("class_names", "fingerprint", "format", "format_version", "cut"))


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
    splits = [_diff_split(one, other, role, count) for role in _ROLES]
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
    done, total = 0, sum(len(getattr(a, role)) * len(_features(a, b, role)) for role in _ROLES)

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
