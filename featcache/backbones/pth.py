"""PyTorch's checkpoint files, ``.pth`` and ``.pt``, without PyTorch and without trust.

Both formats keep a pickle that *describes* tensors (which storage, from where,
which shape and strides) apart from the storages, which are raw numbers:

* since PyTorch 1.6, a zip archive: ``<name>/data.pkl``, one entry
  ``<name>/data/<key>`` per storage, and ``<name>/byteorder``;
* before that, and on demand ever since, one stream: a magic number, the
  protocol, facts about the machine, the description and a list of storage keys,
  each a pickle of its own; then each storage's length as int64 and its numbers.

The pickles go through `read_pickle`, which cannot run them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import WeightsError, one_line
from ..files import check_shape
from ..pickles import Names, ordered_dict, read_pickle
from .tensors import (
    MAX_PICKLE_BYTES,
    Archive,
    checkpoint_pickle,
    decode,
    item_bytes,
    state_dict,
    whole,
)

_ZIP_MAGIC = b"PK\x03\x04"
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_LENGTH_BYTES = 8
_DTYPES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}


@dataclass(frozen=True)
class _Storage:
    """``length`` numbers of one type, kept under ``key``."""

    key: str
    dtype: str
    length: int

    @property
    def size_bytes(self) -> int:
        return self.length * item_bytes(self.dtype)


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; ``offset`` and ``strides`` count numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_hooks_and_gradients: Any
) -> _Tensor:
    if not (
        isinstance(storage, _Storage)
        and isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and len(shape) == len(strides)
        and whole(offset, *strides)
    ):
        raise TypeError("a tensor's description is not one")
    numbers = check_shape(shape)
    last = offset + sum((dim - 1) * stride for dim, stride in zip(shape, strides, strict=True))
    # The count on its own too: a stride of 0 would repeat one number without end.
    if numbers > storage.length or (numbers > 0 and last >= storage.length):
        raise ValueError("a tensor reaches beyond its storage")
    # An empty tensor has no first number either, wherever it says that it begins.
    return _Tensor(storage, offset if numbers else 0, shape, strides)


_NAMES: Names = {
    "collections.OrderedDict": ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    **dict.fromkeys(_DTYPES),
}
_PICKLE = checkpoint_pickle(_NAMES)
_PLAIN = checkpoint_pickle({})


class _Storages:
    """The storages that a description mentions, by key."""

    def __init__(self) -> None:
        self.by_key: dict[str, _Storage] = {}

    def declare(self, reference: Any) -> _Storage:
        """Take ``("storage", type, key, device, length)``, for `read_pickle`."""
        kind, dtype, key, _device, length, *view = reference
        # The sixth item, a view of another storage, is one that PyTorch has ceased to write.
        described = kind == "storage" and isinstance(key, str) and view in ([], [None])
        if not described or not whole(length):
            raise ValueError("a storage's description is not one")
        storage = _Storage(key, _DTYPES[dtype.text], length)
        if self.by_key.setdefault(key, storage) != storage:
            raise ValueError("a storage is described in two ways")
        return storage


def read_pth(data: bytes, source: str, lone: str | None = None) -> dict[str, np.ndarray]:
    """Read the state dict of a checkpoint file of either format.

    ``lone`` is the name that a tensor gets which was saved by itself; by default it is refused.
    """
    if data.startswith(_ZIP_MAGIC):
        return _read_archive(data, source, lone)
    return _read_stream(data, source, lone)


def _named(loaded: object, source: str, lone: str | None) -> dict[str, _Tensor]:
    if lone is not None and isinstance(loaded, _Tensor):
        return {lone: loaded}
    return state_dict(loaded, _Tensor, source)


def _read_archive(data: bytes, source: str, lone: str | None) -> dict[str, np.ndarray]:
    archive = Archive(data, source)
    roots = [name[: -len("data.pkl")] for name in archive.names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise WeightsError(
            f"{source}: expected one PyTorch checkpoint in the archive, found {len(roots)}; an "
            "OneFlow checkpoint's archive is called .zip"
        )
    description = archive.read(f"{roots[0]}data.pkl", MAX_PICKLE_BYTES)
    loaded, _ = read_pickle(description, 0, source, _PICKLE, _Storages().declare)
    order = "<"
    if f"{roots[0]}byteorder" in archive.names:
        order = _byte_order(archive.read(f"{roots[0]}byteorder", 16) == b"little")
    return _arrays(
        _named(loaded, source, lone),
        lambda storage: archive.read(f"{roots[0]}data/{storage.key}", storage.size_bytes),
        order,
        source,
    )


def _read_stream(data: bytes, source: str, lone: str | None) -> dict[str, np.ndarray]:
    storages = _Storages()
    magic, end = read_pickle(data, 0, source, _PLAIN)
    if magic != _STREAM_MAGIC:
        raise WeightsError(
            f"{source}: expected a PyTorch checkpoint, found something else; "
            "give the file that torch.save wrote"
        )
    _protocol, end = read_pickle(data, end, source, _PLAIN)
    machine, end = read_pickle(data, end, source, _PLAIN)
    loaded, end = read_pickle(data, end, source, _PICKLE, storages.declare)
    keys, end = read_pickle(data, end, source, _PLAIN)
    little = not isinstance(machine, dict) or machine.get("little_endian", True) is True
    buffers: dict[str, memoryview] = {}
    for key in keys if isinstance(keys, list) else []:
        storage = storages.by_key.get(key) if isinstance(key, str) else None
        if storage is None:
            raise WeightsError(f"{source}: found a storage without a tensor; get the file again")
        header = data[end : end + _LENGTH_BYTES]
        length = int.from_bytes(header, "little" if little else "big", signed=True)
        end += _LENGTH_BYTES
        if length != storage.length or end + storage.size_bytes > len(data):
            raise WeightsError(
                f"{source}: expected {storage.length:,} numbers in storage {one_line(key)}, found "
                "a truncated or damaged file; get it again"
            )
        buffers[key] = memoryview(data)[end : end + storage.size_bytes]
        end += storage.size_bytes
    return _arrays(
        _named(loaded, source, lone),
        lambda storage: buffers.get(storage.key, b""),
        _byte_order(little),
        source,
    )


def _byte_order(little: bool) -> str:
    return "<" if little else ">"


def _arrays(
    tensors: Mapping[str, _Tensor],
    fetch: Callable[[_Storage], bytes | memoryview],
    order: str,
    source: str,
) -> dict[str, np.ndarray]:
    """Lay every tensor over its storage, each storage being fetched once."""
    decoded: dict[str, np.ndarray] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        storage = tensor.storage
        if storage.key not in decoded:
            buffer = fetch(storage)
            if len(buffer) != storage.size_bytes:
                raise WeightsError(
                    f"{source}: expected {storage.size_bytes:,} bytes for {name!r}, found "
                    f"{len(buffer):,}; get the file again"
                )
            decoded[storage.key] = decode(buffer, storage.dtype, order)
        flat = decoded[storage.key]
        width = flat.itemsize
        arrays[name] = np.ndarray(
            tensor.shape,
            flat.dtype,
            flat,
            tensor.offset * width,
            tuple(stride * width for stride in tensor.strides),
        )
    return arrays
