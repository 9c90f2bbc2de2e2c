"""The commands `search` and `select`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import output as out
from .help import RESULTS
from .options import (
    DataRootOption,
    DeviceOption,
    JsonOption,
    MmapOption,
    SeedOption,
    app,
    cache_place,
    column,
    without,
)
from .output import counted

if TYPE_CHECKING:
    from ..auditing.selection import SelectResult
    from ..searching import SearchResult

_SHOWN = 5  # queries on the terminal
_ROWS = 20  # selected images on the terminal

OneCacheArgument = Annotated[
    Path, typer.Argument(help="Path or URL of a cache.", metavar="CACHE", parser=cache_place)
]
CsvOption = Annotated[
    Path | None,
    typer.Option(help="Write all to a .csv file.", metavar="PATH", rich_help_panel=RESULTS),
]


@app.command()
def search(
    cache: OneCacheArgument,
    queries: Annotated[
        list[str] | None,
        typer.Argument(
            help="Ids of the cache; else images, folders and archives, or their URLs.",
            metavar="QUERY...",
            show_default=False,
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Neighbours of each query.")] = 10,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A query in words, of a CLIP or SigLIP model; may be given again.",
            metavar="TEXT",
            show_default=False,
        ),
    ] = None,
    vectors: Annotated[
        Path | None,
        typer.Option(
            help="More queries: a .npy file of features (M, D), such as of text in the same space.",
            metavar="FILE",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="The backbone's checkpoint.",
            show_default="the one that the cache records",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="The backbone, where it is a file or a function.",
            show_default="the one that the cache records",
        ),
    ] = None,
    device: DeviceOption = "auto",
    mmap: MmapOption = False,
    csv: CsvOption = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page (.html).", metavar="PATH", rich_help_panel=RESULTS),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="The data set of the cache, for pictures on the page.",
            metavar="DATASET",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    data_root: DataRootOption = None,
    json: JsonOption = False,
) -> None:
    """Find the images of a cache that are most similar to images, ids, texts or vectors.

    Example: featcache search digits.h5 photo.png -k 5
    """
    from ..files import check_writable, write_atomically
    from ..searching import as_csv
    from ..searching import search as run

    if images is not None and html is None:
        raise typer.BadParameter("has no effect without --html", param_hint="--images")
    if csv is not None:
        check_writable(csv)
    if html is not None:
        from ..reporting.page import check_sheet

        check_sheet("search", html)
    with out.progress() as report:
        result = run(
            cache,
            queries or (),
            k=k,
            text=text or (),
            vectors=vectors,
            weights=weights,
            backbone=backbone,
            device=device,
            mmap=mmap,
            on_progress=report,
            on_note=out.note,
        )
        if html is not None:
            from ..reporting.neighbours import write_neighbours

            write_neighbours(
                result,
                html,
                images=images,
                data_root=data_root,
                on_progress=report,
                on_note=out.note,
            )
    if csv is not None:
        write_atomically(csv, as_csv(result).encode())
    out.show(result, json, search_summary)


def search_summary(result: SearchResult) -> list[Any]:
    """Return a table for each of the first queries."""
    shown: list[Any] = []
    for query in result.queries[:_SHOWN]:
        rows = [
            (f"{one.similarity:.4f}", one.split, one.label or "", one.id)
            for one in query.neighbours
        ]
        columns = ("split", "label", "image")
        shown.append(out.table(rows, (), ("cosine",), columns, title=query.name))
    if len(result.queries) > _SHOWN:
        left = counted(len(result.queries) - _SHOWN, "query").replace("querys", "queries")
        shown.append(f"{left} more: --csv PATH, --html PATH or --json")
    shown.append(f"{counted(result.n_images, 'image')} compared; {result.wall_s:.2f} s")
    return shown


@app.command()
def select(
    cache: OneCacheArgument,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="How many images.")] = 100,
    by: Annotated[
        Literal["uncertain", "diverse", "both"],
        typer.Option(
            help="uncertain: a head on the labelled images hesitates most. diverse: unlike the "
            "labelled and each other. both: diverse, and rather uncertain ones."
        ),
    ] = "both",
    target: Annotated[
        str | None,
        column("Column of the attached table that has the labels.", "the cache's own labels"),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(help="Only these images: 'site != \"B\"'.", metavar="EXPRESSION"),
    ] = None,
    seed: SeedOption = 0,
    mmap: MmapOption = False,
    csv: CsvOption = None,
    json: JsonOption = False,
) -> None:
    """Select the unlabelled images that are most worth a label.

    Example: featcache select digits.h5 -n 200 --csv next.csv
    """
    given = without(locals(), "cache", "json")
    from ..auditing.selection import select as run

    with out.progress() as report:
        result = run(cache, **given, on_progress=report)
    out.show(result, json, select_summary)


def select_summary(result: SelectResult) -> list[Any]:
    """Return the first of the selected images, and what to do with them."""
    said = (
        f"{counted(len(result.selected), 'image')} of {result.n_unlabelled:,} without a label, "
        f"by {result.by}; {result.n_labelled:,} have one"
    )
    rows = [
        ("" if one.margin is None else f"{one.margin:.4f}", one.suggested or "", one.id)
        for one in result.selected[:_ROWS]
    ]
    shown: list[Any] = [said, out.table(rows, (), ("margin",), ("suggested", "image"))]
    if len(result.selected) > _ROWS:
        shown.append(f"{len(result.selected) - _ROWS:,} more: --csv PATH or --json")
    shown += [f"note: {note}" for note in result.notes]
    if result.csv is not None:
        again = shlex.join(["featcache", "label", str(result.cache), str(result.csv)])
        shown.append(f"fill in {result.csv}, then: {again}")
    return [*shown, f"{result.wall_s:.2f} s"]
