"""Methods side by side: what accuracy costs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import FeatcacheError
from ..finetuning.recipes import PUBLISHED
from ..runs import run_label, run_labels
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
    WIDTH,
    by_dataset,
    log_x,
    percent,
    percent_axis,
    settle,
    sheet,
    time_ticks,
)

_LEAST_S = 1e-3  # a logarithm needs a duration
_BESIDE = 50.0  # points that the labels of y and the margins take

_CIFAR10 = re.compile(r"cifar10(-.+)?")
_FULL_CIFAR10 = (50_000, 10_000)  # training and test images
_TUTORIAL_SIZE = 224

_LOOKS = {"probe": (SERIES[0], "o"), "finetune": (SERIES[1], "D"), "knn": (SERIES[2], "s")}
_OTHER = (SERIES[3], "^")


def accuracy_over_time(records: Sequence[Mapping[str, Any]], *, width: float = WIDTH) -> Any:
    """Draw what accuracy each method reached, and in what time.

    One mark per method, images, weights and recipe: the newest of such runs, since the
    best would be chosen by its test accuracy. It stands at the run's own time. Where the
    run began with cached features, a dotted line leads on to a ring at the time with
    these, which the backbone computes once for all runs. Runs on different data never
    share axes: each data set has a panel.

    Parameters
    ----------
    records : sequence of mapping
        As `featcache.compare` returns them.
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    EngineUnavailableError
        matplotlib is not installed.
    FeatcacheError
        No runs, more than 40 methods on a data set, or more than 8 data sets.
    """
    if not records:
        raise FeatcacheError("accuracy over time: expected runs, found none")
    panels = [_newest(group) for group in by_dataset(records)]
    labels = [_method_labels(panel) for panel in panels]
    inches = [max(2.0, (len(found) + 2) * STEP / 72) for found in labels]
    with sheet(width, 0.75 + sum(inches) + 0.45 * len(panels)) as figure:
        several = len(panels) > 1
        said = "Top-1 on test images with its 95 % interval. "
        if any(_features_s(record) for panel in panels for record in panel):
            said += "Ring: with the time of the features, which are computed once. "
        if any(published(panel) for panel in panels):
            said += "Dashed: the figures of the OneFlow tutorial."
        head(figure, titled("Accuracy against time", panels), said)
        room = max(column_width(found) for found in labels) / (72 * width)
        figure.get_layout_engine().set(rect=(0, 0, 1 - room, 1))
        grid = figure.add_gridspec(len(panels), 1, height_ratios=inches)
        drawn = []
        for cell, panel in zip(grid, panels, strict=True):
            axes = figure.add_subplot(cell)
            _time_panel(axes, panel, 72 * width * (1 - room) - _BESIDE)
            if several:
                dataset_title(axes, panel[0])
            drawn.append(axes)
        settle(figure)
        for axes, found in zip(drawn, labels, strict=True):
            label_column(axes, found)
    return figure


def published(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the tutorial's figures that runs on a data set may be held against.

    Its figures are of a ResNet-18 at 224 px on all of CIFAR-10, so only where there is a
    run with exactly that: the data set is named ``cifar10`` or a copy of it
    (``cifar10-jpeg``), 50,000 images were learnt from and 10,000 tested on. Then
    ``"full"`` where a run began with the ``imagenet`` weights, and ``"scratch"`` where
    one was trained from scratch.

    Returns
    -------
    dict of str to float
        Of `featcache.finetuning.recipes.PUBLISHED`.
    """
    found = set()
    for record in records:
        learnt = record["n_train"] + (record.get("n_val") or 0)
        if (
            _CIFAR10.fullmatch(str(record.get("dataset")))
            and (learnt, record["n_test"]) == _FULL_CIFAR10
            and record.get("backbone") == "resnet18"
            and record.get("size") == _TUTORIAL_SIZE
        ):
            found |= {"full"} if record.get("weights") == "imagenet" else set()
            found |= {"scratch"} if record.get("method") == "scratch" else set()
    return {name: top1 for name, top1 in PUBLISHED.items() if name in found}


def _newest(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the newest run of each method, images, weights and recipe; the best first."""
    kept: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for record in sorted(records, key=lambda record: str(record.get("created", ""))):
        facts = ("n_train", "n_val", "n_test", "weights", "size", "backbone", "scale")
        epochs = record["n_epochs"] if record["kind"] == "finetune" else None
        key = (run_label(record), epochs, *(record.get(fact) for fact in facts))
        kept[key] = record
    if len(kept) > MOST_LABELS:
        raise FeatcacheError(
            f"figure: expected at most {MOST_LABELS} methods on a data set, found {len(kept)}; "
            "keep fewer runs in the folder"
        )
    return sorted(kept.values(), key=lambda record: -record["top1"])


def _features_s(record: Mapping[str, Any]) -> float:
    seconds = record.get("features_wall_s")
    return float(seconds) if isinstance(seconds, (int, float)) else 0.0


def _total_s(record: Mapping[str, Any]) -> float:
    return _features_s(record) + max(float(record["wall_s"]), _LEAST_S)


def _method_labels(records: Sequence[Mapping[str, Any]]) -> list[Label]:
    return [
        Label(
            _total_s(record),
            record["top1"],
            as_name(label, LABEL_COLUMNS),
            percent(record["top1"]),
        )
        for record, label in zip(records, run_labels(records), strict=True)
    ]


def _time_panel(axes: Any, records: Sequence[Mapping[str, Any]], points: float) -> None:
    alone_s = [max(float(record["wall_s"]), _LEAST_S) for record in records]
    log_x(axes, [*alone_s, *map(_total_s, records)])
    for record, alone in zip(records, alone_s, strict=True):
        colour, mark = _LOOKS.get(str(record["kind"]), _OTHER)
        top1, total = record["top1"], _total_s(record)
        low, high = record["top1_interval"]
        axes.errorbar(
            [alone],
            [top1],
            yerr=[[max(top1 - low, 0)], [max(high - top1, 0)]],
            fmt=mark,
            color=colour,
            markeredgecolor=SURFACE,
            markersize=6.5,
            elinewidth=1.2,
            zorder=3,
        )
        if total > alone:
            ring = {"markerfacecolor": SURFACE, "markersize": 4, "markevery": [1]}
            axes.plot([alone, total], [top1, top1], ":o", color=colour, linewidth=1, **ring)
    for method, top1 in published(records).items():
        axes.axhline(top1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(
            f"tutorial, {method}: {percent(top1, 2)}",
            (0, top1),
            xycoords=("axes fraction", "data"),
            xytext=(2, 2),
            textcoords="offset points",
            size=7.5,
            color=MUTED,
        )
    time_ticks(axes, points)
    percent_axis(axes.yaxis, "top-1")
    axes.set_xlabel("time")
