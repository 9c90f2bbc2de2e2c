"""The command `serve`."""

from __future__ import annotations

import json as _json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ..options import MAX_PIXELS
from . import output as out
from .options import (
    DataRootOption,
    DeviceOption,
    HeadBackboneOption,
    HeadWeightsOption,
    JsonOption,
    MaxPixelsOption,
    app,
    cache_place,
)

_LIMITS = "Limits"


@app.command()
def serve(
    head: Annotated[
        Path, typer.Argument(help="A head that featcache probe saved.", metavar="HEAD")
    ],
    cache: Annotated[
        Path | None,
        typer.Option(
            help="The head's cache: shows the nearest images and the accuracy.",
            metavar="CACHE",
            parser=cache_place,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Where the images of the cache are, for their pictures."),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="Label in the browser: a CSV file for the answers, made where there is none.",
            metavar="TABLE",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's need a token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(
            help="Secret that every request must bring; safer in the environment than here.",
            envvar="FEATCACHE_TOKEN",
            metavar="TOKEN",
        ),
    ] = None,
    weights: HeadWeightsOption = None,
    backbone: HeadBackboneOption = None,
    device: DeviceOption = "auto",
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    max_mb: Annotated[
        int, typer.Option(min=1, help="Most megabytes of a request.", rich_help_panel=_LIMITS)
    ] = 32,
    timeout: Annotated[
        float,
        typer.Option(
            min=1,
            help="Most seconds of a request, its sending included.",
            rich_help_panel=_LIMITS,
        ),
    ] = 30.0,
    connections: Annotated[
        int, typer.Option(min=1, help="Most connections at a time.", rich_help_panel=_LIMITS)
    ] = 256,
    queue: Annotated[
        int,
        typer.Option(
            min=1,
            help="Most images under way; more are answered 503 until there is room.",
            rich_help_panel=_LIMITS,
        ),
    ] = 256,
    data_root: DataRootOption = None,
    json: JsonOption = False,
) -> None:
    """Serve a head on this machine: a page to drop images on, and HTTP for programs.

    Example: featcache serve cats.safetensors --cache cats.h5
    """
    from ..serving.server import require_server
    from ..serving.server import serve as run

    require_server()
    from ..serving.app import ServeOptions

    options = ServeOptions(
        weights=weights,
        backbone=backbone,
        device=device,
        cache=cache,
        dataset=dataset,
        data_root=data_root,
        label=label,
        host=host,
        port=port,
        token=token,
        max_pixels=max_pixels,
        max_bytes=max_mb * 1_000_000,
        timeout_s=timeout,
        connections=connections,
        queue=queue,
    )

    def ready(address: str) -> None:
        loading.close()
        if json:
            print(_json.dumps({"address": address, "head": str(head)}), flush=True)
        asks = "?token=…" if token else ""
        out.note(f"{address}{asks} answers; programs: {address}docs; Ctrl-C ends it")
        if label is not None:
            out.note(f"{address}label{asks} takes labels for {label}")

    with ExitStack() as loading:
        report = loading.enter_context(out.progress())
        run(head, options=options, on_ready=ready, on_progress=report, on_note=out.note)
    out.note("ended")
