"""The commands on cached features: probe in its forms, and predict."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from ..errors import visible
from ..options import MAX_PIXELS
from ..process import had_ctrl_c
from . import output as out
from . import plot as _plot
from .help import IMAGES, RESULTS
from .options import (
    CacheArgument,
    DeviceOption,
    HeadBackboneOption,
    HeadWeightsOption,
    JsonOption,
    MaxPixelsOption,
    MmapOption,
    PlotOption,
    RunsOption,
    SeedOption,
    TestLimitOption,
    TrainLimitOption,
    app,
    cache_place,
    numbers,
    place,
    seconds,
)
from .output import counted, encoding, percent, shows, sparkline
from .output import name as name_of
from .targets import folds_summary, labels_summary, numbers_summary, summary_table

if TYPE_CHECKING:
    from ..prediction import HeadResult, Prediction
    from ..probes.cross_check import CheckResult
    from ..probes.curves import CurvePoint
    from ..probes.knn import KnnResult
    from ..probes.probe import ProbeResult
    from ..probes.zero_shot import ZeroShotResult


_question = partial(typer.Option, rich_help_panel="Question")
_head = partial(typer.Option, rich_help_panel="The head")
_sgd = partial(typer.Option, rich_help_panel="Only with --solver sgd", show_default="the recipe's")
_instead = partial(typer.Option, rich_help_panel="Instead of one head")
_result = partial(typer.Option, rich_help_panel=RESULTS)

# The options that each alternative to one head may be combined with.
_QUESTION = {"target", "task", "separator", "labels", "by", "split_column", "group", "where"}
_CURVE = {"cache", "seeds", "solver", "weight_decay", "metric", "plot", "runs", "json"}
_CURVE |= {"weight_column", *_QUESTION}
_FORMS = {
    "head": {"cache", "json"},
    "knn": {"cache", "cut", "temperature", "distance", "shots", "seeds", "mmap", "runs", "json"}
    | _QUESTION,
    "shots": _CURVE,
    "learning_curve": _CURVE,
}


def _check_form(context: typer.Context) -> None:
    """Refuse options that would have no effect, instead of ignoring them silently."""
    spelled = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }
    forms = [name for name in _FORMS if name in given]
    if "knn" in forms and "shots" in forms:
        forms.remove("shots")  # so many images to search
    if len(forms) > 1:
        names = " and ".join(spelled[name] for name in forms)
        raise typer.BadParameter(f"expected at most one of them, found {names}")
    for name, needed in (
        ("seeds", ("shots", "learning_curve")),
        ("temperature", ("knn",)),
        ("distance", ("knn",)),
        ("backbone", ("zero_shot",)),
    ):
        if name in given and not given & set(needed):
            message = f"has no effect without {' or '.join(spelled[one] for one in needed)}"
            raise typer.BadParameter(message, param_hint=spelled[name])
    if not forms:
        return
    (form,) = forms
    for name in sorted(given - _FORMS[form] - {form}):
        raise typer.BadParameter(f"has no effect with {spelled[form]}", param_hint=spelled[name])


@app.command()
def probe(
    context: typer.Context,
    cache: CacheArgument = None,
    target: Annotated[
        list[str] | None,
        _question(
            help="The column to predict; several with commas, or given again.",
            metavar="COLUMN",
            show_default="the cache's own labels",
        ),
    ] = None,
    task: Annotated[
        Literal["auto", "classification", "multilabel", "regression"],
        _question(help="What the target is; auto decides by its values, and says how."),
    ] = "auto",
    separator: Annotated[
        str | None, _question(help="Between the labels of one cell: multi-label.", metavar="TEXT")
    ] = None,
    labels: Annotated[
        Path | None,
        _question(
            help="A table to join now: .csv, .tsv, .parquet or .jsonl.",
            metavar="TABLE",
            show_default="the one attached",
            parser=place,
        ),
    ] = None,
    by: Annotated[
        str | None, _question(help="The column of --labels that names the images.")
    ] = None,
    split_column: Annotated[
        str | None, _question(help="The column with train, val or test.", metavar="COLUMN")
    ] = None,
    group: Annotated[
        str | None,
        _question(help="The column whose images stay on one side.", metavar="COLUMN"),
    ] = None,
    where: Annotated[
        str | None,
        _question(help="Only these images: 'age >= 40 and site != \"B\"'.", metavar="EXPRESSION"),
    ] = None,
    weight_column: Annotated[
        str | None, _question(help="The column with training weights.", metavar="COLUMN")
    ] = None,
    class_weight: Annotated[
        Literal["balanced"] | None,
        _question(help="balanced: every class counts the same in training."),
    ] = None,
    cv: Annotated[
        int | None,
        _question(min=2, help="Cross-validate with so many folds of all images.", metavar="FOLDS"),
    ] = None,
    repeats: Annotated[int, _question(min=1, help="Only with --cv: draws of the folds.")] = 1,
    solver: Annotated[
        Literal["lbfgs", "ridge", "sgd"] | None,
        _head(
            help="lbfgs: the exact optimum. ridge: least squares, closed form. sgd: in OneFlow.",
            show_default="lbfgs",
        ),
    ] = None,
    recipe: Annotated[
        Literal["default", "tutorial"],
        _sgd(
            help="default: to the optimum. tutorial: 3 epochs at 1e-3.",
            show_default="default",
        ),
    ] = "default",
    epochs: Annotated[int | None, _sgd(min=1, help="Exact number of epochs.")] = None,
    batch_size: Annotated[int | None, _sgd(min=1, help="Features per step.")] = None,
    lr: Annotated[float | None, _sgd(help="Learning rate.")] = None,
    momentum: Annotated[float | None, _sgd(help="Momentum, from 0 to below 1.")] = None,
    schedule: Annotated[
        Literal["constant", "cosine"] | None, _sgd(help="cosine: the learning rate falls to 0.")
    ] = None,
    weight_decay: Annotated[
        float | None, _head(help="The penalty lambda; C = 1 / (N lambda).")
    ] = None,
    C: Annotated[float | None, _head("--C", help="The penalty in scikit-learn's terms.")] = None,
    sweep: Annotated[
        bool | None,
        _head(
            "--sweep/--no-sweep",
            help="Choose C on a holdout of the training split.",
            show_default="on where no penalty is given",
        ),
    ] = None,
    grid: Annotated[
        str | None,
        _head(
            help="Values of C to choose from, at equal ratios: 1e-6:1e5:45.",
            metavar="START:STOP:COUNT",
            show_default="1e-4:100:20, and beyond",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        _head(
            help="Of lbfgs: the part by which the objective may exceed its optimum.",
            show_default="1e-6",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        _head(help="Take the best head after this time, and say how good it is: 30s, 10m."),
    ] = None,
    cut: Annotated[
        str | None,
        _head(
            help="Where the features were taken; several with commas stand side by side: cls,mean.",
            metavar="CUT",
            show_default="the cache's first",
        ),
    ] = None,
    scale: Annotated[
        Literal["none", "standardize", "l2"], _head(help="Scaling of the features.")
    ] = "none",
    metric: Annotated[
        Literal["top1", "balanced", "f1"],
        _head(help="What the sweep maximises and curves show; balanced for rare classes."),
    ] = "top1",
    per_class: Annotated[
        bool, _result("--per-class", help="Show the accuracy of every class.")
    ] = False,
    confusion: Annotated[bool, _result("--confusion", help="Show the confusion matrix.")] = False,
    knn: Annotated[
        str | None,
        _instead(help="k-nearest-neighbour vote instead of a linear head: 10,20,100."),
    ] = None,
    temperature: Annotated[
        float | None,
        _instead(
            help="Of the k-NN vote; inf: every neighbour counts the same.",
            show_default="0.07, for euclidean inf",
        ),
    ] = None,
    distance: Annotated[
        Literal["cosine", "euclidean"], _instead(help="Between neighbours of the k-NN vote.")
    ] = "cosine",
    shots: Annotated[
        str | None, _instead(help="Few-shot curve, images per class: 1,2,5,10,25,full.")
    ] = None,
    learning_curve: Annotated[
        bool, _instead("--learning-curve", help="Accuracy by training-set size.")
    ] = False,
    seeds: Annotated[int, _instead(min=1, help="Draws per point of a curve.")] = 5,
    head: Annotated[Path | None, _instead(help="Test this saved head.")] = None,
    test: Annotated[
        Path | None,
        typer.Option(
            "--test-cache",
            help="Test on the test split of this cache.",
            metavar="PATH",
            rich_help_panel=IMAGES,
            parser=cache_place,
        ),
    ] = None,
    train_limit: TrainLimitOption = None,
    test_limit: TestLimitOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    mmap: MmapOption = False,
    check: Annotated[
        bool, _result("--check/--no-check", help="Cross-check with scikit-learn.")
    ] = True,
    strict: Annotated[
        bool, _result("--strict", help="Exit 1 if the head is under-trained.")
    ] = False,
    save_head_to: Annotated[
        Path | None, _result("--save-head", help="Save the head to this .safetensors file.")
    ] = None,
    zero_shot: Annotated[
        Path | None,
        _result(
            "--zero-shot",
            "--zero-shot-vectors",
            help="Beside it a head without training: a text file of classes or prompts, or .npy "
            "or .npz vectors of the classes.",
            metavar="FILE",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        _result(
            help="Of --zero-shot: the model, where it is a folder.",
            show_default="the one that the cache records",
        ),
    ] = None,
    plot: PlotOption = None,
    runs: RunsOption = None,
    json: JsonOption = False,
) -> Any:
    """Train a linear head on cached features and cross-check it with scikit-learn.

    Example: featcache probe --scale standardize --per-class
    """
    given = dict(locals())
    _check_form(context)
    _plot.checked(plot)
    if head is not None:
        from ..prediction import evaluate_head
        from ..store.cache import newest_cache

        out.show(evaluate_head(head, cache or newest_cache()), json, head_summary, head_facts)
    elif knn is not None:
        from ..probes.knn import KnnOptions
        from ..probes.knn import knn as run_knn

        given["ks"] = [int(k) for k in numbers(knn, "--knn")]
        given["shots"] = numbers(shots or "full", "--shots", ("full",))
        with out.progress() as report:
            votes = run_knn(cache, options=_options(KnnOptions, given), on_progress=report)
        out.show(votes, json, knn_table, _as_dicts)
    elif shots is not None or learning_curve:
        from ..probes.curves import FewShotOptions, LearningCurveOptions, few_shot
        from ..probes.curves import learning_curve as run_curve
        from ..probes.recipes import ExactRecipe

        given["solver"] = solver or "lbfgs"
        given["recipe"] = None if weight_decay is None else ExactRecipe(weight_decay=weight_decay)
        with out.progress() as report:
            if shots is not None:
                given["shots"] = numbers(shots, "--shots", ("full",))
                few = _options(FewShotOptions, given)
                points = few_shot(cache, options=few, on_progress=report)
            else:
                parts = _options(LearningCurveOptions, given)
                points = run_curve(cache, options=parts, on_progress=report)
        out.show(points, json, lambda items: curve_table(items, metric), _as_dicts)
        _plot.save(plot, lambda: _curve_figure(points, metric))
    else:
        from ..probes.probe import ProbeOptions
        from ..probes.probe import probe as run

        given |= {"check": check or strict, "encode": None}
        given["budget_s"] = None if budget is None else seconds(budget)
        with out.progress() as report:
            if zero_shot is not None:
                from ..searching import text_features

                given["encode"] = partial(text_features, backbone=backbone, on_progress=report)
            result = run(cache, options=_options(ProbeOptions, given), on_progress=report)
        if cv is not None:
            out.show(result, json, folds_summary)
            short = not all(fold.converged for fold in result.folds)
        elif result.task != "classes":
            out.show(result, json, labels_summary if result.task == "labels" else numbers_summary)
            short = result.check is not None and result.check.under_trained
        else:
            out.show(result, json, lambda item: probe_summary(item, per_class, confusion))
            _plot.save(plot, lambda: _probe_figure(result))
            # Without a check, the solver must at least have reached its own tolerance.
            short = result.check.under_trained if result.check else result.converged is False
        if plot is not None and (cv is not None or result.task != "classes"):
            out.note(f"{plot}: not written; only a head of classes has a figure")
        if strict and short:
            raise typer.Exit(1)
        return result
    return None


def _options(kind: Any, given: dict[str, Any]) -> Any:
    """Return the options of a verb, of which each that the command has is given."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in given.items() if name in names})


