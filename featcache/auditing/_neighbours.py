"""Who is near whom, within and across the splits; and how far from everybody an image is.

An outlier's score is the mean cosine distance to its nearest training images, the
image itself left out.

References
----------
Sun, Ming, Zhu and Li, "Out-of-distribution detection with deep nearest neighbors", ICML
2022: the distance to the k-th neighbour of normalised features, without any assumption
about their distribution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..probes import Features, nearest
from ..progress import OnProgress, Progress

__all__ = ["Neighbours", "find_neighbours", "furthest", "outlier_scores"]


@dataclass(frozen=True)
class Neighbours:
    """The nearest of one split, for each image of another or the same.

    Parameters
    ----------
    role, among : str
        Whose neighbours, and of which split they are.
    similarity : numpy.ndarray
        float32 (M, k), in [-1, 1], the nearest first.
    rows : numpy.ndarray
        int64 (M, k).
    """

    role: str
    among: str
    similarity: np.ndarray
    rows: np.ndarray


def find_neighbours(
    train: Features, test: Features, k: int, on_progress: OnProgress
) -> tuple[Neighbours, Neighbours, Neighbours]:
    """Return the k nearest of test in train, train in train and test in test.

    Fewer than k where a split has fewer other images, and none (M, 0) where it has none.
    """
    searches = (
        ("test", test, "train", train),
        ("train", train, "train", train),
        ("test", test, "test", test),
    )
    found = []
    for role, queries, among, keys in searches:
        within = role == among
        count = min(k, max(0, len(keys) - within))

        def report(message: Progress, stage: str = f"{role} by {among}") -> None:
            on_progress(replace(message, stage=stage))

        if count and len(queries):
            pair = nearest(queries, keys, count, exclude_self=within, on_progress=report)
        else:
            shape = (len(queries), 0)
            pair = np.empty(shape, np.float32), np.empty(shape, np.int64)
        found.append(Neighbours(role, among, *pair))
    return found[0], found[1], found[2]


def outlier_scores(neighbours: Neighbours) -> np.ndarray:
    """Return 1 - the mean cosine to the neighbours: float64 (M,); NaN where there are none."""
    if not neighbours.similarity.shape[1]:
        return np.full(len(neighbours.similarity), np.nan)
    scores: np.ndarray = 1 - neighbours.similarity.mean(axis=1, dtype=np.float64)
    return scores


def furthest(
    train_scores: np.ndarray, test_scores: np.ndarray, share: float
) -> tuple[float | None, list[tuple[str, int, float]]]:
    """Return the score that a ``share`` of training images exceed, and who exceeds it.

    Returns
    -------
    limit : float or None
        None where no training image has a score.
    found : list of (split, row, score)
        The furthest first; of equals train before test, and the lower row.
    """
    if not len(train_scores) or np.isnan(train_scores).any():
        return None, []
    limit = float(np.quantile(train_scores, 1 - share))
    found = [
        (role, int(row), float(scores[row]))
        for role, scores in (("train", train_scores), ("test", test_scores))
        for row in np.flatnonzero(scores > limit)
    ]
    return limit, sorted(found, key=lambda item: -item[2])
