"""The command `featcache label`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output as out
from .options import JsonOption, app, column, place
from .output import columns_in_words, counted
from .output import name as name_of

if TYPE_CHECKING:
    from ..store.label import LabelResult


@app.command()
def label(
    cache: Annotated[
        Any, typer.Argument(help="Path or URL of a cache.", metavar="CACHE", parser=place)
    ],
    table: Annotated[
        str | None,
        typer.Argument(
            help="A path or URL: .csv, .tsv, .txt, .parquet, .jsonl or .ndjson.",
            metavar="TABLE",
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        str | None,
        column(
            "The column that names the images: by id, path or content hash.",
            "id, path, file_name or the like",
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Remove the table of the cache instead.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Attach a table of labels to a cache, in the place of any before it; features stay.

    Example: featcache label digits.h5 labels.csv
    """
    from ..store.label import detach as remove
    from ..store.label import label as run

    if detach:
        if table is not None or by is not None:
            raise typer.BadParameter("not with TABLE or --by", param_hint="--detach")
        out.show({"detached": remove(cache)}, json, lambda gone: f"removed {gone['detached']}")
        return
    if table is None:
        raise typer.BadParameter("expected a table, found none; name a file", param_hint="TABLE")
    out.show(run(cache, table, by=by, on_note=out.note), json, _summary)


def _summary(result: LabelResult) -> list[Any]:
    """Say how many images have a row, by what, and what the columns are."""
    return [
        name_of(
            f"{result.cache}: {result.n_matched:,} of {counted(result.n_images, 'image')} have a "
            f"row of {result.source} (by {result.key}), in {result.wall_s:.1f} s"
        ),
        *columns_in_words(result.columns),
    ]
