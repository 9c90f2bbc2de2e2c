"""The command `errors`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from . import output as out
from .help import RESULTS
from .options import DataRootOption, JsonOption, PicturesOption, RunsOption, app
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
    from ..reporting.mistakes import worst_errors

    with out.progress() as report:
        result = worst_errors(
            run,
            top=top,
            label=label,
            prediction=prediction,
            html=html,
            dataset=dataset,
            data_root=data_root,
            runs=runs,
            on_progress=report,
            on_note=out.note,
        )
    out.show(result, json, errors_summary)


def errors_summary(result: ErrorsResult) -> list[Any]:
    """Return the worst predictions, and where all of them are."""
    table = Table(title=f"the worst of {counted(result.n_wrong, 'error')} in {result.n:,} images")
    for column in ("image", "label", "prediction"):
        table.add_column(column, overflow="fold")
    table.add_column("probability", justify="right")
    table.add_column("of the label", justify="right")
    for one in result.worst:
        share = one.probability
        table.add_row(
            name_of(one.id),
            name_of(one.label or ""),
            name_of(one.prediction or ""),
            f"error {one.error:.3g}" if share is None else f"{share:.3f}",
            "" if one.label_probability is None else f"{one.label_probability:.3f}",
        )
    shown: list[Any] = [table if result.worst else "No prediction is wrong."]
    if result.confused:
        words = (f"{label} as {prediction} {n:,}" for label, prediction, n in result.confused[:5])
        shown.append(name_of(f"most frequent: {'; '.join(words)}"))
    shown.append(name_of(f"all predictions: {result.predictions}"))
    if result.page is not None:
        shown.append(name_of(f"page: {result.page}"))
    return shown
