"""The command that makes a page of runs and features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import output as out
from .help import RESULTS
from .options import DataRootOption, JsonOption, app, cache_place

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
            help="Where the records of runs are.",
            show_default="beside the cache",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    map: Annotated[
        Literal["pca", "umap"], typer.Option(help="How features become a map; umap takes minutes.")
    ] = "pca",
    points: Annotated[
        int,
        typer.Option(min=2, help="Images on the map at most; of more, a draw."),
    ] = 60_000,
    thumbnails: Annotated[
        Literal["auto", "all", "lists", "none"],
        typer.Option(help="auto: all images up to 20,000, else those in lists."),
    ] = "auto",
    dataset: Annotated[
        str | None,
        typer.Option(help="Where the images are.", show_default="where the cache found them"),
    ] = None,
    data_root: DataRootOption = None,
    health: Annotated[
        bool,
        typer.Option("--health/--no-health", help="Look for near-duplicates and wrong labels."),
    ] = True,
    open_page: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    json: JsonOption = False,
) -> None:
    """Make one HTML page of runs and features, and its figures as PNG and SVG.

    Example: featcache report --open
    """
    from ..reporting.report import report as run

    with out.progress() as listener:
        result = run(
            *(sources or ()),
            output=output,
            runs=runs,
            map=map,
            points=points,
            thumbnails=thumbnails,
            dataset=dataset,
            data_root=data_root,
            health=health,
            on_progress=listener,
            on_note=out.note,
        )
    out.show(result, json, _summary)
    if open_page and not result.open():
        out.note(f"{result.page}: there is no browser here to show it")


def _summary(result: ReportResult) -> list[Any]:
    """Say where the page is, and what is in it."""
    size = f"{result.size_bytes / 1e6:.1f} MB"
    if result.thumbnail_bytes:
        size += f" ({result.thumbnail_bytes / 1e6:.1f} MB of it thumbnails)"
    what = f"{', '.join(result.datasets)}; {out.counted(result.n_runs, 'run')}, "
    what += out.counted(result.n_points, "image")
    lines = [f"{result.page}: {what}; {size} in {result.wall_s:.1f} s"]
    if result.figures:
        lines.append(f"{result.figures[0].parent}: {out.counted(len(result.figures), 'figure')}")
    return lines
