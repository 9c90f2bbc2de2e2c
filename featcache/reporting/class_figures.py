"""Bars with names: the accuracy of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import FeatcacheError
from .names import SIZE, STEP, Name, as_name, head, set_ticks
from .style import (
    MUTED,
    SERIES,
    SURFACE,
    TEXT,
    WIDTH,
    as_recalls,
    check_shape,
    percent,
    sheet,
    size_of,
    text_width,
)

_LISTED = 40  # classes up to which every one has its bar
_WORST, _BEST = 20, 10


def per_class(recalls: Any, class_names: Sequence[str], *, width: float = WIDTH) -> Any:
    """Draw the accuracy of every class as bars, the best first.

    Parameters
    ----------
    recalls : sequence of float or None, or numpy.ndarray
        (K,): `Evaluation.per_class_accuracy`. None or NaN for a class without test images.
    class_names : sequence of str
        K names.
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
        Above 40 classes the best 10 and the worst 20.

    Raises
    ------
    EngineUnavailableError
        matplotlib is not installed.
    ShapeMismatchError
        Accuracies and names do not fit together.
    FeatcacheError
        There are none: an evaluation keeps those of at most 100 classes.
    """
    values = as_recalls(recalls, class_names)
    if values.size == 0:
        raise FeatcacheError(
            "per class: expected accuracies, found none: an evaluation keeps those of at most 100 "
            "classes"
        )
    with sheet(width, per_class_height(len(values))) as figure:
        draw_per_class(figure, values, class_names)
    return figure


def per_class_height(n_classes: int) -> float:
    """Return the inches that the bars of so many classes are high."""
    return 1.0 + (min(n_classes, _WORST + _BEST + 1) if n_classes > _LISTED else n_classes) * (
        1.15 * STEP / 72
    )


def draw_per_class(panel: Any, values: np.ndarray, class_names: Sequence[str]) -> None:
    """Draw `per_class` into a figure or a part of one."""
    order = np.argsort(-np.where(np.isnan(values), -1, values), kind="stable")
    seen = int(np.count_nonzero(~np.isnan(values)))
    mean = float(np.nanmean(values)) if seen else float("nan")
    said = f"The mean of {seen:,} classes, balanced accuracy, is {percent(mean)}." if seen else ""
    cut = len(values) > _LISTED
    if cut:
        said += f" Below are the best {_BEST} and the worst {_WORST}."
        order = np.concatenate((order[:_BEST], order[seen - _WORST : seen]))
    head(panel, "Accuracy of each class", said)
    axes = panel.add_subplot()
    names = [as_name(class_names[index], 22) for index in order]
    places = bars(axes, values[order].tolist(), names, SERIES[0], gap_at=_BEST if cut else None)
    axes.axvline(mean, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1.12)
    axes.set_ylim(max(places) + 0.6, -0.6)


def bars(
    axes: Any,
    values: Sequence[float],
    names: Sequence[Name],
    colour: str,
    gap_at: int | None = None,
) -> list[float]:
    """Draw named bars from the top down, each with its percentage; return their places."""
    places = [
        float(number + (gap_at is not None and number >= gap_at)) for number in range(len(values))
    ]
    axes.barh(places, np.nan_to_num(values), height=0.72, color=colour, alpha=0.85)
    for place, value in zip(places, values, strict=True):
        said = "no test image" if np.isnan(value) else percent(value)
        axes.annotate(
            said,
            (np.nan_to_num(value), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            size=SIZE - 0.5,
            color=MUTED,
            bbox={"facecolor": SURFACE, "edgecolor": "none", "pad": 0.8},
        )
    set_ticks(axes.yaxis, places, names)
    axes.grid(False)
    axes.invert_yaxis()
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(bottom=False, labelbottom=False)
    return places


_NUMBERED = 12  # classes up to which each cell says its percentage
_NAMED = 30  # up to which both sides of the matrix have names
_DRAWN = 100  # up to which there is a matrix at all: cells of more are specks
_WIDEST = 0.9  # inches of a cell
_PAIRS = 15
_PAIRS_POINTS = (_PAIRS + 3) * STEP
_LEVELS = 24  # of shade; each is one path, however many cells it has


def confusion(matrix: Any, class_names: Sequence[str], *, width: float = WIDTH) -> Any:
    """Draw what images of each class are taken for.

    Parameters
    ----------
    matrix : array_like
        int (K, K): label by prediction, as `featcache.metrics.confusion_matrix` counts.
    class_names : sequence of str
        K names.
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
        Up to 30 classes the matrix with their names; up to 100 the matrix, and below it
        the pairs that are confused most; above 100 these pairs alone.

    Raises
    ------
    EngineUnavailableError
        matplotlib is not installed.
    ShapeMismatchError
        Matrix and names do not fit together.
    FeatcacheError
        The matrix is empty: an evaluation keeps those of at most 100 classes.
    """
    counts = np.asarray(matrix)
    if counts.size == 0:
        raise FeatcacheError(
            "confusion: expected counts, found none: an evaluation keeps those of at most 100 "
            "classes"
        )
    check_shape(counts.shape, (len(class_names),) * 2, "confusion")
    with sheet(width, confusion_height(class_names, width)) as figure:
        draw_confusion(figure, counts, class_names)
    return figure


def confusion_height(class_names: Sequence[str], width: float) -> float:
    """Return the inches that the confusion of these classes is high, at a width."""
    n_classes = len(class_names)
    height = 0.7
    if n_classes <= _DRAWN:
        beside = max(text_width(name.drawn, SIZE) for name in _label_names(class_names))
        below = max(text_width(name.drawn, SIZE) for name in _prediction_names(class_names))
        height += min(width - (beside + 35) / 72, _WIDEST * n_classes) + (below + 25) / 72
    if n_classes > _NAMED:
        height += _PAIRS_POINTS / 72
    return height


def _label_names(class_names: Sequence[str]) -> list[Name]:
    return [as_name(name if len(class_names) <= _NAMED else "", 18) for name in class_names]


def _prediction_names(class_names: Sequence[str]) -> list[Name]:
    return [as_name(name if len(class_names) <= _NAMED else "", 14) for name in class_names]


def draw_confusion(panel: Any, counts: np.ndarray, class_names: Sequence[str]) -> None:
    """Draw `confusion` into a figure or a part of one."""
    n_classes = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = shares * ~np.eye(n_classes, dtype=bool)
    worst = float(wrong.max())
    right = np.trace(counts) / max(counts.sum(), 1)
    said = f"{percent(right)} of {counts.sum():,} test images are recognised."
    if not worst:
        said += " No class is taken for another."
    elif n_classes <= _DRAWN:
        said += " Blue: recognised. Orange: taken for another class, darkest at "
        said += f"{percent(worst)} of the images of a class."
    else:
        said += f" A matrix of {n_classes:,} classes is too fine to be drawn: below are the pairs "
        said += "that are confused most."
    head(panel, "What is taken for what", said)
    above = below = panel
    if _NAMED < n_classes <= _DRAWN:  # apart, so that the names of one do not narrow the other
        height = size_of(panel)[1]
        above, below = panel.subfigures(2, 1, height_ratios=(height - _PAIRS_POINTS, _PAIRS_POINTS))
    if n_classes <= _DRAWN:
        _draw_matrix(above.add_subplot(), shares, wrong, worst, class_names)
    if n_classes > _NAMED:
        _draw_pairs(below.add_subplot(), wrong, class_names)


def _draw_matrix(
    axes: Any, shares: np.ndarray, wrong: np.ndarray, worst: float, class_names: Sequence[str]
) -> None:
    n_classes = len(shares)
    _shade(axes, np.diag(np.diag(shares)), SERIES[0])
    _shade(axes, wrong / worst if worst else wrong, SERIES[1])
    axes.set(
        xlim=(-0.5, n_classes - 0.5), ylim=(n_classes - 0.5, -0.5), aspect="equal", anchor="NW"
    )
    axes.grid(False)
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(True)
        axes.spines[side].set_color(MUTED)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    if n_classes <= _NAMED:
        places = range(n_classes)
        upright = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
        set_ticks(axes.yaxis, places, _label_names(class_names))
        set_ticks(axes.xaxis, places, _prediction_names(class_names), **upright)
    if n_classes <= _NUMBERED:
        for row, column in zip(*np.nonzero(shares > 0.005), strict=True):
            share = shares[row, column]
            deep = share if row == column else share / worst
            axes.text(
                column,
                row,
                f"{100 * share:.0f}",
                ha="center",
                va="center",
                size=SIZE - max(0, n_classes - 8) * 0.3,
                color=SURFACE if deep > 0.75 else TEXT,
            )


def _shade(axes: Any, strengths: np.ndarray, colour: str) -> None:
    """Fill cells with a colour, each as opaque as its strength in [0, 1]."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    levels = np.ceil(strengths * _LEVELS).astype(int)
    for level in np.unique(levels[levels > 0]).tolist():
        rows, columns = np.nonzero(levels == level)
        corners = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5)]
        vertices = np.stack((columns, rows), axis=1)[:, None] + np.array(corners)
        codes = np.tile([Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY], len(rows))
        path = Path(vertices.reshape(-1, 2), codes)
        axes.add_patch(
            PathPatch(path, facecolor=colour, alpha=level / _LEVELS, linewidth=0, zorder=1)
        )


def _draw_pairs(axes: Any, wrong: np.ndarray, class_names: Sequence[str]) -> None:
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    pairs = [divmod(int(place), len(wrong)) for place in order]
    pairs = [pair for pair in pairs if wrong[pair] > 0]
    names = [
        as_name(class_names[label], 16) + " → " + as_name(class_names[taken], 16)
        for label, taken in pairs
    ]
    shares = [float(wrong[pair]) for pair in pairs]
    axes.set_title("Confused most, of the images of the first", loc="left", size=9, color=MUTED)
    bars(axes, shares, names, SERIES[1])
    if not pairs:
        axes.text(0.5, 0.5, "no mistake", ha="center", transform=axes.transAxes, color=MUTED)
