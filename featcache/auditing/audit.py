"""The whole of `featcache.audit`: neighbours, duplicates, heads, suspects, outliers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import RecipeError
from ..metrics import top1
from ..probes.blocks import Features, Rows
from ..probes.labelled import check_finite
from ..progress import OnNote, OnProgress, silent
from ..store.cache import Cache, load, newest_cache
from .duplicates import Copies, find_copies, find_neighbours, furthest, outlier_scores
from .findings import AuditResult, DuplicateGroup, DuplicatePair, Image, Outlier, Suspect
from .labels import Doubts, doubts, fit_heads, thresholds_of

_THRESHOLD = 0.95  # docs/audit.md has the measurement
_NEIGHBOURS = 10


def audit(
    cache: str | Path | Cache | None = None,
    *,
    duplicates: float = _THRESHOLD,
    folds: int = 5,
    neighbours: int = _NEIGHBOURS,
    outliers: float = 0.01,
    seed: int = 0,
    mmap: bool = False,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> AuditResult:
    """Look for what is wrong with a data set: near-duplicates, wrong labels, outliers.

    Images without a label take part in near-duplicates and outliers. Nothing is changed:
    the lists are for a person to look at.

    Parameters
    ----------
    cache : str, Path or Cache, optional
        The features; the newest cache by default.
    duplicates : float
        The cosine from which on two images count as near-duplicates, above 0, at most 1.
    folds : int
        Heads that training labels are judged by, at least 2: each image by the one that
        was fitted to the other folds.
    neighbours : int
        Of the nearest images so many are looked at, at least 1: for near-duplicates, and for
        outliers, whose score is a mean over them.
    outliers : float
        Images further out than all but this share of the training images are listed:
        above 0, below 1.
    seed : int
        Of the folds.
    mmap : bool
        Leave the features on the disk, for a cache larger than the memory. Their
        checksums are then not verified. A `Cache` is taken as it was loaded.
    on_progress : callable
        Hears of blocks and heads.
    on_note : callable
        Hears what `AuditResult.notes` has.

    Returns
    -------
    AuditResult

    Raises
    ------
    CacheError
        No cache, one that cannot be trusted, features that are not vectors or not finite.
    RecipeError
        An option out of its range.

    Notes
    -----
    The methods and their sources are in the modules `featcache.auditing` is made of, and in
    ``docs/audit.md``.
    """
    _check(duplicates, folds, neighbours, outliers, seed)
    if not isinstance(cache, Cache):
        cache = load(cache if cache is not None else newest_cache(), mmap=mmap)
    cache.check_vectors()
    started = time.perf_counter()
    for role, split in (("train", cache.train), ("test", cache.test)):
        check_finite(cache, role, [split.features])

    crossing, within_train, within_test = find_neighbours(
        cache.train.features, cache.test.features, neighbours, on_progress
    )
    copies = find_copies(crossing, within_train, within_test, duplicates)
    limit, far = furthest(outlier_scores(within_train), outlier_scores(crossing), outliers)
    searched = time.perf_counter()

    copied = np.array([pair[0] for pair in copies.pairs[: copies.n_crossing]], np.int64)
    judgement = judge(cache, copied - len(cache.train), folds, seed, on_progress)
    ended = time.perf_counter()

    for note in judgement.notes:
        on_note(note)
    catalogue = _Catalogue(cache)
    pairs = _pairs(copies, catalogue)
    return AuditResult(
        cache=cache.path,
        n_train=len(cache.train),
        n_test=len(cache.test),
        n_unlabelled=int((cache.train.labels < 0).sum() + (cache.test.labels < 0).sum()),
        threshold=float(duplicates),
        duplicates=pairs,
        groups=_groups(copies, catalogue),
        n_test_with_duplicate=copies.n_crossing,
        n_label_conflicts=sum(pair.same_label is False for pair in pairs),
        mislabelled=_suspects(judgement, catalogue),
        n_judged=judgement.n_judged,
        outliers=tuple(
            Outlier(**vars(catalogue.image(role, row)), score=score) for role, row, score in far
        ),
        n_neighbours=within_train.similarity.shape[1],
        outlier_score=limit,
        C=judgement.C,
        top1=judgement.top1,
        top1_without_duplicates=judgement.top1_without,
        n_test_without_duplicates=judgement.n_without,
        notes=judgement.notes,
        neighbours_s=searched - started,
        heads_s=ended - searched,
        wall_s=time.perf_counter() - started,
    )


def _check(duplicates: float, folds: int, neighbours: int, outliers: float, seed: int) -> None:
    if not (math.isfinite(duplicates) and 0 < duplicates <= 1):
        raise RecipeError(
            f"duplicates: expected a cosine above 0 and at most 1, found {duplicates}; 0.95 is the "
            "default"
        )
    if not 0 < outliers < 1:
        raise RecipeError(
            f"outliers: expected a share above 0 and below 1, found {outliers}; 0.01 is the default"
        )
    for name, value, least in (
        ("folds", folds, 2),
        ("neighbours", neighbours, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise RecipeError(f"{name}: expected at least {least}, found {value}")


class _Catalogue:
    """The images of a cache by split and row."""

    def __init__(self, cache: Cache) -> None:
        self._names = cache.class_names
        self._splits = {
            role: (split.ids, split.labels.tolist())
            for role, split in (("train", cache.train), ("test", cache.test))
        }
        self.n_train = len(cache.train)

    def image(self, role: str, row: int) -> Image:
        ids, labels = self._splits[role]
        label = labels[row]
        return Image(ids[row], role, row, self._names[label] if label >= 0 else None)

    def node(self, node: int) -> Image:
        """Return an image by its number in both splits, training images first."""
        if node < self.n_train:
            return self.image("train", node)
        return self.image("test", node - self.n_train)

    def class_name(self, label: int) -> str:
        return self._names[label]


def _same(labels: Sequence[str | None]) -> bool | None:
    known = [label for label in labels if label is not None]
    return None if len(known) < 2 else len(set(known)) == 1


def _pairs(copies: Copies, catalogue: _Catalogue) -> tuple[DuplicatePair, ...]:
    number = {node: n for n, group in enumerate(copies.groups, 1) for node in group}
    pairs = []
    for a, b, similarity in copies.pairs:
        first, second = catalogue.node(a), catalogue.node(b)
        same = _same([first.label, second.label])
        pairs.append(DuplicatePair(first, second, similarity, same, number[a]))
    return tuple(pairs)


def _groups(copies: Copies, catalogue: _Catalogue) -> tuple[DuplicateGroup, ...]:
    groups = []
    for number, nodes in enumerate(copies.groups, 1):
        images = tuple(catalogue.node(node) for node in nodes)
        n_train = sum(node < catalogue.n_train for node in nodes)
        same = _same([image.label for image in images])
        groups.append(DuplicateGroup(number, images, n_train, len(nodes) - n_train, same))
    return tuple(groups)


def _suspects(judgement: Judgement, catalogue: _Catalogue) -> tuple[Suspect, ...]:
    if judgement.classes is None:
        return ()
    suspects = []
    for role, rows, found in judgement.doubts:
        columns = (rows[found.rows], judgement.classes[found.suggested])
        shares = (found.self_confidence, found.confidence)
        listed = zip(*(column.tolist() for column in (*columns, *shares)), strict=True)
        for row, label, own, other in listed:
            image = catalogue.image(role, row)
            name = catalogue.class_name(label)
            suspects.append(
                Suspect(
                    **vars(image),
                    suggested=name,
                    self_confidence=own,
                    confidence=other,
                    score=1 - own,
                )
            )
    return tuple(sorted(suspects, key=lambda suspect: suspect.self_confidence))


_NAMED = 3  # classes that a note names


@dataclass(frozen=True)
class Judgement:
    """What heads say about the labels of both splits."""

    doubts: tuple[tuple[str, np.ndarray, Doubts], ...] = ()  # split, rows of its images
    classes: np.ndarray | None = None
    n_judged: int = 0
    C: float | None = None
    top1: float | None = None
    top1_without: float | None = None
    n_without: int = 0
    notes: tuple[str, ...] = ()


def judge(
    cache: Cache, copied: np.ndarray, folds: int, seed: int, on_progress: OnProgress
) -> Judgement:
    """Fit heads and doubt labels; ``copied`` are test rows with a near-duplicate in train."""
    rows = np.flatnonzero(cache.train.labels >= 0)
    classes, labels, counts = np.unique(
        cache.train.labels[rows], return_inverse=True, return_counts=True
    )
    if len(classes) < 2:
        found = f"one class, {cache.class_names[classes[0]]}" if len(classes) else "none"
        return Judgement(
            notes=(f"labels: not judged, which takes two classes in train, found {found}",)
        )
    test_labels = np.full(len(cache.class_names), -1)
    test_labels[classes] = np.arange(len(classes))
    given = cache.test.labels
    wanted = np.where(given >= 0, test_labels[given], -1)
    test_rows = np.flatnonzero(wanted >= 0)
    wanted = wanted[test_rows]
    test = _some(cache.test.features, test_rows)
    heads = fit_heads(_some(cache.train.features, rows), labels, test, folds, seed, on_progress)
    thresholds = thresholds_of(heads.train, labels)
    clean = ~np.isin(test_rows, copied)
    predicted = heads.test.argmax(axis=1)
    unknown = int((given >= 0).sum()) - len(test_rows)
    return Judgement(
        doubts=(
            ("train", rows, doubts(heads.train, labels, thresholds)),
            ("test", test_rows, doubts(heads.test, wanted, thresholds)),
        ),
        classes=classes,
        n_judged=len(rows) - int((counts == 1).sum()) + len(test_rows),
        C=heads.C,
        top1=top1(predicted, wanted) if len(wanted) else None,
        top1_without=top1(predicted[clean], wanted[clean]) if clean.any() else None,
        n_without=int(clean.sum()),
        notes=_notes(cache, classes, counts, folds, unknown),
    )


def _some(features: Features, rows: np.ndarray) -> Features:
    return features if len(rows) == len(features) else Rows(features, rows)


def _notes(
    cache: Cache, classes: np.ndarray, counts: np.ndarray, folds: int, unknown: int
) -> tuple[str, ...]:
    def named(chosen: np.ndarray) -> str:
        names = [cache.class_names[label] for label in classes[chosen][:_NAMED]]
        more = int(chosen.sum()) - len(names)
        return ", ".join(names) + (f" and {more:,} more" if more else "")

    notes = []
    single, few = counts == 1, (counts > 1) & (counts < folds)
    if single.any():
        notes.append(
            f"labels: the only training image of its class can't be held out, and is not judged: "
            f"{named(single)}"
        )
    if few.any():
        notes.append(
            f"labels: classes with fewer training images than the {folds} folds were held out one "
            f"image at a time: {named(few)}"
        )
    if unknown:
        notes.append(
            f"labels: {unknown:,} test images whose class has no training image are not judged"
        )
    return tuple(notes)
