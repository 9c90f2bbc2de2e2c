"""The cache's format, version 2: names, fields, fingerprint, and the sealed index.

A cache is one HDF5 file that h5py alone opens, or a folder of shards. Both are
described by an *index*: JSON that says where every block of rows lies and what its
SHA-256 is. In the file it stands in the user block, before HDF5 begins; in a folder
it is ``manifest.json``. This package reads through the index alone, so that no
damaged or hostile file ever reaches libhdf5. ``docs/format.md`` has it in full.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "featcache"
FORMAT_VERSION = 2
BLOCK_ROWS = 16_384  # rows under one checksum in a packed file
UNLABELLED = -1  # the label of an image that has none

# Everything that changes a feature. The same values give the same features; any other
# value makes another cache.
FINGERPRINT_FIELDS = (
    "backbone",
    "cuts",
    "dataset_digest",
    "device",
    "dtype",
    "engine",
    "engine_version",
    "precision",
    "preprocess",
    "views",
    "weights_sha256",
)

# What features may be kept as, and what NumPy calls it.
DTYPES = {"float32": "<f4", "float16": "<f2"}


def fingerprint_fields(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields that the fingerprint covers: version 1 knew one cut per cache."""
    if meta.get("format_version", FORMAT_VERSION) == 1:
        return tuple("cut" if name == "cuts" else name for name in FINGERPRINT_FIELDS)
    return FINGERPRINT_FIELDS


def fingerprint(meta: Mapping[str, Any]) -> str:
    """Return SHA-256 (hex) over canonical JSON of everything that changes a feature."""
    fields = {name: meta[name] for name in fingerprint_fields(meta)}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def differing(
    one: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str] = FINGERPRINT_FIELDS
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the fields that differ, with both values; those of nested fields one by one."""
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
    """Return where the features of a cut and view lie inside a split's group."""
    if cut != main_cut:
        return f"cuts/{cut}/{view}"
    return "features" if view == "identity" else f"views/{view}"


def encode_id(name: str) -> bytes:
    """Return an id as it is stored: UTF-8, and the bytes of a file name that is none."""
    return name.encode("utf-8", "surrogateescape")


def label_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Return the names by label, ``""`` for `UNLABELLED`: -1 is Python's index of the last."""
    return (*class_names, "")


def decode_id(name: bytes) -> str:
    """Return an id as it was given to `encode_id`."""
    return name.decode("utf-8", "surrogateescape")


def seal(content: Mapping[str, Any]) -> bytes:
    """Return JSON behind a line with its format, version, length and SHA-256.

    ``featcache 2 <bytes> <sha256>``, a line feed, the JSON: what is cut short or has
    a bit flipped is told from what was written.
    """
    # What is no text (a path may be none) is spelt out, for it is only for people.
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True).encode()
    return (
        f"{FORMAT} {FORMAT_VERSION} {len(text)} {hashlib.sha256(text).hexdigest()}\n".encode()
        + text
    )


def unseal(data: bytes) -> dict[str, Any]:
    """Return what `seal` was given.

    Raises
    ------
    ValueError
        Not sealed, cut short, or changed since; the text says which.
    """
    line, _, text = data.partition(b"\n")
    words = line.split(b" ")
    if len(words) != 4 or words[0] != FORMAT.encode() or not words[2].isdigit():
        raise ValueError("no featcache index")
    text = text[: int(words[2][:12])]
    if hashlib.sha256(text).hexdigest().encode() != words[3]:
        raise ValueError("an index that was cut short or changed after it was written")
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("an index that is no JSON object")
    return content


@dataclass(frozen=True)
class Block:
    """Rows that lie together under one checksum.

    Parameters
    ----------
    path : Path
        The file that they lie in.
    offset : int
        Of the first byte, from the start of the file.
    n_rows : int
        How many.
    sha256 : str
        Hex, of their bytes.
    sums : str
        Hex, as `_sums` makes them of their bytes; "" in version 1, which had none.
    """

    path: Path
    offset: int
    n_rows: int
    sha256: str
    sums: str = ""


@dataclass(frozen=True)
class StoredArray:
    """An array on disk: rows in C order, block after block.

    Parameters
    ----------
    name : str
        ``"train/features"``.
    dtype : numpy.dtype
        Little-endian.
    row_shape : tuple of int
        Shape of one row: () for labels, (D,) for features.
    blocks : tuple of Block
        In the order of the rows.
    """

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
        size = self.dtype.itemsize
        for length in self.row_shape:
            size *= length
        return size

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole array."""
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True)
class Index:
    """What a cache says about itself, checked.

    Parameters
    ----------
    path : Path
        The file or folder.
    form : str
        ``"hdf5"`` or ``"shards"``.
    meta : dict
        Its provenance.
    arrays : mapping of str to StoredArray
        By name.
    structure_sha256 : str
        Of the bytes of an HDF5 file that belong to no array: libhdf5's own; "" for shards.
    stamp : tuple of int
        What tells the file from another that takes its place (`file_stamp`).
    """

    path: Path
    form: str
    meta: dict[str, Any]
    arrays: Mapping[str, StoredArray]
    structure_sha256: str
    stamp: tuple[int, ...] = ()
