"""The safetensors format: a JSON header and raw numbers.

https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..files import replaced_file
from ._reading import Reading

__all__ = ["write_safetensors"]

_DTYPES = {"<f4": "F32", "<f2": "F16", "<i8": "I64"}
_ALIGNMENT_BYTES = 8


def write_safetensors(path: Path, reading: Reading) -> None:
    """Write every array under its name.

    The format knows no text. Ids are uint8 (N, W): each row is UTF-8, filled up with
    zeros, and ``ids.numpy().view(f"S{ids.shape[1]}")[:, 0]`` are the names. The
    header's metadata has ``class_names`` (a JSON list) and ``meta`` (a JSON object).

    Raises
    ------
    OutputError
        It cannot be written.
    """
    # Wide numbers first, so that each array is aligned.
    names = sorted(reading.arrays, key=lambda name: -_item_bytes(reading, name))
    header: dict[str, object] = {
        "__metadata__": {
            "class_names": json.dumps(reading.cache.class_names),
            "meta": json.dumps(reading.cache.meta),
        }
    }
    end = 0
    for name in names:
        array = reading.arrays[name]
        start, end = end, end + array.size_bytes
        header[name] = {
            "dtype": _DTYPES.get(array.dtype.str, "U8"),
            "shape": [*array.shape, *[array.dtype.itemsize] * (array.dtype.kind == "S")],
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    with replaced_file(path) as descriptor, os.fdopen(os.dup(descriptor), "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in reading.pieces(name):
                stream.write(piece.reshape(-1).view("u1").data)


def _item_bytes(reading: Reading, name: str) -> int:
    dtype = reading.arrays[name].dtype
    return 1 if dtype.kind == "S" else dtype.itemsize
