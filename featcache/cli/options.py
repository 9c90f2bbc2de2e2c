"""The app, and the options that several commands share."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console

from ..remote import is_url
from . import output as out
from .help import BACKBONE, ENGINE, IMAGES, PIXELS, RESULTS, HelpfulCommand, HelpfulGroup


def place(text: str) -> str | Path:
    """Return a URL as it is, and anything else as a path."""
    return text if is_url(text) else Path(text)


def cache_place(text: str) -> Path:
    """Return the path of a cache; for a URL, the path of a local copy, downloaded if necessary."""
    if not is_url(text):
        return Path(text)
    from ..process import import_numpy

    import_numpy()  # before the store does, with the right threads
    from ..store.remote_caches import cache_file

    with out.progress() as report:
        return cache_file(text, report, out.note)


def without(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the options of a command that are those of its function: all but these."""
    return {name: value for name, value in given.items() if name not in names}


def column(help: str, default: bool | str = True, panel: str | None = None) -> Any:
    """Return an option that names a column of a table."""
    return typer.Option(help=help, metavar="COLUMN", show_default=default, rich_help_panel=panel)


def numbers(text: str, option: str, also: tuple[str, ...] = ()) -> list[int | str]:
    """Read "1,2,full" as [1, 2, "full"]."""
    values: list[int | str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part not in also and not part.isdecimal():
            expected = " or ".join(("numbers", *also))
            raise typer.BadParameter(
                f"expected {expected} with commas, found {part!r}", param_hint=option
            )
        values.append(part if part in also else int(part))
    return values


_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """Return the seconds of a budget: ``90``, ``90s``, ``10m`` or ``1.5h``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not match or not float(match[1]):
        raise typer.BadParameter(
            f"expected a duration such as 90s, 10m or 2h, found {text!r}", param_hint="--budget"
        )
    return float(match[1]) * _UNITS[match[2] or "s"]


# Every command, in the order in which a user needs them.
_CONTENTS = {
    "First run": ("demo",),
    "Features": ("extract", "import", "pack", "label", "info", "backbones"),
    "Questions": (
        *("probe", "predict", "serve", "search", "select", "errors", "audit", "survey"),
        *("compare", "report"),
    ),
    "In use": ("ship",),
    "Training": ("finetune", "fit"),
    "Cache maintenance": ("verify", "diff", "merge", "export"),
    "This machine": ("doctor",),
}

_ORDER = tuple(name for names in _CONTENTS.values() for name in names)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Contents(HelpfulGroup):
    contents = _CONTENTS


class _Command(HelpfulCommand):
    def invoke(self, ctx: Any) -> Any:
        """Run the command; NumPy is imported only now, after the arguments are checked."""
        from ..process import import_numpy

        import_numpy()
        return super().invoke(ctx)


class _App(typer.Typer):
    """Commands with our help pages."""

    def command(self, *words: Any, **options: Any) -> Callable[[_Function], _Function]:
        """Register a command."""
        return super().command(*words, **{"cls": _Command, **options})


def parser(first: str) -> Any:
    """Return what parses a command line that begins with this word.

    It knows the one command that it names, or all: to build all takes as long as to import NumPy.
    """
    named = [info for info in app.registered_commands if _name_of(info) == first]
    if not named or "_FEATCACHE_COMPLETE" in os.environ:
        return typer.main.get_command(app)
    alone = copy.copy(app)
    alone.registered_commands = named
    return typer.main.get_command(alone)


def _name_of(info: Any) -> str:
    return info.name or info.callback.__name__.replace("_", "-")


_console = Console()  # knows NO_COLOR and TERM=dumb
app = _App(
    name="featcache",
    cls=_Contents,
    help="Run a pretrained backbone once, keep its features in HDF5, and answer later questions "
    "from them in seconds.",
    epilog="For the options of a command: featcache probe --help",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,  # longer lines are hard to read
        "color": False if _console.no_color or not _console.color_system else None,
    },
)


def _one_of(*names: str) -> Callable[[str], list[str]]:
    """Return a shell completion of these names; the shell itself completes files."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def _dataset(default: bool | str = True) -> Any:
    return typer.Argument(
        help="cifar10, digits, torchvision:NAME, hf:NAME; a folder of images, a .zip or .tar of "
        "one, shards such as 'train-{000..012}.tar', a table of paths, or a URL of these.",
        metavar="DATASET",
        show_default=default,
        autocompletion=_one_of("cifar10", "digits"),
    )


def _backbone(default: bool | str = True) -> Any:
    return typer.Option(
        help="resnet18, resnet34, resnet50; timm:NAME, torchvision:NAME, hf:ORG/NAME, "
        "open_clip:NAME/PRETRAINED, flowvision:NAME; a file (.onnx, .xml, .pt2), a folder of "
        "save_pretrained, or package.module:function. featcache backbones lists them.",
        show_default=default,
        rich_help_panel=BACKBONE,
        autocompletion=_one_of("resnet18", "resnet34", "resnet50"),
    )


def _weights(default: bool | str = True) -> Any:
    return typer.Option(
        help="A path (.safetensors, .pth, OneFlow checkpoint) or random:SEED; of the ResNets also "
        "imagenet (downloaded once) and tinyimagenet32 (ships with featcache, weaker).",
        show_default=default,
        rich_help_panel=BACKBONE,
        autocompletion=_one_of("imagenet", "tinyimagenet32"),
    )


Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["f32", "bf16", "f16"]
DatasetArgument = Annotated[str, _dataset()]
BackboneOption = Annotated[str, _backbone()]
WeightsOption = Annotated[str | None, _weights("imagenet, or the library's own")]
# For a survey, which takes several.
SeveralBackbonesOption = Annotated[list[str] | None, _backbone(False)]
SeveralWeightsOption = Annotated[list[str] | None, _weights("imagenet, or the library's own")]
# For training, where a cache may supply the value.
TrainedDatasetArgument = Annotated[str | None, _dataset("cifar10, or the cache's")]
TrainedBackboneOption = Annotated[str | None, _backbone("resnet18, or the cache's")]
TrainedWeightsOption = Annotated[str | None, _weights("imagenet, or the cache's")]
# For a saved head, which records its backbone.
_RECORDED = "the one that the head recorded"
HeadWeightsOption = Annotated[
    str | None, typer.Option(help="The backbone's checkpoint.", show_default=_RECORDED)
]
HeadBackboneOption = Annotated[
    str | None,
    typer.Option(help="The backbone, where it is a file or a function.", show_default=_RECORDED),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        help="Number format of the engine; bf16 and f16 are faster on hardware that has them.",
        rich_help_panel=ENGINE,
    ),
]
ExtractPrecisionOption = Annotated[
    Literal["f32", "bf16", "f16", "int8", "auto"],
    typer.Option(
        help="Number format of the engine; bf16 and f16 are faster on hardware that has them. "
        "auto: the fastest that leaves the features of 256 of the images as in f32. int8: by "
        "OpenVINO, scaled by training images, needs featcache[int8]; says what it changes.",
        rich_help_panel=ENGINE,
    ),
]
OnErrorOption = Annotated[
    Literal["fail", "skip"],
    typer.Option(help="For images that do not decode: stop, or leave them out and list them."),
]
MaxPixelsOption = Annotated[
    int,
    typer.Option(min=1, help="Images of more pixels are taken for damaged or hostile ones."),
]
SizeOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4096,
        help="Side of the input image in pixels.",
        show_default="the size the weights were trained at",
        rich_help_panel=BACKBONE,
    ),
]


