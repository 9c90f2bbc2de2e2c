"""How probes, curves and predictions look on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ._output import counted, encoding, percent
from ._output import name as name_of
from ._sparkline import shows, sparkline

if TYPE_CHECKING:
    from ..curves import CurvePoint
    from ..neighbours import KnnResult
    from ..prediction import HeadResult, Prediction
    from ..probes import CheckResult
    from ..probing import ProbeResult

_CONFUSION_CLASSES = 20


def _table(title: str, *columns: str | Text) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _solver(result: ProbeResult) -> str:
    if result.solver == "sgd":
        return f"OneFlow SGD, {counted(result.epochs, 'epoch')}"
    if result.solver == "ridge":
        return "ridge, closed form"
    return f"exact (L-BFGS), {counted(result.steps, 'iteration')}"


def probe_summary(result: ProbeResult, per_class: bool, confusion: bool) -> list[Any]:
    """Return the head next to scikit-learn's, and what to make of it."""
    table = _table(
        f"linear probe of {result.cache.name}", "solver", "top-1 (95 %)", "objective", "wall"
    )
    table.add_row(
        _solver(result),
        percent(result.top1, result.top1_interval),
        f"{result.objective:.5f}",
        f"{result.wall_s:.2f} s",
    )
    from ..metrics import wilson_interval

    check, said = result.check, [table, f"C = {result.C:.4g}{_chosen(result)}"]
    if check:
        table.add_row(
            f"scikit-learn, C = {check.C:.4g}",
            percent(check.top1, wilson_interval(check.top1, result.n_test)),
            f"{check.objective:.5f}",
            f"{check.wall_s:.2f} s",
        )
        said += _verdict(result, check)
    if result.converged is False:
        said.append(
            f"The solver stopped before its tolerance, after {counted(result.steps, 'step')}."
        )
    said.append(_details(result))
    if result.n_unlabelled:
        said.append(f"Left out, for want of a label: {counted(result.n_unlabelled, 'image')}.")
    if result.test_cache != result.cache:
        said.append(f"tested on {result.test_cache}")
    said += [f"note: {note}" for note in result.notes]
    names = _class_names(result)
    if per_class:
        said.append(_per_class(result, names))
    if confusion:
        said.append(_confusion(result, names))
    said.append(f"head: {result.head}")
    return said


def _chosen(result: ProbeResult) -> str:
    sweep = result.sweep
    if sweep is None:
        return f", given (lambda = {result.weight_decay:.3g})"
    scores = [point.score for point in sweep.points]
    line = sparkline(scores, encoding())
    edge = (
        f"; the {sweep.at_edge} of the grid: a better one may lie beyond" if sweep.at_edge else ""
    )
    return (
        f", the best of {len(scores)} by {result.metric} on {sweep.n_holdout:,} held-out training "
        f"images: {line} {100 * max(scores):.1f} %{edge}"
    )


def _verdict(result: ProbeResult, check: CheckResult) -> list[Any]:
    gap = f"objective {100 * check.objective_gap:+.4f} %"
    said: list[Any] = [
        f"Same prediction on {100 * check.agreement:.2f} % of "
        f"{counted(result.n_test, 'test image')}, {gap}."
    ]
    if not check.converged:
        said.append(f"scikit-learn stopped early, after {counted(check.iterations, 'iteration')}.")
    if check.under_trained:
        short = 100 * (check.top1 - result.top1)
        points = f"{short:.1f} points of top-1 below it" if short > 0 else "no less accurate"
        said.append(
            f"Under-trained: its objective is {100 * check.objective_gap:.3f} % above "
            f"scikit-learn's, {points}."
        )
    return said


def _details(result: ProbeResult) -> str:
    found = result.evaluation
    facts = [
        f"balanced accuracy {100 * found.balanced_accuracy:.2f} %",
        f"macro F1 {100 * found.macro_f1:.2f} %",
    ]
    if found.top5 is not None:
        facts.append(f"top-5 {100 * found.top5:.2f} %")
    if found.calibration_error is not None:
        facts.append(f"calibration error {100 * found.calibration_error:.2f} %")
    return ", ".join(facts)


