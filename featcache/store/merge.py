"""Merging caches of the same ingredients and different images into one."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import CacheMismatchError, OutputError, RecipeError
from ..files import check_writable, user_path
from ..options import check_choice
from ..progress import OnProgress, Progress, silent
from ..tables.table import Column, Table
from ..version import __version__
from .cache import Cache, CachedSplit, load
from .copies import content_numbers, role_spans
from .format import FINGERPRINT_FIELDS, ROLES, StoredArray, differing, fingerprint, roles_of
from .reader import iterate_rows
from .shards import single_writer
from .table_file import attach, table_path
from .writer import Source, encoded_ids, pack

OnConflict = Literal["refuse", "train", "test", "drop"]
_ON_CONFLICT = ("refuse", "train", "test", "drop")
_IN_SOME = ("/skipped", "/content_hashes")  # arrays that not every cache has
# What describes the part alone: its format and its extraction.
_NOT_KEPT = frozenset(
    ("bottleneck", "fingerprint", "format", "format_version", "reused_rows", "stages_s")
)


@dataclass(frozen=True)
class MergeResult:
    """The result of `merge`.

    Parameters
    ----------
    cache : Path
        The merged cache.
    n_parts : int
        Number of caches that were merged.
    n_train, n_test : int
        Images of each split.
    size_bytes : int
        Size of the file.
    wall_s : float
        Duration.
    fingerprint : str
        SHA-256 (hex) of everything that changes a feature.
    n_val : int
        Images of the split val.
    n_dropped : int
        Images that were left out because a copy stands in another split.
    notes : tuple of str
        Observations about copies.
    """

    cache: Path
    n_parts: int
    n_train: int
    n_test: int
    size_bytes: int
    wall_s: float
    fingerprint: str
    n_val: int = 0
    n_dropped: int = 0
    notes: tuple[str, ...] = ()

    def load(self) -> Cache:
        """Open the cache."""
        return load(self.cache)


def merge(
    caches: Sequence[str | Path | Cache],
    output: str | Path,
    *,
    name: str | None = None,
    prefix: bool = False,
    on_conflict: OnConflict = "refuse",
    force: bool = False,
    on_progress: OnProgress = silent,
) -> MergeResult:
    """Merge caches of different images into one, in the given order.

    Everything but the images must be the same: backbone, weights, preprocessing, engine, cuts,
    views, dtype, and the class names in their order. Memory does not grow with the features. The
    tables of labels that are attached to the parts come along.

    An image that is in train of one cache and in test of another would be learnt and then asked
    for. Such images are found by the SHA-256 of their files, under any name. Caches whose sides
    were drawn from the content of the images have none.

    Parameters
    ----------
    caches : sequence of str, Path or Cache
        At least two.
    output : str or Path
        A ``.h5`` file.
    name : str, optional
        Name of the merged data set; by default the names of the parts, joined by ``+``.
    prefix : bool
        Put the name of its data set before every id: ``digits/train/7``. Needed where two
        caches use the same id.
    on_conflict : str
        What happens to an image that stands in more than one split: ``"refuse"`` raises;
        ``"test"`` keeps the copies in the last of its splits, so that the test split stays whole;
        ``"train"`` those in the first; ``"drop"`` none. Copies within a split stay.
    force : bool
        Replace ``output`` if it exists.
    on_progress : callable
        Called with the progress in bytes.

    Returns
    -------
    MergeResult
        The data set's digest is SHA-256 over the digests and prefixes of the parts in order, and
        ``on_conflict`` where it left images out; the field ``merged_from`` of the provenance
        lists the parts.

    Raises
    ------
    RecipeError
        Fewer than two caches, or an unknown ``on_conflict``.
    CacheMismatchError
        They differ in an ingredient, use an id twice in the same split, or have an image in
        different splits.
    CacheError
        One of them is missing or damaged.
    OutputError
        ``output`` exists, is one of the caches, or cannot be written.
    """
    started = time.perf_counter()
    check_choice("on_conflict", on_conflict, _ON_CONFLICT)
    parts = [cache if isinstance(cache, Cache) else load(cache) for cache in caches]
    path = user_path(output)
    _check_output(path, parts, force)
    _check_parts(parts)
    names = _names(parts)
    prefixes = [f"{part}/" if prefix else "" for part in names]
    kept, notes = _kept_rows(parts, on_conflict)
    n_dropped = sum(int((~mask).sum()) for masks in kept.values() for mask in masks)
    rule = on_conflict if n_dropped else ""
    meta = _meta(parts, name or "+".join(names), prefixes, kept, rule)
    sources: dict[str, Source] = {}
    for role in _roles(parts):
        sources.update(_sources(parts, role, prefixes, kept[role]))
    table, facts = _merged_table(parts, kept)
    check_writable(path)
    with single_writer(path):
        pack(path, _counted(sources, on_progress), meta)
        if table is not None:
            attach(path, fingerprint(meta), table, facts)
        else:  # that of a cache which was replaced
            table_path(path).unlink(missing_ok=True)
    counts = {role: int(sum(mask.sum() for mask in masks)) for role, masks in kept.items()}
    return MergeResult(
        cache=path,
        n_parts=len(parts),
        n_train=counts["train"],
        n_test=counts["test"],
        size_bytes=path.stat().st_size,
        wall_s=time.perf_counter() - started,
        fingerprint=fingerprint(meta),
        n_val=counts.get("val", 0),
        n_dropped=n_dropped,
        notes=notes,
    )


def _roles(parts: Sequence[Cache]) -> tuple[str, ...]:
    """Return the splits of the merged cache: val where any part has one."""
    return roles_of({name: None for part in parts for name in part.index.arrays})


def _check_output(path: Path, parts: Sequence[Cache], force: bool) -> None:
    if path.suffix != ".h5":
        raise OutputError(
            f"{path}: expected the name of a .h5 file for the merged cache, found "
            f"{path.suffix or 'no suffix'}; name it {path.name}.h5"
        )
    if any(os.path.realpath(path) == os.path.realpath(part.path) for part in parts):
        raise OutputError(f"{path}: is one of the caches to be merged; name another output")
    if os.path.lexists(path) and not force:
        raise OutputError(
            f"{path}: exists already; use --force to replace it, or name another output"
        )


def _check_parts(parts: Sequence[Cache]) -> None:
    if len(parts) < 2:
        raise RecipeError(f"merge: expected two or more caches, found {len(parts)}; name another")
    first = parts[0]
    matters = [*FINGERPRINT_FIELDS, "class_names"]
    matters.remove("dataset_digest")
    for other in parts[1:]:
        fields = list(differing(first.meta, other.meta, matters))
        if not fields:
            shapes = (_row_shapes(first), _row_shapes(other))
            fields = list(differing(*shapes, sorted({*shapes[0], *shapes[1]})))
        if fields:
            lines = "; ".join(f"{name}: {a!r:.66} and {b!r:.66}" for name, a, b in fields)
            advice = "extract both with the same options"
            if any(name.startswith("class_names") for name, _, _ in fields):
                advice = "put the class folders of both into one data set, and extract that"
            raise CacheMismatchError(
                f"{other.path}: expected the ingredients of {first.path} and other images, found "
                f"other ingredients: {lines}; {advice}"
            )
    seen: dict[str, Path] = {}
    for part in parts:  # prefixes would hide that the images are the same
        digest = part.meta["dataset_digest"]
        if digest in seen:
            raise CacheMismatchError(
                f"{part.path}: expected other images than in {seen[digest]}, found the same data "
                "set; name each once"
            )
        seen[digest] = part.path


def _row_shapes(part: Cache) -> dict[str, tuple[int, ...]]:
    return {
        name: array.row_shape
        for name, array in part.index.arrays.items()
        if not name.endswith(_IN_SOME) and not name.startswith("val/")
    }


def _kept_rows(
    parts: Sequence[Cache], on_conflict: str
) -> tuple[dict[str, list[np.ndarray]], tuple[str, ...]]:
    """Return which rows of each split and part stay, bool (N,) each, and notes on copies."""
    places = [
        (role, part, split)
        for role in _roles(parts)
        for part in parts
        if (split := _split(part, role)) is not None
    ]
    lengths = [len(split) for _, _, split in places]
    hashes = [split.content_hashes for _, _, split in places if len(split)]
    keep = np.ones(sum(lengths), bool)
    notes: list[str] = []
    if any(one is None for one in hashes):
        notes.append(
            "not every cache has the SHA-256 of its images: whether an image stands in two splits "
            "was not checked"
        )
    elif hashes:
        contents = content_numbers(np.concatenate([one for one in hashes if one is not None]))
        numbers = np.array([ROLES.index(role) for role, _, _ in places])
        own = np.repeat(numbers, lengths)
        first, last = role_spans(contents, own)
        torn = first != last
        if torn.any():
            if on_conflict == "refuse":
                raise CacheMismatchError(_conflict(places, lengths, contents, torn))
            keep = ~torn
            if on_conflict != "drop":
                keep |= own == (first if on_conflict == "train" else last)
            notes.append(
                f"{int((~keep).sum()):,} images that also stand in another split were left out"
            )
        _, counts = np.unique(np.stack([contents, own])[:, keep], axis=1, return_counts=True)
        if n_copies := int((counts - 1).sum()):
            notes.append(f"{n_copies:,} images are exact copies of others of their split")
    masks = iter(np.split(keep, np.cumsum(lengths)[:-1]))
    kept = {
        role: [np.ones(0, bool) if _split(part, role) is None else next(masks) for part in parts]
        for role in _roles(parts)
    }
    return kept, tuple(notes)


def _merged_table(
    parts: Sequence[Cache], kept: Mapping[str, Sequence[np.ndarray]]
) -> tuple[Table | None, dict[str, Any]]:
    """Return the tables of the parts as one, aligned to the merged rows; None without any.

    A column that a part lacks is missing there, and one of different kinds becomes text.
    """
    given = [part.attached_table for part in parts if part.attached_table is not None]
    if not given:
        return None, {}
    lengths = [sum(len(split) for _, split in part.splits()) for part in parts]
    columns = [{} if part.table is None else part.table.columns for part in parts]
    joined = {
        name: _joined_column([own.get(name) for own in columns], lengths)
        for name in dict.fromkeys(name for own in columns for name in own)
    }
    at, rows = np.cumsum([0, *lengths]).tolist(), []
    for masks in kept.values():
        for number, mask in enumerate(masks):
            rows.append(at[number] + np.flatnonzero(mask))
            at[number] += len(mask)
    facts: dict[str, Any] = {
        "source": ", ".join(dict.fromkeys(one.facts["source"] for one in given)),
        "sha256": "",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "key": "merged with the caches",
    }
    for count in ("n_rows", "n_matched", "n_missing", "n_doubled", "n_left_over"):
        facts[count] = sum(one.facts[count] for one in given)
    return Table(joined, facts["source"]).take(np.concatenate(rows)), facts


def _joined_column(columns: Sequence[Column | None], lengths: Sequence[int]) -> Column:
    """Return columns of one name one after another; None has no value in so many rows."""
    kinds = {column.kind for column in columns if column is not None}
    kind = kinds.pop() if len(kinds) == 1 else "text"
    missing = np.nan if kind == "number" else None
    values = [
        np.full(length, missing)
        if column is None
        else column.values
        if column.kind == kind
        else column.texts()
        for column, length in zip(columns, lengths, strict=True)
    ]
    return Column(kind, np.concatenate(values))


def _conflict(
    places: Sequence[tuple[str, Cache, CachedSplit]],
    lengths: Sequence[int],
    contents: np.ndarray,
    torn: np.ndarray,
) -> str:
    """Say how many images stand in several splits, and where the first one does."""
    starts = np.cumsum([0, *lengths])

    def named(row: int) -> str:
        place = int(np.searchsorted(starts, row, side="right")) - 1
        role, part, split = places[place]
        return f"{split.ids[row - starts[place]]!r} in {role} of {part.path}"

    rows = np.flatnonzero(contents == contents[torn.argmax()])
    place_of = np.repeat(np.arange(len(places)), lengths)
    other = next(row for row in rows if places[place_of[row]][0] != places[place_of[rows[0]]][0])
    return (
        f"merge: expected each image in one split, found {len(np.unique(contents[torn])):,} in "
        f"several, first {named(rows[0])}, which is {named(other)} too: a head would be "
        "tested on what it learnt; choose with --on-conflict test (keeps the test split whole), "
        "train, or drop"
    )


def _split(part: Cache, role: str) -> CachedSplit | None:
    """Return a split, None where the part has none."""
    return dict(part.splits()).get(role)


def _names(parts: Sequence[Cache]) -> list[str]:
    """Return the name of each part's data set, numbered where two are the same."""
    names = [str(part.meta.get("dataset", part.path.stem)) for part in parts]
    if len(set(names)) < len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names, start=1)]
    return names