def _as_dicts(items: list[Any]) -> list[dict[str, Any]]:
    return [asdict(item) for item in items]


def _curve_figure(points: list[CurvePoint], metric: str) -> Any:
    from ..reporting.figures import shots_curve

    return shots_curve(points, metric=metric)


def _probe_figure(result: ProbeResult) -> Any:
    from ..probes.head import load_head
    from ..reporting.figures import probe_overview

    return probe_overview(result, load_head(result.head).class_names)


@app.command()
def predict(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Images, videos, folders and .zip archives, or their URLs; - reads paths from "
            "standard input, one a line.",
            metavar="IMAGE...",
        ),
    ],
    head: Annotated[Path, typer.Option(help="A head that featcache probe saved.")],
    weights: HeadWeightsOption = None,
    backbone: HeadBackboneOption = None,
    device: DeviceOption = "auto",
    top: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 1,
    on_error: Annotated[
        Literal["fail", "skip"],
        typer.Option(help="For images that do not decode: stop, or write a row that says why."),
    ] = "fail",
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    every: Annotated[
        str,
        typer.Option(
            help="Frames of a video: 1s takes one a second, 10 every tenth.", metavar="STEP"
        ),
    ] = "1s",
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Answer the images of folders, and new ones as they come, to Ctrl-C."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Write them to a .csv, .jsonl or .parquet file too.",
            metavar="PATH",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    form: Annotated[
        Literal["table", "csv", "jsonl"] | None,
        typer.Option(
            "--format",
            help="csv and jsonl print each row as it comes; --json prints JSON.",
            show_default="table; csv with - and --watch",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Classify images with a saved head.

    Example: featcache predict photos --head cats.safetensors --format csv
    """
    from ..prediction import PredictionFile, PredictOptions, predict_stream, table_columns
    from ..probes.head import load_head

    streams = images == ["-"]
    if "-" in images and (watch or not streams):
        raise typer.BadParameter("expected - alone, found more", param_hint="IMAGE...")
    if json and form:
        raise typer.BadParameter("has no effect with --json", param_hint="--format")
    if watch and (json or form == "table"):
        raise typer.BadParameter(
            "prints rows, since it does not end: use --format csv or jsonl", param_hint="--watch"
        )
    options = PredictOptions(
        weights=weights,
        backbone=backbone,
        device=device,
        top=top,
        on_error=on_error,
        max_pixels=max_pixels,
        every=every,
    )
    columns = table_columns(load_head(head), options)
    file = PredictionFile(output, columns) if output is not None else None
    answered = file.answered() if file and watch else set()
    form = form or ("csv" if (streams or watch) and not json else "table")
    row = _row_printer(form, columns)
    shown: list[Prediction] = []
    with file or nullcontext():
        try:
            with out.progress() as report:
                for prediction in predict_stream(
                    _lines_of_stdin() if streams else images,
                    head,
                    options=options,
                    watch=watch,
                    answered=answered,
                    on_progress=report,
                    on_note=out.note,
                ):
                    if file:
                        file.write(prediction)
                    if row:
                        row(prediction)
                    else:
                        shown.append(prediction)
        except (KeyboardInterrupt, Exception) as error:
            # C++ code may have made another error of Ctrl-C.
            if not watch or not (isinstance(error, KeyboardInterrupt) or had_ctrl_c()):
                raise
            out.note("stopped watching")
    if file and file.n_rows:
        out.note(f"{output}: {out.counted(file.n_rows, 'prediction')}")
    if form == "table":
        out.show(shown, json, prediction_table, _as_dicts)


def _lines_of_stdin() -> Iterator[str]:
    from ..new_images import read_paths

    # Of a stream of its own: at the end the interpreter closes standard input, and aborts where a
    # thread still waits for a line of it.
    lines = sys.stdin.buffer
    with suppress(OSError, ValueError):
        lines = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    return read_paths(lines)


def _row_printer(form: str, columns: Any) -> Callable[[Prediction], None] | None:
    """Return what prints a prediction as soon as it is there; None for a table."""
    from ..prediction import csv_head, csv_row, json_row

    if form == "table":
        return None
    # On a terminal, progress bars let what is printed pass; a pipe is not theirs.
    pipe = None if sys.stdout.isatty() else sys.stdout

    head = csv_head(columns) if form == "csv" else ""

    def write(one: Prediction) -> None:
        nonlocal head
        text = head + (csv_row(one, columns) if form == "csv" else json_row(one))
        print(text if pipe else visible(text), end="", file=pipe, flush=True)
        head = ""

    return write


_CONFUSION_CLASSES = 20


def _solver(result: ProbeResult) -> str:
    if result.solver == "sgd":
        return f"OneFlow SGD, {counted(result.epochs, 'epoch')}"
    if result.solver == "ridge":
        return "ridge, closed form"
    return f"exact (L-BFGS), {counted(result.steps, 'iteration')}"


def probe_summary(result: ProbeResult, per_class: bool, confusion: bool) -> list[Any]:
    """Return the head next to scikit-learn's, and how they compare."""
    from ..metrics import wilson_interval

    asked = f", target {result.target}" if result.target else ""
    table = summary_table(
        f"linear probe of {result.cache.name}{asked}",
        "solver",
        "top-1 (95 %)",
        "objective",
        "one fit",
    )
    table.add_row(
        _solver(result),
        percent(result.top1, result.top1_interval),
        f"{result.objective:.5f}",
        f"{result.fit_s:.2f} s",
    )
    check = result.check
    shown: list[Any] = [table, f"C = {result.C:.4g}{_choice(result)}"]
    if check:
        table.add_row(
            f"scikit-learn, C = {check.C:.4g}",
            percent(check.top1, wilson_interval(check.top1, result.n_test)),
            f"{check.objective:.5f}",
            f"{check.wall_s:.2f} s",
        )
        shown += _comparison(result, check)
    if result.converged is False:
        bound = ""
        if result.gap is not None and result.gap < result.objective:
            bound = f"; the objective is at most {result.gap:.2g} above its optimum"
        steps = counted(result.steps, "step")
        shown.append(f"The solver stopped before its tolerance, after {steps}{bound}.")
    if result.zero_shot:
        shown.append(_zero_shot(result.zero_shot, table))
    shown.append(_measures(result))
    if result.n_unlabelled:
        shown.append(f"left out without a label: {counted(result.n_unlabelled, 'image')}")
    if result.test_cache != result.cache:
        shown.append(f"tested on {result.test_cache}")
    shown += [f"note: {note}" for note in result.notes]
    names = _class_names(result)
    if per_class:
        shown.append(_per_class(result, names))
    if confusion:
        shown.append(_confusion(result, names))
    shown.append(f"head: {result.head}")
    if result.zero_shot:
        shown.append(f"zero-shot head: {result.zero_shot.head}")
    return shown


def _zero_shot(result: ZeroShotResult, table: Table) -> str:
    """Add a head without training to the table, and return how the probe compares with it."""
    vectors = f"zero-shot, {counted(result.n_vectors, 'vector')}"
    table.add_row(vectors, percent(result.top1, result.top1_interval), "", "")
    test = result.versus
    low, high = (f"{100 * end:+.2f}" for end in test.interval)
    return (
        f"the probe against zero-shot: {100 * test.difference + 0:+.2f} points ({low} to {high}), "
        f"{out.p_value(test.p_value)} (McNemar)"
    )


def _choice(result: ProbeResult) -> str:
    sweep = result.sweep
    if sweep is None:
        return f", given (lambda = {result.weight_decay:.3g})"
    scores = [point.score for point in sweep.points]
    line = sparkline(scores, encoding())
    edge = (
        f"; the {sweep.at_edge} of the grid, so a better one may lie beyond"
        if sweep.at_edge
        else ""
    )
    held_out = "images of the val split" if result.n_val else "held-out training images"
    if sweep.n_folds > 1:
        held_out = f"training images in {sweep.n_folds} folds"
    return (
        f", the best of {len(scores)} by {result.metric} on {sweep.n_holdout:,} {held_out}: {line} "
        f"{100 * max(scores):.1f} %{edge}; the sweep took {result.wall_s - result.fit_s:.1f} s"
    )


def _comparison(result: ProbeResult, check: CheckResult) -> list[Any]:
    gap = 100 * check.objective_gap
    loss = f"{abs(gap):.2f} % {'lower' if gap < 0 else 'higher'}"
    loss = loss if abs(gap) >= 0.01 else "the same within 0.01 %"
    shown: list[Any] = [
        f"agrees with scikit-learn on {100 * check.agreement:.2f} % of "
        f"{counted(result.n_test, 'test image')}; our loss is {loss}"
    ]
    if not check.converged:
        shown.append(f"scikit-learn stopped early, after {counted(check.iterations, 'iteration')}.")
    if check.under_trained:
        short = 100 * (check.top1 - result.top1)
        points = f"{short:.1f} points lower" if short > 0 else "not lower"
        shown.append(
            f"Under-trained: the loss is {gap:.3f} % above scikit-learn's, and top-1 is {points}."
        )
    return shown


def _measures(result: ProbeResult) -> str:
    measured = result.evaluation
    facts = [
        f"balanced accuracy {100 * measured.balanced_accuracy:.2f} %",
        f"macro F1 {100 * measured.macro_f1:.2f} %",
    ]
    if measured.top5 is not None:
        facts.append(f"top-5 {100 * measured.top5:.2f} %")
    if measured.calibration_error is not None:
        facts.append(f"calibration error {100 * measured.calibration_error:.2f} %")
    return ", ".join(facts)


def _class_names(result: ProbeResult) -> tuple[str, ...]:
    from ..probes.head import load_head

    return load_head(result.head).class_names


def _per_class(result: ProbeResult, names: tuple[str, ...]) -> Any:
    measured = result.evaluation
    if measured.per_class_accuracy:
        table = summary_table("accuracy per class", "class", "accuracy")
        for name, recall in zip(names, measured.per_class_accuracy, strict=True):
            shown = "no test image" if recall is None else f"{100 * recall:.1f} %"
            table.add_row(name_of(name), shown)
        return table
    title = (
        f"lowest accuracies of {len(names):,} classes; {measured.n_classes_missed:,} classes have "
        "no image right"
    )
    table = summary_table(title, "class", "accuracy", "correct")
    for one in measured.worst_classes:
        share = f"{100 * one.n_right / one.n:.1f} %"
        table.add_row(name_of(names[one.label]), share, f"{one.n_right:,} of {one.n:,}")
    return table


def _confusion(result: ProbeResult, names: tuple[str, ...]) -> Any:
    measured = result.evaluation
    if not 0 < len(measured.confusion) <= _CONFUSION_CLASSES:
        if not measured.most_confused:
            return "No test image is misclassified."
        table = Table(title=f"most confused of {len(names):,} classes", title_justify="left")
        for column in ("label", "prediction", "images"):
            table.add_column(column, justify="right" if column == "images" else "left")
        for pair in measured.most_confused:
            shown = (name_of(names[pair.label]), name_of(names[pair.prediction]))
            table.add_row(*shown, f"{pair.n:,} of {pair.n_label:,}")
        return table
    none = "·" if shows("·", encoding()) else "."
    table = summary_table(
        "confusion matrix: label by prediction", "", *(name_of(name[:8]) for name in names)
    )
    for name, row in zip(names, measured.confusion, strict=True):
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
    """Return the fields of the result without arrays."""
    return {name: value for name, value in vars(result).items() if name != "predicted"}


def knn_table(results: list[KnnResult]) -> list[Any]:
    """Return one line per k."""
    few = any(item.shots is not None for item in results)
    top5 = results[0].top5 is not None
    columns = ["shots"] * few + ["k", "top-1 (95 %)"] + ["top-5"] * top5
    table = summary_table("k-nearest-neighbour vote", *columns, "balanced", "macro F1")
    for item in results:
        table.add_row(
            *["full" if item.shots is None else str(item.shots)] * few,
            str(item.k),
            percent(item.top1, item.top1_interval),
            *[f"{100 * (item.top5 or 0):.2f} %"] * top5,
            f"{100 * item.balanced_accuracy:.2f} %",
            f"{100 * item.macro_f1:.2f} %",
        )
    first = results[0]
    wall_s = sum({item.shots: item.wall_s for item in results}.values())
    timing = f"{counted(first.n_test, 'test image')} in {wall_s:.2f} s"
    return [table, timing, *(f"note: {note}" for note in first.notes)]


def curve_table(points: list[CurvePoint], metric: str) -> list[Any]:
    """Return one line per training-set size, and the curve."""
    shots = any(point.shots is not None for point in points)  # a learning curve has none
    columns = ["shots"] * shots + ["n train", f"{metric} (95 %)", "draws", "wall"]
    table = summary_table("by training-set size", *columns)
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
    numbers = any(item.values is not None for item in predictions)
    table = Table()
    for column in ("image", "target", "value") if numbers else ("image", "class", "probability"):
        table.add_column(column, overflow="fold")
    for item in predictions:
        if item.error is not None:
            table.add_row(name_of(item.path), Text("not read", style="dim"), "")
            continue
        pairs = item.values or (item.top if item.labels is None else item.labels)
        names = Text("\n").join(name_of(name) for name, _ in pairs)
        shares = "\n".join(f"{share:.6g}" if numbers else f"{share:.3f}" for _, share in pairs)
        table.add_row(name_of(item.path), names, shares)
    return table
