"""How far a head may be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import FeatcacheError
from ..metrics import wilson_interval
from ._axes import count_axis, percent_axis
from ._data import field, percent
from ._head import head
from ._style import MUTED, SERIES, SURFACE, WIDTH, sheet

if TYPE_CHECKING:
    from ..metrics import ReliabilityBin

__all__ = ["draw_reliability", "reliability", "reliability_height"]


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
