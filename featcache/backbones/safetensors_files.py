"""The safetensors format: a JSON header and raw numbers, nothing that could run.

https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import WeightsError, one_line
from ..files import split_safetensors, write_atomically
from .tensors import decode, state_dict

_LENGTH_BYTES = 8
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_safetensors(data: bytes, source: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the tensors and the metadata of a file."""
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(data)
    except SafetensorError as failure:
        raise WeightsError(
            f"{source}: expected a safetensors file, found a truncated one or none "
            f"({one_line(failure)}); get the file again"
        ) from failure
    arrays: dict[str, np.ndarray] = {}
    for name, entry in entries:
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise WeightsError(
                f"{source}: expected numbers of type {', '.join(_DTYPES)}, found "
                f"{entry['dtype']} in '{one_line(name)}'; save the model as float32"
            )
        arrays[name] = decode(entry["data"], dtype).reshape(entry["shape"])
    header, _ = split_safetensors(data)
    return state_dict(arrays, np.ndarray, source), header.get("__metadata__") or {}


def write_safetensors(
    path: Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a file whole: it has its name only once it is on the disk."""
    from safetensors.numpy import save

    # The format is dense, and safetensors takes an array's memory as it lies.
    dense = {name: np.asarray(array, order="C") for name, array in state.items()}
    header, numbers = split_safetensors(save(dense, dict(metadata)))
    # It shuffles the metadata anew in each process; sorted, the same model has the same digest.
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    write_atomically(path, len(text).to_bytes(_LENGTH_BYTES, "little"), text, numbers)
