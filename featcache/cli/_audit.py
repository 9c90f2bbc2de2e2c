"""The command `audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _output as out
from ._audit_output import audit_summary
from ._options import CacheArgument, JsonOption, MmapOption, SeedOption, app

__all__ = ["audit"]


@app.command()
def audit(
    cache: CacheArgument = None,
    duplicates: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Cosine from which on two images count as near-duplicates."
        ),
    ] = 0.95,
    folds: Annotated[
        int, typer.Option(min=2, help="Heads that training labels are judged by.")
    ] = 5,
    neighbours: Annotated[
        int, typer.Option(min=1, help="Nearest images that are looked at, for each image.")
    ] = 10,
    outliers: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="List what lies further out than all but this share of train."
        ),
    ] = 0.01,
    top: Annotated[int, typer.Option(min=0, help="Lines of each list that are shown.")] = 10,
    csv: Annotated[
        Path | None,
        typer.Option(
            help="A folder for the whole lists: duplicates, groups, mislabelled, outliers.",
            metavar="FOLDER",
        ),
    ] = None,
    seed: SeedOption = 0,
    mmap: MmapOption = False,
    json: JsonOption = False,
) -> None:
    """Look for near-duplicates, likely wrong labels and outliers in a data set.

    Example: [bold]featcache audit --csv health[/bold]
    """
    from ..auditing import audit as run
    from ..auditing import table_paths, write_tables
    from ..files import check_writable, user_path

    folder = None if csv is None else user_path(csv)
    if folder is not None:
        for path in table_paths(folder).values():
            check_writable(path)
    with out.progress() as report:
        result = run(
            cache,
            duplicates=duplicates,
            folds=folds,
            neighbours=neighbours,
            outliers=outliers,
            seed=seed,
            mmap=mmap,
            on_progress=report,
        )
    if folder is not None:
        write_tables(result, folder)
    out.show(result, json, lambda item: audit_summary(item, top, folder))
