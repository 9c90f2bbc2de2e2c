"""The images of a cache as points: where they lie, what is said of them, who is near them."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..errors import DatasetError, EngineUnavailableError
from ..metrics import softmax
from ..probes.head import Head
from ..probes.knn import nearest
from ..probes.labelled import check_finite
from ..probes.scaling import moments
from ..progress import OnProgress, Progress
from ..store.cache import Cache, CachedSplit
from .names import as_name, head, put
from .style import MUTED, SERIES, TEXT, WIDTH, sheet

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


MAPS = ("pca", "umap")

_REDUCED = 50  # dimensions that UMAP searches its neighbours in: as exact, and many times faster
_NEIGHBOURS = 15  # umap-learn's own choice
_SEED = 0


@dataclass(frozen=True)
class Projection:
    """Where each image lies on the map.

    Parameters
    ----------
    places : numpy.ndarray
        float32 (N, 2).
    axes : tuple of 2 str
        What the two directions are, for a person.
    said : str
        How the map was made, in a sentence.
    """

    places: np.ndarray
    axes: tuple[str, str]
    said: str


def require_map(how: str) -> None:
    """Find out before the long work that there is something to make the map with.

    Raises
    ------
    EngineUnavailableError
        UMAP was asked for, and umap-learn is not installed.
    """
    if how == "umap":
        _import_umap()


def project(features: np.ndarray, how: str, on_progress: OnProgress) -> Projection:
    """Lay features (N, D) out in the plane; the same features always lie the same.

    Parameters
    ----------
    features : numpy.ndarray
        (N, D), finite.
    how : str
        ``"pca"``: the two directions of largest variance, each signed so that its largest
        weight is positive. ``"umap"``: of the first 50 of them, by cosine, with seed 0.
    on_progress : callable
        Hears of rows.

    References
    ----------
    McInnes, Healy and Melville, "UMAP: uniform manifold approximation and projection for
    dimension reduction" (2018), arXiv:1802.03426.
    """
    n = len(features)
    on_progress(Progress(f"map ({how})", 0, n))
    shares, components = _components(features, 2 if how == "pca" else _REDUCED)
    if how == "pca":
        axes = [
            f"component {number}, {100 * share:.1f} %" for number, share in enumerate(shares, 1)
        ]
        found = Projection(
            components,
            (axes[0], axes[1]),
            f"The two directions in which the features vary most: {100 * sum(shares):.0f} % of "
            "their variance. Distances on the map leave the rest out; the nearest neighbours do "
            "not.",
        )
    else:
        found = _umap(components)
    on_progress(Progress(f"map ({how})", n, n))
    return found


def _components(features: np.ndarray, count: int) -> tuple[list[float], np.ndarray]:
    """Return shares of the variance, and float32 (N, count): at least two, though empty ones."""
    measured = moments([features])
    count = max(2, min(count, features.shape[1]))
    directions = np.zeros((features.shape[1], count))
    variances = np.zeros(count)
    kept = min(count, features.shape[1])
    directions[:, :kept] = measured.directions[:, ::-1][:, :kept]
    variances[:kept] = measured.variances[::-1][:kept]
    largest = np.abs(directions).argmax(axis=0)
    directions *= np.where(directions[largest, np.arange(count)] < 0, -1, 1)
    weights = directions.astype(np.float32)
    shift = (measured.mean @ directions).astype(np.float32)
    total = float(measured.variances.sum())
    places = np.asarray(features, np.float32) @ weights - shift
    return [float(value) / total if total else 0.0 for value in variances], places


def _umap(components: np.ndarray) -> Projection:
    n = len(components)
    if n <= _NEIGHBOURS:  # fewer than its graph needs
        places = np.ascontiguousarray(components[:, :2])
    else:
        reducer = _import_umap().UMAP(
            n_neighbors=_NEIGHBOURS, metric="cosine", random_state=_SEED, n_jobs=1
        )
        places = np.asarray(reducer.fit_transform(components), np.float32)
    return Projection(
        places,
        ("UMAP 1", "UMAP 2"),
        "UMAP of the features: what is near stays near. The sizes of clusters and the gaps "
        "between them mean little.",
    )


def _import_umap() -> Any:
    try:
        import umap
    except ImportError as error:
        raise EngineUnavailableError(
            f"--map umap: expected the package umap-learn, found: {error}; type: pip install "
            "'featcache[umap]', or take --map pca"
        ) from None
    return umap


MARKERS = "os^Dvh"
_NAMED = 24  # classes that a legend has room for


def draw_map(points: Points, class_names: Sequence[str], dataset: str) -> Any:
    """Draw the points of a map, coloured by class; colours and markers are the page's.

    Parameters
    ----------
    points : Points
        What to draw.
    class_names : sequence of str
        K names.
    dataset : str
        For the title.

    Returns
    -------
    matplotlib.figure.Figure
    """
    places = points.projection.places
    with sheet(WIDTH, WIDTH + 1.1) as figure:
        head(figure, "Map of the features: " + as_name(dataset, 40), points.projection.said)
        axes = figure.add_subplot()
        # In an order in which no class lies on top of the others.
        order = np.random.default_rng(_SEED).permutation(len(places))
        size = max(1.0, min(16.0, 2e4 / len(places)))
        for marker in range(len(MARKERS)):
            looks = points.labels[order] // len(SERIES) % len(MARKERS)
            chosen = order[(points.labels[order] >= 0) & (looks == marker)]
            colours = [_colour(label) for label in points.labels[chosen].tolist()]
            axes.scatter(
                *places[chosen].T, s=size, c=colours, marker=MARKERS[marker], alpha=0.6, linewidth=0
            )
        unlabelled = points.labels < 0
        axes.scatter(*places[unlabelled].T, s=size, c=MUTED, alpha=0.6, linewidth=0)
        axes.set(aspect="equal", xticks=(), yticks=())
        axes.set_xlabel(points.projection.axes[0])
        axes.set_ylabel(points.projection.axes[1])
        axes.grid(False)
        if len(class_names) <= _NAMED:
            _legend(figure, class_names)
    return figure


@cache
def _colour(label: int) -> str:
    """Return a class's colour; those after the eighth are the same ones, darker."""
    from matplotlib.colors import to_hex, to_rgb

    own = to_rgb(SERIES[label % len(SERIES)])
    share = 0.45 if label >= len(SERIES) else 0.0
    mixed = np.array(own) * (1 - share) + np.array(to_rgb(TEXT)) * share
    return str(to_hex(mixed.tolist()))


def _legend(figure: Any, class_names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=MARKERS[label // len(SERIES) % len(MARKERS)],
            color=_colour(label),
            markersize=4,
            label=str(label),
        )
        for label in range(len(class_names))
    ]
    drawn = figure.legend(
        handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8
    )
    for text, name in zip(drawn.get_texts(), class_names, strict=True):
        put(text, as_name(name, 14))
