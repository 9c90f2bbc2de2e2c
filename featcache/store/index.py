"""Opening a cache: read its index and check every field; nothing in it is trusted."""

from __future__ import annotations

import math
import os
import re
import shlex
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import (
    CacheCorruptError,
    CacheError,
    CacheMismatchError,
    CacheMissError,
    one_line,
)
from ..files import did_you_mean_path, open_file, user_path
from ..schema import count, list_of, number, object_of, text, wrong_fields
from .format import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    UNLABELLED,
    Block,
    Index,
    Stamp,
    StoredArray,
    roles_of,
    unseal,
)
from .provenance import check_provenance

# What a look into JSON raises where it is other than meant.
NOT_MEANT = (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError)
AGAIN = "make it again with featcache extract --force, or restore a copy"
MANIFEST = "manifest.json"
COMMITS = ".commits"  # in an unfinished folder of shards: which shards are complete
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_LINE_BYTES = 200  # of the line before the JSON
_MAX_INDEX_BYTES = 1 << 26  # a hundred million rows need less; Python takes ten times as much
_MAX_ROW_BYTES = 1 << 30
_MAX_ROW_DIMENSIONS = 3  # channels, height, width
_ARRAY_NAME = re.compile(
    r"(train|val|test)/"
    r"(features|labels|ids|content_hashes|skipped|views/[a-z]+|cuts/[A-Za-z0-9_%~-][A-Za-z0-9_.%~-]{0,300}/[a-z]+)"
)
_SHARD_NAME = re.compile(r"[a-z0-9.-]+\.npy")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_XXH3 = re.compile(r"[0-9a-f]{32}")
_HASH_BYTES = 32  # of a content hash
_whole = count()
_TEXT = r"\|S[1-9][0-9]{0,5}"
# By the last part of an array's name; all others are features.
_DTYPE_OF = {"labels": "<i8", "content_hashes": r"\|u1", "ids": _TEXT, "skipped": _TEXT}
_FEATURES = "|".join(DTYPES.values())


def open_index(path: Path) -> Index:
    """Read and check the index of a packed file or a folder of shards; raise a CacheError."""
    try:
        if is_shards(path):
            return _open_shards(path)
        if path.is_file():
            with open_file(path) as stream:
                stamp = Stamp.of(os.fstat(stream.fileno()))
                content = _sealed_in(stream, path)
            return _checked_index(content, path, stamp)
        if (path / COMMITS).is_dir():
            found = (
                " an unfinished extraction; run the same featcache extract again, or featcache "
                "pack where jobs made it"
            )
        elif path.is_dir():
            found = (
                " a folder that is none; if it holds images, run featcache extract "
                f"{shlex.quote(str(path))} first"
            )
        else:
            otherwise = "make one with featcache extract, or name none to take the newest"
            found = f" no such file{did_you_mean_path(path, otherwise)}"
    except CacheError:
        raise
    except OSError as error:
        found = f": {error.strerror}; see to its permissions"
    raise CacheMissError(f"{path}: expected a feature cache, found{found}")


def _open_shards(path: Path) -> Index:
    """Do as `open_index`, through one descriptor: folders are replaced by renaming them too."""
    folder = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        with open_file(MANIFEST, folder) as stream:
            stamp = Stamp.of(os.fstat(stream.fileno()))
            content = _sealed_in(stream, path / MANIFEST)
        try:
            return _checked_index(content, path, stamp, folder)
        except CacheCorruptError:  # the old folder is deleted once a new one has its name
            check_unchanged(path / MANIFEST, stamp)
            raise
    finally:
        os.close(folder)


def check_unchanged(file: Path, stamp: Stamp) -> None:
    """Refuse a file that was replaced or changed since it had this stamp."""
    try:
        same = Stamp.of(file.stat()) == stamp
    except OSError:
        same = False
    if not same:
        raise replaced(file)


def replaced(path: Path) -> CacheMismatchError:
    """Return the error for a file that is no longer the one that was opened."""
    return CacheMismatchError(
        f"{path}: expected the cache that was opened, found that it was replaced, changed or "
        "removed since; load it again"
    )


