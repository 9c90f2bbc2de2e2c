"""Curves of a probe: accuracy over the penalty, and over the number of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import FeatcacheError
from ._axes import log_ticks, log_x, percent_axis, spaced_ticks
from ._data import field, metric_name, percent
from ._head import head
from ._style import MUTED, SERIES, SURFACE, TEXT, WIDTH, sheet, size_of

if TYPE_CHECKING:
    from ..curves import CurvePoint
    from ..probes import Sweep

__all__ = ["PATH_HEIGHT", "draw_path", "regularisation_path", "shots_curve"]

PATH_HEIGHT = 2.9  # inches
_BESIDE = 50.0  # points that the labels of y and the margins take


def regularisation_path(
    sweep: Sweep | Mapping[str, Any], *, metric: str = "top1", width: float = WIDTH
) -> Any:
    """Draw the score on the holdout over C, and which C was chosen.

    Parameters
    ----------
    sweep : Sweep or mapping
        Of a `ProbeResult`, or of a probe's record.
    metric : str
        What the sweep went by.
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
        A fit that stopped before its tolerance is a hollow mark.

    Raises
    ------
    EngineUnavailableError
        matplotlib is not installed.
    FeatcacheError
        There is no sweep, or one without points.
    """
    if not sweep or not field(sweep, "points"):
        raise FeatcacheError(
            "regularisation path: expected the points of a sweep, found none: this probe was "
            "given its penalty"
        )
    with sheet(width, PATH_HEIGHT) as figure:
        draw_path(figure, sweep, metric)
    return figure


def draw_path(panel: Any, sweep: Sweep | Mapping[str, Any], metric: str) -> None:
    """Draw `regularisation_path` into a figure or a part of one."""
    points = field(sweep, "points")
    places = [float(field(point, "C")) for point in points]
    scores = [float(field(point, "score")) for point in points]
    chosen = float(field(sweep, "C"))
    best = min(range(len(places)), key=lambda number: abs(places[number] - chosen))
    said = f"On {field(sweep, 'n_holdout'):,} held-out training images; test images have no say."
    if field(sweep, "at_edge"):
        said += f" The best is the {field(sweep, 'at_edge')} C tried: a better one may lie beyond."
    short = [number for number, point in enumerate(points) if not field(point, "converged")]
    if short:
        said += " Hollow: stopped before its tolerance."
    head(panel, "Choosing the penalty", said)
    axes = panel.add_subplot()
    log_x(axes, places)
    axes.plot(places, scores, "-o", color=SERIES[0], markersize=4)
    looks = {"linestyle": "none", "marker": "o", "markerfacecolor": SURFACE, "markersize": 4}
    axes.plot(
        [places[number] for number in short],
        [scores[number] for number in short],
        markeredgecolor=SERIES[0],
        **looks,
    )
    axes.axvline(chosen, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.plot([places[best]], [scores[best]], "o", color=SERIES[1], markersize=8, zorder=4)
    _beside(axes, places[best], scores[best], f"C = {chosen:.3g}: {percent(scores[best])}")
    log_ticks(axes, size_of(panel)[0] - _BESIDE)
    percent_axis(axes.yaxis, metric_name(metric))
    axes.set_xlabel("C = 1 / (N · lambda)")


def shots_curve(
    points: Sequence[CurvePoint | Mapping[str, Any]], *, metric: str = "top1", width: float = WIDTH
) -> Any:
    """Draw accuracy over the number of training images.

    Parameters
    ----------
    points : sequence of CurvePoint or mapping
        What `featcache.few_shot` or `featcache.learning_curve` returned, or the points of
        such a run's record.
    metric : str
        What they score by.
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
        The line is the mean over draws, the band its 95 % interval, and each dot a draw.

    Raises
    ------
    EngineUnavailableError
        matplotlib is not installed.
    FeatcacheError
        There are no points.
    """
    if not points:
        raise FeatcacheError("few-shot curve: expected points, found none")
    ordered = sorted(points, key=lambda point: int(field(point, "n_train")))
    sizes = [int(field(point, "n_train")) for point in ordered]
    means = [float(field(point, "mean")) for point in ordered]
    lows, highs = zip(*(field(point, "interval") for point in ordered), strict=True)
    by_class = any(field(point, "shots") is not None for point in ordered)
    draws = max(len(field(point, "scores")) for point in ordered)
    with sheet(width, PATH_HEIGHT) as figure:
        said = "The mean over draws of training images, with its 95 % interval."
        said += " Dots are draws." if draws > 1 else ""
        title = (
            "Accuracy by training images of each class"
            if by_class
            else ("Accuracy by training images")
        )
        head(figure, title, said)
        axes = figure.add_subplot()
        log_x(axes, sizes)
        axes.fill_between(sizes, lows, highs, color=SERIES[0], alpha=0.18, linewidth=0)
        for point, size in zip(ordered, sizes, strict=True):
            scores = field(point, "scores")
            if len(scores) > 1:
                looks = {"color": SERIES[0], "markersize": 3, "alpha": 0.55, "linestyle": "none"}
                axes.plot([size] * len(scores), scores, marker="o", markeredgewidth=0, **looks)
        axes.plot(sizes, means, "-o", color=SERIES[0], markersize=4.5, markeredgecolor=SURFACE)
        _beside(axes, sizes[-1], means[-1], percent(means[-1]))
        _label_sizes(axes, ordered, sizes, by_class, 72 * width - _BESIDE)
        percent_axis(axes.yaxis, metric_name(metric))
    return figure


def _label_sizes(
    axes: Any, points: Sequence[Any], sizes: Sequence[int], by_class: bool, width: float
) -> None:
    """Name the sizes along x, the smallest and the largest first."""
    said = []
    for point, size in zip(points, sizes, strict=True):
        shots = field(point, "shots")
        said.append(f"{size:,}" if not by_class else "all" if shots is None else f"{shots:,}")
    ticks = list(zip(sizes, said, strict=True))
    spaced_ticks(axes, [ticks[0], *ticks[::-1]], width)
    axes.set_xlabel("training images of each class" if by_class else "training images")


def _beside(axes: Any, x: float, y: float, words: str) -> None:
    """Write words above a point, on the side where the axes go on."""
    low, high = axes.get_xlim()
    left = x > (low * high) ** 0.5 if axes.get_xscale() == "log" else x > (low + high) / 2
    axes.annotate(
        words,
        (x, y),
        xytext=(-7 if left else 7, 7),
        textcoords="offset points",
        ha="right" if left else "left",
        color=TEXT,
        weight="bold",
        parse_math=False,
    )
