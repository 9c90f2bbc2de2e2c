"""A probe on one sheet: its penalty, its classes, its mistakes, its confidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FeatcacheError
from ..metrics import wilson_interval
from .class_figures import confusion_height, draw_confusion, draw_per_class, per_class_height
from .curve_figures import PATH_HEIGHT, draw_path
from .names import as_name, head
from .style import (
    MUTED,
    SERIES,
    SURFACE,
    WIDTH,
    as_recalls,
    count_axis,
    field,
    percent,
    percent_axis,
    sheet,
)

if TYPE_CHECKING:
    from ..metrics import ReliabilityBin
    from ..probes.probe import ProbeResult


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


def reliability(bins: Sequence[ReliabilityBin | Mapping[str, Any]], *, width: float = WIDTH) -> Any:
    """Draw how often the head is right, over how sure it is.

    Parameters
    ----------
    bins : sequence of ReliabilityBin or mapping
        What `featcache.metrics.expected_calibration_error` returned, or those of a
        probe's record.
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
        Above the accuracy in each bin, with Wilson's 95 % interval, against the diagonal;
        below how many images are in it.

    Raises
    ------
    EngineUnavailableError
        matplotlib is not installed.
    FeatcacheError
        There are no bins, or no images in them: ridge scores are no probabilities.

    References
    ----------
    Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks",
    ICML 2017, figure 1.
    """
    if not sum(field(entry, "n") for entry in bins):
        raise FeatcacheError(
            "reliability: expected bins with images, found none: the scores of this head are no "
            "probabilities, or its record is from before bins were kept"
        )
    with sheet(width, reliability_height(width)) as figure:
        draw_reliability(figure, bins)
    return figure


def reliability_height(width: float) -> float:
    """Return the inches that the diagram is high, at a width."""
    return 0.92 * width


def draw_reliability(panel: Any, bins: Sequence[ReliabilityBin | Mapping[str, Any]]) -> None:
    """Draw `reliability` into a figure or a part of one."""
    filled = [entry for entry in bins if field(entry, "n")]
    total = sum(field(entry, "n") for entry in filled)
    sure = [field(entry, "confidence") for entry in filled]
    right = [field(entry, "accuracy") for entry in filled]
    sizes = [field(entry, "n") for entry in filled]
    error = sum(n * abs(a - c) for n, a, c in zip(sizes, right, sure, strict=True)) / total
    said = f"Calibration error {percent(error)} on {total:,} test images. Below the diagonal the "
    said += "head is surer than it is right."
    head(panel, "Confidence and accuracy", said)
    cells = panel.add_gridspec(2, 1, height_ratios=(3, 1))
    above = panel.add_subplot(cells[0])
    below = panel.add_subplot(cells[1], sharex=above)
    above.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    lows, highs = zip(*map(wilson_interval, right, sizes), strict=True)
    above.vlines(sure, lows, highs, color=SERIES[0], linewidth=1.2)
    areas = [14 + 42 * n / max(sizes) for n in sizes]
    above.scatter(sure, right, areas, color=SERIES[0], edgecolor=SURFACE, linewidth=0.8, zorder=3)
    above.set(xlim=(0, 1), ylim=(0, 1))
    percent_axis(above.yaxis, "accuracy")
    above.tick_params(labelbottom=False)
    edges = [field(entry, "low") for entry in bins]
    widths = [0.92 * (field(entry, "high") - field(entry, "low")) for entry in bins]
    counts = [field(entry, "n") for entry in bins]
    below.bar(edges, counts, width=widths, align="edge", color=SERIES[0], alpha=0.55)
    below.set_ylabel("images")
    count_axis(below.yaxis, 4)
    below.grid(False)
    percent_axis(below.xaxis, "confidence")
