"""Writing a packed cache: lay out HDF5 in memory, then stream the arrays to their places."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError, ShapeMismatchError, one_line, text_of
from ..files import replaced_file
from .format import (
    BLOCK_ROWS,
    FORMAT,
    FORMAT_VERSION,
    Checksums,
    encode_id,
    fingerprint,
    seal,
)
from .provenance import check_provenance


@dataclass(frozen=True)
class Source:
    """An array to be written; ``blocks`` returns its rows as consecutive arrays."""

    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @classmethod
    def of(cls, array: np.ndarray) -> Source:
        """Return the source of an array in memory."""
        array = np.ascontiguousarray(array)
        return cls(array.dtype, array.shape, lambda: (array,))


def encoded_ids(ids: Iterable[str]) -> np.ndarray:
    """Return names as fixed-length UTF-8 bytes (N,)."""
    encoded = [encode_id(name) for name in ids]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")


_USER_BLOCK_BYTES = 512  # HDF5 takes this times a power of two
_ALIGNMENT_BYTES = 64  # a mapped array begins on a cache line
_PAGE_BYTES = 4096
_MAX_ATTRIBUTE_BYTES = 60_000  # libhdf5's limit is 64 KiB


class Layout:
    """An HDF5 file whose arrays have their places (``offsets``) and no content yet."""

    def __init__(self, sources: Mapping[str, Source], meta: Mapping[str, Any]) -> None:
        import h5py

        self._sources = sources
        self._meta = meta
        self._memory = _SparseFile()
        self._checksums: dict[str, int] = {}
        self.offsets: dict[str, int] = {}
        self._start = self._user_block_bytes()
        with h5py.File(
            self._memory,
            "w",
            userblock_size=self._start,
            alignment_threshold=_ALIGNMENT_BYTES,
            alignment_interval=_ALIGNMENT_BYTES,
        ) as file:
            for name, value in attributes(meta).items():
                file.attrs[name] = value
            names = encoded_ids(meta["class_names"])
            file.create_dataset("class_names", data=names.astype(_hdf5_type(names.dtype)))
            for name, source in sources.items():
                self.offsets[name] = _place(file, name, source.dtype, source.shape)
                n_blocks = -(-source.shape[0] // BLOCK_ROWS)
                self._checksums[name] = _place(
                    file, f"{name}_sha256", np.dtype(np.uint8), (n_blocks, 32)
                )
        self.size_bytes = self._memory.end

    def _user_block_bytes(self) -> int:
        """Return a size that the index fits into, wherever libhdf5 places the arrays."""
        self.size_bytes = farthest = 10**15
        longest = {
            name: [[BLOCK_ROWS, farthest, "0" * 64, "0" * 32]] * -(-source.shape[0] // BLOCK_ROWS)
            for name, source in self._sources.items()
        }
        size = _USER_BLOCK_BYTES
        while size < len(seal(self._content(longest, "0" * 64))):
            size *= 2
        return size

    def put_checksums(self, blocks: Mapping[str, list[list[Any]]]) -> None:
        """Fill in the SHA-256 of every block, for readers that use h5py alone."""
        for name, offset in self._checksums.items():
            digests = b"".join(bytes.fromhex(sha256) for _, _, sha256, _ in blocks[name])
            self._memory.seek(offset)
            self._memory.write(digests)

    def structure(self) -> Iterator[tuple[int, bytes]]:
        """Yield (offset, bytes) of everything after the user block that belongs to no array."""
        at = self._start
        for name in sorted(self._sources, key=self.offsets.__getitem__):
            source = self._sources[name]
            if source.size_bytes:
                yield at, self._memory.read_at(at, self.offsets[name] - at)
                at = self.offsets[name] + source.size_bytes
        yield at, self._memory.read_at(at, self.size_bytes - at)

    def user_block(self, blocks: Mapping[str, list[list[Any]]]) -> bytes:
        """Return what precedes HDF5: the sealed index, padded."""
        digest = hashlib.sha256()
        for _, piece in self.structure():
            digest.update(piece)
        return seal(self._content(blocks, digest.hexdigest())).ljust(self._start, b"\n")

    def _content(
        self, blocks: Mapping[str, list[list[Any]]], structure_sha256: str
    ) -> dict[str, Any]:
        return {
            "meta": self._meta,
            "arrays": {
                name: {
                    "dtype": source.dtype.str,
                    "row_shape": list(source.shape[1:]),
                    "blocks": blocks[name],
                }
                for name, source in self._sources.items()
            },
            "size_bytes": self.size_bytes,
            "structure_sha256": structure_sha256,
        }


def attributes(meta: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Return the provenance as attributes of the root: numbers, text, and JSON as text."""
    values: dict[str, str | int | float] = {}
    for name, value in meta.items():
        if isinstance(value, (int, float)):
            values[name] = value
        elif value is not None:  # HDF5 has no null
            text = text_of(value if isinstance(value, str) else json.dumps(value))
            # Only the index has longer fields; the class names are an array too.
            if len(text.encode()) <= _MAX_ATTRIBUTE_BYTES:
                values[name] = text
    return values


