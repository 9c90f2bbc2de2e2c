"""The commands on caches themselves: verify, diff, merge, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import _output as out
from . import _store_output as view
from ._options import CacheArgument, JsonOption, app
from ._places import cache_place

__all__ = ["diff", "export", "merge", "verify"]

_ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output if it is there.")]


@app.command()
def verify(
    cache: CacheArgument = None,
    json: JsonOption = False,
) -> None:
    """Read a cache whole and check every block of it; exit 1 with the first bad one named.

    Example: [bold]featcache verify cache/digits-resnet18.h5[/bold]
    """
    from ..store import newest_cache
    from ..store import verify as run

    with out.progress() as report:
        result = run(cache or newest_cache(), on_progress=report)
    out.show(result, json, view.verify_summary)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A cache.", metavar="A", parser=cache_place)],
    b: Annotated[Path, typer.Argument(help="Another.", metavar="B", parser=cache_place)],
    json: JsonOption = False,
) -> None:
    """Compare two caches: ingredients, images, labels, features.

    Exits 0 if one can stand for the other, and 1 if they differ.

    Example: [bold]featcache diff before.h5 after.h5[/bold]
    """
    from ..store import diff as run

    with out.progress() as report:
        result = run(a, b, on_progress=report)
    out.show(result, json, view.diff_summary)
    if not result.same:
        raise typer.Exit(1)


@app.command()
def merge(
    caches: Annotated[
        list[Path],
        typer.Argument(help="Two caches at least.", metavar="CACHE", parser=cache_place),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .h5 file.")],
    name: Annotated[
        str | None,
        typer.Option(help="Of the data set they make.", show_default="their names with +"),
    ] = None,
    prefix: Annotated[
        bool,
        typer.Option("--prefix", help="Put the data set's name in front of every id."),
    ] = False,
    force: _ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Put the images of several caches of the same ingredients into one.

    Example: [bold]featcache merge a.h5 b.h5 -o both.h5[/bold]
    """
    from ..store import merge as run

    if len(caches) < 2:
        raise typer.BadParameter("expected two caches at least", param_hint="CACHE")
    with out.progress() as report:
        result = run(caches, output, name=name, prefix=prefix, force=force, on_progress=report)
    out.show(result, json, view.merge_summary)


@app.command()
def export(
    cache: CacheArgument = None,
    to: Annotated[
        Literal["npz", "parquet", "safetensors", "tensorboard"],
        typer.Option(
            help="npz, parquet, safetensors, or tensorboard: a folder for its projector.",
            metavar="FORMAT",
        ),
    ] = "npz",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A file, or a folder for it.", show_default="beside the cache"
        ),
    ] = None,
    split: Annotated[Literal["all", "train", "test"], typer.Option(help="Which images.")] = "all",
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of tensorboard: images at most, the proportions of classes kept.",
            show_default="10,000",
        ),
    ] = None,
    force: _ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write a cache in another format.

    Example: [bold]featcache export --to parquet -o digits.parquet[/bold]
    """
    from ..exporting import export as run

    if limit is not None and to != "tensorboard":
        raise typer.BadParameter("is of --to tensorboard alone", param_hint="--limit")
    with out.progress() as report:
        result = run(cache, to, output, split=split, limit=limit, force=force, on_progress=report)
    out.show(result, json, view.export_summary)
