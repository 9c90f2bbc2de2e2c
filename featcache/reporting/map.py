"""The map: images as points, with their neighbours, for the page and as a figure."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DatasetError, EngineUnavailableError, text_of
from ..metrics import softmax
from ..probes.head import Head
from ..probes.knn import nearest
from ..probes.question import check_finite
from ..probes.scaling import moments
from ..progress import OnProgress, Progress
from ..store.cache import Cache, CachedSplit
from .style import COLOURS, MUTED, WIDTH, head, sheet, short

NEIGHBOURS = 10
ROLES = ("train", "test", "val")  # as points are numbered; val may be absent

_DRAW_SEED = 0
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
    """Lay the images of a cache out on a map, at most ``limit`` of them.

    Of more, a random sample that is always the same.

    Raises
    ------
    CacheCorruptError
        NaN or infinity in a feature.
    DatasetError
        Fewer than two images.
    """
    every = dict(cache.splits())
    splits: dict[str, CachedSplit] = {role: every[role] for role in ROLES if role in every}
    n_all = sum(map(len, splits.values()))
    if n_all < 2:
        raise DatasetError(f"{cache.path}: expected at least two images, found {n_all}")
    chosen = np.arange(n_all)
    if n_all > limit:
        chosen = np.sort(np.random.default_rng(_DRAW_SEED).choice(n_all, limit, replace=False))
    starts = np.cumsum([0, *map(len, splits.values())])
    bounds = np.searchsorted(chosen, starts)
    rows = {
        role: chosen[bounds[number] : bounds[number + 1]] - starts[number]
        for number, role in enumerate(splits)
    }
    for role, split in splits.items():
        check_finite(cache, role, [split.features])
    features = _pooled([split.features for split in splits.values()], list(rows.values()))
    predicted, confidence = None, None
    if head is not None:
        predicted, confidence = predict(head, features)
    k = min(NEIGHBOURS, len(chosen) - 1)
    projection = project(features, how, on_progress)
    _, neighbours = nearest(features, features, k, exclude_self=True, on_progress=on_progress)
    return Points(
        roles=np.repeat(
            np.arange(len(splits), dtype=np.uint8), [len(rows[role]) for role in splits]
        ),
        rows=np.concatenate([rows[role] for role in splits]),
        labels=np.concatenate([splits[role].labels[rows[role]] for role in splits]),
        predicted=predicted,
        confidence=confidence if calibrated else None,
        ids=tuple(splits[role].ids[row] for role in splits for row in rows[role].tolist()),
        projection=projection,
        neighbours=neighbours,
        n_all=n_all,
    )


def predict(head: Head, features: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return a head's prediction for each feature, int64 (N,), and its softmax."""
    predicted = np.empty(len(features), np.int64)
    confidence = np.empty(len(features))
    for start in range(0, len(features), _ROWS):
        part = slice(start, start + _ROWS)
        scores = head.scores(features[part])
        predicted[part] = scores.argmax(axis=1)
        confidence[part] = softmax(scores).max(axis=1)
    return predicted, confidence


