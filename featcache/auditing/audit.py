"""`featcache.audit`: neighbours, near-duplicates, likely wrong labels, outliers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import RecipeError
from ..metrics import top1
from ..options import with_options
from ..probes.blocks import Features, Rows
from ..probes.question import check_finite, opened
from ..progress import OnNote, OnProgress, silent
from ..store.cache import Cache
from .duplicates import (
    Copies,
    Neighbours,
    copy_threshold,
    find_copies,
    find_neighbours,
    furthest,
    outlier_scores,
)
from .findings import (
    AuditResult,
    DuplicateGroup,
    DuplicatePair,
    Image,
    Outlier,
    StraddlingCopy,
    StraddlingGroup,
    Suspect,
)
from .labels import Doubts, doubts, fit_heads, reference_of, with_neighbours
from .straddling import straddling_copies, straddling_groups


@dataclass(frozen=True)
class AuditOptions:
    """Options of `audit`, which describes them."""

    duplicates: float | None = None
    folds: int = 5
    neighbours: int = 10
    outliers: float = 0.01
    seed: int = 0
    mmap: bool = False
    group: str | None = None

    def __post_init__(self) -> None:
        if self.duplicates is not None and not 0 < self.duplicates <= 1:
            raise RecipeError(
                f"duplicates: expected a cosine above 0 and at most 1, found {self.duplicates}; "
                "leave it out for one that suits the features"
            )
        if not 0 < self.outliers < 1:
            raise RecipeError(
                f"outliers: expected a fraction above 0 and below 1, found {self.outliers}; the "
                "default is 0.01"
            )
        for name, least in (("folds", 2), ("neighbours", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise RecipeError(f"{name}: expected at least {least}, found {value}")


@with_options(AuditOptions)
def audit(
    cache: str | Path | Cache | None = None,
    *,
    options: AuditOptions,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> AuditResult:
    """Find near-duplicates, likely wrong labels and outliers in a data set.

    Also listed are exact copies of an image, and groups, in several splits: there a head is tested
    on what it learnt. Images without a label are checked for near-duplicates and as outliers.
    Nothing is changed: the lists are for a person to review. The methods and their sources are in
    ``docs/audit.md``.

    Parameters
    ----------
    cache : str, Path or Cache, optional
        The features; the newest cache by default.
    duplicates : float, optional
        Two images with at least this cosine are near-duplicates: above 0, at most 1. By default
        the cosine at which 1 - cosine is 6.5 % of its mean over all pairs of training images.
    folds : int
        Folds of cross-validation for training labels, at least 2: the head that judges an image
        was fitted to the other folds.
    neighbours : int
        Nearest images per image, at least 1, for near-duplicates and for outliers, whose score is
        a mean over them.
    outliers : float
        List images further away than all but this fraction of the training images: above 0,
        below 1.
    seed : int
        For the folds.
    mmap : bool
        Leave the features on disk, for a cache larger than memory. Their checksums are then not
        verified. Has no effect on a `Cache` that is already loaded.
    group : str, optional
        A column of the attached table, such as patients: its groups that stand in several splits
        are listed.
    on_progress : callable
        Called with the progress of block pairs and heads.
    on_note : callable
        Called with each of `AuditResult.notes`.

    Returns
    -------
    AuditResult

    Raises
    ------
    CacheError
        No cache, a damaged one, or features that are not vectors or not finite.
    RecipeError
        An option out of range.
    TableError
        A group is asked for, and the cache has no table with that column.
    """
    cache = opened(cache, mmap=options.mmap)
    started = time.perf_counter()
    n_groups, torn = (0, []) if options.group is None else straddling_groups(cache, options.group)
    copied_rows = straddling_copies(cache)
    for role, split in (("train", cache.train), ("test", cache.test)):
        check_finite(cache, role, [split.features])

    crossing, within_train, within_test = find_neighbours(
        cache.train.features, cache.test.features, options.neighbours, on_progress
    )
    threshold = options.duplicates or copy_threshold(cache.train.features)
    copies = find_copies(crossing, within_train, within_test, threshold)
    limit, far = furthest(outlier_scores(within_train), outlier_scores(crossing), options.outliers)
    searched = time.perf_counter()

    copied = np.array([pair[0] for pair in copies.pairs[: copies.n_crossing]], np.int64)
    judgement = judge(
        cache, copied - len(cache.train), within_train, crossing, options, on_progress
    )
    ended = time.perf_counter()

    notes = judgement.notes + _crowded(copies, len(cache.train) + len(cache.test), threshold)
    if copied_rows is None:
        notes += ("copies: not checked: not every image has the SHA-256 of its file",)
    for note in notes:
        on_note(note)
    catalogue = _Catalogue(cache)
    pairs = _pairs(copies, catalogue)
    return AuditResult(
        cache=cache.path,
        n_train=len(cache.train),
        n_test=len(cache.test),
        n_unlabelled=int((cache.train.labels < 0).sum() + (cache.test.labels < 0).sum()),
        threshold=float(threshold),
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
        notes=notes,
        neighbours_s=searched - started,
        heads_s=ended - searched,
        wall_s=time.perf_counter() - started,
        n_val=0 if cache.val is None else len(cache.val),
        straddling_copies=_straddling(cache, copied_rows or [], catalogue),
        group=options.group,
        straddling_groups=tuple(StraddlingGroup(name, *counts) for name, counts in torn),
        n_groups=n_groups,
    )


def _crowded(copies: Copies, n_images: int, threshold: float) -> tuple[str, ...]:
    """Return a note where a group is too large to be copies."""
    largest = max(map(len, copies.groups), default=0)
    if largest <= max(_CROWD, n_images // 10):
        return ()
    return (
        f"near-duplicates: one group holds {largest:,} of {n_images:,} images: at a cosine of "
        f"{threshold:.4g} these features do not tell copies from pictures that are alike; try "
        f"--duplicates {1 - (1 - threshold) / 2:.4g}",
    )


class _Catalogue:
    """The images of a cache by split and row."""

    def __init__(self, cache: Cache) -> None:
        self.names = cache.class_names
        self._splits = {role: (split.ids, split.labels.tolist()) for role, split in cache.splits()}
        self.n_train = len(cache.train)

    def image(self, role: str, row: int) -> Image:
        ids, labels = self._splits[role]
        label = labels[row]
        return Image(ids[row], role, row, self.names[label] if label >= 0 else None)

    def node(self, node: int) -> Image:
        """Return an image by its node number: training images first, then test images."""
        if node < self.n_train:
            return self.image("train", node)
        return self.image("test", node - self.n_train)


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


def _straddling(
    cache: Cache, found: Sequence[np.ndarray], catalogue: _Catalogue
) -> tuple[StraddlingCopy, ...]:
    starts = np.cumsum([0, *(len(split) for _, split in cache.splits())])
    roles = [role for role, _ in cache.splits()]
    copies = []
    for rows in found:
        parts = (np.searchsorted(starts, rows, side="right") - 1).tolist()
        images = tuple(
            catalogue.image(roles[part], int(row - starts[part]))
            for part, row in zip(parts, rows, strict=True)
        )
        copies.append(StraddlingCopy(images, _same([image.label for image in images])))
    return tuple(copies)


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
    for role, rows, doubted in judgement.doubts:
        columns = (
            rows[doubted.rows],
            judgement.classes[doubted.suggested],
            doubted.self_confidence,
            doubted.confidence,
            doubted.score,
        )
        for row, label, own, other, score in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            suspects.append(
                Suspect(
                    **vars(catalogue.image(role, row)),
                    suggested=catalogue.names[label],
                    self_confidence=own,
                    confidence=other,
                    score=score,
                )
            )
    # Both splits are in order; the sort is stable, so scores that round alike stay so.
    return tuple(sorted(suspects, key=lambda suspect: -suspect.score))


_NAMED = 3  # classes in a note
_CROWD = 20  # images: a group of so few is never too large


@dataclass(frozen=True)
class Judgement:
    """The result of heads on the labels of both splits."""

    doubts: tuple[tuple[str, np.ndarray, Doubts], ...] = ()  # split, rows of its images
    classes: np.ndarray | None = None
    n_judged: int = 0
    C: float | None = None
    top1: float | None = None
    top1_without: float | None = None
    n_without: int = 0
    notes: tuple[str, ...] = ()


def judge(
    cache: Cache,
    copied: np.ndarray,
    within_train: Neighbours,
    crossing: Neighbours,
    options: AuditOptions,
    on_progress: OnProgress,
) -> Judgement:
    """Fit heads and judge labels; ``copied`` are test rows with a near-duplicate in train."""
    rows = np.flatnonzero(cache.train.labels >= 0)
    classes, labels, counts = np.unique(
        cache.train.labels[rows], return_inverse=True, return_counts=True
    )
    if len(classes) < 2:
        present = f"only {cache.class_names[classes[0]]}" if len(classes) else "none"
        return Judgement(
            notes=(f"labels: not judged: expected at least 2 classes in train, found {present}",)
        )
    test_labels = np.full(len(cache.class_names), -1)
    test_labels[classes] = np.arange(len(classes))
    given = cache.test.labels
    expected = np.where(given >= 0, test_labels[given], -1)
    test_rows = np.flatnonzero(expected >= 0)
    expected = expected[test_rows]
    test = _some(cache.test.features, test_rows)
    train = _some(cache.train.features, rows)
    heads = fit_heads(train, labels, test, options.folds, options.seed, on_progress)
    # Labels of the training rows as columns of the heads, -1 for those without.
    columns = np.full(len(cache.train), -1)
    columns[rows] = labels
    judged = [
        with_neighbours(probabilities, near.similarity[chosen], columns[near.rows[chosen]])
        for probabilities, near, chosen in (
            (heads.train, within_train, rows),
            (heads.test, crossing, test_rows),
        )
    ]
    reference = reference_of(judged[0], labels)
    clean = ~np.isin(test_rows, copied)
    predicted = heads.test.argmax(axis=1)
    unknown = int((given >= 0).sum()) - len(test_rows)
    return Judgement(
        doubts=(
            ("train", rows, doubts(judged[0], labels, reference)),
            ("test", test_rows, doubts(judged[1], expected, reference)),
        ),
        classes=classes,
        n_judged=len(rows) - int((counts == 1).sum()) + len(test_rows),
        C=heads.C,
        top1=top1(predicted, expected) if len(expected) else None,
        top1_without=top1(predicted[clean], expected[clean]) if clean.any() else None,
        n_without=int(clean.sum()),
        notes=_notes(cache, classes, counts, options.folds, unknown),
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
            "labels: the only training image of a class cannot be held out and is not judged: "
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
