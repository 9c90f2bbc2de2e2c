"""The commands extract, compare, info, doctor and demo; importing this adds all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from ..options import MAX_PIXELS

# Importing these adds their commands to the app.
from . import audit as _audit  # noqa: F401
from . import errors as _errors  # noqa: F401
from . import label as _label  # noqa: F401
from . import output as out
from . import plot as _plot
from . import report as _report  # noqa: F401
from . import search as _search  # noqa: F401
from . import serve as _serve  # noqa: F401
from . import ship as _ship  # noqa: F401
from . import store as _store  # noqa: F401
from . import survey as _survey  # noqa: F401
from .finetune import finetune
from .help import IMAGES
from .options import (
    BackboneOption,
    CacheArgument,
    CropPctOption,
    DataRootOption,
    DatasetArgument,
    DeviceOption,
    EngineOption,
    ExtractPrecisionOption,
    GeometryOption,
    InterpolationOption,
    JsonOption,
    MaxPixelsOption,
    MeanOption,
    OnErrorOption,
    PlotOption,
    RunsOption,
    SizeOption,
    StdOption,
    TestLimitOption,
    TrainLimitOption,
    WeightsOption,
    column,
    place,
)
from .options import (
    app as app,
)
from .output import encoding, name, sparkline, width
from .pack import (
    AddressOption,
    ExecutorOption,
    ShardOption,
    ShardsOption,
    WorkersOption,
    share_of,
    share_summary,
)
from .probe import probe

if TYPE_CHECKING:
    from ..finetuning.run import FinetuneResult
    from ..probes.probe import ProbeResult

DEMO_WEIGHTS = "tinyimagenet32"


def _version(is_asked: bool) -> None:
    if is_asked:
        from ..version import __version__

        print(f"featcache {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Take the options that come before a command."""


@app.command()
def extract(
    dataset: DatasetArgument = "cifar10",
    backbone: BackboneOption = "resnet18",
    weights: WeightsOption = None,
    size: SizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    geometry: GeometryOption = None,
    crop_pct: CropPctOption = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    precision: ExtractPrecisionOption = "f32",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images per forward pass.", show_default="what suits the engine"),
    ] = None,
    cut: Annotated[
        str,
        typer.Option(
            help="Where features are taken: pooled, cls, mean (vectors), tokens, a stage or block "
            "such as layer3 or blocks.11, or several with commas between; featcache backbones "
            "NAME lists them."
        ),
    ] = "pooled",
    views: Annotated[
        Literal["none", "flips"],
        typer.Option(help="flips: also the flipped views of the training images."),
    ] = "none",
    dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="What features are kept as; float16 takes half the space."),
    ] = "float32",
    on_error: OnErrorOption = "fail",
    max_pixels: MaxPixelsOption = MAX_PIXELS,
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
    shards: ShardsOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Make it again if it is there, and compute every image.")
    ] = False,
    verify_images: Annotated[
        bool,
        typer.Option(
            "--verify-images", help="Hash every image, also where its size and times are known."
        ),
    ] = False,
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse/--no-reuse",
            help="Take the features of images that another cache of the same ingredients has.",
        ),
    ] = True,
    shard: ShardOption = None,
    executor: ExecutorOption = "local",
    address: AddressOption = None,
    workers: WorkersOption = None,
    data_root: DataRootOption = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="A table with a row per image: CSV, TSV, Parquet, JSON lines.",
            metavar="TABLE",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    path_column: Annotated[
        str | None,
        column("Its column that names the images.", "path, file_name or alike", IMAGES),
    ] = None,
    target: Annotated[
        str | None,
        column("Its column of the classes.", "label, class or alike", IMAGES),
    ] = None,
    split_column: Annotated[
        str | None,
        column("Its column of train, val and test.", "split, or drawn from the images", IMAGES),
    ] = None,
    group: Annotated[
        str | None,
        column("Its column whose values stay on one side: the patient.", panel=IMAGES),
    ] = None,
    json: JsonOption = False,
) -> Path | str:
    """Run the backbone once over a data set and cache its features.

    Example: featcache extract digits --weights tinyimagenet32
    """
    given = locals()
    from ..extraction.extract import extract as run
    from ..extraction.extract import extract_share
    from ..extraction.options import ExtractOptions

    names = {field.name for field in fields(ExtractOptions)} & given.keys()
    options = ExtractOptions(
        **{name: given[name] for name in names}, pack=False if shards else None
    )
    share = None if shard is None else share_of(shard, force=force, executor=executor)
    with out.progress() as report:
        if share:
            part = extract_share(
                dataset, options=options, share=share, on_progress=report, on_note=out.note
            )
        else:
            result = run(
                dataset,
                options=options,
                force=force,
                executor=executor,
                address=address,
                workers=workers,
                on_progress=report,
                on_note=out.note,
            )
    if share:
        out.show(part, json, share_summary)
        return part.output
    out.show(result, json, out.extract_summary)
    return result.cache


