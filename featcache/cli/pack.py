"""Extraction by many jobs: one share of it, and putting the shares together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import output as out
from .options import JsonOption, app, place

if TYPE_CHECKING:
    from ..extraction.result import ShareResult


ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        help="Do the I-th of N shares, as one of N jobs at once; featcache pack makes the cache.",
        metavar="I/N",
    ),
]
ShardsOption = Annotated[
    bool, typer.Option("--shards", help="Leave a folder of shards, whatever the size.")
]
ExecutorOption = Annotated[
    Literal["local", "ray"],
    typer.Option(help="ray: on the workers of a Ray cluster, which see the images as we do."),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="Of the Ray cluster, such as auto or 10.0.0.1:6379.",
        show_default="$RAY_ADDRESS, or one started here",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=1, help="Engines on the cluster.", show_default="one per machine or GPU"),
]


def share_of(shard: str, *, force: bool, executor: str) -> tuple[int, int]:
    """Return which job this is, and of how many; wrong values are usage errors."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise typer.BadParameter(
            f"expected I/N with I from 1 to N, such as 3/8, found {shard!r}", param_hint="--shard"
        )
    if force:
        raise typer.BadParameter(
            "not with --shard, since jobs would throw away each other's work; remove the output "
            "to start over",
            param_hint="--force",
        )
    if executor != "local":
        raise typer.BadParameter("not with --shard: take one or the other", param_hint="--executor")
    return int(found[1]), int(found[2])


def share_summary(result: ShareResult) -> Any:
    """Say what is done, what is there, and what comes next."""
    left_out = f", {result.n_skipped} left out" if result.n_skipped else ""
    return (
        f"share {result.share} of {result.output}: {out.counted(result.n_images, 'image')}"
        f"{left_out}, in "
        f"{result.wall_s:.1f} s\n"
        f"{result.n_shards_there} of {result.n_shards_wanted} shards are there; "
        f"when all are: {result.next_step}"
    )


@app.command()
def pack(
    output: Annotated[
        Path | None,
        typer.Argument(
            help="The jobs' output: a .h5 file, or the folder for it.",
            metavar="OUTPUT",
            show_default="cache/",
            parser=place,
        ),
    ] = None,
    shards: ShardsOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another cache of that name.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Put together what the jobs of extract --shard made.

    Example: featcache pack cache/photos.h5
    """
    from ..extraction.jobs import pack as run

    with out.progress() as report:
        result = run(
            output,
            shards=True if shards else None,
            force=force,
            on_progress=report,
            on_note=out.note,
        )
    out.show(result, json, out.extract_summary)