def is_shards(path: Path) -> bool:
    """Tell whether a path is a complete folder of shards."""
    return (path / MANIFEST).is_file()


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the sealed JSON at the start of a file, or raise a CacheError."""
    try:
        with open_file(path) as stream:
            return _sealed_in(stream, path)
    except OSError as error:
        raise _not_ours(path, error) from None


def _sealed_in(stream: FileIO, path: Path) -> dict[str, Any]:
    def read_at(start: int, length: int) -> bytes:
        stream.seek(start)
        return stream.read(length)

    return sealed_content(read_at, os.fstat(stream.fileno()).st_size, path)


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
    name, advice = shlex.quote(str(where)), AGAIN
    suffix = Path(str(where)).suffix.lower()
    if suffix in (".npy", ".npz", ".pt", ".safetensors", ".parquet", ".csv"):
        advice = f"if it holds features, run featcache import {name} first"
    elif suffix in (".zip", ".tar", ".tsv", ".jsonl", ".jpg", ".png"):
        advice = f"if it holds images, run featcache extract {name} first"
    return CacheCorruptError(
        f"{where}: expected a file that featcache extract wrote, found {error}; {advice}"
    )


def _checked_index(
    content: Mapping[str, Any], path: Path, stamp: Stamp, folder: int | None = None
) -> Index:
    """Turn an index's JSON into an `Index`; raise CacheCorruptError at anything unexpected.

    ``stamp`` is that of the file that holds it; ``folder`` is open, and given of shards alone.
    """
    form = "hdf5" if folder is None else "shards"
    try:
        index = Index(
            path=path,
            form=form,
            meta=check_provenance(content["meta"]),
            arrays={
                name: _stored(name, spec, path, stamp, folder)
                for name, spec in content["arrays"].items()
            },
            structure_sha256=str(content.get("structure_sha256", "")),
            stamp=stamp,
        )
        if form == "hdf5" and content["size_bytes"] != stamp.size_bytes:
            raise ValueError(
                f"{content['size_bytes']:,} bytes in its index and {stamp.size_bytes:,} on "
                "the disk: it was cut short or added to"
            )
        _belong_together(index)
        _lie_apart(index)
    except (*NOT_MEANT, OSError) as error:
        why = f"none of {error}" if isinstance(error, KeyError) else str(error)
        raise CacheCorruptError(f"{path}: expected a whole cache, found {why}; {AGAIN}") from None
    return index


def _stored(
    name: str, spec: Mapping[str, Any], path: Path, stamp: Stamp, folder: int | None
) -> StoredArray:
    """Return an array whose blocks are where the index says."""
    array = _array(name, spec, path, "hdf5" if folder is None else "shards")
    blocks = []
    for block in array.blocks:
        end = block.offset + block.n_rows * array.row_bytes
        if folder is not None:
            stamp = _shard_stamp(block.path.name, end, folder)
        elif end > stamp.size_bytes:
            raise ValueError(f"{end:,} bytes declared and {stamp.size_bytes:,} on the disk")
        blocks.append(replace(block, stamp=stamp))
    return replace(array, blocks=tuple(blocks))


_COMMIT = {
    "role": text,
    "start": count(),
    "stop": count(),
    "fingerprint": text,
    "arrays": object_of({}),
    "facts": lambda value: isinstance(value, dict) and all(map(number(0), value.values())),
}
_COMMIT_MAY = {
    "hashes": object_of({}),
    "left_out": list_of(list_of(count(UNLABELLED), 2)),
}


def checked_commit(commit: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a shard's commit if all that it says may be; raise one of `NOT_MEANT` if not.

    Its files are not looked at.
    """
    wrong = wrong_fields(commit, _COMMIT, _COMMIT_MAY)
    if wrong:
        raise ValueError(f"no usable {', '.join(wrong)}")
    arrays, n_images = dict(commit["arrays"]), commit["stop"] - commit["start"]
    if "hashes" in commit:
        *place, file = commit["hashes"]["block"]
        if not file.startswith(f"{COMMITS}/") or place[0] != n_images:
            raise ValueError(f"hashes of {place[0]!r} images in {file!r:.80}")
        block = [*place, file.removeprefix(f"{COMMITS}/")]
        _array("train/content_hashes", {**commit["hashes"], "blocks": [block]}, folder, "shards")
    n_rows = 0
    for name, spec in arrays.items():
        array = _array(name, {**spec, "blocks": [spec["block"]]}, folder, "shards")
        role, _, kind = name.partition("/")
        if kind in ("labels", "skipped"):
            n_rows += array.shape[0]
        elif array.shape[0] != arrays[f"{role}/labels"]["block"][0]:
            raise ValueError(f"{array.shape[0]} rows in {name}")
    rows = {row for row, _ in commit.get("left_out", ())}
    if n_rows != n_images or not rows <= set(range(commit["start"], commit["stop"])):
        raise ValueError(f"{n_rows} rows of {n_images} images")
    return commit


def _array(name: str, spec: Mapping[str, Any], path: Path, form: str) -> StoredArray:
    if not _ARRAY_NAME.fullmatch(name):
        raise ValueError(f"an array named {name[:80]!r}")
    row_shape = tuple(spec["row_shape"])
    if len(row_shape) > _MAX_ROW_DIMENSIONS or not all(
        type(length) is int and 0 < length <= _MAX_ROW_BYTES for length in row_shape
    ):
        raise ValueError(f"rows of shape {row_shape} in {name}")
    said = spec["dtype"]
    if not re.fullmatch(_DTYPE_OF.get(name.rpartition("/")[2], _FEATURES), str(said)):
        raise ValueError(f"{name} as {said}")
    dtype = np.dtype(said)
    row_bytes = dtype.itemsize * math.prod(row_shape)
    if row_bytes > _MAX_ROW_BYTES:
        raise ValueError(f"rows of {row_bytes:,} bytes in {name}")
    blocks = []
    for n_rows, offset, sha256, xxh3, *rest in spec["blocks"]:
        if not (_whole(n_rows) and _whole(offset)):
            raise ValueError(f"a block of {one_line(n_rows)} rows at {one_line(offset)} in {name}")
        if not _SHA256.fullmatch(sha256) or not _XXH3.fullmatch(xxh3):
            raise ValueError(f"checksums {sha256!r:.80} and {xxh3!r:.80} in {name}")
        where = path
        if form == "shards":
            (file,) = rest
            if not _SHARD_NAME.fullmatch(file):
                raise ValueError(f"a shard named {file[:80]!r}")
            where = path / file
        blocks.append(Block(where, offset, n_rows, sha256, xxh3))
    return StoredArray(name, dtype, row_shape, tuple(blocks))


def _shard_stamp(file: str, size_bytes: int, folder: int) -> Stamp:
    """Return the stamp of a shard in an open folder; refuse it unless it has just these bytes."""
    try:
        # Once per shard: there may be 100,000, on a network.
        status = os.stat(file, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise ValueError(f"no shard {file}: it was removed or moved")
    if status.st_size != size_bytes:
        raise ValueError(f"a shard {file} of {status.st_size:,} bytes instead of {size_bytes:,}")
    return Stamp.of(status)


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
        is_hash = name.endswith("/content_hashes")
        if bool(array.row_shape) == is_list or (is_hash and array.row_shape != (_HASH_BYTES,)):
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
