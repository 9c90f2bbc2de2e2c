"""OneFlow's checkpoints, without OneFlow and without trust.

A checkpoint is a folder, or a zip archive of one. Each tensor is a folder in
it: ``out`` holds the raw numbers, little endian, and ``meta`` says what they
are, as a protocol buffer's text::

    shape {
      dim: 64
      dim: 3
    }
    data_type: kFloat

There are two formats for which folder is which tensor. ``flow.save`` writes
``pickled_data``, a pickle of ``{"protocol_version": 1, "data": ...}`` in which
each tensor is an object with the state ``{"path": "tensor_7"}``; `read_pickle`
reads it, and cannot run it. In older releases the folders had the tensors'
names, and an empty file ``snapshot_done`` stood beside them.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np

from ..errors import WeightsError, one_line
from ..files import check_shape
from ..pickles import Record, ordered_dict, read_pickle
from .tensors import (
    MAX_BYTES,
    MAX_PICKLE_BYTES,
    Archive,
    checkpoint_pickle,
    decode,
    item_bytes,
    state_dict,
)

_TABLE = "pickled_data"
_LEGACY_MARK = "snapshot_done"
_MAX_META_BYTES = 4096
_PICKLE = checkpoint_pickle(
    {
        "collections.OrderedDict": ordered_dict,
        "oneflow.Tensor": None,
        "oneflow.nn.Parameter": None,
    }
)
_DTYPES = {
    "kFloat": "float32",
    "kDouble": "float64",
    "kFloat16": "float16",
    "kBFloat16": "bfloat16",
    "kInt8": "int8",
    "kInt32": "int32",
    "kInt64": "int64",
    "kUInt8": "uint8",
    "kBool": "bool",
}
_META = re.compile(r"\s*shape\s*\{((?:\s*dim:\s*\d{1,10})*)\s*\}\s*data_type:\s*(\w+)\s*")
# One plain folder name: no separator, no "..", nothing that a path could hide in.
_FOLDER_NAME = re.compile(r"(?!\.)[\w.\-]{1,200}", re.ASCII)


class _Folder:
    """A checkpoint on disk; remembers the digest of each file it has read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.digests: dict[str, str] = {}
        self._budget = MAX_BYTES

    def folders(self) -> list[str]:
        return sorted(path.parent.name for path in self.root.glob("*/out"))

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def read(self, name: str, limit: int) -> bytes:
        path = self.root / name
        real = Path(os.path.realpath(path))  # pathlib's resolve raises at a loop of links
        inside = real.is_relative_to(os.path.realpath(self.root))
        if not inside or not path.is_file():
            found = "none" if inside else f"a link to {real}"
            raise WeightsError(f"{path}: expected a file of the checkpoint, found {found}")
        limit = min(limit, self._budget)
        if path.stat().st_size > limit:
            raise WeightsError(f"{path}: expected at most {limit:,} bytes, found more")
        try:
            data = path.read_bytes()
        except OSError as failure:
            raise WeightsError(f"{path}: cannot be read ({failure.strerror})") from failure
        self._budget -= len(data)
        self.digests[name] = hashlib.sha256(data).hexdigest()
        return data


class _Zipped:
    """A checkpoint in an archive, below the folder that the archive wraps it in."""

    def __init__(self, archive: Archive, prefix: str) -> None:
        self.archive = archive
        self.prefix = prefix
        self.names = {name[len(prefix) :] for name in archive.names if name.startswith(prefix)}

    def folders(self) -> list[str]:
        parts = [name.split("/") for name in self.names]
        return sorted(part[0] for part in parts if part[1:] == ["out"])

    def has(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str, limit: int) -> bytes:
        return self.archive.read(self.prefix + name, limit)


def read_oneflow_folder(root: Path) -> tuple[dict[str, np.ndarray], str]:
    """Read the state dict of a checkpoint folder."""
    files = _Folder(root)
    state = _read(files, str(root))
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.digests.items()))
    return state, hashlib.sha256(listing.encode()).hexdigest()


def read_oneflow_zip(data: bytes, source: str) -> dict[str, np.ndarray]:
    """Read the state dict of a zip archive that holds one checkpoint folder."""
    archive = Archive(data, source)
    prefixes = {
        name[: -len(mark)]
        for name in archive.names
        for mark in (_TABLE, _LEGACY_MARK)
        if f"/{name}".endswith(f"/{mark}") and not name.startswith("__MACOSX/")
    }
    if len(prefixes) != 1:
        raise WeightsError(
            f"{source}: expected one OneFlow checkpoint in the archive ({_TABLE} or "
            f"{_LEGACY_MARK}), found {len(prefixes)}; a PyTorch checkpoint is called .pth"
        )
    return _read(_Zipped(archive, prefixes.pop()), source)


def _read(files: _Folder | _Zipped, source: str) -> dict[str, np.ndarray]:
    if files.has(_TABLE):
        places = _places(files.read(_TABLE, MAX_PICKLE_BYTES), source)
    elif files.has(_LEGACY_MARK):
        files.read(_LEGACY_MARK, _MAX_META_BYTES)
        places = state_dict({name: name for name in files.folders()}, str, source)
    else:
        raise WeightsError(
            f"{source}: expected an OneFlow checkpoint ({_TABLE} or {_LEGACY_MARK}), found "
            "neither; give the folder that flow.save wrote"
        )
    arrays = {place: _array(files, place, source) for place in dict.fromkeys(places.values())}
    return {name: arrays[place] for name, place in places.items()}


def _places(pickled: bytes, source: str) -> dict[str, str]:
    """Return name -> folder of every tensor, from ``pickled_data``."""
    loaded, _ = read_pickle(pickled, 0, source, _PICKLE)
    if not isinstance(loaded, dict) or loaded.get("protocol_version") != 1:
        raise WeightsError(
            f"{source}: expected {_TABLE} of protocol 1, found another; save it with OneFlow 0.9"
        )
    records = state_dict(loaded.get("data"), Record, source)
    places = {}
    for name, record in records.items():
        place = record.state.get("path") if isinstance(record.state, dict) else None
        if not isinstance(place, str):
            raise WeightsError(f"{source}: found no folder for {name!r}; save it with flow.save")
        places[name] = place
    return places


def _array(files: _Folder | _Zipped, place: str, source: str) -> np.ndarray:
    if not _FOLDER_NAME.fullmatch(place):
        raise WeightsError(
            f"{source}: expected the name of a folder inside the checkpoint, found "
            f"'{one_line(place)}'; do not use this checkpoint"
        )
    text = files.read(f"{place}/meta", _MAX_META_BYTES).decode("ascii", "replace")
    meta = _META.fullmatch(text)
    dtype = _DTYPES.get(meta[2]) if meta else None
    if meta is None or dtype is None:
        raise WeightsError(
            f"{source}: expected a shape and a type in {place}/meta, found "
            f"'{one_line(text)}'; get the checkpoint again"
        )
    shape = tuple(int(dim) for dim in re.findall(r"\d+", meta[1]))
    try:
        size_bytes = check_shape(shape) * item_bytes(dtype)
    except ValueError as failure:
        raise WeightsError(f"{source}: {place}/meta: {failure}; get it again") from failure
    data = files.read(f"{place}/out", size_bytes)
    if len(data) != size_bytes:
        raise WeightsError(
            f"{source}: expected {size_bytes:,} bytes in {place}/out, found {len(data):,}; "
            "get the checkpoint again"
        )
    return decode(data, dtype).reshape(shape)
