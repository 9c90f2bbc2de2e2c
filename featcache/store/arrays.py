"""A cache of features that were made elsewhere, from arrays in memory or mapped files."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheError, DatasetError, OutputError, ShapeMismatchError, one_line
from ..files import check_writable, user_path
from ..progress import OnNote, OnProgress, Progress, silent
from ..sampling import drawn_sides, text_hashes
from ..tables.table import listed
from ..version import __version__
from .format import ROLE_WORDS, ROLES, UNLABELLED, fingerprint
from .index import default_folder, open_index
from .provenance import IMPORTED
from .shards import single_writer
from .table_file import table_path
from .writer import Source, encoded_ids, pack

WEIGHTS = "imported, not computed here"
CUT = "features"
_PIECE_ROWS = 4096
_NAMED = 3  # ids in a message
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, eq=False)
class Rows:
    """Features of N images that were made elsewhere, and what is known of the images.

    `Cache.from_arrays` describes them. ``features`` are arrays one after another, N rows in all;
    ``roles`` its splits; images of one of ``groups`` (N texts) are drawn to one side; ``facts``
    are further fields of the provenance.
    """

    features: Sequence[np.ndarray]
    ids: Sequence[str]
    labels: np.ndarray | None  # int64 (N,) in [0, K), -1 for none
    class_names: Sequence[str]
    roles: Sequence[str] | None
    hashes: np.ndarray | None
    made_by: str | None
    facts: Mapping[str, Any]
    groups: Sequence[str] | None = None


def as_classes(labels: Any, class_names: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    """Return labels int64 (N,), -1 for none, and class names, of whole numbers or of texts."""
    values = np.asarray(labels)
    if values.ndim != 1:
        raise ShapeMismatchError(f"labels: expected one per image (N,), found {values.shape}")
    if values.dtype.kind == "f" and (values == np.round(values)).all():
        values = values.astype(np.int64)
    if values.dtype.kind in "iu":
        values = values.astype(np.int64)
        if class_names is None:
            known = np.unique(values[values >= 0])
            class_names = [str(label) for label in known.tolist()]
            values = np.where(values >= 0, np.searchsorted(known, values), UNLABELLED)
        if values.size and not -1 <= values.min() <= values.max() < len(class_names):
            raise DatasetError(
                f"labels: expected 0 to {len(class_names) - 1} for {len(class_names)} class names, "
                f"or -1 for none, found {values.min()} to {values.max()}"
            )
        return values, list(class_names)
    if values.dtype.kind not in "US" and not (
        values.dtype == object and all(isinstance(one, (str, type(None))) for one in values)
    ):
        raise DatasetError(
            f"labels: expected whole numbers or the names of classes, found {values.dtype}; give "
            "quantities as a table, with --labels, and ask for them with probe --target"
        )
    texts = [_text(value) for value in values.tolist()]
    names = list(class_names) if class_names is not None else sorted({*texts} - {""})
    number = {name: label for label, name in enumerate(names)} | {"": UNLABELLED}
    strange = next((text for text in texts if text not in number), None)
    if strange is not None:
        raise DatasetError(
            f"labels: expected one of {len(names)} class names, found {one_line(repr(strange))}"
        )
    return np.array([number[text] for text in texts], np.int64), names


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def write_rows(
    rows: Rows,
    path: str | Path | None,
    *,
    name: str,
    source: str,
    force: bool = False,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> tuple[Path, bool]:
    """Write a cache; return its path, and whether it was there already with the same content.

    ``name`` is the data set's, ``source`` the features', for the provenance. The rest, and what
    is raised, is as of `Cache.from_arrays`.
    """
    n_rows, row_shape, dtype = _check_features(rows.features, source, on_note)
    _check_ids(rows, n_rows, source)
    roles, split = _roles(rows, source)
    labels = np.full(n_rows, UNLABELLED) if rows.labels is None else rows.labels
    if len(labels) != n_rows:
        raise ShapeMismatchError(f"{source}: expected {n_rows} labels, found {len(labels)}")
    digest = _features_digest(rows, dtype, source, on_progress)
    meta = {
        "backbone": IMPORTED,
        "class_names": list(rows.class_names),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cuts": [CUT],
        "dataset": name,
        "dataset_digest": _dataset_digest(rows, roles, labels),
        "dataset_path": None,
        "dataset_source": source,
        "device": "unknown",
        "dtype": dtype.name,
        "engine": IMPORTED,
        "engine_version": "unknown",
        "features_sha256": digest,
        "featcache_version": __version__,
        "precision": "unknown",
        "preprocess": {},
        "split": split,
        "views": ["identity"],
        "weights": WEIGHTS if rows.made_by is None else f"{rows.made_by} ({WEIGHTS})",
        "weights_sha256": digest if rows.made_by is None else _named_sha256(rows.made_by),
        "weights_source": source,
        **rows.facts,
    }
    target = _target(path, name, meta)
    if _is_there(target, meta, force):
        on_note(f"{target}: is there already, with the same features, ids and labels")
        return target, True
    check_writable(target)
    with single_writer(target):
        pack(target, _sources(rows, roles, labels, dtype, row_shape, on_progress), meta)
        table_path(target).unlink(missing_ok=True)  # of the cache that was replaced
    return target, False


def _named_sha256(made_by: str) -> str:
    return hashlib.sha256(f"{IMPORTED} {made_by}".encode("utf-8", "surrogateescape")).hexdigest()


def _check_features(
    features: Sequence[np.ndarray], source: str, on_note: OnNote
) -> tuple[int, tuple[int, ...], np.dtype]:
    """Return the number of rows, the shape of one, and the dtype in which they are stored."""
    shapes = {(array.shape[1:], array.dtype.newbyteorder("=")) for array in features}
    n_rows = sum(len(array) for array in features if array.ndim)
    if len(shapes) != 1 or not n_rows:
        found = "none" if len(shapes) < 2 else f"{len(shapes)} different shapes or dtypes"
        raise DatasetError(
            f"{source}: expected features of one or more images, found {found}; check its name"
        )
    row_shape, dtype = shapes.pop()
    if not 1 <= len(row_shape) < _MAX_DIMENSIONS or 0 in row_shape:
        raise ShapeMismatchError(
            f"{source}: expected features (N, D) or maps (N, C, H, W), found "
            f"{(n_rows, *row_shape)}; reshape them"
        )
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise ShapeMismatchError(
            f"{source}: expected features as float32 or float16, found {dtype}; convert them with "
            ".astype('float32')"
        )
    if dtype in (np.float32, np.float16):
        return n_rows, row_shape, dtype
    exact = dtype.kind in "iu" and dtype.itemsize <= 2
    on_note(f"features: {dtype} is kept as float32, {'exactly' if exact else 'rounded'}")
    return n_rows, row_shape, np.dtype(np.float32)


def _check_ids(rows: Rows, n_rows: int, source: str) -> None:
    for what, found in (("ids", rows.ids), ("roles", rows.roles), ("hashes", rows.hashes)):
        if found is not None and len(found) != n_rows:
            raise ShapeMismatchError(
                f"{source}: expected {n_rows:,} {what}, one per row of the features, found "
                f"{len(found):,}"
            )
    twice = [name for name, count in Counter(rows.ids).items() if count > 1]
    if twice:
        raise DatasetError(
            f"{source}: expected an id of its own for every row, found twice or more: "
            f"{listed(twice, _NAMED)}; give others with --ids"
        )


def _roles(rows: Rows, source: str) -> tuple[np.ndarray, str]:
    """Return the number of each row's role, and how it was found: given, content, group, id."""
    if rows.roles is not None:
        numbers = [ROLE_WORDS.get(str(word).strip().lower(), -1) for word in rows.roles]
        if -1 in numbers:
            raise DatasetError(
                f"{source}: expected train, val or test as splits, found "
                f"{one_line(repr(rows.roles[numbers.index(-1)]))} in row {numbers.index(-1)}"
            )
        return np.array(numbers), "given"
    if rows.hashes is not None:
        hashes, how = rows.hashes, "content"
    elif rows.groups is not None:
        hashes, how = text_hashes(rows.groups), "group"
    else:
        hashes, how = text_hashes(rows.ids), "id"
    return np.where(drawn_sides(hashes), ROLES.index("test"), ROLES.index("train")), how


