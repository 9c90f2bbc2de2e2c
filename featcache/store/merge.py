"""Merging caches of the same ingredients and different images into one."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheMismatchError, OutputError, RecipeError
from ..files import check_writable, user_path
from ..progress import OnProgress, Progress, silent
from ..version import __version__
from .cache import Cache, load
from .format import FINGERPRINT_FIELDS, ROLES, StoredArray, differing, fingerprint
from .reader import iterate_rows
from .shards import single_writer
from .writer import Source, encoded_ids, pack

_IN_SOME = ("/skipped", "/content_hashes")  # arrays that not every cache has
# What describes the part alone: its format and its extraction.
_NOT_KEPT = frozenset(("bottleneck", "fingerprint", "format", "format_version", "stages_s"))


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
    """

    cache: Path
    n_parts: int
    n_train: int
    n_test: int
    size_bytes: int
    wall_s: float
    fingerprint: str

    def load(self) -> Cache:
        """Open the cache."""
        return load(self.cache)


def merge(
    caches: Sequence[str | Path | Cache],
    output: str | Path,
    *,
    name: str | None = None,
    prefix: bool = False,
    force: bool = False,
    on_progress: OnProgress = silent,
) -> MergeResult:
    """Merge caches of different images into one, in the given order.

    Everything but the images must be the same: backbone, weights, preprocessing, engine, cuts,
    views, dtype, and the class names in their order. Memory does not grow with the caches.

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
    force : bool
        Replace ``output`` if it exists.
    on_progress : callable
        Called with the progress in bytes.

    Returns
    -------
    MergeResult
        The data set's digest is SHA-256 over the digests and prefixes of the parts in order;
        the field ``merged_from`` of the provenance lists the parts.

    Raises
    ------
    RecipeError
        Fewer than two caches.
    CacheMismatchError
        They differ in an ingredient, or use an id twice in the same split.
    CacheError
        One of them is missing or damaged.
    OutputError
        ``output`` exists, is one of the caches, or cannot be written.
    """
    started = time.perf_counter()
    parts = [cache if isinstance(cache, Cache) else load(cache) for cache in caches]
    path = user_path(output)
    _check_output(path, parts, force)
    _check_parts(parts)
    _check_images(parts)
    names = _names(parts)
    prefixes = [f"{part}/" if prefix else "" for part in names]
    meta = _meta(parts, name or "+".join(names), prefixes)
    sources: dict[str, Source] = {}
    for role in ROLES:
        sources.update(_sources(parts, role, prefixes))
    check_writable(path)
    with single_writer(path):
        pack(path, _counted(sources, on_progress), meta)
    return MergeResult(
        cache=path,
        n_parts=len(parts),
        n_train=sources["train/labels"].shape[0],
        n_test=sources["test/labels"].shape[0],
        size_bytes=path.stat().st_size,
        wall_s=time.perf_counter() - started,
        fingerprint=fingerprint(meta),
    )


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


def _check_images(parts: Sequence[Cache]) -> None:
    """Refuse the same data set twice: prefixes would hide the duplicates."""
    seen: dict[str, Path] = {}
    for part in parts:
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
        if not name.endswith(_IN_SOME)
    }


def _names(parts: Sequence[Cache]) -> list[str]:
    """Return the name of each part's data set, numbered where two are the same."""
    names = [str(part.meta.get("dataset", part.path.stem)) for part in parts]
    if len(set(names)) < len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names, start=1)]
    return names


def _meta(parts: Sequence[Cache], name: str, prefixes: Sequence[str]) -> dict[str, Any]:
    """Return the merged provenance."""
    walls = [_number(part, "wall_s") for part in parts]
    passes = sum(
        _number(part, "images_per_s") * wall_s for part, wall_s in zip(parts, walls, strict=True)
    )
    lines = (
        f"{part.meta['dataset_digest']} {prefix}\n"
        for part, prefix in zip(parts, prefixes, strict=True)
    )
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
                "n_test": len(part.test),
                "n_train": len(part.train),
            }
            for part in parts
        ],
        "wall_s": sum(walls),
    }


def _number(part: Cache, field: str) -> float:
    value = part.meta.get(field)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _sources(parts: Sequence[Cache], role: str, prefixes: Sequence[str]) -> dict[str, Source]:
    """Return the arrays of a split: the rows of the parts in order."""
    splits = [getattr(part, role) for part in parts]
    sources = {
        f"{role}/labels": Source.of(np.concatenate([split.labels for split in splits])),
        f"{role}/ids": Source.of(encoded_ids(_ids(parts, role, prefixes))),
    }
    skipped = [
        prefix + name
        for split, prefix in zip(splits, prefixes, strict=True)
        for name in split.skipped
    ]
    if skipped:
        sources[f"{role}/skipped"] = Source.of(encoded_ids(skipped))
    for name, array in parts[0].index.arrays.items():
        new = name.startswith(f"{role}/") and name not in sources and not name.endswith("/skipped")
        if new and all(name in part.index.arrays for part in parts):
            arrays = [part.index.arrays[name] for part in parts]
            n_rows = sum(stored.shape[0] for stored in arrays)
            sources[name] = Source(array.dtype, (n_rows, *array.row_shape), partial(_rows, arrays))
    return sources


def _ids(parts: Sequence[Cache], role: str, prefixes: Sequence[str]) -> Iterator[str]:
    """Yield the ids of all parts; refuse an id that occurs twice."""
    owner: dict[str, Cache] = {}
    for part, prefix in zip(parts, prefixes, strict=True):
        for own in getattr(part, role).ids:
            name = prefix + own
            if name in owner:
                raise CacheMismatchError(
                    f"{part.path}: expected images that are not in {owner[name].path} too, found "
                    f"{name!r} in {role} of both; "
                    + ("see featcache verify" if prefix else "use --prefix if these are two images")
                )
            owner[name] = part
            yield name


def _rows(arrays: Iterable[StoredArray]) -> Iterator[np.ndarray]:
    for array in arrays:
        yield from iterate_rows(array)


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
        name: Source(source.dtype, source.shape, partial(count, source))
        for name, source in sources.items()
    }
