"""The app, and the options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from ..remote import is_url
from . import output as out
from .help import BACKBONE, ENGINE, IMAGES, RESULTS, HelpfulCommand, HelpfulGroup


def place(text: str) -> str | Path:
    """Return a URL as it is, and anything else as a path."""
    return text if is_url(text) else Path(text)


def cache_place(text: str) -> Path:
    """Return the path of a cache; of one behind a URL, that of a copy, taken if need be."""
    if not is_url(text):
        return Path(text)
    from ..process import import_numpy

    import_numpy()  # with its threads, before the store does
    from ..store.remote_caches import cache_file

    with out.progress() as report:
        return cache_file(text, report, out.note)


# Every command, in the order in which one meets them.
_CONTENTS = {
    "Begin": ("demo",),
    "Features": ("extract", "pack", "info"),
    "Questions": ("probe", "predict", "audit", "compare", "report"),
    "Training": ("finetune", "fit"),
    "Care of caches": ("verify", "diff", "merge", "export"),
    "This machine": ("doctor",),
}

_ORDER = tuple(name for names in _CONTENTS.values() for name in names)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Contents(HelpfulGroup):
    contents = _CONTENTS


class _Command(HelpfulCommand):
    def invoke(self, ctx: Any) -> Any:
        """Run it; what is slow to load waits until it is known what was asked for."""
        from ..process import import_numpy

        import_numpy()
        return super().invoke(ctx)


class _App(typer.Typer):
    """Commands with our help pages."""

    def command(self, *words: Any, **options: Any) -> Callable[[_Function], _Function]:
        """Register a command."""
        return super().command(*words, **{"cls": _Command, **options})


app = _App(
    name="featcache",
    cls=_Contents,
    help="Run a pretrained backbone once, keep its features in HDF5, and answer every later "
    "question from them.",
    epilog="One command in detail: featcache probe --help",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _one_of(*names: str) -> Callable[[str], list[str]]:
    """Return what completes these names in a shell; files are completed besides."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def _dataset(default: bool | str = True) -> Any:
    return typer.Argument(
        help="cifar10, digits, a folder of class folders, a .zip of one, or the URL of either.",
        metavar="DATASET",
        show_default=default,
        autocompletion=_one_of("cifar10", "digits"),
    )


def _backbone(default: bool | str = True) -> Any:
    return typer.Option(
        help="resnet18, resnet34 or resnet50.",
        show_default=default,
        rich_help_panel=BACKBONE,
        autocompletion=_one_of("resnet18", "resnet34", "resnet50"),
    )


def _weights(default: bool | str = True) -> Any:
    return typer.Option(
        help="imagenet (downloaded once), tinyimagenet32 (ships with featcache, weaker), or a "
        "path: .safetensors, .pth, OneFlow checkpoint.",
        show_default=default,
        rich_help_panel=BACKBONE,
        autocompletion=_one_of("imagenet", "tinyimagenet32"),
    )


Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["f32", "bf16", "f16"]
DatasetArgument = Annotated[str, _dataset()]
BackboneOption = Annotated[str, _backbone()]
WeightsOption = Annotated[str, _weights()]
# Of training, which a cache may say these for.
TrainedDatasetArgument = Annotated[str | None, _dataset("cifar10, or the cache's")]
TrainedBackboneOption = Annotated[str | None, _backbone("resnet18, or the cache's")]
TrainedWeightsOption = Annotated[str | None, _weights("imagenet, or the cache's")]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        help="What the engine computes in; bf16 and f16 are faster where they run.",
        rich_help_panel=ENGINE,
    ),
]
OnErrorOption = Annotated[
    Literal["fail", "skip"],
    typer.Option(help="skip: leave out images that do not decode, and say which."),
]
SizeOption = Annotated[
    int | None,
    typer.Option(
        min=32,
        max=4096,
        help="Side of the input in pixels.",
        show_default="the weights' own",
        rich_help_panel=BACKBONE,
    ),
]
EngineOption = Annotated[
    Literal["auto", "oneflow", "openvino", "torch"],
    typer.Option(
        help="What runs the backbone; auto takes OneFlow or PyTorch on a GPU, else the fastest on "
        "the CPU: OpenVINO, PyTorch, OneFlow.",
        rich_help_panel=ENGINE,
    ),
]
TrainerOption = Annotated[
    Literal["auto", "oneflow", "torch"],
    typer.Option(
        help="What trains; auto takes PyTorch where it is installed, else OneFlow.",
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
        help="Where named data sets are kept and downloaded to.",
        show_default="$FEATCACHE_DATA, else ~/.cache/featcache/data",
        rich_help_panel=IMAGES,
    ),
]
TrainLimitOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Only a stratified draw of so many training images, always the same.",
        rich_help_panel=IMAGES,
    ),
]
TestLimitOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Only a stratified draw of so many test images.", rich_help_panel=IMAGES
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of every random draw.")]
MmapOption = Annotated[
    bool,
    typer.Option(
        "--mmap",
        help="Leave the features on the disk: for more than fit in memory.",
        rich_help_panel=IMAGES,
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="JSON on standard output.", rich_help_panel=RESULTS),
]
RunsOption = Annotated[
    Path | None,
    typer.Option(
        help="Where the records of runs are.", show_default="cache/runs", rich_help_panel=RESULTS
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        help="Save a figure: a .png or .svg, or without a suffix both.",
        metavar="FILE",
        rich_help_panel=RESULTS,
    ),
]
CacheArgument = Annotated[
    Path | None,
    typer.Argument(
        help="A cache, or the URL of one.",
        metavar="CACHE",
        show_default="the newest in cache/",
        parser=cache_place,
    ),
]
