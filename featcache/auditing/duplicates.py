"""Near-duplicates (pairs of images with a high cosine, and their groups) and outliers.

Only the nearest images of each image are compared. A larger set of copies is connected through
them. Barz and Denzler, "Do we train on test data? Purging CIFAR of near-duplicates", Journal of
Imaging 6 (2020), find candidates by the cosine of a network's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..probes.blocks import Features, each_block
from ..probes.knn import nearest
from ..progress import OnProgress, Progress

_COPY_SHARE = 0.065  # a cosine of 0.95 on CIFAR-10, where docs/audit.md has the measurement
_ROUNDING = 1e-5  # between the cosine of equal images and 1, float16 features included

_Edge = tuple[int, int, float]  # two nodes and their cosine


@dataclass(frozen=True)
class Copies:
    """Near-duplicates by node number: training rows first, test rows from n_train on."""

    pairs: list[_Edge]  # in the order of the listing
    groups: list[list[int]]  # nodes, ascending, in the order of group numbers
    n_crossing: int  # the first n_crossing pairs are test images with a near-duplicate in train


def copy_threshold(features: Features) -> float:
    """Return the least cosine of near-duplicates for features (N, D).

    Cosines of a network's features crowd at 1 where its images are all alike. So 1 - cosine is
    compared with its mean over all pairs: 1 minus the squared norm of the mean unit vector.
    """

    def of_block(features: Features, rows: slice) -> np.ndarray:
        block = np.asarray(features[rows], np.float32)
        norms = np.linalg.norm(block, axis=1, keepdims=True)
        unit: np.ndarray = (block / np.where(norms > 0, norms, 1)).sum(axis=0, dtype=np.float64)
        return unit

    total = sum(each_block([features], of_block, 2 * features.shape[1]), np.zeros(1))
    mean = float(np.square(total / max(1, len(features))).sum())
    return 1 - max(_COPY_SHARE * (1 - mean), _ROUNDING)


def find_copies(
    crossing: Neighbours, train: Neighbours, test: Neighbours, threshold: float
) -> Copies:
    """Return near-duplicates among test in train, train in train and test in test."""
    n_train = len(train.similarity)
    near = crossing.similarity >= threshold
    rows, places = np.nonzero(near)
    across = (rows + n_train, crossing.rows[rows, places], crossing.similarity[rows, places])
    edges: list[_Edge] = list(zip(*(part.tolist() for part in across), strict=True))
    nearest = np.flatnonzero(near[:, :1].any(axis=1))
    order = nearest[np.argsort(-crossing.similarity[nearest, :1].ravel(), kind="stable")]
    pairs = [
        (row + n_train, int(crossing.rows[row, 0]), float(crossing.similarity[row, 0]))
        for row in order.tolist()
    ]
    for within, offset in ((train, 0), (test, n_train)):
        tree, _ = _forest(_edges(within, threshold, offset))
        edges += tree
        pairs += tree

    def rank(group: list[int]) -> tuple[bool, int, int]:
        both = group[0] < n_train <= group[-1]
        return not both, -len(group), group[0]

    return Copies(pairs, sorted(_forest(edges)[1], key=rank), len(order))


def _edges(within: Neighbours, threshold: float, offset: int) -> list[_Edge]:
    """Return each pair of one split once, the lower row first, the closest pairs first."""
    rows, places = np.nonzero(within.similarity >= threshold)
    others, values = within.rows[rows, places], within.similarity[rows, places]
    first, second = np.minimum(rows, others), np.maximum(rows, others)
    order = np.lexsort((second, first, -values))
    listed: dict[tuple[int, int], float] = {}
    for low, high, value in zip(
        *(part[order].tolist() for part in (first, second, values)), strict=True
    ):
        listed.setdefault((low + offset, high + offset), value)  # each may be the other's neighbour
    return [(low, high, value) for (low, high), value in listed.items()]


def _forest(edges: Sequence[_Edge]) -> tuple[list[_Edge], list[list[int]]]:
    """Return the edges that connect all nodes first, n - 1 of n (Kruskal 1956), and its trees."""
    from scipy.cluster.hierarchy import DisjointSet

    sets = DisjointSet(node for edge in edges for node in edge[:2])
    tree = [edge for edge in edges if sets.merge(edge[0], edge[1])]
    return tree, [sorted(nodes) for nodes in sets.subsets()]


@dataclass(frozen=True)
class Neighbours:
    """The nearest images, the nearest first: cosines float32 (M, k) and rows int64 (M, k)."""

    similarity: np.ndarray
    rows: np.ndarray


def find_neighbours(
    train: Features, test: Features, k: int, on_progress: OnProgress
) -> tuple[Neighbours, Neighbours, Neighbours]:
    """Return the nearest, at most k, of test in train, train in train and test in test."""
    searches = (
        ("test", test, "train", train),
        ("train", train, "train", train),
        ("test", test, "test", test),
    )
    results = []
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
        results.append(Neighbours(*pair))
    return results[0], results[1], results[2]


def outlier_scores(neighbours: Neighbours) -> np.ndarray:
    """Return 1 - the mean cosine to the neighbours: float64 (M,); NaN where there are none."""
    if not neighbours.similarity.shape[1]:
        return np.full(len(neighbours.similarity), np.nan)
    scores: np.ndarray = 1 - neighbours.similarity.mean(axis=1, dtype=np.float64)
    return scores


def furthest(
    train_scores: np.ndarray, test_scores: np.ndarray, share: float
) -> tuple[float | None, list[tuple[str, int, float]]]:
    """Return the score that a ``share`` of training images exceed, or None, and the images above.

    Images are (split, row, score), the highest score first.
    """
    if not len(train_scores) or np.isnan(train_scores).any():
        return None, []
    limit = float(np.quantile(train_scores, 1 - share))
    above = [
        (role, int(row), float(scores[row]))
        for role, scores in (("train", train_scores), ("test", test_scores))
        for row in np.flatnonzero(scores > limit)
    ]
    return limit, sorted(above, key=lambda item: -item[2])
