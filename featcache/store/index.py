"""Opening a cache: read its index and check every field; nothing in it is trusted."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, CacheError, CacheMismatchError, CacheMissError
from ..files import user_path
from .format import (
    DTYPES,
    FINGERPRINT_FIELDS,
    FORMAT,
    FORMAT_VERSION,
    OPTIONAL_FIELDS,
    Block,
    Index,
    StoredArray,
    fingerprint,
    roles_of,
    unseal,
)

AGAIN = "make it again with featcache extract --force, or restore a copy"
MANIFEST = "manifest.json"
COMMITS = ".commits"  # in an unfinished folder of shards: which shards are complete
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_LINE_BYTES = 200  # of the line before the JSON
_MAX_INDEX_BYTES = 1 << 26  # a hundred million rows need less; Python takes ten times as much
_MAX_ROW_BYTES = 1 << 30
_MAX_ROW_DIMENSIONS = 3  # channels, height, width
_MAX_LEVELS = 4  # of lists and objects in a field
_ARRAY_NAME = re.compile(
    r"(train|val|test)/"
    r"(features|labels|ids|content_hashes|skipped|views/[a-z]+|cuts/[A-Za-z0-9_%~-][A-Za-z0-9_.%~-]{0,300}/[a-z]+)"
)
_SHARD_NAME = re.compile(r"[a-z0-9.-]+\.npy")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_XXH3 = re.compile(r"[0-9a-f]{32}")
_HASH_BYTES = 32  # of a content hash
# The types of these fields; the others of the fingerprint are text.
_KINDS = {"class_names": list, "cuts": list, "preprocess": dict, "views": list}
_FEATURES = frozenset(DTYPES.values())


def open_index(path: Path) -> Index:
    """Read and check the index of a packed file or a folder of shards; raise a CacheError."""
    try:
        if is_shards(path):
            return checked_index(read_sealed(path / MANIFEST), path, "shards")
        if (path / COMMITS).is_dir():
            raise CacheMissError(
                f"{path}: expected a feature cache, found an unfinished extraction; run "
                "the same featcache extract again, or featcache pack where jobs made it"
            )
        if not path.is_file():
            found = "a folder without manifest.json" if path.is_dir() else "no such file"
            raise CacheMissError(
                f"{path}: expected a feature cache, found {found}; make one with featcache "
                "extract, or name none to take the newest"
            )
        path.open("rb").close()
    except CacheError:
        raise
    except OSError as error:
        raise CacheMissError(
            f"{path}: expected a feature cache, found: {error.strerror}; see to its permissions"
        ) from None
    return checked_index(read_sealed(path), path, "hdf5")


def file_stamp(path: Path, form: str) -> tuple[int, ...]:
    """Return what tells a cache from one that replaces it under the same name."""
    status = (path / MANIFEST if form == "shards" else path).stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def is_shards(path: Path) -> bool:
    """Tell whether a path is a complete folder of shards."""
    return (path / MANIFEST).is_file()


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the sealed JSON at the start of a file, or raise a CacheError."""
    try:
        with path.open("rb") as stream:

            def read_at(start: int, length: int) -> bytes:
                stream.seek(start)
                return stream.read(length)

            return sealed_content(read_at, os.fstat(stream.fileno()).st_size, path)
    except OSError as error:
        raise _not_ours(path, error) from None


def sealed_content(
    read_at: Callable[[int, int], bytes], size_bytes: int, where: object
) -> dict[str, Any]:
    """Return the sealed JSON at the start of ``where``, read by ``read_at(start, length)``."""
    try:
        line = read_at(0, min(_MAX_LINE_BYTES, size_bytes)) if size_bytes else b""
        line = line[: line.find(b"\n") + 1 or None]
        words = line.split(b" ")
        if words[0] != FORMAT.encode() or len(words) != 4 or not words[2].isdigit():
            raise ValueError("no featcache index at its start")
        if words[1] != str(FORMAT_VERSION).encode():
            raise CacheMismatchError(
                f"{where}: expected format version {FORMAT_VERSION}, found "
                f"{words[1][:20].decode('ascii', 'replace')}; use the featcache that wrote it, "
                f"or {AGAIN}"
            )
        length, most = int(words[2][:12]), size_bytes - len(line)
        if length > min(_MAX_INDEX_BYTES, most):
            raise ValueError(
                f"an index of {length:,} bytes in a file of {most:,} (an index has at most "
                f"{_MAX_INDEX_BYTES:,})"
            )
        return unseal(line + (read_at(len(line), length) if length else b""))
    except (OSError, ValueError, RecursionError) as error:
        raise _not_ours(where, error) from None