@app.command()
def compare(
    dataset: Annotated[
        str | None, typer.Argument(help="Show only runs on this data set.", metavar="DATASET")
    ] = None,
    runs: RunsOption = None,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Compare all runs on the same data side by side.

    Example: featcache compare digits
    """
    from ..runs import compare as run

    _plot.checked(plot)
    records = run(dataset, runs=runs, on_note=out.note)
    out.show(records, json, comparison_tables)

    def draw() -> Any:
        from ..reporting.figures import accuracy_over_time

        return accuracy_over_time(records)

    _plot.save(plot, draw)


@app.command()
def info(
    cache: CacheArgument = None,
    json: JsonOption = False,
) -> None:
    """Show the contents and provenance of a cache.

    Example: featcache info
    """
    from ..store.cache import load, newest_cache

    out.show(load(cache or newest_cache()), json, out.cache_summary, out.cache_facts)


@app.command()
def backbones(
    pattern: Annotated[
        str | None,
        typer.Argument(
            help="A name, whose cuts are shown; or a pattern of names, such as 'timm:*dinov2*'.",
            metavar="NAME",
        ),
    ] = None,
    weights: WeightsOption = None,
    size: SizeOption = None,
    json: JsonOption = False,
) -> None:
    """List the backbones that can be used here, or one's cuts and preprocessing.

    Example: featcache backbones resnet18
    """
    from ..backbones.listing import describe_backbone, list_backbones

    if pattern is None or any(mark in pattern for mark in "*?["):
        out.show(list_backbones(pattern), json, out.backbones_table)
        return
    out.show(describe_backbone(pattern, weights=weights, size=size), json, out.backbone_facts)


@app.command()
def doctor(
    network: Annotated[
        bool, typer.Option(help="Try to reach the hosts of weights and data sets.")
    ] = True,
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure every engine and precision available here.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Report this machine's engines, GPU, cores and network, and what is missing.

    Example: featcache doctor --no-network
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
    """Run the whole workflow offline: extract, probe, fine-tune, compare.

    Example: featcache demo
    """
    from ..backbones import efficientnet_lite
    from ..frameworks import oneflow_status, torch_status
    from ..store.cache import load

    def words(**options: object) -> list[object]:
        given = {name.replace("_", "-"): value for name, value in options.items() if value}
        return [word for name, value in given.items() for word in (f"--{name}", value)]

    weights: dict[str, Any] = {"weights": DEMO_WEIGHTS, "data_root": data_root}
    kept: dict[str, Any] = {"train_limit": train_limit, "test_limit": test_limit, "runs": runs}
    cuts = "avgpool,layer3"
    out.command("extract", dataset, *words(cut=cuts, **weights))
    cache = Path(extract(dataset, cut=cuts, **weights))
    out.command("probe", cache, *words(**kept))
    head = probe(context, cache, **kept)
    if efficientnet_lite.is_installed():
        backbone = efficientnet_lite.NAME
        out.command("extract", dataset, *words(backbone=backbone))
        other = Path(extract(dataset, backbone=backbone, data_root=data_root))
        out.command("probe", other, *words(**kept))
        probe(context, other, **kept)
    lessons: list[str] = []
    has_oneflow, has_torch = oneflow_status()[0], torch_status()[0]
    if has_oneflow or has_torch:
        top = {"cache": cache, "freeze_until": "layer3", "augment": "none", **kept}
        runs_of = []
        for more in (
            {"method": "split"},
            {"method": "full", "init_head": head.head, **_LP_FT},
        ):
            out.command("finetune", *words(**top, **more))
            runs_of.append(finetune(None, **top, **more))
        lessons = _lessons(head, *runs_of)
    else:
        out.note(
            "fine-tuning is left out: it needs PyTorch, pip install 'featcache[torch]', or OneFlow"
        )
    if not has_oneflow:
        out.note(
            "OneFlow would add the reference engine, fine-tuning and --solver sgd as in the "
            "tutorial: pip install 'featcache[oneflow]' (Python 3.10 on Linux x86_64)"
        )
    name = load(cache).meta["dataset"]
    out.command("compare", name, *words(runs=runs))
    compare(name, runs)
    out.show(lessons, False, list)


# Large steps that fall to 0, as the last attempt of `featcache.fit` takes.
_LP_FT: dict[str, Any] = {"lr": 0.01, "schedule": "cosine", "batch_size": 32, "epochs": 2}


def _lessons(head: ProbeResult, split: FinetuneResult, lp_ft: FinetuneResult) -> list[str]:
    """Say how the two fine-tunes of the demo compare with the probe, and why."""

    def ends(result: FinetuneResult) -> str:
        points = 100 * (result.top1 - head.top1)
        if not points:
            return "ends where the probe does"
        return f"ends {abs(points):.2f} points {'above' if points > 0 else 'below'} the probe"

    n_steps = len(split.epochs) * -(-split.n_train // split.recipe.batch_size)
    is_behind = split.top1 < head.top1
    why = ", which are too few; the probe's head is at its optimum" * is_behind
    is_sure = lp_ft.top1 > head.top1_interval[1]
    doubt = f" {head.n_test:,} test images cannot prove it: see the intervals." * (not is_sure)
    return [
        f"split {ends(split)}: its head starts at random, and takes {n_steps:,} steps at the "
        f"tutorial's rate{why}.",
        f"LP-FT {ends(lp_ft)}: it starts at the probe's head, and trains layer4 too, "
        f"on features cached below it.{doubt}",
        "Fine-tuning is the fallback for when a head is not enough: featcache fit tries both, the "
        "cheapest first.",
    ]


_WIDE = 120  # columns of a terminal that has room for the names of runs
_ROOMY = 96  # and for curves
_CURVE = 10


def comparison_tables(records: list[dict[str, Any]]) -> list[Any]:
    """Return one table per data set, since accuracies on different data do not compare.

    What all runs share is in the title; a column that would be empty is left out.
    """
    from ..runs import epochs_of, fold, weights_label

    tables: list[Any] = []
    explained: set[str] = set()
    for (dataset, digest), group in groupby(
        records, key=lambda record: (record["dataset"], record["dataset_digest"])
    ):
        rows = fold(list(group))
        shared = [
            {f"{weights_label(record)} {record['size']} px" for record, _ in rows},
            {f"{record['n_train'] + (record.get('n_val') or 0):,} to train" for record, _ in rows},
            {f"{record['n_test']:,} to test" for record, _ in rows},
        ]
        said = [f"{dataset} ({digest[:8]})", *(min(one) for one in shared if len(one) == 1)]
        cells = [_comparison_cells(record) for record, _ in rows]
        curves = [[epoch["top1"] for epoch in epochs_of(record)] for record, _ in rows]
        for row, curve, (record, _) in zip(cells, curves, rows, strict=True):
            row["curve"] = sparkline(curve, encoding(), _CURVE) if width() >= _ROOMY else ""
            row["run"] = record["run"] if width() >= _WIDE else ""
        columns = [
            column for column in cells[0] if any(row[column] not in ("", "-") for row in cells)
        ]
        wordy = [column for column in columns if column in ("curve", "run")]
        lines = [
            (label, *(row[column] for column in columns))
            for (_, label), row in zip(rows, cells, strict=True)
        ]
        numbers = columns[: len(columns) - len(wordy)]  # the others come last
        table = out.table(lines, ("method",), numbers, wordy, title=", ".join(said))
        tables += [table, *_paired(rows)]
        explained |= set(columns)
    legend = "; ".join(f"{column}: {_LEGEND[column]}" for column in _LEGEND if column in explained)
    tables.append(Text(legend, style="dim"))
    return tables


_MOST_PAIRED = 10


def _paired(rows: Sequence[tuple[Mapping[str, Any], str]]) -> list[Any]:
    """Return a line for each run that compares with the best one image by image."""
    (_, best), *others = rows
    tested = [(label, one["vs_best"]) for one, label in others if one.get("vs_best")]
    if not tested:  # fine-tunes keep no predictions
        return []
    shown = [name(f"against {best}, on the same {tested[0][1]['n']:,} test images (McNemar):")]
    for label, test in tested[:_MOST_PAIRED]:
        low, high = (f"{-100 * end:+.2f}" for end in reversed(test["interval"]))
        difference = f"{0 - 100 * test['difference']:+.2f} points ({low} to {high})"
        shown.append(name(f"  {label}: {difference}, {out.p_value(test['p_value'])}"))
    left, apart = len(tested) - _MOST_PAIRED, len(others) - len(tested)
    words = [f"{out.counted(left, 'more run')}: see --json"] * (left > 0)
    words += [f"{out.counted(apart, 'run')} without predictions of these images"] * (apart > 0)
    return shown + [Text(f"  {'; '.join(words)}")] * bool(words)


_LEGEND = {
    "wall s": "extraction time + training time, of the newest run",
    "ep": "epochs",
    "img/s": "training images",
    "s/point": (
        "wall time per percentage point gained over the best probe on the same images; - for "
        "probes, without such a probe, and where nothing was gained"
    ),
}


def _comparison_cells(record: Mapping[str, Any]) -> dict[str, str]:
    """Return a run's cells; of a fine-tune alone, epochs and speed."""
    low, high = record["top1_interval"]
    tuned, price = record["kind"] == "finetune", record["s_per_point"]
    before, wall = record.get("features_wall_s"), _short(record["wall_s"])
    return {
        "top-1 % (95 %)": f"{100 * record['top1']:.2f} ({100 * low:.1f}-{100 * high:.1f})",
        "wall s": f"{_short(before)} + {wall}" if before else wall,
        "ep": str(record["n_epochs"]) if tuned else "",
        "img/s": f"{record['images_per_s']:,.0f}" if tuned else "",
        "s/point": "-" if price is None else _short(price),
    }


def _short(seconds: float) -> str:
    """Return seconds, with a decimal below 100."""
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"
