"""The cache's format, version 1: names, attributes, checksums, fingerprint.

One HDF5 file that h5py alone opens::

    /                    attributes: format, format_version, fingerprint and every field below
    /train/features      float32 (N, D), contiguous
    /train/labels        int64 (N,)
    /train/ids           UTF-8 bytes of one length (N,)
    /train/views/hflip   float32 (N, D), one per further flip view
    /train/…_sha256      uint8 (blocks, 32) beside each of these: SHA-256 per BLOCK_ROWS rows
    /test/…              the same
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

__all__ = [
    "BLOCK_ROWS",
    "FINGERPRINT_FIELDS",
    "FORMAT",
    "FORMAT_VERSION",
    "block_checksums",
    "decode_attribute",
    "decode_id",
    "differences",
    "encode_attribute",
    "encode_id",
    "fingerprint",
]

FORMAT = "featcache"
FORMAT_VERSION = 1
BLOCK_ROWS = 16_384

# Everything that changes a feature. The same values give the same features; any other
# value makes another cache.
FINGERPRINT_FIELDS = (
    "backbone",
    "cut",
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

# Fields that HDF5 has no plain attribute type for: kept as JSON text.
_JSON_FIELDS = frozenset(("class_names", "preprocess", "views"))


def fingerprint(meta: Mapping[str, Any]) -> str:
    """Return SHA-256 (hex) over canonical JSON of everything that changes a feature."""
    fields = {name: meta[name] for name in FINGERPRINT_FIELDS}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List the fields of the fingerprint that differ, as ``name: found, wanted``."""
    return [
        f"{name}: found {found.get(name)!r}, wanted {wanted.get(name)!r}"
        for name in FINGERPRINT_FIELDS
        if found.get(name) != wanted.get(name)
    ]


def encode_attribute(name: str, value: Any) -> Any:
    """Return a field as HDF5 keeps it: text, number, or JSON text."""
    if name in _JSON_FIELDS:
        return json.dumps(value)
    # A path need not be text; what is none is spelt out, for it is only for people.
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def encode_id(name: str) -> bytes:
    """Return an id as HDF5 keeps it: UTF-8, and the bytes of a file name that is none."""
    return name.encode("utf-8", "surrogateescape")


def decode_id(name: bytes) -> str:
    """Return an id as it was given to `encode_id`."""
    return name.decode("utf-8", "surrogateescape")


def decode_attribute(name: str, value: Any) -> Any:
    """Return a field as plain Python."""
    if isinstance(value, bytes):
        value = value.decode()
    if name in _JSON_FIELDS:
        return json.loads(value)
    return value.item() if isinstance(value, np.generic) else value


def block_checksums(array: np.ndarray) -> np.ndarray:
    """Return SHA-256 of every `BLOCK_ROWS` rows: uint8 (blocks, 32)."""
    digests = [hashlib.sha256(block).digest() for block in _blocks(array)]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def _blocks(array: np.ndarray) -> Iterator[memoryview]:
    for start in range(0, len(array), BLOCK_ROWS):
        block = np.ascontiguousarray(array[start : start + BLOCK_ROWS])
        yield block.view(np.uint8).data
