"""Bars with names: the accuracy of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import FeatcacheError
from ._data import as_recalls, percent
from ._head import head
from ._labels import SIZE, STEP
from ._names import Name, as_name, set_ticks
from ._style import MUTED, SERIES, SURFACE, WIDTH, sheet

__all__ = ["bars", "draw_per_class", "per_class", "per_class_height"]

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