def _three_numbers(text: str) -> tuple[float, ...]:
    try:
        red, green, blue = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected three numbers as R,G,B, found {text!r}") from None
    return red, green, blue


def _statistic(help: str) -> Any:
    return typer.Option(
        help=help,
        metavar="R,G,B",
        parser=_three_numbers,
        show_default="the weights' own",
        rich_help_panel=PIXELS,
    )


MeanOption = Annotated[Any, _statistic("Mean of each channel, on the scale of 0 to 1.")]
StdOption = Annotated[Any, _statistic("Standard deviation of each channel, on the same scale.")]
InterpolationOption = Annotated[
    Literal["bilinear", "bicubic", "lanczos"] | None,
    typer.Option(
        help="Filter that resizes.", show_default="the weights' own", rich_help_panel=PIXELS
    ),
]
GeometryOption = Annotated[
    Literal["square", "crop", "squash", "pad"] | None,
    typer.Option(
        help="square: the centre square, resized; crop: the shorter side resized, then the centre; "
        "squash: resized whatever the aspect ratio; pad: the whole image on a background.",
        show_default="the weights' own",
        rich_help_panel=PIXELS,
    ),
]
CropPctOption = Annotated[
    float | None,
    typer.Option(
        help="Side of the input divided by the side before a centre crop.",
        metavar="0..1",
        show_default="the weights' own",
        rich_help_panel=PIXELS,
    ),
]
EngineOption = Annotated[
    Literal["auto", "oneflow", "openvino", "torch"],
    typer.Option(
        help="Framework that runs the backbone; auto takes OneFlow or PyTorch on a GPU, else the "
        "first of OpenVINO, PyTorch and OneFlow that is installed.",
        rich_help_panel=ENGINE,
    ),
]
TrainerOption = Annotated[
    Literal["auto", "oneflow", "torch"],
    typer.Option(
        help="Framework that trains; auto takes PyTorch where it is installed, else OneFlow.",
        rich_help_panel=ENGINE,
    ),
]
DeviceOption = Annotated[
    Device,
    typer.Option(help="auto takes a GPU that the engine can use.", rich_help_panel=ENGINE),
]
DataRootOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder for named data sets and their downloads.",
        show_default="$FEATCACHE_DATA, else ~/.cache/featcache/data",
        rich_help_panel=IMAGES,
    ),
]
TrainLimitOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Use a stratified sample of N training images, the same in every run.",
        metavar="N",
        rich_help_panel=IMAGES,
    ),
]
TestLimitOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Use a stratified sample of N test images.",
        metavar="N",
        rich_help_panel=IMAGES,
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of every random draw.")]
MmapOption = Annotated[
    bool,
    typer.Option(
        "--mmap",
        help="Map the features from disk, for caches larger than memory.",
        rich_help_panel=IMAGES,
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print JSON on standard output.", rich_help_panel=RESULTS),
]
PicturesOption = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="Where the images are, for thumbnails.",
        show_default="known of cifar10 and digits alone",
    ),
]
RunsOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the records of runs.", show_default="cache/runs", rich_help_panel=RESULTS
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        help="Save a figure as .png or .svg; without a suffix, as both.",
        metavar="FILE",
        rich_help_panel=RESULTS,
    ),
]
CacheArgument = Annotated[
    Path | None,
    typer.Argument(
        help="Path or URL of a cache.",
        metavar="CACHE",
        show_default="the newest in cache/",
        parser=cache_place,
    ),
]
