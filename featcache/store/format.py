"""Format version 1: names, fields, fingerprint, checksums, and the sealed index.

A cache is one HDF5 file that h5py alone opens, or a folder of shards. An *index* describes both:
JSON that says where every block of rows lies and which checksums it has. This package reads
through the index alone, so that no damaged or hostile file ever reaches libhdf5. See
``docs/format.md``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import xxhash

FORMAT = "featcache"
FORMAT_VERSION = 1
ROLES = ("train", "val", "test")  # in the order in which a cache has them; val may be absent
# What a split may be called elsewhere, in any case, and its place in ROLES.
ROLE_WORDS = {
    **dict.fromkeys(("train", "training"), 0),
    **dict.fromkeys(("val", "valid", "validation", "eval", "dev"), 1),
    **dict.fromkeys(("test", "testing"), 2),
}
BLOCK_ROWS = 16_384  # rows under one checksum in a packed file
UNLABELLED = -1  # the label of an image that has none

# Everything that changes a feature. The same values give the same features; any other
# value makes another cache.
FINGERPRINT_FIELDS = (
    "backbone",
    "calibration",
    "cuts",
    "dataset_digest",
    "device",
    "dtype",
    "engine",
    "engine_version",
    "library",
    "precision",
    "preprocess",
    "views",
    "weights_sha256",
)

# Of a backbone that another library built; of int8, the digest of the pixels that scaled it.
OPTIONAL_FIELDS = frozenset({"library", "calibration"})

# What features may be kept as, and what NumPy calls it.
DTYPES = {"float32": "<f4", "float16": "<f2"}


def fingerprint(meta: Mapping[str, Any]) -> str:
    """Return SHA-256 (hex) over canonical JSON of everything that changes a feature."""
    fields = {
        name: meta[name]
        for name in FINGERPRINT_FIELDS
        if name in meta or name not in OPTIONAL_FIELDS
    }
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def differing(
    one: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str] = FINGERPRINT_FIELDS
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value, other value) of the fields that differ; nested fields one by one."""
    for name in names:
        left, right = one.get(name), other.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            for key in sorted({*left, *right}):
                if left.get(key) != right.get(key):
                    yield f"{name}.{key}", left.get(key), right.get(key)
        elif left != right:
            yield name, left, right


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], names: Iterable[str] = FINGERPRINT_FIELDS
) -> list[str]:
    """List the fields that differ, as ``name: found, wanted``."""
    return [
        f"{name}: found {left!r}, wanted {right!r}"
        for name, left, right in differing(found, wanted, names)
    ]


def array_name(cut: str, view: str, main_cut: str) -> str:
    """Return the name of the features of a cut and view inside a split's group."""
    if cut != main_cut:
        # A tensor of an ONNX file may be called "/blocks/0/Add", which would be a path.
        safe = quote(cut, safe="")
        return f"cuts/{'%2E' + safe[1:] if safe.startswith('.') else safe}/{view}"
    return "features" if view == "identity" else f"views/{view}"


def roles_of(arrays: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the roles of a cache's splits by the names of its arrays: train, maybe val, test."""
    has_val = any(name.startswith("val/") for name in arrays)
    return tuple(role for role in ROLES if role != "val" or has_val)


def encode_id(name: str) -> bytes:
    """Return an id as stored: UTF-8; bytes of a file name that is not UTF-8 stay as they are."""
    return name.encode("utf-8", "surrogateescape")


def decode_id(name: bytes) -> str:
    """Return an id as `encode_id` took it."""
    return name.decode("utf-8", "surrogateescape")


def label_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Return class names indexed by label, with ``""`` last: `UNLABELLED` is -1."""
    return (*class_names, "")


class Checksums:
    """Both checksums of a block: feed bytes with `update`, then ask for `hexdigests`."""

    def __init__(self) -> None:
        self._both = (hashlib.sha256(), xxhash.xxh3_128())

    def update(self, data: memoryview) -> None:
        """Add the bytes (contiguous) that come next."""
        for digest in self._both:
            digest.update(data)

    def hexdigests(self) -> list[str]:
        """Return SHA-256 and XXH3-128, in the order in which an index has them."""
        return [digest.hexdigest() for digest in self._both]


def seal(content: Mapping[str, Any]) -> bytes:
    """Return JSON after a line ``featcache 1 <bytes> <sha256>``, which shows any damage to it."""
    # Text that is not UTF-8 (a path may hold some) is escaped.
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True).encode()
    line = f"{FORMAT} {FORMAT_VERSION} {len(text)} {hashlib.sha256(text).hexdigest()}\n"
    return line.encode() + text


def unseal(data: bytes) -> dict[str, Any]:
    """Return what `seal` was given, or raise a ValueError that says what is wrong."""
    line, _, text = data.partition(b"\n")
    words = line.split(b" ")
    if len(words) != 4 or words[0] != FORMAT.encode() or not words[2].isdigit():
        raise ValueError("no featcache index")
    text = text[: int(words[2][:12])]
    if hashlib.sha256(text).hexdigest().encode() != words[3]:
        raise ValueError("an index that was cut short or changed after it was written")
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("an index that is not a JSON object")
    return content


class Stamp(NamedTuple):
    """What tells a file from one that replaces it under the same name."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Return the stamp of an open file, or of one at a path."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Block:
    """Consecutive rows of an array: their file, first byte, number, and checksums (hex).

    ``stamp`` is that of the file when its index was read; None where any file will do.
    """

    path: Path
    offset: int
    n_rows: int
    sha256: str
    xxh3: str
    stamp: Stamp | None = None


@dataclass(frozen=True)
class StoredArray:
    """An array on disk: rows in C order, block after block; ``row_shape`` is that of one row."""

    name: str
    dtype: np.dtype
    row_shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole array's shape, rows first."""
        return (sum(block.n_rows for block in self.blocks), *self.row_shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * math.prod(self.row_shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole array."""
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True)
class Index:
    """The checked index of a cache.

    ``form`` is ``"hdf5"`` or ``"shards"``; ``structure_sha256`` covers the bytes of an HDF5 file
    that belong to no array; ``stamp`` is that of the file, or of the manifest of shards.
    """

    path: Path
    form: str
    meta: dict[str, Any]
    arrays: Mapping[str, StoredArray]
    structure_sha256: str
    stamp: Stamp
