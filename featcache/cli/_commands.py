"""The commands. Each is the library function of the same name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import _output as out
from . import _plot
from ._audit import audit
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
    OnErrorOption,
    PlotOption,
    PrecisionOption,
    RunsOption,
    SizeOption,
    TestLimitOption,
    TrainLimitOption,
    WeightsOption,
    app,
)
from ._pack import (
    AddressOption,
    ExecutorOption,
    ShardOption,
    WorkersOption,
    pack,
    share_of,
    share_summary,
)
from ._places import place
from ._probe import probe
from ._report import report
from ._store import diff, export, merge, verify

__all__ = ["app", "audit", "diff", "export", "fit", "merge", "pack", "report", "verify"]

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
    precision: PrecisionOption = "f32",
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
    on_error: OnErrorOption = "fail",
    train_limit: TrainLimitOption = None,
    test_limit: TestLimitOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A .h5 file, or a folder for it; either may be a URL.",
            metavar="PATH",
            parser=place,
        ),
    ] = None,
    shards: Annotated[
        bool,
        typer.Option("--shards", help="Leave a folder of shards, whatever the size."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Make it again if it is there.")] = False,
    shard: ShardOption = None,
    executor: ExecutorOption = "local",
    address: AddressOption = None,
    workers: WorkersOption = None,
    data_root: DataRootOption = None,
    json: JsonOption = False,
) -> Path | str:
    """Run the backbone once over a data set and cache its features.

    Example: [bold]featcache extract digits --weights tinyimagenet32[/bold]
    """
    from ..extraction import extract as run
    from ..extraction import extract_share

    options: dict[str, Any] = {
        "backbone": backbone,
        "weights": weights,
        "size": size,
        "cut": cut,
        "engine": engine,
        "device": device,
        "precision": precision,
        "dtype": dtype,
        "batch_size": batch_size,
        "views": views,
        "on_error": on_error,
        "train_limit": train_limit,
        "test_limit": test_limit,
        "output": output,
        "pack": False if shards else None,
        "data_root": data_root,
    }
    share = None if shard is None else share_of(shard, force=force, executor=executor)
    with out.progress() as report:
        if share:
            part = extract_share(
                dataset, share=share, on_progress=report, on_note=out.note, **options
            )
        else:
            result = run(
                dataset,
                force=force,
                executor=executor,
                address=address,
                workers=workers,
                on_progress=report,
                on_note=out.note,
                **options,
            )
    if share:
        out.show(part, json, share_summary)
        return part.output
    out.show(result, json, out.extract_summary)
    return result.cache


@app.command()
def compare(
    dataset: Annotated[
        str | None, typer.Argument(help="Only this data set's runs.", metavar="DATASET")
    ] = None,
    runs: RunsOption = None,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Show every run on the same data side by side.

    Example: [bold]featcache compare digits[/bold]
    """
    from ..comparison import compare as run

    _plot.checked(plot)
    records = run(dataset, runs=runs, on_note=out.note)
    out.show(records, json, comparison_tables)

    def draw() -> Any:
        from ..figures import accuracy_over_time

        return accuracy_over_time(records)

    _plot.save(plot, draw)


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
    context: typer.Context,
    dataset: DatasetArgument = "digits",
    train_limit: TrainLimitOption = None,
    test_limit: TestLimitOption = None,
    data_root: DataRootOption = None,
    runs: RunsOption = None,
) -> None:
    """Do the whole job offline: extract, probe, fine-tune, compare.

    Example: [bold]featcache demo[/bold]
    """
    from ..store import load

    def words(**options: object) -> list[object]:
        given = {name.replace("_", "-"): value for name, value in options.items() if value}
        return [word for name, value in given.items() for word in (f"--{name}", value)]

    weights: dict[str, Any] = {"weights": DEMO_WEIGHTS, "data_root": data_root}
    kept: dict[str, Any] = {"train_limit": train_limit, "test_limit": test_limit, "runs": runs}
    out.command("extract", dataset, *words(**weights))
    cache = Path(extract(dataset, **weights))
    out.command("probe", cache, *words(**kept))
    probe(context, cache, **kept)
    out.command("finetune", dataset, *words(method="split", **weights, **kept))
    finetune(dataset, method="split", **weights, **kept)
    name = load(cache).meta["dataset"]
    out.command("compare", name, *words(runs=runs))
    compare(name, runs)
