"""The command `featcache report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import output as out
from .help import RESULTS
from .options import DataRootOption, JsonOption, PicturesOption, app, cache_place

if TYPE_CHECKING:
    from ..reporting.report import ReportResult


@app.command()
def report(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Runs (folders or names) and caches, also their URLs.",
            metavar="RUN|CACHE...",
            parser=cache_place,
            show_default="the newest cache and the runs on its data",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="An .html file, or a folder.", show_default="beside the cache"
        ),
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            help="The folder of runs.",
            show_default="beside the cache",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    map: Annotated[
        Literal["pca", "umap"],
        typer.Option(help="How to project the features onto the map; umap takes minutes."),
    ] = "pca",
    points: Annotated[
        int,
        typer.Option(min=2, help="The most images on the map; of more, a random sample."),
    ] = 60_000,
    thumbnails: Annotated[
        Literal["auto", "all", "lists", "none"],
        typer.Option(help="Which images get one. auto: all of up to 20,000, else those in lists."),
    ] = "auto",
    dataset: PicturesOption = None,
    data_root: DataRootOption = None,
    health: Annotated[
        bool,
        typer.Option("--health/--no-health", help="Look for near-duplicates and wrong labels."),
    ] = True,
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Write one HTML page about runs and features, and its figures as PNG and SVG.

    Example: featcache report --open
    """
    from ..reporting.report import ReportOptions
    from ..reporting.report import report as run

    options = ReportOptions(output, runs, map, points, thumbnails, dataset, data_root, health)
    with out.progress() as listener:
        result = run(*(sources or ()), options=options, on_progress=listener, on_note=out.note)
    out.show(result, json, _summary)
    if open_page and not result.open():
        out.note(f"{result.page}: found no browser to open it")


def _summary(result: ReportResult) -> list[Any]:
    """Summarise the page in two lines."""
    size = f"{result.size_bytes / 1e6:.1f} MB"
    if result.thumbnail_bytes:
        size += f" ({result.thumbnail_bytes / 1e6:.1f} MB of it thumbnails)"
    what = f"{', '.join(result.datasets)}; {out.counted(result.n_runs, 'run')}, "
    what += out.counted(result.n_points, "image")
    lines = [f"{result.page}: {what}; {size} in {result.wall_s:.1f} s"]
    if result.figures:
        lines.append(f"{result.figures[0].parent}: {out.counted(len(result.figures), 'figure')}")
    return lines
