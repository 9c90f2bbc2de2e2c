"""The labels of a cache on trial: which images take part, and what is said about the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..metrics import top1
from ..probes import Features, Rows
from ..progress import OnProgress
from ..store import Cache
from ._labels import Doubts, doubts, fit_heads, thresholds_of

__all__ = ["Judgement", "judge"]

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
