"""What `probe` prints of other results than one head of classes: labels, numbers, folds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from .output import counted, percent
from .output import name as name_of

if TYPE_CHECKING:
    from ..probes.folds import CrossValidationResult
    from ..probes.labels_and_numbers import MultilabelResult, RegressionResult

_LISTED = 100  # labels, numbers or folds in a table


def labels_summary(result: MultilabelResult) -> list[Any]:
    """Return the average precision of all labels, and a table of each."""
    title = f"multi-label probe of {result.cache.name}, target {result.target}"
    table = summary_table(title, "label", "train", "test", "AP (95 %)", "F1", "C")
    for one in result.labels[:_LISTED]:
        table.add_row(
            name_of(one.name),
            f"{one.n_train_positive:,} of {one.n_train:,}",
            f"{one.n_test_positive:,} of {one.n_test:,}",
            _share(one.average_precision, one.average_precision_interval),
            _share(one.f1),
            "not trained" if one.C is None else f"{one.C:.3g}",
        )
    shown = [
        table,
        f"average precision: macro {_share(result.macro_ap, result.macro_ap_interval)}, "
        f"micro {_share(result.micro_ap, result.micro_ap_interval)}",
        f"F1 at the thresholds of the holdout: macro {_share(result.macro_f1)}, "
        f"micro {_share(result.micro_f1)}",
        _images(result.n_train, result.n_test, result.n_val, result.wall_s),
    ]
    if result.check:
        gap = 100 * result.check.objective_gap
        shown.append(f"scikit-learn on {len(result.check.labels)} labels: our loss {_gap(gap)}")
    return [*shown, *_rest(result, len(result.labels))]


def numbers_summary(result: RegressionResult) -> list[Any]:
    """Return the scores of each number."""
    title = f"ridge regression of {result.cache.name}, target {result.target}"
    table = summary_table(title, "number", "R2 (95 %)", "MAE", "RMSE", "Spearman", "lambda")
    for one in result.targets[:_LISTED]:
        table.add_row(
            name_of(one.name),
            _number(one.r2, one.r2_interval),
            _number(one.mae),
            _number(one.rmse),
            _number(one.spearman, one.spearman_interval),
            f"{one.weight_decay:.3g}",
        )
    how = {"gcv": "generalized cross-validation", "val": "the val split"}
    chosen = how.get(result.chosen_by)
    shown = [
        table,
        f"penalty {f'chosen by {chosen}' if chosen else 'given'}",
        _images(result.n_train, result.n_test, result.n_val, result.wall_s),
    ]
    if result.check:
        gap = 100 * result.check.objective_gap
        shown.append(f"scikit-learn on {len(result.check.targets)} numbers: our loss {_gap(gap)}")
    return [*shown, *_rest(result, len(result.targets))]


def folds_summary(result: CrossValidationResult) -> list[Any]:
    """Return the mean over folds, and a table of each."""
    title = f"{result.n_folds} folds of {result.cache.name}"
    table = summary_table(title, "fold", "train", "test", result.metric, "C")
    for one in result.folds[:_LISTED]:
        draw = f"{one.repeat + 1}." if result.repeats > 1 else ""
        edge = f" ({one.at_edge} of the grid)" if one.at_edge else ""
        table.add_row(
            f"{draw}{one.fold + 1}",
            f"{one.n_train:,}",
            f"{one.n_test:,}",
            _number(one.score) if result.metric == "r2" else _share(one.score),
            "" if one.C is None else f"{one.C:.3g}{edge}",
        )
    groups = f" in {counted(result.n_groups, 'group')}" if result.group else ""
    is_r2 = result.metric == "r2"
    mean = (_number if is_r2 else _share)(result.mean, result.interval)
    shown = [
        table,
        f"{'R2' if is_r2 else result.metric} {mean} on "
        f"{counted(result.n_images, 'image')}{groups}, each tested by a head that did not see it",
        f"{result.wall_s:.2f} s",
    ]
    if result.n_unlabelled:
        shown.append(f"left out without a label: {counted(result.n_unlabelled, 'image')}")
    return [*shown, *(f"note: {note}" for note in result.notes)]


def summary_table(title: str, *columns: str | Text) -> Table:
    """Return an empty table: a column of text, then columns of numbers."""
    table = Table(title=name_of(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _share(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "none"
    return f"{100 * value:.2f} %" if interval is None else percent(value, interval)


def _number(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" + (f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else "")


def _gap(percentage: float) -> str:
    if abs(percentage) < 0.01:
        return "is the same within 0.01 %"
    return f"is at most {percentage:.2f} % above its" if percentage > 0 else "is below its"


def _images(n_train: int, n_test: int, n_val: int, wall_s: float) -> str:
    val = f", {n_val:,} val" if n_val else ""
    return f"{n_train:,} train{val}, {n_test:,} test images; {wall_s:.2f} s"


def _rest(result: MultilabelResult | RegressionResult, n_rows: int) -> list[str]:
    """Return what both results end with: what is not listed, notes, and the head's file."""
    shown = []
    if n_rows > _LISTED:
        shown.append(f"{n_rows - _LISTED:,} more: see --json")
    if result.n_unlabelled:
        shown.append(f"left out without a label: {counted(result.n_unlabelled, 'image')}")
    return [*shown, *(f"note: {note}" for note in result.notes), f"head: {result.head}"]
