"""The command `audit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from . import output as out
from .options import CacheArgument, JsonOption, MmapOption, SeedOption, app, column, without
from .output import counted
from .output import name as name_of

if TYPE_CHECKING:
    from ..auditing.findings import AuditResult, DuplicateGroup, StraddlingCopy


@app.command()
def audit(
    cache: CacheArgument = None,
    duplicates: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Least cosine of two near-duplicates.",
            show_default="one that suits the features",
        ),
    ] = None,
    folds: Annotated[
        int, typer.Option(min=2, help="Folds of cross-validation for training labels.")
    ] = 5,
    neighbours: Annotated[
        int, typer.Option(min=1, help="Nearest images compared, for each image.")
    ] = 10,
    outliers: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Fraction of training images to list as outliers."),
    ] = 0.01,
    top: Annotated[int, typer.Option(min=0, help="Lines shown of each list.")] = 10,
    csv: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the full lists: duplicates, groups, mislabelled, outliers, and what "
            "stands in several splits.",
            metavar="FOLDER",
        ),
    ] = None,
    group: Annotated[
        str | None,
        column("Column of the attached table, such as patient: name groups in several splits."),
    ] = None,
    seed: SeedOption = 0,
    mmap: MmapOption = False,
    json: JsonOption = False,
) -> None:
    """Find near-duplicates, likely wrong labels, outliers, and what stands in several splits.

    Example: featcache audit --csv health
    """
    given = without(locals(), "cache", "top", "csv", "json")
    from ..auditing.audit import audit as run
    from ..auditing.findings import table_paths, write_tables
    from ..files import check_writable, user_path

    folder = None if csv is None else user_path(csv)
    if folder is not None:
        for path in table_paths(folder).values():
            check_writable(path)
    with out.progress() as report:
        result = run(cache, **given, on_progress=report)
    if folder is not None:
        write_tables(result, folder)
    out.show(result, json, lambda item: audit_summary(item, top, folder))


_NAMED = 2  # images of a group
_LABELS = 3  # of a group
_LONG = 60  # characters of a name; the full lists have all of it


def audit_summary(result: AuditResult, top: int, folder: Path | None) -> list[Any]:
    """Return the results in sentences, and the first lines of each list."""
    shown: list[Any] = [_duplicates(result)]
    if top and result.groups:
        shown.append(_groups_table(result, top))
    shown += _straddling(result, top)
    shown.append(_labels(result))
    if top and result.mislabelled:
        shown.append(_suspects_table(result, top))
    shown.append(_outliers(result))
    if top and result.outliers:
        shown.append(_outliers_table(result, top))
    shown += [name_of(f"note: {note}") for note in result.notes]
    if folder is not None:
        shown.append(name_of(f"full lists: {folder}/*.csv"))
    else:
        shown.append("full lists: --csv FOLDER, or --json")
    shown.append(
        f"neighbours {result.neighbours_s:.1f} s, heads {result.heads_s:.1f} s, "
        f"total {result.wall_s:.1f} s"
    )
    return shown


def _duplicates(result: AuditResult) -> str:
    n_images = sum(len(group.images) for group in result.groups)
    text = (
        f"Near-duplicates: {result.n_test_with_duplicate:,} of {result.n_test:,} test images have "
        f"one in the training split (cosine {result.threshold:.4g} or more)."
    )
    if result.top1 is not None and result.top1_without_duplicates is not None:
        text += (
            f" The top-1 of the audit's own head, whose C need not be a probe's, is "
            f"{100 * result.top1:.2f} % on all labelled test images and "
            f"{100 * result.top1_without_duplicates:.2f} % on the "
            f"{result.n_test_without_duplicates:,} without one."
        )
    mixed = sum(group.same_label is False for group in result.groups)
    return (
        f"{text} {len(result.groups):,} groups of near-duplicates hold {n_images:,} images; "
        f"{mixed:,} groups have different labels."
    )


def _straddling(result: AuditResult, top: int) -> list[Any]:
    """Return the copies and groups that stand in several splits, or that there are none."""
    shown: list[Any] = []
    if result.straddling_copies:
        relabelled = sum(copy.same_label is False for copy in result.straddling_copies)
        shown.append(
            f"Exact copies: {counted(len(result.straddling_copies), 'image')} in several splits, "
            f"{relabelled:,} with different labels: a head is tested on what it learnt."
        )
        copies = [
            (
                str(len(copy.images)),
                _labels_of(copy),
                ", ".join(
                    f"{one.split}: {_cut(one.id)}" for one in copy.images[:: len(copy.images) - 1]
                ),
            )
            for copy in result.straddling_copies[:top]
        ]
        if top:
            shown.append(out.table(copies, (), ("copies",), ("label", "images")))
    if result.group is not None:
        shown.append(
            name_of(
                f"Groups: {len(result.straddling_groups):,} of {result.n_groups:,} of "
                f"{result.group} stand in several splits."
            )
        )
        groups = [
            (_cut(one.name), f"{one.n_train:,}", f"{one.n_val:,}", f"{one.n_test:,}")
            for one in result.straddling_groups[:top]
        ]
        if groups:
            shown.append(out.table(groups, (result.group,), ("train", "val", "test")))
    return shown


def _labels(result: AuditResult) -> str:
    if result.C is None:
        return "Likely wrong labels: no label was judged."
    return (
        f"Likely wrong labels: {len(result.mislabelled):,} of {result.n_judged:,} images, which a "
        "head not trained on them assigns to another class. Ranked, for a person to review."
    )


def _outliers(result: AuditResult) -> str:
    if result.outlier_score is None:
        return "Outliers: none, because the training split has fewer than two images."
    return (
        f"Outliers: {len(result.outliers):,} of {result.n_train + result.n_test:,} images, further "
        f"than {result.outlier_score:.3f} from their {result.n_neighbours} nearest training images "
        "(1 - mean cosine)."
    )


def _groups_table(result: AuditResult, top: int) -> Table:
    closest: dict[int, float] = {}
    for pair in result.duplicates:
        closest[pair.group] = max(pair.similarity, closest.get(pair.group, -1.0))
    rows = [
        (
            str(group.number),
            f"{group.n_train:,}",
            f"{group.n_test:,}",
            f"{closest[group.number]:.3f}",
            _labels_of(group),
            _images_of(group),
        )
        for group in result.groups[:top]
    ]
    return out.table(rows, ("group",), ("train", "test", "cosine"), ("label", "images"))


def _labels_of(group: DuplicateGroup | StraddlingCopy) -> str:
    labels = list(dict.fromkeys(image.label or "none" for image in group.images))
    more = len(labels) - _LABELS
    shown = " / ".join(map(_cut, labels[:_LABELS]))
    return f"{shown} and {more:,} more" if more > 0 else shown


def _images_of(group: DuplicateGroup) -> str:
    # The first and the last: one of each split where the group has both.
    images = (group.images[0], group.images[-1])
    more = len(group.images) - _NAMED
    return ", ".join(_cut(image.id) for image in images) + (f" and {more:,} more" if more else "")


def _suspects_table(result: AuditResult, top: int) -> Table:
    rows = [
        (
            one.split,
            _cut(one.id),
            _cut(one.label or ""),
            _cut(one.suggested),
            f"{one.self_confidence:.4f}",
            f"{one.confidence:.4f}",
        )
        for one in result.mislabelled[:top]
    ]
    return out.table(rows, ("split", "image", "label", "suggested"), ("p(label)", "p(suggested)"))


def _outliers_table(result: AuditResult, top: int) -> Table:
    rows = [
        (one.split, _cut(one.id), _cut(one.label or "none"), f"{one.score:.3f}")
        for one in result.outliers[:top]
    ]
    return out.table(rows, ("split", "image", "label"), ("distance",))


def _cut(name: str) -> str:
    """Shorten a name in the middle, keeping most of its end."""
    return name if len(name) <= _LONG else f"{name[: _LONG // 3]}…{name[1 + _LONG // 3 - _LONG :]}"
