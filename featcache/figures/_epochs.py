"""How fine-tunes came to their accuracy, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..comparison import epochs_of, run_labels
from ..errors import FeatcacheError
from ._axes import count_axis, percent_axis
from ._data import by_dataset, percent
from ._head import dataset_title, head, titled
from ._labels import LABEL_COLUMNS, MOST_LABELS, STEP, Label, column_width, label_column
from ._names import as_name
from ._style import SERIES, WIDTH, settle, sheet

__all__ = ["learning_curves"]

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
