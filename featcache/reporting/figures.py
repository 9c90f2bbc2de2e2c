"""The figures: methods compared, learning curves, and a probe from every side.

Each function returns a matplotlib ``Figure``, and takes results or the records that they became.
The ones named ``draw_*`` draw into a figure or a part of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FeatcacheError, ShapeMismatchError
from ..finetuning.recipes import PUBLISHED
from ..metrics import wilson_interval
from ..runs import epochs_of, run_label, run_labels
from .style import (
    MUTED,
    POINTS,
    SERIES,
    SMALL,
    STEP,
    SURFACE,
    TEXT,
    WIDTH,
    head,
    label_beside,
    log_ticks,
    percent,
    percent_axis,
    scaled,
    sheet,
    short,
)

_MOST_LABELS = 40  # of a panel: more would be a tall page of words
_MOST_DATASETS = 8
_DASHED = (0, (4, 3))
_METRICS = {"top1": "top-1", "balanced": "balanced accuracy", "f1": "macro F1"}


def _field(item: Any, name: str, default: Any = None) -> Any:
    """Return a field of a dataclass, or of the mapping that it became in a record."""
    return item.get(name, default) if isinstance(item, Mapping) else getattr(item, name, default)


def _count_axis(axis: Any, most: int = 6) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
    axis.set_major_formatter("{x:,.0f}")


def _call_out(axes: Any, x: float, y: float, words: str) -> None:
    """Write words above a point, on the side where the axes have room."""
    left = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[0] > 0.5
    axes.annotate(
        words,
        (x, y),
        (-7 if left else 7, 7),
        textcoords="offset points",
        ha="right" if left else "left",
        weight="bold",
    )


# ---- methods compared

_TIMES: list[tuple[float, str]] = [
    (seconds, f"1 {unit}") for seconds, unit in ((1, "s"), (60, "min"), (3600, "h"))
]
_TIMES += [(10 * seconds, words.replace("1", "10")) for seconds, words in _TIMES]
_TIMES += [(86400, "1 d"), (864000, "10 d"), (0.1, "0.1 s"), (0.01, "10 ms"), (0.001, "1 ms")]
_TIMES += [(n * seconds, f"{n} {words[2:]}") for n in (30, 2, 5) for seconds, words in _TIMES[:3]]
_LOOKS = {"probe": (SERIES[0], "o"), "finetune": (SERIES[1], "D"), "knn": (SERIES[2], "s")}


def accuracy_over_time(records: Sequence[Mapping[str, Any]], *, width: float = WIDTH) -> Any:
    """Draw accuracy against wall time, one mark for the newest run of each method.

    The newest, since the best would be chosen by its test accuracy. A dotted line leads from the
    time of the run to the time that includes extraction. Each data set has its own panel.

    Raises
    ------
    FeatcacheError
        No runs, more than 40 methods on a data set, or more than 8 data sets.
    """
    if not records:
        raise FeatcacheError("accuracy over time: expected runs, found none")
    panels = [_newest(group) for group in _by_dataset(records)]
    inches = [max(2.0, (len(panel) + 2) * STEP / POINTS) for panel in panels]
    words = "Top-1 on test images with its 95 % interval."
    if any(_extraction_s(record) for panel in panels for record in panel):
        words += " Ring: including extraction, which runs once."
    if any(published(panel) for panel in panels):
        words += " Dashed: published by the OneFlow tutorial."
    with sheet(width, 0.75 + sum(inches) + 0.45 * len(panels)) as figure:
        head(figure, _titled("Accuracy against time", panels), words)
        cells = figure.add_gridspec(len(panels), 1, height_ratios=inches)
        for cell, panel in zip(cells, panels, strict=True):
            axes = figure.add_subplot(cell)
            _draw_times(axes, panel)
            if len(panels) > 1:
                axes.set_title(_dataset(panel[0]))
    return figure


def _draw_times(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    axes.set_xscale("log")
    axes.set_autoscalex_on(False)  # identical times would make matplotlib warn
    times = []
    # The labels stand beside the axes: in a narrow figure they would leave no room for them.
    narrow = axes.figure.get_figwidth() < WIDTH
    room = 18 if narrow else 38
    for record, name in zip(records, run_labels(records), strict=True):
        colour, mark = _LOOKS.get(str(record["kind"]), (SERIES[3], "^"))
        top1, alone = record["top1"], max(float(record["wall_s"]), 1e-3)
        total = alone + _extraction_s(record)
        times += [alone, total]
        errors = [
            [max(top1 - record["top1_interval"][0], 0)],
            [max(record["top1_interval"][1] - top1, 0)],
        ]
        looks = {"markeredgecolor": SURFACE, "markersize": 6.5, "elinewidth": 1.2, "zorder": 3}
        axes.errorbar([alone], [top1], yerr=errors, fmt=mark, color=colour, **looks)
        if total > alone:
            looks = {"markerfacecolor": SURFACE, "markersize": 4, "markevery": [1], "linewidth": 1}
            axes.plot([alone, total], [top1, top1], ":o", color=colour, **looks)
        label_beside(axes, total, top1, f"{percent(top1)}  {short(name, room)}")
    for method, top1 in published(records).items():
        axes.axhline(top1, color=MUTED, linewidth=1, linestyle=_DASHED, zorder=0)
        looks = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        words = f"tutorial, {method}: {percent(top1, 2)}"
        axes.annotate(words, (0, top1), (2, 2), size=7.5, color=MUTED, **looks)
    low, high = min(times), max(times)
    margin = max((high / low) ** 0.08, 1.3)  # one run alone spans no range
    axes.set_xlim(low / margin, high * margin)
    log_ticks(axes, _TIMES, 0.4 if narrow else 0.15 * WIDTH / axes.figure.get_figwidth())
    percent_axis(axes.yaxis, "top-1")
    axes.set_xlabel("time")


def published(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the tutorial's published accuracies that runs on a data set compare with.

    They are of a ResNet-18 at 224 px on all of CIFAR-10, so there must be a run with exactly that:
    for ``"full"`` from the ``imagenet`` weights, for ``"scratch"`` from none.
    """
    methods = set()
    for record in records:
        seen = record["n_train"] + (record.get("n_val") or 0)
        if (
            str(record.get("dataset")).split("-")[0] == "cifar10"
            and (seen, record["n_test"]) == (50_000, 10_000)
            and (record.get("backbone"), record.get("size")) == ("resnet18", 224)
        ):
            methods |= {"full"} if record.get("weights") == "imagenet" else set()
            methods |= {"scratch"} if record.get("method") == "scratch" else set()
    return {name: top1 for name, top1 in PUBLISHED.items() if name in methods}


