"""Curves of a probe: accuracy over the penalty, and over the number of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import FeatcacheError
from ..runs import epochs_of, run_labels
from .names import (
    LABEL_COLUMNS,
    MOST_LABELS,
    STEP,
    Label,
    as_name,
    column_width,
    dataset_title,
    head,
    label_column,
    titled,
)
from .style import (
    MUTED,
    SERIES,
    SURFACE,
    TEXT,
    WIDTH,
    by_dataset,
    count_axis,
    field,
    log_ticks,
    log_x,
    metric_name,
    percent,
    percent_axis,
    settle,
    sheet,
    size_of,
    spaced_ticks,
)

if TYPE_CHECKING:
    from ..probes.curves import CurvePoint
    from ..probes.sweep import Sweep


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


_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))


def learning_curves(records: Sequence[Mapping[str, Any]], *, width: float = WIDTH) -> Any:
    """Draw the training loss and the accuracy of fine-tunes, epoch by epoch.

    Parameters
    ----------
    records : sequence of mapping
        Of which those with ``epochs`` are drawn: fine-tunes as `featcache.compare` returns
        them. Runs on different data have panels of their own.
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
        Two panels for each data set. Accuracy is on test images, or where the run had
        ``patience`` on validation images, which its label says; a ring is around the
        epoch that counts then.

    Raises
    ------
    EngineUnavailableError
        matplotlib is not installed.
    FeatcacheError
        No run has epochs, more than 40 on a data set, or more than 8 data sets.
    """
    tuned = [record for record in records if epochs_of(record)]
    if not tuned:
        raise FeatcacheError(
            "learning curves: expected fine-tunes with epochs, found none; make one with "
            "featcache finetune"
        )
    panels = by_dataset(tuned)
    labels = [_curve_labels(panel) for panel in panels]
    inches = [max(1.6, (len(found) + 1) * STEP / 72) for found in labels]
    with sheet(width, 0.6 + sum(2 * side + 0.5 for side in inches)) as figure:
        several = len(panels) > 1
        said = "The loss in training, and the accuracy on test images after each epoch."
        if any(record.get("curve_split") == "val" for record in tuned):
            said = said[:-1] + ", or, where the label says val, on held-out training images."
        head(figure, titled("Learning curves", panels), said)
        room = max(column_width(found) for found in labels) / (72 * width)
        figure.get_layout_engine().set(rect=(0, 0, 1 - room, 1))
        ratios = [side for side in inches for _ in range(2)]
        grid = figure.add_gridspec(2 * len(panels), 1, height_ratios=ratios)
        drawn = []
        for number, panel in enumerate(panels):
            above = figure.add_subplot(grid[2 * number])
            below = figure.add_subplot(grid[2 * number + 1], sharex=above)
            _curve_panels(above, below, panel)
            if several:
                dataset_title(above, panel[0])
            drawn.append(below)
        settle(figure)
        for axes, found in zip(drawn, labels, strict=True):
            label_column(axes, found)
    return figure


def _curve_labels(records: Sequence[Mapping[str, Any]]) -> list[Label]:
    if len(records) > MOST_LABELS:
        raise FeatcacheError(
            f"figure: expected at most {MOST_LABELS} fine-tunes on a data set, found "
            f"{len(records)}; keep fewer runs in the folder"
        )
    labels: list[Label] = []
    for record, label in zip(records, run_labels(records), strict=True):
        last = epochs_of(record)[-1]
        on_val = ", val" if record.get("curve_split") == "val" else ""
        name = as_name(label + on_val, LABEL_COLUMNS)
        colour = _curve_colour(len(labels))
        labels.append(Label(last["epoch"], last["top1"], name, percent(last["top1"]), colour))
    return labels


def _curve_colour(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _curve_panels(above: Any, below: Any, records: Sequence[Mapping[str, Any]]) -> None:
    for number, record in enumerate(records):
        epochs = epochs_of(record)
        numbers = [epoch["epoch"] for epoch in epochs]
        looks = {
            "color": _curve_colour(number),
            "linestyle": _DASHES[number // len(SERIES) % len(_DASHES)],
            "marker": "o",
            "markersize": 3.5,
        }
        above.plot(numbers, [epoch["train_loss"] for epoch in epochs], **looks)
        accuracies = [epoch["top1"] for epoch in epochs]
        below.plot(numbers, accuracies, **looks)
        if record.get("curve_split") == "val" and record.get("best_epoch") in numbers:
            best = numbers.index(record["best_epoch"])
            ring = {"markerfacecolor": "none", "markersize": 9, "color": looks["color"]}
            below.plot([numbers[best]], [accuracies[best]], "o", **ring)
    above.set_ylabel("training loss")
    above.tick_params(labelbottom=False)
    percent_axis(below.yaxis, "top-1")
    below.set_xlabel("epoch")
    count_axis(below.xaxis)
