"""The command `errors`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output as out
from .help import RESULTS
from .options import DataRootOption, JsonOption, PicturesOption, RunsOption, app, without
from .output import counted
from .output import name as name_of

if TYPE_CHECKING:
    from ..reporting.mistakes import ErrorsResult


@app.command()
def errors(
    run: Annotated[
        str | None,
        typer.Argument(
            help="A run: its folder, or its name.",
            metavar="RUN",
            show_default="the newest with predictions",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 24,
    label: Annotated[str | None, typer.Option(help="Only images of this class.")] = None,
    prediction: Annotated[
        str | None, typer.Option(help="Only images predicted as this class.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a page with the images (.html).", metavar="PATH", rich_help_panel=RESULTS
        ),
    ] = None,
    dataset: PicturesOption = None,
    data_root: DataRootOption = None,
    runs: RunsOption = None,
    json: JsonOption = False,
) -> None:
    """Show the worst predictions of a run, as a table and as a page with the images.

    Example: featcache errors --html errors.html
    """
    given = without(locals(), "run", "json")
    from ..reporting.mistakes import worst_errors

    with out.progress() as report:
        result = worst_errors(run, **given, on_progress=report, on_note=out.note)
    out.show(result, json, errors_summary)


def errors_summary(result: ErrorsResult) -> list[Any]:
    """Return the worst predictions, and where all of them are."""
    rows = [
        (
            one.id,
            one.label or "",
            one.prediction or "",
            f"error {one.error:.3g}" if one.probability is None else f"{one.probability:.3f}",
            "" if one.label_probability is None else f"{one.label_probability:.3f}",
        )
        for one in result.worst
    ]
    shown: list[Any] = ["No prediction is wrong."]
    if rows:
        title = f"the worst of {counted(result.n_wrong, 'error')} in {result.n:,} images"
        columns = (("image", "label", "prediction"), ("probability", "of the label"))
        shown = [out.table(rows, *columns, title=title)]
    if result.confused:
        words = (f"{label} as {prediction} {n:,}" for label, prediction, n in result.confused[:5])
        shown.append(name_of(f"most frequent: {'; '.join(words)}"))
    shown.append(name_of(f"all predictions: {result.predictions}"))
    if result.page is not None:
        shown.append(name_of(f"page: {result.page}"))
    return shown
