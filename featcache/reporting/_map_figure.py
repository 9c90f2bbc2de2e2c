"""The map as a picture, for paper and for where no script runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from ..figures._head import head
from ..figures._names import as_name, put
from ..figures._style import MUTED, SERIES, TEXT, WIDTH, sheet
from ._points import Points

__all__ = ["MARKERS", "draw_map"]

MARKERS = "os^Dvh"
_NAMED = 24  # classes that a legend has room for
_SEED = 0


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
