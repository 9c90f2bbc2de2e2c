"""Labels beside what they name, spread so that none lies on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._names import Name, put
from ._style import MUTED, TEXT, size_of, text_width

__all__ = [
    "LABEL_COLUMNS",
    "MOST_LABELS",
    "SIZE",
    "STEP",
    "Label",
    "column_width",
    "label_column",
    "spread",
]

MOST_LABELS = 40  # of a panel: more would be a tall page of words
LABEL_COLUMNS = 38
SIZE = 8.5
STEP = 1.35 * SIZE  # points from one label to the next
_LEAD = 14.0  # points from the axes to the labels
_GAP = 5.0  # points from a value to the name after it


@dataclass(frozen=True)
class Label:
    """What a point is called.

    Parameters
    ----------
    x, y : float
        The point, in the coordinates of its axes.
    name : Name
        What it is called.
    value : str
        A figure, before the name.
    colour : str
        Of the line from the one to the other.
    """

    x: float
    y: float
    name: Name
    value: str = ""
    colour: str = MUTED


def spread(wanted: Sequence[float], step: float, low: float, high: float) -> np.ndarray:
    """Return places as near to those wanted as they can be that keep their distance.

    The sum of squared displacements is least: with ``step`` times its rank taken off,
    each place must be no lower than the one before, which is isotonic regression.

    Parameters
    ----------
    wanted : sequence of float
        In any order.
    step : float
        The least distance between two places.
    low, high : float
        Between which all lie where there is room; else they begin at ``low``.

    Returns
    -------
    numpy.ndarray
        float64, in the order of ``wanted``.
    """
    from sklearn.isotonic import isotonic_regression

    places = np.array(wanted, np.float64)
    if not len(places):
        return places
    order = np.argsort(places, kind="stable")
    ranks = step * np.arange(len(places))
    fitted = isotonic_regression(places[order] - ranks)
    fitted = np.clip(fitted, low, max(low, high - ranks[-1]))
    places[order] = fitted + ranks
    return places


def column_width(labels: Sequence[Label]) -> float:
    """Return the points that labels take beside the axes."""
    names = (text_width(label.name.drawn, SIZE) for label in labels)
    return _value_width(labels) + max(names, default=0.0) + 2


def label_column(axes: Any, labels: Sequence[Label]) -> None:
    """Write labels beside axes that are laid out, a line from each to its point.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        To the right of which there is room for `column_width`.
    labels : sequence of Label
        Of points within the axes.
    """
    width, height = size_of(axes)
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((label.x, label.y))[1]) * height for label in labels]
    places = spread(wanted, STEP, SIZE / 2, height - SIZE / 2) / height
    start = 1 + _value_width(labels) / width
    for label, place in zip(labels, places.tolist(), strict=True):
        values_width = text_width(label.value, SIZE) + _GAP if label.value else 0.0
        axes.annotate(
            "",
            xy=(label.x, label.y),
            xytext=(start - (values_width + 3) / width, place),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkB": 5},
            annotation_clip=False,
            zorder=1,
        ).set_in_layout(False)
        looks = {"va": "center", "size": SIZE, "in_layout": False, "transform": axes.transAxes}
        put(axes.text(start, place, "", color=TEXT, **looks), label.name)
        x = start - _GAP / width
        axes.text(x, place, label.value, color=MUTED, ha="right", parse_math=False, **looks)


def _value_width(labels: Sequence[Label]) -> float:
    """Return the points from the axes to the names."""
    values = (text_width(label.value, SIZE) + _GAP for label in labels if label.value)
    return _LEAD + max(values, default=0.0)