def _pieces(rows: Rows, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield the number of the first row, and rows as they are and as they are stored."""
    start = 0
    for array in rows.features:
        for at in range(0, len(array), _PIECE_ROWS):
            given = np.asarray(array[at : at + _PIECE_ROWS])
            with np.errstate(over="ignore"):
                kept = np.ascontiguousarray(given, dtype)
            yield start + at, given, kept
        start += len(array)


def _features_digest(rows: Rows, dtype: np.dtype, source: str, on_progress: OnProgress) -> str:
    """Return SHA-256 (hex) of the features as they are stored; refuse what is not finite."""
    digest = hashlib.sha256()
    for start, given, kept in _pieces(rows, dtype):
        finite = np.isfinite(kept).reshape(len(kept), -1).all(axis=1)
        if not finite.all():
            row = int(finite.argmin())
            is_finite = np.isfinite(given[row]).all()
            what = "a number too large for float32" if is_finite else "NaN or infinity"
            raise DatasetError(
                f"{source}: expected finite features, found {what} in row {start + row} "
                f"({one_line(repr(rows.ids[start + row]))}); leave such rows out"
            )
        digest.update(kept.reshape(-1).view(np.uint8).data)
        on_progress(Progress("checking", start + len(kept), len(rows.ids), "row"))
    return digest.hexdigest()


def _dataset_digest(rows: Rows, roles: np.ndarray, labels: np.ndarray) -> str:
    """Return SHA-256 (hex) over class names, ids, roles, labels and content hashes."""
    digest = hashlib.sha256(json.dumps(list(rows.class_names)).encode())
    for name, role, label in zip(rows.ids, roles.tolist(), labels.tolist(), strict=True):
        digest.update(f"{json.dumps(name)} {ROLES[role]} {label}\n".encode())
    if rows.hashes is not None:
        digest.update(np.ascontiguousarray(rows.hashes).data)
    return digest.hexdigest()


def _target(path: str | Path | None, name: str, meta: Mapping[str, Any]) -> Path:
    folder = default_folder() if path is None else user_path(path)
    if path is not None and not folder.is_dir():
        if folder.suffix != ".h5":
            raise OutputError(
                f"{folder}: expected the name of a .h5 file or a folder, found "
                f"{folder.suffix or 'no suffix'}; name it {folder.name}.h5"
            )
        return folder
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    return folder / f"{safe}-{IMPORTED}-{fingerprint(meta)[:8]}.h5"


def _is_there(path: Path, meta: Mapping[str, Any], force: bool) -> bool:
    """Tell whether a file holds this cache already; refuse to replace any other."""
    if force or not os.path.lexists(path):
        return False
    with suppress(CacheError):
        there = open_index(path).meta
        if there["fingerprint"] == fingerprint(meta) and (
            there.get("features_sha256") == meta["features_sha256"]
        ):
            return True
    raise OutputError(
        f"{path}: exists already, with other content; use --force to replace it, or name another "
        "output"
    )


def _sources(
    rows: Rows,
    roles: np.ndarray,
    labels: np.ndarray,
    dtype: np.dtype,
    row_shape: tuple[int, ...],
    on_progress: OnProgress,
) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for number, role in enumerate(ROLES):
        mask = roles == number
        if role == "val" and not mask.any():
            continue
        sources[f"{role}/features"] = Source(
            dtype, (int(mask.sum()), *row_shape), partial(_of_role, rows, dtype, mask, on_progress)
        )
        sources[f"{role}/labels"] = Source.of(labels[mask].astype(np.int64))
        sources[f"{role}/ids"] = Source.of(encoded_ids(compress(rows.ids, mask)))
        if rows.hashes is not None:
            sources[f"{role}/content_hashes"] = Source.of(rows.hashes[mask])
    return sources


def _of_role(
    rows: Rows, dtype: np.dtype, mask: np.ndarray, on_progress: OnProgress
) -> Iterator[np.ndarray]:
    for start, _, kept in _pieces(rows, dtype):
        yield kept[mask[start : start + len(kept)]]
        on_progress(Progress("writing", start + len(kept), len(mask), "row"))


def checked_hashes(hashes: Any) -> np.ndarray:
    """Return content hashes uint8 (N, 32), or raise ShapeMismatchError."""
    array = np.asarray(hashes)
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != 32:
        raise ShapeMismatchError(
            f"hashes: expected SHA-256 of each image's file, uint8 (N, 32), found {array.dtype} "
            f"{array.shape}"
        )
    return np.ascontiguousarray(array)
