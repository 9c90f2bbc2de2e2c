"""One checkpoint, in whatever format: read once, and hashed as it was read.

The digest is of the bytes that the tensors come from, so that the file cannot
be exchanged between the check and the reading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import WeightsError, one_line
from ..files import parse_safetensors, split_safetensors, write_atomically
from .oneflow_checkpoints import read_oneflow_folder, read_oneflow_zip
from .pth import read_pth
from .tensors import MAX_BYTES, decode, state_dict

FORMATS = ".safetensors, .pth, .pt, an OneFlow checkpoint folder or a .zip of one"

# https://huggingface.co/docs/safetensors/index#format
_LENGTH_BYTES = 8
_SAFETENSORS_DTYPES = {
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


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a checkpoint holds, not yet compared with any architecture."""

    # The tensors, possibly read-only views of the file's bytes.
    state: Mapping[str, np.ndarray] = field(repr=False)
    sha256: str  # of the file, or of a folder as `read_oneflow_folder` defines it
    # A safetensors file's own words about itself.
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint file or folder."""
    if path.is_dir():  # whatever its suffix: flow.save makes a folder of "model.pth" too
        return Checkpoint(*read_oneflow_folder(path))
    return parse_checkpoint(read_file(path), path.suffix, str(path))


def read_file(path: Path) -> bytes:
    """Return the bytes of a checkpoint file."""
    if not path.is_file():
        found = "something else" if path.exists() else "nothing"
        raise WeightsError(f"{path}: expected a file, found {found}; check the path")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise WeightsError(
                f"{path}: expected at most {MAX_BYTES:,} bytes, found {path.stat().st_size:,}; "
                "save the model's state dict alone"
            )
        return path.read_bytes()
    except OSError as failure:
        raise WeightsError(
            f"{path}: cannot be read ({failure.strerror}); check its permissions"
        ) from failure


def parse_checkpoint(data: bytes, suffix: str, source: str) -> Checkpoint:
    """Read a checkpoint from its bytes, in the format that its suffix says."""
    sha256 = hashlib.sha256(data).hexdigest()
    match suffix:
        case ".safetensors":
            state, metadata = read_safetensors(data, source)
            return Checkpoint(state, sha256, metadata)
        case ".pth" | ".pt":
            return Checkpoint(read_pth(data, source), sha256)
        case ".zip":
            return Checkpoint(read_oneflow_zip(data, source), sha256)
    raise WeightsError(
        f"{source}: expected {FORMATS}, found the suffix {suffix!r}; "
        "rename the file if it is one of these"
    )


def read_safetensors(data: bytes, source: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the tensors and the metadata of a file."""
    try:
        entries, metadata = parse_safetensors(data)
    except ValueError as failure:
        raise WeightsError(
            f"{source}: expected a safetensors file, found {one_line(failure)}; get the file again"
        ) from failure
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in entries.items():
        dtype = _SAFETENSORS_DTYPES.get(tensor.dtype)
        if dtype is None:
            raise WeightsError(
                f"{source}: expected numbers of type {', '.join(_SAFETENSORS_DTYPES)}, found "
                f"{tensor.dtype} in '{one_line(name)}'; save the model as float32"
            )
        arrays[name] = decode(tensor.data, dtype).reshape(tensor.shape)
    return state_dict(arrays, np.ndarray, source), metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file without its tensors; nothing of any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}  # reading it whole says what is wrong


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
