"""The commands. Each is the library function of the same name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import _output as out
from ._options import (
    BackboneOption,
    CacheArgument,
    DataRootOption,
    DatasetArgument,
    DeviceOption,
    JsonOption,
    SeedOption,
    SizeOption,
    TestLimitOption,
    TrainLimitOption,
    WeightsOption,
    app,
)
from ._probe import probe

__all__ = ["app"]

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
    device: DeviceOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    views: Annotated[
        Literal["none", "flips"],
        typer.Option(help="flips: also the flipped views of the training images."),
    ] = "none",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .h5 file, or a folder for it.")
    ] = None,
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
            device=device,
            batch_size=batch_size,
            views=views,
            output=output,
            force=force,
            data_root=data_root,
            on_progress=report,
        )
    out.note(f"{result.engine} on {result.device}, {result.precision}: {result.why}")
    out.show(result, json, out.extract_summary)
    return result.cache


@app.command()
def finetune(
    dataset: DatasetArgument = "cifar10",
    method: Annotated[
        Literal["full", "split", "frozen", "scratch"],
        typer.Option(help="What is trained: everything, at split rates, the head, from scratch."),
    ] = "split",
    backbone: BackboneOption = "resnet18",
    weights: WeightsOption = "imagenet",
    size: SizeOption = None,
    device: DeviceOption = "auto",
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Passes over the training images.", show_default="the tutorial's 3"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Images per step.", show_default="the tutorial's 64")
    ] = None,
    train_limit: TrainLimitOption = None,
    test_limit: TestLimitOption = None,
    seed: SeedOption = 0,
    data_root: DataRootOption = None,
    json: JsonOption = False,
) -> None:
    """Train the network end to end in OneFlow, with the tutorial's recipes.

    Example: [bold]featcache finetune digits --method split --weights tinyimagenet32[/bold]
    """
    from ..finetuning import finetune as run

    with out.progress() as report:
        result = run(
            dataset,
            method,
            backbone=backbone,
            weights=weights,
            size=size,
            device=device,
            epochs=epochs,
            batch_size=batch_size,
            train_limit=train_limit,
            test_limit=test_limit,
            seed=seed,
            data_root=data_root,
            on_progress=report,
        )
    out.show(result, json, out.finetune_summary)


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

    out.show(run(dataset, runs=runs, on_note=out.note), json, out.comparison_tables)


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
    json: JsonOption = False,
) -> None:
    """Say what of OneFlow, GPU, BLAS and network this machine has, and what it lacks.

    Example: [bold]featcache doctor --no-network[/bold]
    """
    from ..doctor import examine

    findings = examine(urls=None if network else ())
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