def encode(points: Points, class_names: Sequence[str], thumbs: Sequence[str]) -> tuple[str, Any]:
    """Return the points as compressed JSON in base64, and `_kinds` for the boxes beside the map."""
    places = points.projection.places.astype(np.float64)
    low, span = places.min(axis=0), float(np.ptp(places, axis=0).max()) or 1.0
    margin = (span - np.ptp(places, axis=0)) / 2  # both directions to the same scale, centred
    x, y = ((places - low + margin) / span).round(4).T.tolist()  # finer than any screen
    kinds = _kinds(points, class_names)
    data = {
        "x": x,
        "y": y,
        # A file name need not be text: what cannot be shown is spelt out.
        "ids": [text_of(name) for name in points.ids],
        "kinds": {name: {**kind, "of": kind["of"].tolist()} for name, kind in kinds.items()},
        "neighbours": points.neighbours.tolist(),
        "predicted": None if points.predicted is None else points.predicted.tolist(),
        "confidence": None,
        "thumbs": thumbs,
        "plot": plot(),
    }
    if points.confidence is not None:
        data["confidence"] = np.rint(100 * points.confidence).astype(int).tolist()
    text = json.dumps(data, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode(), kinds


def _kinds(points: Points, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what points can be told apart by: names, the one of each point, looks, counts."""
    none = _look(_own("--fc-muted"), "circle", 130)
    n_classes = len(class_names)
    kinds: dict[str, dict[str, Any]] = {
        "class": {
            "title": "Class",
            "names": [*map(str, class_names), "no label"],
            "of": np.where(points.labels < 0, n_classes, points.labels),
            "looks": [*map(class_look, range(n_classes)), none],
        }
    }
    if points.predicted is not None:
        kinds["verdict"] = {
            "title": "Prediction",
            "names": ["correct", "wrong", "no label"],
            "of": np.where(points.labels < 0, 2, points.predicted != points.labels),
            "looks": [
                _look(_own("--fc-6"), "circle", 130),
                _look(_own("--fc-2"), "triangle", 200),
                none,
            ],
        }
    kinds["split"] = {
        "title": "Split",
        "names": list(ROLES),
        "of": points.roles,
        "looks": [
            _look(_own("--fc-1"), "circle", 130),
            _look(_own("--fc-5"), "square"),
            _look(_own("--fc-3"), "triangle"),
        ],
    }
    if not (points.roles == ROLES.index("val")).any():
        for part in ("names", "looks"):
            kinds["split"][part].pop()
    for kind in kinds.values():
        kind["counts"] = np.bincount(kind["of"].astype(int), minlength=len(kind["names"])).tolist()
        kind["of"] = kind["of"].astype(int)
    return kinds


def _own(variable: str) -> list[str]:
    """Return a colour of the page, on light and on dark."""
    return [scheme[variable] for scheme in COLOURS.values()]


def _look(colours: list[str], marker: str, opacity: int = 255) -> dict[str, Any]:
    return {"colours": colours, "marker": marker, "opacity": opacity, "sign": MARKERS[marker][1]}


def class_look(label: int) -> dict[str, Any]:
    """Return a class's colours on light and on dark, and its marker.

    Colours after the eighth are the first ones again, darker; the marker changes every eight
    classes.
    """
    colours = _own(f"--fc-{1 + label % 8}")
    if label >= 8:
        darkest = (COLOURS["light"]["--fc-text"], COLOURS["dark"]["--fc-surface"])
        colours = [_mixed(*pair) for pair in zip(colours, darkest, strict=True)]
    return _look(colours, list(MARKERS)[label // 8 % len(MARKERS)])


def _mixed(colour: str, other: str) -> str:
    pairs = ((int(own[at : at + 2], 16) for own in (colour, other)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(0.6 * one + 0.4 * two):02x}" for one, two in pairs)


def plot() -> dict[str, Any]:
    """Return, as JSON types, a square Bokeh plot whose points are yet to come.

    ``dots`` has x and y from 0 to 1, c (RGBA in one number) and m (a marker); ``rings`` and
    ``lines`` mark the selected image and its neighbours. Without WebGL, Bokeh draws a tenth of
    the points while they move.
    """
    from bokeh.embed import json_item
    from bokeh.models import ColumnDataSource, PanTool, Range1d, WheelZoomTool
    from bokeh.plotting import figure

    def whole() -> Range1d:
        return Range1d(start=-0.02, end=1.02, bounds=(-1.0, 2.0), min_interval=0.002)

    def source(*names: str) -> ColumnDataSource:
        return ColumnDataSource({name: [] for name in names})

    made = figure(
        sizing_mode="stretch_both",
        output_backend="webgl",
        tools=[PanTool(), WheelZoomTool()],
        toolbar_location=None,
        x_range=whole(),
        y_range=whole(),
        x_axis_type=None,
        y_axis_type=None,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        min_border=0,
        lod_timeout=150,
    )
    made.grid.visible = False
    looks: dict[str, Any] = {"color": "c", "marker": "m", "line_color": None, "fill_alpha": 0.7}
    made.scatter("x", "y", size=4, source=source("x", "y", "c", "m"), name="dots", **looks)
    ends = {name: name for name in ("x0", "y0", "x1", "y1")}
    made.segment(**ends, source=source(*ends), name="lines", line_alpha=0.45)
    rings: dict[str, Any] = {"fill_color": None, "line_width": 1.6, "size": "s"}
    made.scatter("x", "y", source=source("x", "y", "s"), name="rings", **rings)
    return dict(json_item(made))


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
    """Raise EngineUnavailableError if UMAP is asked for and not installed."""
    if how == "umap":
        _import_umap()


def project(features: np.ndarray, how: str, on_progress: OnProgress) -> Projection:
    """Project features (N, D) onto the plane; the same features give the same map.

    Parameters
    ----------
    features : numpy.ndarray
        (N, D), finite.
    how : str
        ``"pca"``: the two directions of largest variance, each signed so that its largest
        weight is positive. ``"umap"``: of the first 50 of them, by cosine, with seed 0.
    on_progress : callable
        Called with the rows done.

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
            f"The first two principal components of the features: {100 * sum(shares):.0f} % of "
            "their variance. Nearest neighbours are those in all dimensions, not on the map.",
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
        "UMAP of the features. It keeps neighbours together; sizes of clusters and distances "
        "between them mean little.",
    )


def _import_umap() -> Any:
    try:
        import umap
    except ImportError as error:
        raise EngineUnavailableError(
            f"--map umap: expected the package umap-learn, found: {error}; type: pip install "
            "'featcache[umap]', or use --map pca"
        ) from None
    return umap


# Bokeh's name, the sign in a list, and matplotlib's.
MARKERS = {
    "circle": ("o", "●"),
    "square": ("s", "■"),
    "triangle": ("^", "▲"),
    "diamond": ("D", "◆"),
    "inverted_triangle": ("v", "▼"),
    "hex": ("h", "⬢"),
}
_NAMED = 24  # classes that a legend has room for


def draw_map(points: Points, class_names: Sequence[str], dataset: str) -> Any:
    """Return the map as a matplotlib figure, coloured by class as on the page."""
    from matplotlib.lines import Line2D

    places = points.projection.places
    with sheet(WIDTH, WIDTH + 1.1) as figure:
        head(figure, f"Map of the features: {short(dataset, 40)}", points.projection.said)
        axes = figure.add_subplot()
        # In an order in which no class lies on top of the others.
        order = np.random.default_rng(_SEED).permutation(len(places))
        size = max(1.0, min(16.0, 2e4 / len(places)))
        looks = [class_look(label) for label in range(len(class_names))]
        markers = [*(look["marker"] for look in looks), None]  # the last, also -1, has no label
        for marker, (sign, _) in MARKERS.items():
            chosen = [at for at in order if markers[points.labels[at]] == marker]
            colours = [looks[label]["colours"][0] for label in points.labels[chosen]]
            axes.scatter(*places[chosen].T, s=size, c=colours, marker=sign, alpha=0.6, linewidth=0)
        unlabelled = points.labels < 0
        axes.scatter(*places[unlabelled].T, s=size, c=MUTED, alpha=0.6, linewidth=0)
        axes.set(aspect="equal", xticks=(), yticks=())
        axes.set_xlabel(points.projection.axes[0])
        axes.set_ylabel(points.projection.axes[1])
        axes.grid(False)
        if len(class_names) <= _NAMED:
            handles = [
                Line2D(
                    [], [], ls="", ms=4, color=look["colours"][0], marker=MARKERS[look["marker"]][0]
                )
                for look in looks
            ]
            place = {"loc": "outside lower center", "ncols": 5, "frameon": False, "fontsize": 8}
            legend = figure.legend(handles, list(map(str, range(len(handles)))), **place)
            # Set afterwards: a legend leaves out names that begin with an underscore.
            for text, name in zip(legend.get_texts(), class_names, strict=True):
                text.set_text(short(name, 14))
    return figure
