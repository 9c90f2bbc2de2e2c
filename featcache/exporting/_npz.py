"""NumPy's own archive, which ``numpy.load`` opens without unpickling anything."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..files import replaced_file
from ..store import decode_id
from ._reading import Reading

__all__ = ["write_npz"]

_ANY_DATE = (1980, 1, 1, 0, 0, 0)  # the same cache makes the same bytes


def write_npz(path: Path, reading: Reading) -> None:
    """Write every array under its name, with ``class_names`` and ``meta`` (JSON text).

    Ids are fixed-width unicode (N,); arrays are stored uncompressed, as `numpy.savez`
    does.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    meta = json.dumps(reading.cache.meta)
    with (
        replaced_file(path) as descriptor,
        os.fdopen(os.dup(descriptor), "wb") as stream,
        zipfile.ZipFile(stream, "w") as archive,
    ):
        for name, array in reading.arrays.items():
            if array.dtype.kind == "S":
                ids = [decode_id(encoded) for encoded in reading.whole(name).tolist()]
                texts = np.array(ids, dtype=f"<U{max(map(len, ids), default=1) or 1}")
                _write(archive, name, texts.dtype, texts.shape, iter((texts,)))
            else:
                _write(archive, name, array.dtype, array.shape, reading.pieces(name))
        for name, texts in (
            ("class_names", np.array(reading.cache.class_names, dtype=str)),
            ("meta", np.array(meta)),
        ):
            _write(archive, name, texts.dtype, texts.shape, iter((texts,)))


def _write(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    pieces: Iterator[np.ndarray],
) -> None:
    member = zipfile.ZipInfo(f"{name}.npy", _ANY_DATE)
    member.external_attr = 0o644 << 16
    with archive.open(member, "w", force_zip64=True) as stream:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for piece in pieces:
            stream.write(piece.reshape(-1).view(np.uint8).data)
