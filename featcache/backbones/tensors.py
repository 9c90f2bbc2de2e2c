"""From the bytes of a checkpoint to named arrays, whatever the file format.

Each format has its own words for types and its own way to nest the tensors;
here are the steps that they share, with the bounds that keep a hostile file
from asking for more than it brings.
"""

from __future__ import annotations

import io
import zipfile
from typing import TypeVar

import numpy as np

from ..errors import WeightsError, one_line
from ..pickles import Names, PickleFormat

# Of a file, and of all that is unpacked from it. A ResNet-50 with its optimizer takes 0.3 GB.
MAX_BYTES = 1 << 30
# What an archive may unpack to: trained weights hardly shrink, and a bomb does a thousandfold.
_FREE_BYTES, _MAX_RATIO = 1 << 26, 64
_MAX_NAME = 200

# A ResNet-50's description is 35 KB, with its optimizer's state under 200 KB.
MAX_PICKLE_BYTES = 1 << 20

T = TypeVar("T")


def checkpoint_pickle(names: Names) -> PickleFormat:
    """Return the format of a checkpoint's pickle in which these names may occur."""
    advice = "save the state dict alone, best as .safetensors"
    return PickleFormat(names, WeightsError, "tensors", advice, MAX_PICKLE_BYTES)


def whole(*values: object) -> bool:
    """Return whether these are counts that a checkpoint can hold: 0 to `MAX_BYTES`."""
    return all(type(value) is int and 0 <= value <= MAX_BYTES for value in values)


def item_bytes(dtype: str) -> int:
    """Return the size of one number: ``"float32"`` takes 4 bytes, ``"bfloat16"`` 2."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def decode(data: bytes | bytearray | memoryview, dtype: str, byte_order: str = "<") -> np.ndarray:
    """Return the numbers of a buffer, shape (N,), without copying where NumPy has the type.

    ``byte_order`` is ``"<"`` for little endian or ``">"``. NumPy has no bfloat16: it is the
    upper half of a float32, and widening it is exact.
    """
    if dtype != "bfloat16":
        return np.frombuffer(data, np.dtype(dtype).newbyteorder(byte_order))  # type: ignore[arg-type]
    halves = np.frombuffer(data, f"{byte_order}u2")
    return (halves.astype(np.uint32) << 16).view(np.float32)


def state_dict(loaded: object, kind: type[T], source: str) -> dict[str, T]:
    """Find the tensors in what a checkpoint holds.

    Training scripts nest them under ``"state_dict"`` or ``"model"``, beside the epoch and the
    optimizer, and data-parallel training puts ``"module."`` before every name.
    """
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        found = "an empty one" if loaded == {} else f"a {type(loaded).__name__}"
        raise WeightsError(
            f"{source}: expected a dictionary of tensors, found {found}; "
            "save the model's state dict"
        )
    for key, value in loaded.items():
        if not isinstance(key, str) or len(key) > _MAX_NAME or not isinstance(value, kind):
            raise WeightsError(
                f"{source}: expected names with tensors, found {type(value).__name__} at "
                f"'{one_line(key)}'; save the model's state dict alone"
            )
    prefix = "module."
    if all(key.startswith(prefix) for key in loaded):
        return {key[len(prefix) :]: value for key, value in loaded.items()}
    return dict(loaded)


class Archive:
    """A zip archive in memory, that gives up rather than unpack without end."""

    def __init__(self, data: bytes, source: str) -> None:
        self._source = source
        self._budget = min(MAX_BYTES, _FREE_BYTES + _MAX_RATIO * len(data))
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except Exception as failure:  # whatever a damaged directory makes zipfile raise
            raise WeightsError(
                f"{source}: expected a zip archive, found a truncated one or none "
                f"({one_line(failure)}); get the file again"
            ) from failure
        self.names = [info.filename for info in self._zip.infolist() if not info.is_dir()]

    def read(self, name: str, limit: int) -> bytes:
        """Return one entry, checked against its CRC."""
        shown = f"'{one_line(name)}'"
        limit = min(limit, self._budget)
        try:
            with self._zip.open(name) as entry:
                # What an entry says about its size is not believed, but measured.
                data = entry.read(limit + 1)
        except KeyError:
            raise WeightsError(
                f"{self._source}: expected an entry {shown}, found none; get the file again"
            ) from None
        except MemoryError:
            raise
        except Exception as failure:  # of zipfile, or of one of four ways to pack
            raise WeightsError(
                f"{self._source}: cannot read the entry {shown} ({one_line(failure)}); "
                "get the file again"
            ) from failure
        if len(data) > limit:
            raise WeightsError(
                f"{self._source}: expected at most {limit:,} bytes in the entry {shown}, found "
                "more; give a checkpoint that holds the model alone"
            )
        self._budget -= len(data)
        return data
