"""The images of a cache as points: where they lie, what is said of them, who is near them."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DatasetError
from ..labelled import check_finite
from ..metrics import softmax
from ..probes import Head, nearest
from ..progress import OnProgress
from ..store import Cache, CachedSplit
from ._projection import Projection, project

__all__ = ["NEIGHBOURS", "Points", "encode", "gather_points"]

NEIGHBOURS = 10
ROLES = ("train", "test")

_DRAW_SEED = 0
_STEPS = 65535  # of a coordinate: finer than any screen
_ROWS = 8192


@dataclass(frozen=True, eq=False)
class Points:
    """N images of a cache on a map, those of train first.

    Parameters
    ----------
    roles : numpy.ndarray
        uint8 (N,): 0 train, 1 test.
    rows : numpy.ndarray
        int64 (N,), in the split.
    labels : numpy.ndarray
        int64 (N,), -1 for an image without one.
    predicted : numpy.ndarray or None
        int64 (N,), what the head says; None without a head.
    confidence : numpy.ndarray or None
        float64 (N,), the probability of that; None without one.
    ids : tuple of str
        N names.
    projection : Projection
        Where they lie.
    neighbours : numpy.ndarray
        int64 (N, k), the nearest points by cosine, the nearest first; k is 10 or N - 1.
    n_all : int
        Images in the cache, of which N were drawn.
    """

    roles: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray | None
    confidence: np.ndarray | None
    ids: tuple[str, ...]
    projection: Projection
    neighbours: np.ndarray
    n_all: int

    def places(self) -> list[tuple[str, int]]:
        """Return role and row of each."""
        return [
            (ROLES[role], row)
            for role, row in zip(self.roles.tolist(), self.rows.tolist(), strict=True)
        ]


def gather_points(
    cache: Cache,
    head: Head | None,
    *,
    calibrated: bool,
    how: str,
    limit: int,
    on_progress: OnProgress,
) -> Points:
    """Put the images of a cache on a map.

    Parameters
    ----------
    cache : Cache
        With features (N, D).
    head : Head or None
        What predicts their classes.
    calibrated : bool
        Whether the softmax of its scores is a probability.
    how : str
        `project`'s.
    limit : int
        Images at most; of more, a draw that is always the same.
    on_progress : callable
        Hears of the map and the neighbours.

    Raises
    ------
    CacheCorruptError
        NaN or infinity in a feature.
    DatasetError
        Fewer than two images.
    """
    n_all = len(cache.train) + len(cache.test)
    if n_all < 2:
        raise DatasetError(f"{cache.path}: expected two images at least, found {n_all}")
    chosen = np.arange(n_all)
    if n_all > limit:
        chosen = np.sort(np.random.default_rng(_DRAW_SEED).choice(n_all, limit, replace=False))
    rows = {
        "train": chosen[chosen < len(cache.train)],
        "test": chosen[chosen >= len(cache.train)] - len(cache.train),
    }
    splits: dict[str, CachedSplit] = {"train": cache.train, "test": cache.test}
    for role, split in splits.items():
        check_finite(cache, role, [split.features])
    features = _pooled([splits[role].features for role in ROLES], [rows[role] for role in ROLES])
    predicted, confidence = None, None
    if head is not None:
        predicted, confidence = said_by(head, features)
    k = min(NEIGHBOURS, len(chosen) - 1)
    projection = project(features, how, on_progress)
    _, neighbours = nearest(features, features, k, exclude_self=True, on_progress=on_progress)
    return Points(
        roles=np.repeat(np.arange(2, dtype=np.uint8), [len(rows[role]) for role in ROLES]),
        rows=np.concatenate([rows[role] for role in ROLES]),
        labels=np.concatenate([splits[role].labels[rows[role]] for role in ROLES]),
        predicted=predicted,
        confidence=confidence if calibrated else None,
        ids=tuple(splits[role].ids[row] for role in ROLES for row in rows[role].tolist()),
        projection=projection,
        neighbours=neighbours,
        n_all=n_all,
    )


def said_by(head: Head, features: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the class that a head gives to each feature, int64 (N,), and its share of softmax."""
    predicted = np.empty(len(features), np.int64)
    confidence = np.empty(len(features))
    for start in range(0, len(features), _ROWS):
        part = slice(start, start + _ROWS)
        scores = head.scores(features[part])
        predicted[part] = scores.argmax(axis=1)
        confidence[part] = softmax(scores).max(axis=1)
    return predicted, confidence


def encode(points: Points) -> dict[str, Any]:
    """Return the points in a form that a page can hold: JSON types, and one compressed block.

    Every array lies in the block as planes of bytes, the lowest first, which compress better
    than whole numbers. ``arrays`` lists name, bytes per number and count, in order; the ids
    stand behind them as UTF-8 with a zero byte between.
    """
    places = points.projection.places.astype(np.float64)
    low, span = places.min(axis=0), float(np.ptp(places, axis=0).max()) or 1.0
    margin = (span - np.ptp(places, axis=0)) / 2  # both directions to the same scale, centred
    steps = np.rint((places - low + margin) / span * _STEPS).astype(np.int64)
    arrays = {
        "x": steps[:, 0],
        "y": steps[:, 1],
        "label": points.labels + 1,  # 0: none
        "test": points.roles.astype(np.int64),
        "neighbours": points.neighbours.reshape(-1),
    }
    if points.predicted is not None:
        arrays["predicted"] = points.predicted
    if points.confidence is not None:
        arrays["confidence"] = np.rint(points.confidence * 255).astype(np.int64)
    planes, layout = [], []
    for name, values in arrays.items():
        width = max(1, (int(values.max(initial=0)).bit_length() + 7) // 8)
        planes += [(values >> 8 * byte & 255).astype(np.uint8).tobytes() for byte in range(width)]
        layout.append([name, width, len(values)])
    # A file name need not be text: what cannot be shown is spelt out.
    planes.append("\0".join(points.ids).encode("utf-8", "backslashreplace"))
    block = zlib.compress(b"".join(planes), 9)
    return {
        "n": len(points.ids),
        "k": points.neighbours.shape[1],
        "axes": list(points.projection.axes),
        "arrays": layout,
        "block": base64.b64encode(block).decode(),
    }


def _pooled(splits: list[Any], rows: list[np.ndarray]) -> np.ndarray:
    """Return the chosen rows of both splits as one float32 array."""
    dim = splits[0].shape[1]
    pooled = np.empty((sum(map(len, rows)), dim), np.float32)
    begin = 0
    for features, chosen in zip(splits, rows, strict=True):
        for start in range(0, len(chosen), _ROWS):
            part = chosen[start : start + _ROWS]
            pooled[begin : begin + len(part)] = features[part]
            begin += len(part)
    return pooled