def _newest(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the newest run of each method, images, weights and recipe; the best first."""
    kept: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for record in sorted(records, key=lambda record: str(record.get("created", ""))):
        facts = ("n_train", "n_val", "n_test", "weights", "size", "backbone", "scale")
        epochs = record["n_epochs"] if record["kind"] == "finetune" else None
        key = (run_label(record), epochs, *(record.get(fact) for fact in facts))
        kept[key] = record
    _check_number(len(kept), "methods")
    return sorted(kept.values(), key=lambda record: -record["top1"])


def _check_number(n: int, what: str) -> None:
    if n > _MOST_LABELS:
        raise FeatcacheError(
            f"figure: expected at most {_MOST_LABELS} {what} on a data set, found {n}; keep fewer "
            "runs in the folder"
        )


def _extraction_s(record: Mapping[str, Any]) -> float:
    seconds = record.get("features_wall_s")
    return float(seconds) if isinstance(seconds, (int, float)) else 0.0


def _by_dataset(records: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the records of each data set: accuracies on different data share no axes."""

    def key(record: Mapping[str, Any]) -> tuple[str, str]:
        return str(record.get("dataset", "")), str(record.get("dataset_digest", ""))

    groups = [list(group) for _, group in groupby(sorted(records, key=key), key=key)]
    if len(groups) > _MOST_DATASETS:
        raise FeatcacheError(
            f"figure: expected runs on at most {_MOST_DATASETS} data sets, found {len(groups)}; "
            "name one"
        )
    return groups


def _titled(title: str, panels: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Return a figure's title, with the data set where there is one."""
    dataset = panels[0][0].get("dataset")
    return f"{title}: {short(str(dataset), 40)}" if len(panels) == 1 and dataset else title


def _dataset(record: Mapping[str, Any]) -> str:
    name, digest = str(record.get("dataset", "")), str(record.get("dataset_digest", ""))
    return f"{short(name, 40)} ({digest[:8]})"


# ---- backbones compared

_FEW = ("^", "v", "<", ">")


def backbones_compared(rows: Sequence[Any], *, width: float = WIDTH) -> Any:
    """Draw the accuracies of each backbone of a survey, or of its record, the best first.

    Raises
    ------
    FeatcacheError
        No backbones, or more than 40.
    """
    if not rows:
        raise FeatcacheError("survey: expected backbones, found none")
    _check_number(len(rows), "backbones")
    shots = sorted({_field(one, "shots") or 0 for row in rows for one in _field(row, "few_shot")})
    words = "Circle: linear head with its 95 % interval, hollow where it is significantly worse "
    words += f"than the best (p < 0.05, paired). Square: {_field(_field(rows[0], 'knn'), 'k')}-NN."
    if shots:
        words += f" Triangles: {', '.join(map(str, shots))} images of every class."
    with sheet(width, 1.3 + 2 * len(rows) * STEP / POINTS) as figure:
        head(figure, "Backbones on the same test images", words)
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            _draw_backbone(axes, place, row, shots)
        axes.set_yticks(range(len(rows)), [""] * len(rows))
        axes.set_ylim(len(rows) - 0.5, -0.8)
        percent_axis(axes.xaxis, "top-1")
    return figure


def _draw_backbone(axes: Any, place: int, row: Any, shots: Sequence[int]) -> None:
    # Above the marks there is room for the names of two backbones.
    looks = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "size": SMALL}
    axes.annotate(short(_field(row, "name"), 54), (0, place), (4, 6), **looks)
    versus, rate = _field(row, "vs_best"), _field(row, "images_per_s")
    probe = _field(row, "probe")
    top1, (low, high) = _field(probe, "top1"), _field(probe, "interval")
    worse = versus is not None and _field(versus, "p_value") < 0.05
    errors = [[max(top1 - low, 0)], [max(high - top1, 0)]]
    looks = {"color": SERIES[0], "markersize": 6.5, "elinewidth": 1.2, "zorder": 4}
    face = SURFACE if worse else SERIES[0]
    axes.errorbar([top1], [place], xerr=errors, fmt="o", markerfacecolor=face, **looks)
    axes.plot([_field(_field(row, "knn"), "top1")], [place], "s", color=SERIES[2], markersize=5)
    for one in _field(row, "few_shot"):
        mark = _FEW[shots.index(_field(one, "shots") or 0) % len(_FEW)]
        axes.plot([_field(one, "top1")], [place], mark, color=SERIES[1], markersize=5)
    cost = f"{rate:,.0f} img/s" if rate else f"{_field(row, 'feature_dim'):,} numbers"
    label_beside(axes, top1, place, f"{percent(top1)}  {cost}")


# ---- fine-tunes, epoch by epoch

_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))


