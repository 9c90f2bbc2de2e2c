"""The commands on cached features: probe in its forms, and predict."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from . import output as out
from . import plot as _plot
from .help import IMAGES, RESULTS
from .options import (
    CacheArgument,
    DeviceOption,
    JsonOption,
    MmapOption,
    OnErrorOption,
    PlotOption,
    RunsOption,
    SeedOption,
    TestLimitOption,
    TrainLimitOption,
    app,
    cache_place,
    place,
)
from .output import counted, encoding, percent, shows, sparkline
from .output import name as name_of

if TYPE_CHECKING:
    from ..prediction import HeadResult, Prediction
    from ..probes.cross_check import CheckResult
    from ..probes.curves import CurvePoint
    from ..probes.knn import KnnResult
    from ..probes.probe import ProbeResult


_HEAD, _SGD, _INSTEAD = "The head", "Of --solver sgd", "Instead of one head"

# What may be asked for together with each form that takes the place of one head.
_CURVE = {"cache", "seeds", "metric", "plot", "runs", "json"}
_FORMS = {
    "head": {"cache", "json"},
    "knn": {"cache", "runs", "json"},
    "shots": _CURVE,
    "learning_curve": _CURVE,
}


def _numbers(text: str, option: str, also: tuple[str, ...] = ()) -> list[int | str]:
    """Read "1,2,full" as [1, 2, "full"]."""
    values: list[int | str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part not in also and not part.isdecimal():
            wanted = " or ".join(("numbers", *also))
            raise typer.BadParameter(
                f"expected {wanted} with commas, found {part!r}", param_hint=option
            )
        values.append(part if part in also else int(part))
    return values


def _check_form(context: typer.Context) -> None:
    """Refuse what would be without effect, rather than leave it out without a word."""
    spelled = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }
    forms = [name for name in _FORMS if name in given]
    if len(forms) > 1:
        names = " and ".join(spelled[name] for name in forms)
        raise typer.BadParameter(f"expected one of them at most, found {names}")
    if not forms:
        if "seeds" in given:
            unfit = "has no effect without --shots or --learning-curve"
            raise typer.BadParameter(unfit, param_hint="--seeds")
        return
    (form,) = forms
    for name in sorted(given - _FORMS[form] - {form}):
        raise typer.BadParameter(f"has no effect with {spelled[form]}", param_hint=spelled[name])


@app.command()
def probe(
    context: typer.Context,
    cache: CacheArgument = None,
    solver: Annotated[
        Literal["lbfgs", "ridge", "sgd"] | None,
        typer.Option(
            help="lbfgs: the exact optimum. ridge: least squares, closed form. sgd: in OneFlow.",
            show_default="lbfgs",
            rich_help_panel=_HEAD,
        ),
    ] = None,
    recipe: Annotated[
        Literal["default", "tutorial"],
        typer.Option(
            help="default: to the optimum. tutorial: its 3 epochs at 1e-3.", rich_help_panel=_SGD
        ),
    ] = "default",
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Exactly so many.", show_default="the recipe's", rich_help_panel=_SGD
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Features per step.", show_default="the recipe's", rich_help_panel=_SGD
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate.", show_default="the recipe's", rich_help_panel=_SGD),
    ] = None,
    momentum: Annotated[
        float | None,
        typer.Option(help="From 0 to below 1.", show_default="the recipe's", rich_help_panel=_SGD),
    ] = None,
    schedule: Annotated[
        Literal["constant", "cosine"] | None,
        typer.Option(
            help="cosine lets the rate fall to 0.",
            show_default="the recipe's",
            rich_help_panel=_SGD,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="The penalty as lambda; C = 1 / (N lambda).", rich_help_panel=_HEAD),
    ] = None,
    c: Annotated[
        float | None,
        typer.Option("--C", help="The penalty in scikit-learn's terms.", rich_help_panel=_HEAD),
    ] = None,
    sweep: Annotated[
        bool | None,
        typer.Option(
            "--sweep/--no-sweep",
            help="Choose C on a holdout of the training split.",
            show_default="on where no penalty is given",
            rich_help_panel=_HEAD,
        ),
    ] = None,
    scale: Annotated[
        Literal["none", "standardize", "l2"],
        typer.Option(help="What is done to features first.", rich_help_panel=_HEAD),
    ] = "none",
    metric: Annotated[
        Literal["top1", "balanced", "f1"],
        typer.Option(
            help="What the sweep and the curves go by: balanced for rare classes.",
            rich_help_panel=_HEAD,
        ),
    ] = "top1",
    per_class: Annotated[
        bool,
        typer.Option(
            "--per-class", help="Show the accuracy of every class.", rich_help_panel=RESULTS
        ),
    ] = False,
    confusion: Annotated[
        bool,
        typer.Option("--confusion", help="Show label against prediction.", rich_help_panel=RESULTS),
    ] = False,
    knn: Annotated[
        str | None,
        typer.Option(
            help="Vote of so many neighbours instead: 10,20,100.", rich_help_panel=_INSTEAD
        ),
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(help="Few-shot curve instead: 1,2,5,10,25,full.", rich_help_panel=_INSTEAD),
    ] = None,
    learning_curve: Annotated[
        bool,
        typer.Option(
            "--learning-curve",
            help="Accuracy by training-set size instead.",
            rich_help_panel=_INSTEAD,
        ),
    ] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Draws per point of a curve.", rich_help_panel=_INSTEAD)
    ] = 5,
    head: Annotated[
        Path | None,
        typer.Option(
            help="Measure this saved head instead of training one.", rich_help_panel=_INSTEAD
        ),
    ] = None,
    test_cache: Annotated[
        Path | None,
        typer.Option(
            help="Test on the test split of this cache instead.",
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
        bool,
        typer.Option(
            "--check/--no-check", help="Compare with scikit-learn.", rich_help_panel=RESULTS
        ),
    ] = True,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit 1 if the head is under-trained.", rich_help_panel=RESULTS
        ),
    ] = False,
    save_head: Annotated[
        Path | None, typer.Option(help="A .safetensors file for the head.", rich_help_panel=RESULTS)
    ] = None,
    plot: PlotOption = None,
    runs: RunsOption = None,
    json: JsonOption = False,
) -> None:
    """Train a linear head on cached features, checked against scikit-learn.

    Example: featcache probe --scale standardize --per-class
    """
    _check_form(context)
    _plot.checked(plot)
    if head is not None:
        from ..prediction import evaluate_head
        from ..store.cache import newest_cache

        out.show(evaluate_head(head, cache or newest_cache()), json, head_summary, head_facts)
        return
    with out.progress() as report:
        if knn is not None:
            from ..probes.knn import knn as run_knn

            ks = [int(k) for k in _numbers(knn, "--knn")]
            votes = run_knn(cache, ks=ks, runs=runs, on_progress=report)
        elif shots is not None:
            from ..probes.curves import few_shot

            wanted = _numbers(shots, "--shots", ("full",))
            points = few_shot(
                cache, shots=wanted, seeds=seeds, metric=metric, runs=runs, on_progress=report
            )
        elif learning_curve:
            from ..probes.curves import learning_curve as run_curve

            points = run_curve(cache, seeds=seeds, metric=metric, runs=runs, on_progress=report)
        else:
            from ..probes.probe import probe as run

            result = run(
                cache,
                solver=solver,
                recipe=recipe,
                epochs=epochs,
                batch_size=batch_size,
                lr=lr,
                momentum=momentum,
                schedule=schedule,
                weight_decay=weight_decay,
                C=c,
                sweep=sweep,
                scale=scale,
                metric=metric,
                test=test_cache,
                train_limit=train_limit,
                test_limit=test_limit,
                seed=seed,
                device=device,
                mmap=mmap,
                check=check or strict,
                save_head_to=save_head,
                runs=runs,
                on_progress=report,
            )
    if knn is not None:
        out.show(votes, json, knn_table, lambda items: [asdict(item) for item in items])
    elif shots is not None or learning_curve:
        out.show(
            points,
            json,
            lambda items: curve_table(items, metric),
            lambda items: [asdict(item) for item in items],
        )
        _plot.save(plot, lambda: _curve_figure(points, metric))
    else:
        out.show(result, json, lambda item: probe_summary(item, per_class, confusion))
        _plot.save(plot, lambda: _probe_figure(result))
        # What could not be checked must at least have reached its own tolerance.
        short = result.check.under_trained if result.check else result.converged is False
        if strict and short:
            raise typer.Exit(1)


def _curve_figure(points: list[CurvePoint], metric: str) -> Any:
    from ..reporting.curve_figures import shots_curve

    return shots_curve(points, metric=metric)


def _probe_figure(result: ProbeResult) -> Any:
    from ..probes.head import load_head
    from ..reporting.probe_figures import probe_overview

    return probe_overview(result, load_head(result.head).class_names)


@app.command()
def predict(
    images: Annotated[
        list[Path],
        typer.Argument(
            help="Images, folders and .zip archives, or their URLs.",
            metavar="IMAGE...",
            parser=place,
        ),
    ],
    head: Annotated[Path, typer.Option(help="A head that featcache probe saved.")],
    weights: Annotated[
        str | None,
        typer.Option(help="The backbone's checkpoint.", show_default="the one that the head names"),
    ] = None,
    device: DeviceOption = "auto",
    top: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 1,
    on_error: OnErrorOption = "fail",
    form: Annotated[
        Literal["table", "csv"],
        typer.Option("--format", help="What is printed; JSON by --json.", rich_help_panel=RESULTS),
    ] = "table",
    json: JsonOption = False,
) -> None:
    """Name the class of images, with a saved head.

    Example: featcache predict photos --head cats.safetensors --format csv
    """
    from ..prediction import as_csv
    from ..prediction import predict as run

    if json and form == "csv":
        raise typer.BadParameter("has no effect with --json", param_hint="--format")
    with out.progress() as report:
        found = run(
            list(images),
            head,
            weights=weights,
            device=device,
            top=top,
            on_error=on_error,
            on_progress=report,
            on_note=out.note,
        )
    if form == "csv":
        # A file name need not be text: what cannot be printed is spelt out.
        print(as_csv(found).encode("utf-8", "backslashreplace").decode(), end="")
        return
    out.show(found, json, prediction_table, lambda items: [asdict(item) for item in items])


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
    from ..probes.head import load_head

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
