"""The commands that maintain caches, and import: verify, diff, merge, export."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from . import output as out
from .options import CacheArgument, JsonOption, app, cache_place, column, without
from .output import counted
from .output import name as name_of

if TYPE_CHECKING:
    from ..importing.features import ImportResult
    from ..store.diff import DiffReport, FieldDiff, SplitDiff
    from ..store.export import ExportResult
    from ..store.merge import MergeResult
    from ..store.verify import VerifyReport


_ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


@app.command()
def verify(
    cache: CacheArgument = None,
    json: JsonOption = False,
) -> None:
    """Check every block of a cache against its checksum; name the first damaged one and exit 1.

    Example: featcache verify cache/digits-resnet18.h5
    """
    from ..store.cache import newest_cache
    from ..store.verify import verify as run

    with out.progress() as report:
        result = run(cache or newest_cache(), on_progress=report)
    out.show(result, json, verify_summary)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A cache.", metavar="A", parser=cache_place)],
    b: Annotated[Path, typer.Argument(help="Another cache.", metavar="B", parser=cache_place)],
    json: JsonOption = False,
) -> None:
    """Compare two caches: provenance, images, labels, features.

    Exits 0 if they are interchangeable, and 1 if they differ.

    Example: featcache diff before.h5 after.h5
    """
    from ..store.diff import diff as run

    with out.progress() as report:
        result = run(a, b, on_progress=report)
    out.show(result, json, diff_summary)
    if not result.same:
        raise typer.Exit(1)


@app.command()
def merge(
    caches: Annotated[
        list[Path],
        typer.Argument(help="Two or more caches.", metavar="CACHE", parser=cache_place),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .h5 file.")],
    name: Annotated[
        str | None,
        typer.Option(help="Name of the merged data set.", show_default="their names, joined by +"),
    ] = None,
    prefix: Annotated[
        bool,
        typer.Option("--prefix", help="Prefix every id with the name of its data set."),
    ] = False,
    on_conflict: Annotated[
        Literal["refuse", "train", "test", "drop"],
        typer.Option(
            help="For an image that is in train of one cache and in test of another: stop, keep "
            "the copy in train or in test, or leave both out."
        ),
    ] = "refuse",
    force: _ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Combine several caches with the same backbone and preprocessing into one.

    Example: featcache merge a.h5 b.h5 -o both.h5
    """
    given = without(locals(), "caches", "output", "json")
    from ..store.merge import merge as run

    if len(caches) < 2:
        raise typer.BadParameter(
            f"expected two or more caches, found {len(caches)}", param_hint="CACHE"
        )
    with out.progress() as report:
        result = run(caches, output, **given, on_progress=report)
    for note in result.notes:
        out.note(note)
    out.show(result, json, merge_summary)


@app.command()
def export(
    cache: CacheArgument = None,
    to: Annotated[
        Literal["npz", "parquet", "csv", "safetensors", "tensorboard"] | None,
        typer.Option(
            help="npz, parquet, csv, safetensors, or tensorboard (a folder for its projector).",
            metavar="FORMAT",
            show_default="what the output's suffix says, or npz",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A file, or a folder for it.", show_default="beside the cache"
        ),
    ] = None,
    split: Annotated[
        Literal["all", "train", "val", "test"], typer.Option(help="Images to export.")
    ] = "all",
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="For tensorboard: at most N images, in the same class proportions.",
            metavar="N",
            show_default="10,000",
        ),
    ] = None,
    force: _ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write a cache in another format.

    Example: featcache export -o digits.parquet
    """
    from ..store.export import export as run

    if limit is not None and to != "tensorboard":
        raise typer.BadParameter("has no effect without --to tensorboard", param_hint="--limit")
    with out.progress() as report:
        result = run(cache, to, output, split=split, limit=limit, force=force, on_progress=report)
    out.show(result, json, export_summary)


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .npy, .npz, .h5, .h5ad, .parquet, .safetensors or .pt file, or a folder of "
            "thingsvision, clip-retrieval, CLAM, TRIDENT, or of one file per image.",
            metavar="FEATURES",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A .h5 file, or a folder for it.",
            show_default="in the cache folder",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="A table of the images: .csv, .tsv, .parquet, .jsonl.", metavar="TABLE"),
    ] = None,
    by: Annotated[str | None, column("Column of the table with the ids.", "id or path")] = None,
    target: Annotated[str | None, column("Column that becomes the cache's labels.")] = None,
    split_column: Annotated[str | None, column("Column that says train, val or test.")] = None,
    ids: Annotated[
        Path | None,
        typer.Option(
            help="A text file with one id per row of the features.",
            metavar="FILE",
            show_default="those in the source, or row numbers",
        ),
    ] = None,
    array: Annotated[
        str | None,
        typer.Option(
            help="The array or column that has the features.",
            metavar="NAME",
            show_default="the only one, or features",
        ),
    ] = None,
    made_by: Annotated[
        str | None,
        typer.Option(
            help="What made the features: caches of one name can be merged and tested together.",
            metavar="NAME",
            show_default="unknown, and no other's",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the data set.", show_default="that of the source"),
    ] = None,
    force: _ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Make a cache of features that another program computed.

    Example: featcache import features.npz --labels labels.csv --target species
    """
    given = without(locals(), "source", "output", "json")
    from ..importing.features import import_features as run

    for option, value in (("--by", by), ("--target", target), ("--split-column", split_column)):
        if value is not None and labels is None:
            raise typer.BadParameter("has no effect without --labels", param_hint=option)
    with out.progress() as report:
        result = run(source, output, **given, on_progress=report, on_note=out.note)
    out.show(result, json, import_summary)


