"""The command `ship`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..options import MAX_PIXELS
from . import output as out
from .options import (
    HeadBackboneOption,
    HeadWeightsOption,
    JsonOption,
    MaxPixelsOption,
    RunsOption,
    app,
)
from .output import name as name_of

if TYPE_CHECKING:
    from ..shipping.ship import ShipResult


@app.command()
def ship(
    head: Annotated[
        Path,
        typer.Argument(
            help="A head's file, of probe --save-head or in the folder of a run; with --knn a "
            "cache.",
            metavar="HEAD",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The model: .onnx, or .xml of OpenVINO.", metavar="PATH"
        ),
    ],
    to: Annotated[
        Literal["onnx", "openvino"],
        typer.Option(help="The format; openvino is an .xml and a .bin."),
    ] = "onnx",
    precision: Annotated[
        Literal["f32", "f16"],
        typer.Option(help="What large weights are kept as; f16 takes half the space."),
    ] = "f32",
    dynamic_batch: Annotated[
        bool,
        typer.Option(
            "--dynamic-batch",
            help="Take any number of images of the backbone's own size instead of one of any size.",
        ),
    ] = False,
    knn: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ship the vote of K nearest training images of a cache.", metavar="K"
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            help="Images, a folder or an archive to check the model on; may be repeated.",
            metavar="PATH",
            show_default="pieces of two photographs",
        ),
    ] = None,
    weights: HeadWeightsOption = None,
    backbone: HeadBackboneOption = None,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    runs: RunsOption = None,
    json: JsonOption = False,
) -> None:
    """Write a head with its backbone and preprocessing as one file that runs without featcache.

    Example: featcache ship head.safetensors -o model.onnx
    """
    from ..shipping.ship import ship as run

    with out.progress() as report:
        result = run(
            head,
            output,
            to=to,
            precision=precision,
            dynamic_batch=dynamic_batch,
            knn=knn,
            images=images or (),
            weights=weights,
            backbone=backbone,
            max_pixels=max_pixels,
            force=force,
            runs=runs,
            on_progress=report,
            on_note=out.note,
        )
    out.show(result, json, ship_summary)


def ship_summary(result: ShipResult) -> list[Any]:
    """Return what was written, how well it agrees, and how good it is."""
    ends = ", ".join(f"{name} {kind}" for name, kind in result.outputs.items())
    found, facts = result.agreement, result.facts
    of = "value, relative to the largest" if result.task == "numbers" else "probability"
    lines = [
        f"image {result.inputs['image']} -> {ends}",
        f"checked on {found.n_images} images ({found.images}): largest difference of a {of}: "
        f"{found.largest_difference:.2g}",
    ]
    if "accuracy" in facts:
        low, high = facts.get("accuracy_interval") or (None, None)
        ends = "" if low is None else f" ({low:.4f} to {high:.4f})"
        lines.append(f"{facts['measure']} {facts['accuracy']:.4f}{ends}")
    lines += [f"note: {note}" for note in result.notes]
    lines += [
        f"{result.output}: {result.size_bytes / 1e6:,.1f} MB, {result.precision}",
        f"{result.card}: the model card",
    ]
    return [name_of(line) for line in lines]