def _hdf5_type(dtype: np.dtype) -> Any:
    """Return the dtype for h5py: bytes are UTF-8, so that ``asstr()`` decodes any alphabet."""
    import h5py

    return h5py.string_dtype("utf-8", dtype.itemsize) if dtype.kind == "S" else dtype


def _place(file: Any, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Have libhdf5 reserve room for an array without writing it; return its offset."""
    import h5py

    group, _, last = name.rpartition("/")
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    created = h5py.h5d.create(
        file.require_group(group).id,
        last.encode(),
        h5py.h5t.py_create(_hdf5_type(dtype), logical=True),
        h5py.h5s.create_simple(shape),
        properties,
    )
    # An empty array has no place; any will do.
    offset: int = created.get_offset() if created.get_storage_size() else 0
    return offset


class _SparseFile(io.RawIOBase):
    """A file in memory that keeps only the pages that were written."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._at = 0
        self.end = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.end}[whence]
        return self._at

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        written = len(rest)
        while rest:
            number, inside = divmod(self._at, _PAGE_BYTES)
            count = min(len(rest), _PAGE_BYTES - inside)
            page = self._pages.setdefault(number, bytearray(_PAGE_BYTES))
            page[inside : inside + count] = rest[:count]
            rest = rest[count:]
            self._at += count
        self.end = max(self.end, self._at)
        return written

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        data = self.read_at(self._at, min(len(view), max(0, self.end - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self.end = self._at if size is None else size
        return self.end

    def read_at(self, offset: int, count: int) -> bytes:
        """Return bytes; what was never written is zero."""
        data = bytearray()
        while count > 0:
            number, inside = divmod(offset, _PAGE_BYTES)
            taken = min(count, _PAGE_BYTES - inside)
            page = self._pages.get(number)
            data += page[inside : inside + taken] if page else bytes(taken)
            offset += taken
            count -= taken
        return bytes(data)


def pack(path: Path, sources: Mapping[str, Source], meta: Mapping[str, Any]) -> None:
    """Write a ``.h5`` file of arrays by name; it gets its final name when it is complete."""
    meta = complete_meta(meta)
    with replaced_file(path) as descriptor:
        layout = Layout(sources, meta)
        blocks = {
            name: _write_array(descriptor, layout.offsets[name], source)
            for name, source in sources.items()
        }
        layout.put_checksums(blocks)
        for offset, piece in layout.structure():
            _write(descriptor, memoryview(piece), offset)
        os.truncate(descriptor, layout.size_bytes)
        _write(descriptor, memoryview(layout.user_block(blocks)), 0)


def complete_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the provenance with the fields of the format first."""
    own = {"format": FORMAT, "format_version": FORMAT_VERSION, "fingerprint": fingerprint(meta)}
    complete = {**own, **meta, **own}
    try:
        return check_provenance(complete)
    except ValueError as error:  # such as a NUL in a name
        raise DatasetError(
            f"{one_line(meta.get('dataset'))}: expected metadata that a cache can hold, found "
            f"{error}; rename it"
        ) from None


def _write_array(descriptor: int, offset: int, source: Source) -> list[list[Any]]:
    """Write an array and return its blocks: rows, offset, SHA-256 and XXH3-128 of each."""
    row_bytes = int(np.prod(source.shape[1:], dtype=np.int64)) * source.dtype.itemsize
    blocks: list[list[Any]] = []
    checksums, filled, at = Checksums(), 0, offset
    for part in source.blocks():
        if part.dtype != source.dtype or part.shape[1:] != source.shape[1:]:
            raise ShapeMismatchError(
                f"expected rows of {source.dtype} {source.shape[1:]}, found {part.dtype} "
                f"{part.shape[1:]}"
            )
        start = 0
        while start < len(part):
            rows = np.ascontiguousarray(part[start : start + BLOCK_ROWS - filled])
            data = rows.reshape(-1).view(np.uint8).data
            checksums.update(data)
            _write(descriptor, data, at)
            at += len(data)
            start += len(rows)
            filled += len(rows)
            if filled == BLOCK_ROWS:
                blocks.append([filled, at - filled * row_bytes, *checksums.hexdigests()])
                checksums, filled = Checksums(), 0
    if filled:
        blocks.append([filled, at - filled * row_bytes, *checksums.hexdigests()])
    if sum(block[0] for block in blocks) != source.shape[0]:
        raise ShapeMismatchError(f"expected {source.shape[0]} rows, found another number")
    return blocks


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