_LONG = 60  # characters of a field's value; --json prints all of it
_DIGEST = re.compile(r"[0-9a-f]{64}")


def verify_summary(report: VerifyReport) -> list[Any]:
    """Return the checks that a cache passed."""
    table = Table(show_header=False, box=None)
    for check in report.checks:
        table.add_row(Text("yes", style="green"), Text(check))
    for note in report.notes:
        table.add_row(Text("note", style="yellow"), name_of(note))
    return [
        f"{report.path} is whole: {_images_of(report)}",
        table,
        f"{counted(report.n_blocks, 'block')} of {counted(report.n_arrays, 'array')}, "
        f"{_size(report.size_bytes)} in "
        f"{report.wall_s:.1f} s",
    ]


def import_summary(result: ImportResult) -> list[Any]:
    """Return what was recognised, and where it is now."""
    sides = {
        "given": "as given",
        "content": "drawn from the content hashes",
        "group": "drawn by group",
        "id": "drawn from the ids",
    }
    classes = f", {result.n_classes:,} classes" if result.n_classes else ", without labels"
    cache = shlex.quote(str(result.cache))
    label = f"featcache label {cache} TABLE, and featcache probe {cache} --target COLUMN"
    return [
        name_of(f"recognised: {result.layout}"),
        f"{result.cache}: {_images_of(result)} ({sides[result.split]}), "
        f"{result.feature_dim:,}-d{classes}, {_size(result.size_bytes)} in {result.wall_s:.1f} s",
        f"next: featcache probe {cache}" if result.n_classes else f"next: {label}",
    ]


def _images_of(result: MergeResult | VerifyReport | ImportResult) -> str:
    val = f", {result.n_val:,} val" if result.n_val else ""
    return f"{result.n_train:,} train{val} and {counted(result.n_test, 'test image')}"


def merge_summary(result: MergeResult) -> str:
    """Return one line about the merged cache."""
    return (
        f"{result.cache}: {_images_of(result)} of "
        f"{result.n_parts} caches, {_size(result.size_bytes)} in {result.wall_s:.1f} s"
    )


def export_summary(result: ExportResult) -> list[str]:
    """Return what was written, and the command that shows it."""
    lines = [
        f"{result.output}: {result.n_rows:,} x {result.feature_dim} features, "
        f"{_size(result.size_bytes)} in {result.wall_s:.1f} s"
    ]
    if result.to == "tensorboard":
        lines.append(f"view it: tensorboard --logdir {shlex.quote(str(result.output))}")
    return lines


def diff_summary(report: DiffReport) -> list[Any]:
    """Return what differs as tables, and the verdict."""
    shown: list[Any] = [f"a: {report.a}", f"b: {report.b}"]
    if report.fields:
        shown.append(_fields("provenance that differs", report.fields))
    if report.other_fields:
        shown.append(
            _fields("other fields that differ, without effect on features", report.other_fields)
        )
    shown += [_images(report.splits()), _features(report.splits())]
    for split in report.splits():
        shown += _named(split)
    if report.same:
        shown.append("Same: the caches are interchangeable, bit for bit.")
    else:
        shown.append("They differ.")
    return shown


def _fields(title: str, fields: Iterable[FieldDiff]) -> Table:
    rows = [(field.name, _value(field.a), _value(field.b)) for field in fields]
    return out.table(rows, ("field", "a", "b"), title=title)


def _value(value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    if _DIGEST.fullmatch(text):
        return f"{text[:16]}…"
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def _images(splits: Iterable[SplitDiff]) -> Table:
    rows = [
        (
            split.role,
            *(f"{n:,}" for n in (split.n_a, split.n_b, split.n_both, split.n_relabelled)),
            "same" if split.same_order else "different",
        )
        for split in splits
    ]
    columns = ("in a", "in b", "in both", "relabelled", "order")
    return out.table(rows, ("split",), columns, title="images")


def _features(splits: Iterable[SplitDiff]) -> Table:
    rows = []
    for split in splits:
        for features in split.features:
            cells = [f"{features.n_different:,}", "", "", ""]
            if features.shape_a != features.shape_b:
                shapes = (features.shape_a, features.shape_b)
                cells[0] = " and ".join(" x ".join(map(str, shape)) or "none" for shape in shapes)
            elif features.n_rows:
                cells[1:] = [
                    f"{features.max_abs:.3g}",
                    f"{features.mean_cosine:.8f}",
                    f"{features.min_cosine:.8f}",
                ]
            rows.append((split.role, features.cut, features.view, *cells))
    return out.table(
        rows,
        ("split", "cut", "view"),
        ("differ", "max |a - b|", "mean cosine", "min cosine"),
        title="features of the same images",
    )


def _named(split: SplitDiff) -> list[Text]:
    """Return lines that name the first images only in a, only in b, or relabelled."""
    lines = [
        f"only in {where}, {split.role}: {', '.join(ids)}{_more(count, len(ids))}"
        for where, ids, count in (
            ("a", split.only_a, split.n_a - split.n_both),
            ("b", split.only_b, split.n_b - split.n_both),
        )
        if ids
    ]
    lines += [f"{split.role} {id_}: {a} in a, {b} in b" for id_, a, b in split.relabelled]
    return [name_of(line) for line in lines]


def _more(count: int, shown: int) -> str:
    return f" and {count - shown:,} more" if count > shown else ""


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:,.1f} kB"
