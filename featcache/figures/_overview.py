"""A probe on one sheet: its penalty, its classes, its mistakes, its confidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FeatcacheError
from ._bars import draw_per_class, per_class_height
from ._confusion import confusion_height, draw_confusion
from ._curves import PATH_HEIGHT, draw_path
from ._data import as_recalls, field, percent
from ._head import head
from ._names import as_name
from ._reliability import draw_reliability, reliability_height
from ._style import WIDTH, sheet

if TYPE_CHECKING:
    from ..probing import ProbeResult

__all__ = ["probe_overview"]


def probe_overview(
    result: ProbeResult | Mapping[str, Any],
    class_names: Sequence[str],
    *,
    width: float = 2 * WIDTH,
) -> Any:
    """Draw what there is to see of a probe, in two columns.

    Parameters
    ----------
    result : ProbeResult or mapping
        Or a probe's record. What it has not, a sweep where the penalty was given, or
        a matrix of more than 100 classes, is left out.
    class_names : sequence of str
        K names.
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
        `regularisation_path`, `reliability`, `confusion` and `per_class`.

    Raises
    ------
    EngineUnavailableError
        matplotlib is not installed.
    ShapeMismatchError
        Names and classes do not fit together.
    FeatcacheError
        There is nothing to see.
    """
    column = width / 2
    columns = _shared_out(_panels(result, class_names, column))
    low, high = field(result, "top1_interval")
    with sheet(width, 0.5 + max(sum(tall for tall, _ in part) for part in columns)) as figure:
        name = as_name(Path(str(field(result, "cache"))).stem, 60)
        found = f"top-1 {percent(field(result, 'top1'))} ({percent(low)} to {percent(high)})"
        head(figure, "Linear probe of " + name + f": {found}")
        parts = figure.subfigures(1, len(columns), squeeze=False)[0]
        for part, drawers in zip(parts, columns, strict=True):
            ratios = [tall for tall, _ in drawers]
            places = part.subfigures(len(drawers), 1, height_ratios=ratios, squeeze=False)
            for place, (_, drawer) in zip(places[:, 0], drawers, strict=True):
                drawer(place)
    return figure


_Panel = tuple[float, Callable[[Any], None]]  # inches high, and what draws it


def _panels(
    result: ProbeResult | Mapping[str, Any], class_names: Sequence[str], width: float
) -> list[_Panel]:
    """Return the panels that there is something to put into."""
    found = field(result, "evaluation")
    sweep, counts = field(result, "sweep"), np.asarray(field(found, "confusion", ()))
    recalls = as_recalls(field(found, "per_class_accuracy", ()), class_names)
    bins = field(found, "reliability", ())
    panels: list[_Panel] = []
    if counts.size:
        tall = confusion_height(class_names, width)
        panels.append((tall, lambda panel: draw_confusion(panel, counts, class_names)))
    if recalls.size:
        tall = per_class_height(len(recalls))
        panels.append((tall, lambda panel: draw_per_class(panel, recalls, class_names)))
    if bins:
        panels.append((reliability_height(width), lambda panel: draw_reliability(panel, bins)))
    if sweep:
        metric = str(field(result, "metric", "top1"))
        panels.append((PATH_HEIGHT, lambda panel: draw_path(panel, sweep, metric)))
    if not panels:
        raise FeatcacheError(
            "probe: expected a sweep, classes or bins to draw, found none: with more than 100 "
            "classes and a given penalty there is only the top-1"
        )
    return panels


def _shared_out(panels: Sequence[_Panel]) -> list[list[_Panel]]:
    """Put each panel, the tallest first, into the column that is shorter so far."""
    columns: list[list[_Panel]] = [[], []]
    for panel in sorted(panels, key=lambda panel: -panel[0]):
        min(columns, key=lambda column: sum(tall for tall, _ in column)).append(panel)
    return [column for column in columns if column]
