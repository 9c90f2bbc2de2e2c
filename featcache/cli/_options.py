"""The app, and the options that several commands share, so that they are spelt alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

_ORDER = (
    *("demo", "extract", "probe", "predict", "finetune", "fit", "compare"),
    *("info", "verify", "diff", "merge", "export", "doctor"),
)


class _InOrder(TyperGroup):
    """Lists the commands in the order in which one meets them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands' names."""
        return sorted(super().list_commands(ctx), key=_ORDER.index)


app = typer.Typer(
    name="featcache",
    cls=_InOrder,
    help="Run a pretrained backbone once, keep its features in HDF5, and answer every later "
    "question from them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Literal["auto", "cpu", "cuda"]
DatasetArgument = Annotated[
    str,
    typer.Argument(
        help="cifar10, digits, a folder of class folders, or a .zip of one.", metavar="DATASET"
    ),
]
BackboneOption = Annotated[str, typer.Option(help="resnet18, resnet34 or resnet50.")]
WeightsOption = Annotated[
    str,
    typer.Option(
        help="imagenet (downloaded once), tinyimagenet32 (ships with featcache, weaker), or a "
        "path: .safetensors, .pth, OneFlow checkpoint."
    ),
]
SizeOption = Annotated[
    int | None,
    typer.Option(
        min=32, max=4096, help="Side of the input in pixels.", show_default="the weights' own"
    ),
]
EngineOption = Annotated[
    Literal["auto", "oneflow", "openvino"],
    typer.Option(help="What runs the backbone; auto takes the fastest that this machine has."),
]
DeviceOption = Annotated[Device, typer.Option(help="auto takes the GPU where OneFlow can use it.")]
DataRootOption = Annotated[
    Path | None, typer.Option(help="Where named data sets are kept and downloaded to.")
]
TrainLimitOption = Annotated[
    int | None,
    typer.Option(min=1, help="Only a stratified draw of so many training images, always the same."),
]
TestLimitOption = Annotated[
    int | None, typer.Option(min=1, help="Only a stratified draw of so many test images.")
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of every random draw.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
CacheArgument = Annotated[
    Path | None,
    typer.Argument(help="A cache.", metavar="CACHE", show_default="the newest in cache/"),
]