def _meta(
    parts: Sequence[Cache],
    name: str,
    prefixes: Sequence[str],
    kept: Mapping[str, Sequence[np.ndarray]],
    rule: str,
) -> dict[str, Any]:
    """Return the merged provenance; ``rule`` is how conflicts were resolved, "" without any."""
    walls = [part.meta.get("wall_s", 0.0) for part in parts]
    rates = [part.meta.get("images_per_s", 0.0) for part in parts]
    passes = sum(rate * wall_s for rate, wall_s in zip(rates, walls, strict=True))
    lines = [
        f"{part.meta['dataset_digest']} {prefix}\n"
        for part, prefix in zip(parts, prefixes, strict=True)
    ]
    if rule:
        lines.append(f"on_conflict {rule}\n")
    return {
        **{field: value for field, value in parts[0].meta.items() if field not in _NOT_KEPT},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dataset": name,
        "dataset_digest": hashlib.sha256("".join(lines).encode("utf-8", "replace")).hexdigest(),
        "dataset_path": None,
        "dataset_source": f"merged from {len(parts)} caches",
        "featcache_version": __version__,
        "images_per_s": passes / sum(walls) if sum(walls) else 0.0,
        "merged_from": [
            {
                "cache": part.path.name,
                "dataset": part.meta.get("dataset", ""),
                "dataset_digest": part.meta["dataset_digest"],
                "fingerprint": part.fingerprint,
                **{f"n_{role}": int(masks[number].sum()) for role, masks in sorted(kept.items())},
            }
            for number, part in enumerate(parts)
        ],
        "wall_s": sum(walls),
    }


