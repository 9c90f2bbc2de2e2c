"""The commands on cached features: probe in its forms, and predict."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import _output as out
from . import _plot
from . import _probe_output as view
from ._help import IMAGES, RESULTS
from ._options import (
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
)
from ._places import cache_place, place

if TYPE_CHECKING:
    from ..curves import CurvePoint
    from ..probing import ProbeResult

__all__ = ["predict", "probe"]

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

    Example: [bold]featcache probe --scale standardize --per-class[/bold]
    """
    _check_form(context)
    _plot.checked(plot)
    if head is not None:
        from ..prediction import evaluate_head
        from ..store import newest_cache

        out.show(
            evaluate_head(head, cache or newest_cache()), json, view.head_summary, view.head_facts
        )
        return
    with out.progress() as report:
        if knn is not None:
            from ..neighbours import knn as run_knn

            ks = [int(k) for k in _numbers(knn, "--knn")]
            votes = run_knn(cache, ks=ks, runs=runs, on_progress=report)
        elif shots is not None:
            from ..curves import few_shot

            wanted = _numbers(shots, "--shots", ("full",))
            points = few_shot(
                cache, shots=wanted, seeds=seeds, metric=metric, runs=runs, on_progress=report
            )
        elif learning_curve:
            from ..curves import learning_curve as run_curve

            points = run_curve(cache, seeds=seeds, metric=metric, runs=runs, on_progress=report)
        else:
            from ..probing import probe as run

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
        out.show(votes, json, view.knn_table, lambda items: [asdict(item) for item in items])
    elif shots is not None or learning_curve:
        out.show(
            points,
            json,
            lambda items: view.curve_table(items, metric),
            lambda items: [asdict(item) for item in items],
        )
        _plot.save(plot, lambda: _curve_figure(points, metric))
    else:
        out.show(result, json, lambda item: view.probe_summary(item, per_class, confusion))
        _plot.save(plot, lambda: _probe_figure(result))
        # What could not be checked must at least have reached its own tolerance.
        short = result.check.under_trained if result.check else result.converged is False
        if strict and short:
            raise typer.Exit(1)


def _curve_figure(points: list[CurvePoint], metric: str) -> Any:
    from ..figures import shots_curve

    return shots_curve(points, metric=metric)


def _probe_figure(result: ProbeResult) -> Any:
    from ..figures import probe_overview
    from ..probes import load_head

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

    Example: [bold]featcache predict photos --head cats.safetensors --format csv[/bold]
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
    out.show(found, json, view.prediction_table, lambda items: [asdict(item) for item in items])