def learning_curves(records: Sequence[Mapping[str, Any]], *, width: float = WIDTH) -> Any:
    """Draw training loss and accuracy of the fine-tunes among the records, epoch by epoch.

    Accuracy is on test images or, in runs with ``patience``, on validation images; then a ring
    marks the epoch that was kept. Each data set has its own pair of panels.

    Raises
    ------
    FeatcacheError
        No run has epochs, more than 40 on a data set, or more than 8 data sets.
    """
    tuned = [record for record in records if epochs_of(record)]
    if not tuned:
        raise FeatcacheError(
            "learning curves: expected fine-tunes with epochs, found none; make one with "
            "featcache finetune"
        )
    panels = _by_dataset(tuned)
    inches = [max(1.6, (len(panel) + 1) * STEP / POINTS) for panel in panels for _ in range(2)]
    words = "Training loss, and accuracy on test images, after each epoch."
    if any(record.get("curve_split") == "val" for record in tuned):
        words += " Where the label says val, accuracy is on validation images."
    with sheet(width, 0.6 + sum(inches) + 0.5 * len(panels)) as figure:
        head(figure, _titled("Learning curves", panels), words)
        cells = figure.add_gridspec(2 * len(panels), 1, height_ratios=inches)
        for number, panel in enumerate(panels):
            _check_number(len(panel), "fine-tunes")
            above = figure.add_subplot(cells[2 * number])
            below = figure.add_subplot(cells[2 * number + 1], sharex=above)
            _draw_epochs(above, below, panel)
            if len(panels) > 1:
                above.set_title(_dataset(panel[0]))
    return figure