def _sources(
    parts: Sequence[Cache], role: str, prefixes: Sequence[str], kept: Sequence[np.ndarray]
) -> dict[str, Source]:
    """Return the arrays of a split: the rows of the parts that are kept, in order."""
    present = [
        (part, split, prefix, mask)
        for part, prefix, mask in zip(parts, prefixes, kept, strict=True)
        if (split := _split(part, role)) is not None
    ]
    labels = np.concatenate([split.labels[mask] for _, split, _, mask in present])
    sources = {
        f"{role}/labels": Source.of(labels),
        f"{role}/ids": Source.of(encoded_ids(_ids(present, role))),
    }
    skipped = [prefix + name for _, split, prefix, _ in present for name in split.skipped]
    if skipped:
        sources[f"{role}/skipped"] = Source.of(encoded_ids(skipped))
    for name, array in present[0][0].index.arrays.items():
        new = name.startswith(f"{role}/") and name not in sources and not name.endswith("/skipped")
        if new and all(name in part.index.arrays for part, *_ in present):
            pieces = [(part.index.arrays[name], mask) for part, _, _, mask in present]
            shape = (len(labels), *array.row_shape)
            sources[name] = Source(array.dtype, shape, partial(_rows, pieces))
    return sources


def _ids(present: Iterable[tuple[Cache, CachedSplit, str, np.ndarray]], role: str) -> Iterator[str]:
    """Yield the ids of all parts; refuse an id that occurs twice."""
    owner: dict[str, Cache] = {}
    for part, split, prefix, mask in present:
        for row in np.flatnonzero(mask).tolist():
            name = prefix + split.ids[row]
            if name in owner:
                raise CacheMismatchError(
                    f"{part.path}: expected images that are not in {owner[name].path} too, found "
                    f"{name!r} in {role} of both; "
                    + ("see featcache verify" if prefix else "use --prefix if these are two images")
                )
            owner[name] = part
            yield name


def _rows(pieces: Iterable[tuple[StoredArray, np.ndarray]]) -> Iterator[np.ndarray]:
    for array, mask in pieces:
        row = 0
        for rows in iterate_rows(array):
            kept = mask[row : row + len(rows)]
            row += len(rows)
            yield rows if kept.all() else rows[kept]


def _counted(sources: Mapping[str, Source], on_progress: OnProgress) -> dict[str, Source]:
    """Return the same sources, which also report progress."""
    done, total = 0, sum(source.size_bytes for source in sources.values())

    def count(source: Source) -> Iterator[np.ndarray]:
        nonlocal done
        for rows in source.blocks():
            yield rows
            done += rows.nbytes
            on_progress(Progress("merging", done, total, "B"))

    return {
        name: replace(source, blocks=partial(count, source)) for name, source in sources.items()
    }
