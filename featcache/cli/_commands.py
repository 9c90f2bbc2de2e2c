"""The commands. Each is the library function of the same name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import _output as out
from ._comparison_output import comparison_tables
from ._finetune import finetune
from ._fit import fit
from ._options import (
    BackboneOption,
    CacheArgument,
    DataRootOption,
    DatasetArgument,
    DeviceOption,
    EngineOption,
    JsonOption,
    SizeOption,
    TestLimitOption,
    TrainLimitOption,
    WeightsOption,
    app,
)
from ._probe import probe
from ._store import diff, export, merge, verify

__all__ = ["app", "diff", "export", "fit", "merge", "verify"]

DEMO_WEIGHTS = "tinyimagenet32"


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"featcache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Take the options that belong to no command."""


@app.command()
def extract(
    dataset: DatasetArgument = "cifar10",
    backbone: BackboneOption = "resnet18",
    weights: WeightsOption = "imagenet",
    size: SizeOption = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    precision: Annotated[
        Literal["f32", "bf16", "f16"],
        typer.Option(help="What the engine computes in; bf16 and f16 are faster where they run."),
    ] = "f32",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images per forward pass.", show_default="what suits the engine"),
    ] = None,
    cut: Annotated[
        str,
        typer.Option(
            help="Where features are taken: avgpool (vectors), layer1 to layer4 (maps), or several "
            "with commas between."
        ),
    ] = "avgpool",
    views: Annotated[
        Literal["none", "flips"],
        typer.Option(help="flips: also the flipped views of the training images."),
    ] = "none",
    dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="What features are kept as; float16 takes half the space."),
    ] = "float32",
    on_error: Annotated[
        Literal["fail", "skip"],
        typer.Option(help="skip: leave out images that do not decode, and list them in the cache."),
    ] = "fail",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .h5 file, or a folder for it.")
    ] = None,
    shards: Annotated[
        bool,
        typer.Option("--shards", help="Leave a folder of shards, whatever the size."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Make it again if it is there.")] = False,
    data_root: DataRootOption = None,
    json: JsonOption = False,
) -> Path:
    """Run the backbone once over a data set and cache its features.

    Example: [bold]featcache extract digits --weights tinyimagenet32[/bold]
    """
    from ..extraction import extract as run

    with out.progress() as report:
        result = run(
            dataset,
            backbone=backbone,
            weights=weights,
            size=size,
            cut=cut,
            engine=engine,
            device=device,
            precision=precision,
            dtype=dtype,
            batch_size=batch_size,
            views=views,
            on_error=on_error,
            output=output,
            pack=False if shards else None,
            force=force,
            data_root=data_root,
            on_progress=report,
            on_note=out.note,
        )
    out.show(result, json, out.extract_summary)
    return result.cache


@app.command()
def compare(
    dataset: Annotated[
        str | None, typer.Argument(help="Only this data set's runs.", metavar="DATASET")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Where runs are.", show_default="cache/runs")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show every run on the same data side by side.

    Example: [bold]featcache compare digits[/bold]
    """
    from ..comparison import compare as run

    out.show(run(dataset, runs=runs, on_note=out.note), json, comparison_tables)


@app.command()
def info(
    cache: CacheArgument = None,
    json: JsonOption = False,
) -> None:
    """Show what a cache holds and how it was made.

    Example: [bold]featcache info[/bold]
    """
    from ..store import load, newest_cache

    out.show(load(cache or newest_cache()), json, out.cache_summary, out.cache_facts)


@app.command()
def doctor(
    network: Annotated[bool, typer.Option(help="Try the hosts of weights and data sets.")] = True,
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure every engine and precision that runs here.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Say which engines, GPU, cores and network this machine has, and what it lacks.

    Example: [bold]featcache doctor --no-network[/bold]
    """
    from ..doctor import examine

    findings = examine(urls=None if network else (), bench=bench)
    out.show(findings, json, out.findings_table, lambda items: [asdict(item) for item in items])


@app.command()
def demo(
    dataset: DatasetArgument = "digits",
    train_limit: TrainLimitOption = None,
    test_limit: TestLimitOption = None,
) -> None:
    """Do the whole job offline: extract, probe, fine-tune, compare.

    Example: [bold]featcache demo[/bold]
    """
    from ..store import load

    out.command("extract", dataset, "--weights", DEMO_WEIGHTS)
    cache = extract(dataset, weights=DEMO_WEIGHTS)
    limits = [
        word
        for name, limit in (("--train-limit", train_limit), ("--test-limit", test_limit))
        if limit is not None
        for word in (name, limit)
    ]
    out.command("probe", cache, *limits)
    probe(cache, train_limit=train_limit, test_limit=test_limit)
    split = ("--method", "split", "--weights", DEMO_WEIGHTS)
    out.command("finetune", dataset, *split, *limits)
    finetune(dataset, weights=DEMO_WEIGHTS, train_limit=train_limit, test_limit=test_limit)
    name = load(cache).meta["dataset"]
    out.command("compare", name)
    compare(name)
