"""Writing a cache: built in memory, then renamed into place.

Appending to an open HDF5 file loses it when the process is killed, and on a
full disk libhdf5 crashes the interpreter; so HDF5 never touches the disk here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ShapeMismatchError
from ..files import write_atomically
from ._format import (
    FORMAT,
    FORMAT_VERSION,
    block_checksums,
    encode_attribute,
    encode_id,
    fingerprint,
)

__all__ = ["SplitArrays", "write_cache"]


@dataclass(frozen=True)
class SplitArrays:
    """What a cache keeps of one split.

    Parameters
    ----------
    features : numpy.ndarray
        float32 (N, D), of the identity view.
    labels : numpy.ndarray
        int64 (N,).
    ids : tuple of str
        N names.
    views : mapping of str to numpy.ndarray
        Features (N, D) of further flip views.
    """

    features: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    views: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together."""
        n = len(self.labels)
        for name, array in {"features": self.features, **self.views}.items():
            if array.dtype != np.float32 or array.shape != (n, self.features.shape[-1]):
                raise ShapeMismatchError(
                    f"{name}: expected float32 ({n}, D) for {n} labels, found {array.dtype} "
                    f"{array.shape}"
                )
        if self.labels.dtype != np.int64 or len(self.ids) != n:
            raise ShapeMismatchError(
                f"labels: expected int64 ({n},) and {n} ids, found {self.labels.dtype} "
                f"and {len(self.ids)} ids"
            )


def write_cache(path: Path, splits: Mapping[str, SplitArrays], meta: Mapping[str, Any]) -> None:
    """Write a cache under its final name, whole or not at all.

    Parameters
    ----------
    path : Path
        The ``.h5`` file; replaced if it exists.
    splits : mapping of str to SplitArrays
        ``"train"`` and ``"test"``.
    meta : mapping
        Every field of the provenance; those of the fingerprint must be there.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    import h5py

    with h5py.File("cache", "w", driver="core", backing_store=False) as image:
        for name, value in {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint(meta),
            **meta,
        }.items():
            image.attrs[name] = encode_attribute(name, value)
        for role, split in splits.items():
            group = image.create_group(role)
            _put(group, "features", split.features)
            _put(group, "labels", split.labels)
            _put(group, "ids", np.array([encode_id(name) for name in split.ids], dtype=bytes))
            for view, features in split.views.items():
                _put(group.require_group("views"), view, features)
        image.flush()
        data = image.id.get_file_image()
    write_atomically(path, data)


def _put(group: Any, name: str, array: np.ndarray) -> None:
    group.create_dataset(name, data=array)
    group.create_dataset(f"{name}_sha256", data=block_checksums(array))
