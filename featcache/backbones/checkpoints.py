"""One checkpoint, in whatever format: read once, and hashed as it was read.

The digest is of the very bytes that the tensors come from, so that nobody can
exchange the file between the check and the reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import WeightsError
from .oneflow_checkpoints import read_oneflow_folder, read_oneflow_zip
from .pth import read_pth
from .safetensors_files import read_safetensors
from .tensors import MAX_BYTES

FORMATS = ".safetensors, .pth, .pt, an OneFlow checkpoint folder or a .zip of one"


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