def _draw_epochs(above: Any, below: Any, records: Sequence[Mapping[str, Any]]) -> None:
    for number, (record, name) in enumerate(zip(records, run_labels(records), strict=True)):
        colour = SERIES[number % len(SERIES)]
        dashes = _DASHES[number // len(SERIES) % len(_DASHES)]
        looks = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": 3.5}
        losses, accuracies = (
            {epoch["epoch"]: epoch[field] for epoch in epochs_of(record)}
            for field in ("train_loss", "top1")
        )
        above.plot(list(losses), list(losses.values()), **looks)
        below.plot(list(accuracies), list(accuracies.values()), **looks)
        on_val, best = record.get("curve_split") == "val", record.get("best_epoch")
        if on_val and best in accuracies:
            ring = {"markerfacecolor": "none", "markersize": 9, "color": colour}
            below.plot([best], [accuracies[best]], "o", **ring)
        last, top1 = list(accuracies.items())[-1]
        narrow = below.figure.get_figwidth() < WIDTH
        words = short(name + ", val" * on_val, 18 if narrow else 38)
        label_beside(below, last, top1, f"{percent(top1)}  {words}", colour)
    above.set_ylabel("training loss")
    above.tick_params(labelbottom=False)
    percent_axis(below.yaxis, "top-1")
    below.set_xlabel("epoch")
    _count_axis(below.xaxis)


# ---- the penalty, and the number of labels

_PATH_HEIGHT = 2.9  # inches


def regularisation_path(sweep: Any, *, metric: str = "top1", width: float = WIDTH) -> Any:
    """Draw the validation score over C: of a ``Sweep``, or of a probe's record.

    Raises
    ------
    FeatcacheError
        There is no sweep, or one without points.
    """
    if not sweep or not _field(sweep, "points"):
        raise FeatcacheError(
            "regularisation path: expected the points of a sweep, found none: this probe was "
            "given its penalty"
        )
    with sheet(width, _PATH_HEIGHT) as figure:
        draw_path(figure, sweep, metric)
    return figure


def draw_path(panel: Any, sweep: Any, metric: str) -> None:
    """Draw `regularisation_path`."""
    points = [
        (float(_field(point, "C")), float(_field(point, "score")), _field(point, "converged"))
        for point in _field(sweep, "points")
    ]
    chosen = float(_field(sweep, "C"))
    best = min(points, key=lambda point: abs(point[0] - chosen))
    short_fits = [point for point in points if not point[2]]
    words = f"Score on {_field(sweep, 'n_holdout'):,} images held out of training."
    if _field(sweep, "at_edge"):
        words += f" The best C is the {_field(sweep, 'at_edge')} one tried: a better one may lie "
        words += "beyond."
    if short_fits:
        words += " Hollow: the solver did not converge."
    head(panel, "Choosing C", words)
    axes = panel.add_subplot(xscale="log")
    looks = {"color": SERIES[0], "markersize": 4}
    axes.plot([point[0] for point in points], [point[1] for point in points], "-o", **looks)
    for place, score, _ in short_fits:
        axes.plot([place], [score], "o", markerfacecolor=SURFACE, **looks)
    axes.axvline(chosen, color=MUTED, linewidth=0.8, linestyle=_DASHED, zorder=0)
    axes.plot(*best[:2], "o", color=SERIES[1], markersize=8, zorder=4)
    _call_out(axes, *best[:2], f"C = {chosen:.3g}: {percent(best[1])}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    percent_axis(axes.yaxis, _METRICS.get(metric, metric))
    axes.set_xlabel("C = 1 / (N · lambda)")


def shots_curve(points: Sequence[Any], *, metric: str = "top1", width: float = WIDTH) -> Any:
    """Draw accuracy over training images: the mean of the draws, its 95 % interval, each draw.

    Takes what `featcache.few_shot` or `featcache.learning_curve` returned, or the points of such
    a run's record.

    Raises
    ------
    FeatcacheError
        There are no points.
    """
    if not points:
        raise FeatcacheError("few-shot curve: expected points, found none")
    ordered = sorted(points, key=lambda point: int(_field(point, "n_train")))
    sizes = [int(_field(point, "n_train")) for point in ordered]
    means = [float(_field(point, "mean")) for point in ordered]
    lows, highs = zip(*(_field(point, "interval") for point in ordered), strict=True)
    by_class = any(_field(point, "shots") is not None for point in ordered)
    what = "training images per class" if by_class else "training images"
    several = any(len(_field(point, "scores")) > 1 for point in ordered)
    words = "Mean over random draws of the training images, with its 95 % interval."
    with sheet(width, _PATH_HEIGHT) as figure:
        head(figure, f"Accuracy by {what}", words + " Dots: single draws." * several)
        axes = figure.add_subplot(xscale="log")
        axes.margins(x=0.05)
        axes.fill_between(sizes, lows, highs, color=SERIES[0], alpha=0.18, linewidth=0)
        for point, size in zip(ordered, sizes, strict=True):
            scores = _field(point, "scores")
            if len(scores) > 1:
                looks = {"color": SERIES[0], "markersize": 3, "alpha": 0.55, "markeredgewidth": 0}
                axes.plot([size] * len(scores), scores, "o", **looks)
        axes.plot(sizes, means, "-o", color=SERIES[0], markersize=4.5, markeredgecolor=SURFACE)
        _call_out(axes, sizes[-1], means[-1], percent(means[-1]))
        ticks = [
            (size, f"{size:,}" if not by_class else f"{_field(point, 'shots') or 'all'}")
            for point, size in zip(ordered, sizes, strict=True)
        ]
        log_ticks(axes, [ticks[0], *ticks[::-1]])
        axes.set_xlabel(what)
        percent_axis(axes.yaxis, _METRICS.get(metric, metric))
    return figure


# ---- classes

_LISTED = 40  # classes up to which every one has its bar
_WORST, _BEST = 20, 10


def per_class(recalls: Any, class_names: Sequence[str], *, width: float = WIDTH) -> Any:
    """Draw the accuracy of every class as bars, the best first; above 40 the best and the worst.

    ``recalls`` is `Evaluation.per_class_accuracy`: K numbers, None or NaN for a class without
    test images.

    Raises
    ------
    ShapeMismatchError
        Accuracies and names do not fit together.
    FeatcacheError
        There are none: an evaluation keeps those of at most 100 classes.
    """
    values = _as_recalls(recalls, class_names)
    if values.size == 0:
        raise FeatcacheError(
            "per class: expected accuracies, found none: an evaluation keeps those of at most 100 "
            "classes"
        )
    with sheet(width, _bars_height(len(values))) as figure:
        draw_per_class(figure, values, class_names)
    return figure


def _as_recalls(recalls: Any, class_names: Sequence[str]) -> np.ndarray:
    """Return accuracies of classes as float64 (K,), NaN for None; (0,) where there are none."""
    values = np.array([np.nan if value is None else value for value in recalls], np.float64)
    if values.size:
        _check_shape(values.shape, (len(class_names),), "per class")
    return values


def _check_shape(shape: tuple[int, ...], expected: tuple[int, ...], what: str) -> None:
    if shape != expected:
        raise ShapeMismatchError(
            f"{what}: expected an array of shape {expected}, one place for each class name, found "
            f"{shape}"
        )


def _bars_height(n_classes: int) -> float:
    n_bars = n_classes if n_classes <= _LISTED else _WORST + _BEST + 1
    return 1.0 + n_bars * 1.15 * STEP / POINTS


def draw_per_class(panel: Any, values: np.ndarray, class_names: Sequence[str]) -> None:
    """Draw `per_class`."""
    order = np.argsort(-np.where(np.isnan(values), -1, values), kind="stable")
    seen = int(np.count_nonzero(~np.isnan(values)))
    mean = float(np.nanmean(values)) if seen else float("nan")
    words = f"Dashed: mean of {seen:,} classes (balanced accuracy), {percent(mean)}." * bool(seen)
    gap_at = None
    if len(values) > _LISTED:
        words += f" Shown are the best {_BEST} and the worst {_WORST}."
        gap_at = _BEST
        order = np.concatenate((order[:_BEST], order[seen - _WORST : seen]))
    head(panel, "Accuracy per class", words)
    axes = panel.add_subplot()
    names = [short(class_names[index], scaled(panel, 22)) for index in order]
    said = ["no test image" if np.isnan(value) else percent(value) for value in values[order]]
    _bars(axes, values[order], names, said, SERIES[0], gap_at)
    axes.axvline(mean, color=MUTED, linewidth=0.9, linestyle=_DASHED)


def _bars(
    axes: Any,
    values: Any,
    names: Sequence[str],
    said: Sequence[str],
    colour: str,
    gap_at: int | None = None,
) -> None:
    """Draw named bars of fractions from the top down, with words in a column to the right."""
    places = [number + (gap_at is not None and number >= gap_at) for number in range(len(values))]
    axes.barh(places, np.nan_to_num(values), height=0.72, color=colour, alpha=0.85)
    axes.set_xlim(0, 1)
    looks = {"transform": axes.get_yaxis_transform(), "va": "center", "color": MUTED}
    for place, words in zip(places, said, strict=True):
        axes.text(1.02, place, words, size=SMALL - 0.5, **looks)
    axes.set_yticks(places, names)
    axes.set_ylim(max(places, default=0) + 0.6, -0.6)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(bottom=False, labelbottom=False)


def worst_classes(evaluation: Any, class_names: Sequence[str], *, width: float = WIDTH) -> Any:
    """Draw `Evaluation.worst_classes` as bars: what there is to see of more than 100 classes."""
    with sheet(width, _PAIRS_HEIGHT) as figure:
        draw_worst_classes(figure, evaluation, class_names)
    return figure


def draw_worst_classes(panel: Any, evaluation: Any, class_names: Sequence[str]) -> None:
    """Draw `worst_classes`."""
    worst = _field(evaluation, "worst_classes")
    missed = _field(evaluation, "n_classes_missed", 0)
    words = f"The {len(worst)} lowest of {len(class_names):,} classes; {missed:,} classes have no "
    head(panel, "Accuracy per class", words + "image right.")
    counts = [(_field(one, "n_right"), _field(one, "n")) for one in worst]
    said = [f"{right:,} of {n:,}" for right, n in counts]
    names = [short(class_names[_field(one, "label")], scaled(panel, 22)) for one in worst]
    _bars(panel.add_subplot(), [right / n for right, n in counts], names, said, SERIES[0])


def confused_pairs(
    pairs: Sequence[Any], class_names: Sequence[str], *, width: float = WIDTH
) -> Any:
    """Draw `Evaluation.most_confused`: a matrix of more than 100 classes is too fine to see."""
    with sheet(width, _PAIRS_HEIGHT) as figure:
        draw_confused_pairs(figure, pairs, class_names)
    return figure


def draw_confused_pairs(panel: Any, pairs: Sequence[Any], class_names: Sequence[str]) -> None:
    """Draw `confused_pairs`."""
    words = f"Of {len(class_names):,} classes, the pairs with most misclassified test images."
    head(panel, "Confused most", words if pairs else "There are no mistakes.")
    fields = ("label", "prediction", "n", "n_label")
    _draw_pairs(
        panel.add_subplot(),
        [tuple(_field(pair, name) for name in fields) for pair in pairs],
        class_names,
    )


_NUMBERED = 12  # classes up to which each cell has its percentage
_NAMED = 30  # up to which both sides of the matrix have names
_DRAWN = 100  # up to which there is a matrix: cells of more are specks
_PAIRS = 10
_PAIRS_HEIGHT = 1.15 * (_PAIRS + 5) * STEP / POINTS
_LEVELS = 24  # of shade; each is one path, however many cells it has


def confusion(matrix: Any, class_names: Sequence[str], *, width: float = WIDTH) -> Any:
    """Draw a confusion matrix: int (K, K), label by prediction.

    Up to 30 classes with their names; of more the matrix, and the pairs that are confused most.

    Raises
    ------
    ShapeMismatchError
        Matrix and names do not fit together.
    FeatcacheError
        The matrix is empty, or of more than 100 classes.
    """
    counts = np.asarray(matrix)
    if counts.size == 0:
        raise FeatcacheError(
            "confusion: expected counts, found none: an evaluation keeps those of at most 100 "
            "classes"
        )
    _check_shape(counts.shape, (len(class_names),) * 2, "confusion")
    if len(counts) > _DRAWN:
        raise FeatcacheError(
            f"confusion: expected at most {_DRAWN} classes, found {len(counts):,}, whose cells "
            "would be specks"
        )
    with sheet(width, _confusion_height(class_names, width)) as figure:
        draw_confusion(figure, counts, class_names)
    return figure


def _confusion_height(class_names: Sequence[str], width: float) -> float:
    n_classes = len(class_names)
    longest = max(map(len, class_names)) if n_classes <= _NAMED else 0
    most = min(1.0, width / WIDTH)
    beside, below = (min(n * most, longest) * 0.6 * SMALL / POINTS for n in (18, 14))
    height = 1.15 + min(width - beside - 0.5, 0.9 * n_classes) + below
    return height + (_PAIRS_HEIGHT if n_classes > _NAMED else 0)


def draw_confusion(panel: Any, counts: np.ndarray, class_names: Sequence[str]) -> None:
    """Draw `confusion`."""
    n_classes = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = shares * ~np.eye(n_classes, dtype=bool)
    worst = float(wrong.max())
    right = np.trace(counts) / max(counts.sum(), 1)
    words = f"{percent(right)} of {counts.sum():,} test images are classified correctly."
    if not worst:
        words += " There are no mistakes."
    else:
        words += f" Orange: mistakes, at most {percent(worst)} of a class."
    head(panel, "Confusion matrix", words)
    above = below = panel
    if n_classes > _NAMED:  # apart, so that the names of one do not narrow the other
        height = panel.bbox.height / panel.figure.dpi
        ratios = (height - _PAIRS_HEIGHT, _PAIRS_HEIGHT)
        above, below = panel.subfigures(2, 1, height_ratios=ratios)
    _draw_matrix(above.add_subplot(), shares, wrong, worst, class_names)
    if n_classes > _NAMED:
        order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
        places = [divmod(int(place), n_classes) for place in order]
        pairs = [(a, b, counts[a, b], counts[a].sum()) for a, b in places if wrong[a, b]]
        axes = below.add_subplot()
        axes.set_title("Confused most, as a share of the images of the first class")
        _draw_pairs(axes, pairs, class_names)


def _draw_matrix(
    axes: Any, shares: np.ndarray, wrong: np.ndarray, worst: float, class_names: Sequence[str]
) -> None:
    n = len(shares)
    _shade(axes, np.diag(np.diag(shares)), SERIES[0])
    _shade(axes, wrong / worst if worst else wrong, SERIES[1])
    # Of an aspect of its own, constrained layout would cut off the label below.
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5))
    axes.set(xlabel="prediction", ylabel="label")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(True)
    named = n <= _NAMED
    beside, below = (scaled(axes.get_figure(root=False), most) for most in (18, 14))
    axes.set_yticks(range(n), [short(name, beside) if named else "" for name in class_names])
    upright = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
    axes.set_xticks(
        range(n), [short(name, below) if named else "" for name in class_names], **upright
    )
    if n <= _NUMBERED:
        for row, column in zip(*np.nonzero(shares > 0.005), strict=True):
            share = shares[row, column]
            deep = share if row == column else share / worst
            looks = {"ha": "center", "va": "center", "size": SMALL - max(0, n - 8) * 0.3}
            colour = SURFACE if deep > 0.75 else TEXT
            axes.text(column, row, f"{100 * share:.0f}", color=colour, **looks)


