"""The command `featcache survey`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import output as out
from . import plot as _plot
from .help import BACKBONE, IMAGES
from .options import (
    DataRootOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    PlotOption,
    PrecisionOption,
    RunsOption,
    SeveralBackbonesOption,
    SeveralWeightsOption,
    TestLimitOption,
    TrainLimitOption,
    app,
    cache_place,
    column,
    numbers,
    place,
)
from .output import name as name_of

if TYPE_CHECKING:
    from ..surveying import Answer, Surveyed, SurveyResult


@app.command()
def survey(
    dataset: Annotated[
        str | None,
        typer.Argument(
            help="As of featcache extract; not needed with --cache alone.",
            metavar="DATASET",
            show_default=False,
        ),
    ] = None,
    backbone: SeveralBackbonesOption = None,
    weights: SeveralWeightsOption = None,
    size: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=4096,
            help="Side of the input in pixels; one for all, or one for each.",
            show_default="the size the weights were trained at",
            rich_help_panel=BACKBONE,
        ),
    ] = None,
    caches: Annotated[
        list[Any] | None,
        typer.Option(
            "--cache",
            help="A cache of the same images, also an imported one; give several.",
            metavar="PATH",
            parser=cache_place,
            rich_help_panel=BACKBONE,
        ),
    ] = None,
    concat: Annotated[
        bool,
        typer.Option(
            "--concat",
            help="Every pair too: standardised features side by side, in memory.",
            rich_help_panel=BACKBONE,
        ),
    ] = False,
    target: Annotated[
        list[str] | None, column("The column to predict.", "the data set's own labels")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="A table to join now: .csv, .tsv, .parquet or .jsonl.",
            metavar="TABLE",
            show_default="the one attached",
            parser=place,
        ),
    ] = None,
    split_column: Annotated[str | None, column("The column with train, val or test.")] = None,
    group: Annotated[str | None, column("The column whose images stay on one side.")] = None,
    where: Annotated[
        str | None, typer.Option(help="Only these images: 'age >= 40'.", metavar="EXPRESSION")
    ] = None,
    scale: Annotated[
        Literal["none", "standardize", "l2"],
        typer.Option(help="Scaling of the features for the linear head."),
    ] = "none",
    k: Annotated[int, typer.Option("--knn", min=1, help="Neighbours.", metavar="K")] = 20,
    shots: Annotated[
        str, typer.Option(help="Images of every class for few-shot heads; '' for none.")
    ] = "1,5,25",
    seeds: Annotated[int, typer.Option(min=1, help="Draws of each number of shots.")] = 5,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "f32",
    train_limit: TrainLimitOption = None,
    test_limit: TestLimitOption = None,
    data_root: DataRootOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A folder for the caches.",
            metavar="PATH",
            show_default="cache/",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    plot: PlotOption = None,
    runs: RunsOption = None,
    json: JsonOption = False,
) -> None:
    """Ask several backbones the same questions, and name the cheapest that is good enough.

    Give --backbone for each; --weights and --size once for all, or once for each. The weights
    "own" are those that a backbone has by default.

    Example: featcache survey digits --backbone resnet18 --backbone resnet50 --train-limit 500
    """
    given: dict[str, Any] = {**locals(), "shots": numbers(shots, "--shots"), "backbones": backbone}
    from ..surveying import SurveyOptions
    from ..surveying import survey as run

    _plot.checked(plot)
    names = {field.name for field in fields(SurveyOptions)} & given.keys()
    many = {name: given[name] or () for name in ("backbones", "weights", "size", "caches")}
    options = SurveyOptions(**{**{name: given[name] for name in names}, **many})
    with out.progress() as report:
        result = run(dataset, options=options, on_progress=report, on_note=out.note)
    out.show(result, json, survey_tables)

    def draw() -> Any:
        from ..reporting.figures import backbones_compared

        return backbones_compared(result.rows)

    _plot.save(plot, draw)


def survey_tables(result: SurveyResult) -> list[Any]:
    """Return a table of accuracies and one of costs, and name the cheapest that is good enough."""
    rows = result.rows
    title = f"{result.dataset} ({result.dataset_digest[:8]})"
    title += f", target {result.question['target']}" if result.question["target"] else ""
    title += f": {result.n_train:,} to train, {result.n_test:,} to test"
    k = rows[0].knn.k
    shots = sorted({one.shots or 0 for row in rows for one in row.few_shot})
    few = [{one.shots: f"{100 * one.top1:.1f}" for one in row.few_shot} for row in rows]
    answers = [
        (
            row.name,
            _accuracy(row.probe),
            *_difference(row),
            f"{100 * row.knn.top1:.2f}",
            *(own.get(count, "-") for count in shots),
        )
        for row, own in zip(rows, few, strict=True)
    ]
    costs = [
        (
            row.name,
            f"{row.feature_dim:,}",
            f"{row.bytes_per_image:,}",
            f"{row.images_per_s:,.0f}" if row.images_per_s else "?",
            *(f"{one:.1f} s" for one in (row.probe.wall_s, row.knn.wall_s)),
            f"{sum(one.wall_s for one in row.few_shot):.1f} s",
        )
        for row in rows
    ]
    scores = ("top-1 % (95 %)", "to best", "p", f"{k}-NN", *(f"{count}-shot" for count in shots))
    prices = ("features", "B/image", "img/s", "head", "k-NN", "few-shot")
    return [
        out.table(answers, ("backbone",), scores, title=title),
        out.table(costs, ("backbone",), prices),
        name_of(_verdict(result)),
        f"record: {result.run}",
    ]


def _accuracy(answer: Answer) -> str:
    low, high = answer.interval
    return f"{100 * answer.top1:.2f} ({100 * low:.1f}-{100 * high:.1f})"


def _difference(row: Surveyed) -> tuple[str, str]:
    """Return the difference to the best head and its p value."""
    if row.vs_best is None:
        return "best", ""
    p = out.p_value(row.vs_best.p_value).removeprefix("p ").removeprefix("= ")
    return f"{-100 * row.vs_best.difference:+.2f}", p.replace(" ", "")


def _verdict(result: SurveyResult) -> str:
    best = result.rows[0]
    chosen = next(row for row in result.rows if row.name == result.cheapest)
    if chosen is best:
        cheaper = any(row.cost < best.cost for row in result.rows)
        rest = "every cheaper one is significantly worse (p < 0.05)" if cheaper else "the cheapest"
        return f"{chosen.name}: the best, and {rest}"
    assert chosen.vs_best is not None
    low, high = chosen.vs_best.interval
    return (
        f"{chosen.name}: the cheapest that is not significantly worse than {best.name}, which is "
        f"ahead by {100 * chosen.vs_best.difference:.2f} points "
        f"({100 * low:+.2f} to {100 * high:+.2f}; {out.p_value(chosen.vs_best.p_value)})"
    )