def _not_ours(where: object, error: Exception) -> CacheCorruptError:
    return CacheCorruptError(
        f"{where}: expected a file that featcache extract wrote, found {error}; {AGAIN}"
    )


def checked_index(content: Mapping[str, Any], path: Path, form: str) -> Index:
    """Turn an index's JSON into an `Index`; raise CacheCorruptError at anything unexpected."""
    try:
        index = Index(
            path=path,
            form=form,
            meta=_meta(content),
            arrays={
                name: _array(name, spec, path, form) for name, spec in content["arrays"].items()
            },
            structure_sha256=str(content.get("structure_sha256", "")),
            stamp=file_stamp(path, form),
        )
        if form == "hdf5" and content["size_bytes"] != path.stat().st_size:
            raise ValueError(
                f"{content['size_bytes']:,} bytes in its index and {path.stat().st_size:,} on "
                "the disk: it was cut short or added to"
            )
        _belong_together(index)
        _lie_apart(index)
    except (
        AttributeError,
        KeyError,
        OSError,
        OverflowError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        why = f"none of {error}" if isinstance(error, KeyError) else str(error)
        raise CacheCorruptError(f"{path}: expected a whole cache, found {why}; {AGAIN}") from None
    return index


def _meta(content: Mapping[str, Any]) -> dict[str, Any]:
    meta = content["meta"]
    if meta["format"] != FORMAT or meta["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{meta['format']!r:.40} {meta['format_version']!r:.40} as its format")
    for name, value in meta.items():
        if name == "dataset_path" and not isinstance(value, (str, type(None))):
            raise ValueError(f"{value!r:.100} as dataset_path")
        if (value is None and name != "dataset_path") or not _is_plain(value, _MAX_LEVELS):
            raise ValueError(f"{value!r:.100} in the field {name!r}")
    for name in ("class_names", "fingerprint", *FINGERPRINT_FIELDS):
        if name in OPTIONAL_FIELDS and name not in meta:
            continue
        kind = _KINDS.get(name, str)
        if not isinstance(meta[name], kind):
            raise ValueError(f"{meta[name]!r:.100} in the field {name!r}")
        filled = meta[name] or name == "class_names"  # there are none where nothing is labelled
        if kind is list and not (filled and all(isinstance(part, str) for part in meta[name])):
            raise ValueError(f"{meta[name]!r:.100} as {name}")
    if fingerprint(meta) != meta["fingerprint"]:
        raise ValueError(
            f"fields that do not hash to its fingerprint {str(meta['fingerprint'])[:8]}: someone "
            "edited them"
        )
    return dict(meta)


def _is_plain(value: Any, levels: int) -> bool:
    """Tell whether a field is text, a finite number, null, or lists and objects of these."""
    if isinstance(value, (list, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return levels > 0 and all(_is_plain(part, levels - 1) for part in parts)
    return value is None or isinstance(value, str) or math.isfinite(value)


def _array(name: str, spec: Mapping[str, Any], path: Path, form: str) -> StoredArray:
    if not _ARRAY_NAME.fullmatch(name):
        raise ValueError(f"an array named {name[:80]!r}")
    row_shape = tuple(spec["row_shape"])
    if len(row_shape) > _MAX_ROW_DIMENSIONS or not all(
        type(length) is int and 0 < length <= _MAX_ROW_BYTES for length in row_shape
    ):
        raise ValueError(f"rows of shape {row_shape} in {name}")
    text = spec["dtype"]
    if not _may_be(name.rpartition("/")[2], text):
        raise ValueError(f"{name} as {text}")
    dtype = np.dtype(text)
    row_bytes = dtype.itemsize * math.prod(row_shape)
    if row_bytes > _MAX_ROW_BYTES:
        raise ValueError(f"rows of {row_bytes:,} bytes in {name}")
    blocks = []
    for n_rows, offset, sha256, xxh3, *rest in spec["blocks"]:
        if not (type(n_rows) is int and type(offset) is int and n_rows >= 0 and offset >= 0):
            raise ValueError(f"a block of {n_rows!r} rows at {offset!r} in {name}")
        if not _SHA256.fullmatch(sha256) or not _XXH3.fullmatch(xxh3):
            raise ValueError(f"checksums {sha256!r:.80} and {xxh3!r:.80} in {name}")
        where = path
        if form == "shards":
            (file,) = rest
            if not _SHARD_NAME.fullmatch(file):
                raise ValueError(f"a shard named {file[:80]!r}")
            where = path / file
        blocks.append(Block(where, offset, n_rows, sha256, xxh3))
        _inside(blocks[-1], n_rows * row_bytes, form)
    return StoredArray(name, dtype, row_shape, tuple(blocks))


def _may_be(kind: str, dtype: str) -> bool:
    """Tell whether an array with this last part of its name may have this dtype."""
    if kind == "labels":
        return dtype == "<i8"
    if kind == "content_hashes":
        return dtype == "|u1"
    if kind in ("ids", "skipped"):
        return bool(re.fullmatch(r"\|S[1-9][0-9]{0,5}", dtype))
    return dtype in _FEATURES


def _inside(block: Block, size_bytes: int, form: str) -> None:
    if form == "shards":
        try:
            status = os.lstat(block.path)  # once per shard: there may be 100,000, on a network
        except FileNotFoundError:
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            raise ValueError(f"no shard {block.path.name}: it was removed or moved")
        if status.st_size != block.offset + size_bytes:
            raise ValueError(
                f"a shard {block.path.name} of {status.st_size:,} bytes instead of "
                f"{block.offset + size_bytes:,}"
            )
    elif block.offset + size_bytes > block.path.stat().st_size:
        raise ValueError(
            f"{block.offset + size_bytes:,} bytes declared and {block.path.stat().st_size:,} on "
            "the disk"
        )


def _belong_together(index: Index) -> None:
    """Refuse a split without its arrays, and arrays whose shapes do not fit the others."""
    for role in roles_of(index.arrays):
        n_rows = index.arrays[f"{role}/labels"].shape[0]
        for name in (f"{role}/features", f"{role}/ids"):
            if name not in index.arrays:
                raise KeyError(name)
        for name, array in index.arrays.items():
            beside_labels = name.startswith(f"{role}/") and not name.endswith("/skipped")
            if beside_labels and array.shape[0] != n_rows:
                raise ValueError(f"{array.shape[0]} rows in {name} for {n_rows} labels")
    for name, array in index.arrays.items():
        is_list = name.endswith(("/labels", "/ids", "/skipped"))
        if bool(array.row_shape) == is_list:
            raise ValueError(f"{name} of shape {array.shape}")
        if name.endswith("/content_hashes") and array.row_shape != (_HASH_BYTES,):
            raise ValueError(f"{name} of shape {array.shape}")
        of_main_cut = name.endswith("/features") or "/views/" in name
        if of_main_cut and array.row_shape != index.arrays["train/features"].row_shape:
            raise ValueError(f"{name} of shape {array.shape}, and train/features of another")


def _lie_apart(index: Index) -> None:
    """Refuse an array whose blocks do not follow one another, and arrays that overlap."""
    if index.form == "shards":
        shards = [block.path for array in index.arrays.values() for block in array.blocks]
        if len(set(shards)) < len(shards):
            raise ValueError("a shard that it names twice")
        return
    filled = [array for array in index.arrays.values() if array.size_bytes]
    at, before = 0, "its index"
    for array in sorted(filled, key=lambda array: array.blocks[0].offset):
        if array.blocks[0].offset < at:
            raise ValueError(f"{array.name} that begins inside {before}")
        at, before = array.blocks[0].offset, array.name
        for block in array.blocks:
            if block.offset != at:
                raise ValueError(f"blocks of {array.name} that do not follow one another")
            at += block.n_rows * array.row_bytes


def default_folder() -> Path:
    """Return where caches and runs land: ``$FEATCACHE_DIR``, else ``cache`` here."""
    return user_path(os.environ.get("FEATCACHE_DIR") or "cache")