def _shade(axes: Any, strengths: np.ndarray, colour: str) -> None:
    """Fill cells with a colour, each as opaque as its strength in [0, 1]."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    levels = np.ceil(strengths * _LEVELS).astype(int)
    for level in np.unique(levels[levels > 0]).tolist():
        rows, columns = np.nonzero(levels == level)
        corners = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5)]
        vertices = np.stack((columns, rows), axis=1)[:, None] + np.array(corners)
        codes = np.tile([Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY], len(rows))
        looks = {"facecolor": colour, "alpha": level / _LEVELS, "linewidth": 0, "zorder": 1}
        axes.add_patch(PathPatch(Outline(vertices.reshape(-1, 2), codes), **looks))


def _draw_pairs(
    axes: Any, pairs: Sequence[tuple[int, int, int, int]], class_names: Sequence[str]
) -> None:
    """Draw pairs of classes: label, prediction, how many of it, of how many."""
    # "as" and not an arrow, whose direction right-to-left names would reverse.
    room = scaled(axes.get_figure(root=False), 16)
    names = [
        f"{short(class_names[a], room)} as {short(class_names[b], room)}" for a, b, *_ in pairs
    ]
    said = [f"{n:,} of {total:,}" for *_, n, total in pairs]
    _bars(axes, [n / total for *_, n, total in pairs], names, said, SERIES[1])
    if not pairs:
        axes.text(0.5, 0.5, "no mistakes", ha="center", transform=axes.transAxes, color=MUTED)


# ---- confidence, and all of a probe on one sheet


def reliability(bins: Sequence[Any], *, width: float = WIDTH) -> Any:
    """Draw accuracy over confidence, of the bins of `featcache.metrics.expected_calibration_error`.

    After Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", ICML 2017.

    Raises
    ------
    FeatcacheError
        There are no bins, or no images in them: ridge scores are no probabilities.
    """
    if not sum(_field(entry, "n") for entry in bins):
        raise FeatcacheError(
            "reliability: expected bins with images, found none: the scores of this head are no "
            "probabilities, or its record is from before bins were kept"
        )
    with sheet(width, 0.92 * width) as figure:
        draw_reliability(figure, bins)
    return figure


def draw_reliability(panel: Any, bins: Sequence[Any]) -> None:
    """Draw `reliability`."""
    confidence, accuracy, n, low, high = (
        np.array([_field(entry, name) or 0 for entry in bins], np.float64)
        for name in ("confidence", "accuracy", "n", "low", "high")
    )
    error = float((n * abs(accuracy - confidence)).sum() / n.sum())
    words = f"Calibration error: {percent(error)} on {int(n.sum()):,} test images. Below the "
    head(panel, "Reliability diagram", words + "diagonal, the head is overconfident.")
    above, below = panel.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=_DASHED)
    full = n > 0
    lows, highs = zip(*map(wilson_interval, accuracy[full], n[full].astype(int)), strict=True)
    above.vlines(confidence[full], lows, highs, color=SERIES[0], linewidth=1.2)
    areas = 14 + 42 * n[full] / n.max()
    looks = {"color": SERIES[0], "edgecolor": SURFACE, "linewidth": 0.8, "zorder": 3}
    above.scatter(confidence[full], accuracy[full], areas, **looks)
    above.set(xlim=(0, 1), ylim=(0, 1))
    percent_axis(above.yaxis, "accuracy")
    below.bar(low, n, width=0.92 * (high - low), align="edge", color=SERIES[0], alpha=0.55)
    below.set_ylabel("images")
    _count_axis(below.yaxis, 4)
    below.grid(False)
    percent_axis(below.xaxis, "confidence")


_Panel = tuple[float, Callable[[Any], None]]  # inches high, and what draws it


def probe_overview(result: Any, class_names: Sequence[str], *, width: float = 2 * WIDTH) -> Any:
    """Draw all of the above that a ``ProbeResult``, or a probe's record, has data for.

    Raises
    ------
    ShapeMismatchError
        Names and classes do not fit together.
    FeatcacheError
        There is nothing to draw.
    """
    # The tallest first, each into the column that is shorter so far.
    columns: list[list[_Panel]] = [[], []]
    for panel in sorted(_panels(result, class_names, width / 2), key=lambda panel: -panel[0]):
        min(columns, key=lambda column: sum(height for height, _ in column)).append(panel)
    columns = [column for column in columns if column]
    tallest = max(sum(height for height, _ in column) for column in columns)
    low, high = _field(result, "top1_interval")
    with sheet(width, 0.5 + tallest) as figure:
        name = short(Path(str(_field(result, "cache"))).stem, 60)
        found = f"top-1 {percent(_field(result, 'top1'))} ({percent(low)} to {percent(high)})"
        head(figure, f"Linear probe of {name}: {found}")
        parts = figure.subfigures(1, len(columns), squeeze=False)[0]
        for part, column in zip(parts, columns, strict=True):
            ratios = [height for height, _ in column]
            places = part.subfigures(len(column), 1, height_ratios=ratios, squeeze=False)
            for place, (_, draw) in zip(places[:, 0], column, strict=True):
                draw(place)
    return figure


def _panels(result: Any, class_names: Sequence[str], width: float) -> list[_Panel]:
    evaluation, sweep = _field(result, "evaluation"), _field(result, "sweep")
    counts = np.asarray(_field(evaluation, "confusion", ()))
    recalls = _as_recalls(_field(evaluation, "per_class_accuracy", ()), class_names)
    bins, metric = _field(evaluation, "reliability", ()), str(_field(result, "metric", "top1"))
    panels: list[_Panel] = []
    if counts.size:
        height = _confusion_height(class_names, width)
        panels.append((height, lambda panel: draw_confusion(panel, counts, class_names)))
    if recalls.size:
        height = _bars_height(len(recalls))
        panels.append((height, lambda panel: draw_per_class(panel, recalls, class_names)))
    worst = _field(evaluation, "worst_classes", ())
    if worst and not recalls.size:
        pairs = _field(evaluation, "most_confused", ())
        panels.append((_PAIRS_HEIGHT, lambda panel: draw_confused_pairs(panel, pairs, class_names)))
        panels.append(
            (_PAIRS_HEIGHT, lambda panel: draw_worst_classes(panel, evaluation, class_names))
        )
    if bins:
        panels.append((0.92 * width, lambda panel: draw_reliability(panel, bins)))
    if sweep:
        panels.append((_PATH_HEIGHT, lambda panel: draw_path(panel, sweep, metric)))
    if not panels:
        raise FeatcacheError(
            "probe: expected a sweep, classes or bins to draw, found none: with more than 100 "
            "classes and a given penalty there is only the top-1"
        )
    return panels