def _class_names(result: ProbeResult) -> tuple[str, ...]:
    from ..probes import load_head

    return load_head(result.head).class_names


def _per_class(result: ProbeResult, names: tuple[str, ...]) -> Any:
    recalls = result.evaluation.per_class_accuracy
    if not recalls:
        return "Per-class accuracy of more than 100 classes is not listed."
    table = _table("per class", "class", "accuracy")
    for name, recall in zip(names, recalls, strict=True):
        table.add_row(name_of(name), "no test image" if recall is None else f"{100 * recall:.1f} %")
    return table


def _confusion(result: ProbeResult, names: tuple[str, ...]) -> Any:
    matrix = result.evaluation.confusion
    if not 0 < len(matrix) <= _CONFUSION_CLASSES:
        return f"A confusion matrix of more than {_CONFUSION_CLASSES} classes is in --json alone."
    none = "·" if shows("·", encoding()) else "."
    table = _table("confusion: label by prediction", "", *(name_of(name[:8]) for name in names))
    for name, row in zip(names, matrix, strict=True):
        table.add_row(name_of(name), *(str(count) if count else none for count in row))
    return table


def head_summary(result: HeadResult) -> list[Any]:
    """Return the accuracy of a saved head."""
    accuracy = percent(result.top1, result.top1_interval)
    place = "the cache it was trained on" if result.own_cache else "another cache"
    images = counted(result.n_test, "test image")
    line = f"top-1 {accuracy} on {images} of {result.cache} ({place})"
    return [line, *(f"note: {note}" for note in result.notes)]


def head_facts(result: HeadResult) -> dict[str, Any]:
    """Return the fields that are plain."""
    return {
        "top1": result.top1,
        "top1_interval": result.top1_interval,
        "n_test": result.n_test,
        "cache": result.cache,
        "own_cache": result.own_cache,
        "notes": result.notes,
    }


def knn_table(results: list[KnnResult]) -> list[Any]:
    """Return one line per k."""
    table = _table("k nearest neighbours", "k", "top-1 (95 %)", "balanced", "macro F1")
    for item in results:
        table.add_row(
            str(item.k),
            percent(item.top1, item.top1_interval),
            f"{100 * item.balanced_accuracy:.2f} %",
            f"{100 * item.macro_f1:.2f} %",
        )
    return [table, f"{counted(results[0].n_test, 'test image')} in {results[0].wall_s:.2f} s"]


def curve_table(points: list[CurvePoint], metric: str) -> list[Any]:
    """Return one line per training-set size, and the curve."""
    shots = any(point.shots is not None for point in points)  # a learning curve has none
    columns = ["shots"] * shots + ["n train", f"{metric} (95 %)", "draws", "wall"]
    table = _table("by training-set size", *columns)
    for point in points:
        table.add_row(
            *["full" if point.shots is None else str(point.shots)] * shots,
            f"{point.n_train:,}",
            percent(point.mean, point.interval),
            str(len(point.scores)),
            f"{point.wall_s:.2f} s",
        )
    if len(points) < 2:
        return [table]
    means = [point.mean for point in sorted(points, key=lambda point: point.n_train)]
    line = sparkline(means, encoding())
    return [table, f"{metric} {line} {100 * means[0]:.1f} to {100 * means[-1]:.1f} %"]


def prediction_table(predictions: list[Prediction]) -> Any:
    """Return one line per image."""
    table = Table()
    for column in ("image", "class", "probability"):
        table.add_column(column, overflow="fold")
    for item in predictions:
        names = Text("\n").join(name_of(name) for name, _ in item.top)
        shares = "\n".join(f"{share:.3f}" for _, share in item.top)
        table.add_row(name_of(str(item.path)), names, shares)
    return table
