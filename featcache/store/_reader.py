"""Reading a cache: nothing is believed before it is checked.

A file is opened for the moment of a read and closed again; written files are
never changed in place, so that no lock is needed, on a network file system
either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import (
    CacheCorruptError,
    CacheError,
    CacheMismatchError,
    CacheMissError,
)
from ..files import user_path
from ._format import (
    FINGERPRINT_FIELDS,
    FORMAT,
    FORMAT_VERSION,
    block_checksums,
    decode_attribute,
    decode_id,
    fingerprint,
)

__all__ = ["Cache", "CachedSplit", "load"]

_AGAIN = "make it again with featcache extract --force, or restore a copy"
_REQUIRED = ("class_names", "fingerprint", *FINGERPRINT_FIELDS)


class CachedSplit:
    """Features, labels and ids of one split, read and verified when first asked for.

    Attributes
    ----------
    features : numpy.ndarray
        float32 (N, D), of the images as they are; read-only.
    labels : numpy.ndarray
        int64 (N,), in [0, number of classes); read-only.
    ids : tuple of str
        One name per image.
    """

    def __init__(self, path: Path, role: str, n: int, feature_dim: int, n_classes: int) -> None:
        self._path = path
        self._role = role
        self._n = n
        self._n_classes = n_classes
        self.feature_dim = feature_dim

    def __len__(self) -> int:
        """Return N."""
        return self._n

    def __repr__(self) -> str:
        """Name the file, the role and the shape."""
        return f"<{self._path}/{self._role}: {self._n} x {self.feature_dim}>"

    @cached_property
    def features(self) -> np.ndarray:
        """Features of the identity view."""
        return self._read("features")

    @cached_property
    def labels(self) -> np.ndarray:
        """Label of each image."""
        labels = self._read("labels")
        if labels.size and not 0 <= labels.min() <= labels.max() < self._n_classes:
            raise CacheCorruptError(
                f"{self._path}: expected labels of {self._role} from 0 to {self._n_classes - 1}, "
                f"found {labels.min()} to {labels.max()}; {_AGAIN}"
            )
        return labels

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Name of each image."""
        return tuple(decode_id(name) for name in self._read("ids").tolist())

    def view(self, name: str) -> np.ndarray:
        """Return the features (N, D) of a flip view.

        Raises
        ------
        CacheMissError
            The cache has no such view.
        """
        if name == "identity":
            return self.features
        return self._read(f"views/{name}")

    def _read(self, name: str) -> np.ndarray:
        with _opened(self._path) as file:
            dataset = _plain_dataset(file, f"{self._role}/{name}", self._path)
            expected: tuple[int, ...] = (self._n,)
            if name == "features" or name.startswith("views/"):
                expected = (self._n, self.feature_dim)
            if dataset.shape != expected:
                raise CacheCorruptError(
                    f"{self._path}: expected {self._role}/{name} of shape {expected}, found "
                    f"{dataset.shape}; {_AGAIN}"
                )
            array: np.ndarray = dataset[...]
            stored = _plain_dataset(file, f"{self._role}/{name}_sha256", self._path)[...]
        found = block_checksums(array)
        if stored.shape != found.shape or (stored != found).any():
            block = 0
            if stored.shape == found.shape:
                block = int(np.flatnonzero((stored != found).any(axis=1))[0])
            raise CacheCorruptError(
                f"{self._path}: expected the SHA-256 that was written beside {self._role}/{name}, "
                f"found another in block {block}: the file was damaged; {_AGAIN}"
            )
        array.setflags(write=False)
        return array


class Cache:
    """A feature cache on disk.

    Attributes
    ----------
    path : Path
        The file.
    meta : dict
        Its provenance: backbone, weights, preprocessing, data set, engine, rates.
    class_names : tuple of str
        In label order.
    fingerprint : str
        SHA-256 (hex) of everything that changes a feature.
    train, test : CachedSplit
        The splits.
    """

    def __init__(self, path: Path, meta: dict[str, Any], splits: dict[str, CachedSplit]) -> None:
        self.path = path
        self.meta = meta
        self.class_names: tuple[str, ...] = tuple(meta["class_names"])
        self.fingerprint: str = meta["fingerprint"]
        self.train = splits["train"]
        self.test = splits["test"]

    @property
    def feature_dim(self) -> int:
        """Length D of a feature."""
        return self.train.feature_dim

    @property
    def views(self) -> tuple[str, ...]:
        """The flip views of the training split, ``"identity"`` first."""
        return tuple(self.meta["views"])

    def __repr__(self) -> str:
        """Name the file and the sizes."""
        return (
            f"<Cache {self.path}: {len(self.train)} train, {len(self.test)} test, "
            f"{self.feature_dim}-d, {len(self.class_names)} classes>"
        )


def load(path: str | Path) -> Cache:
    """Open a cache: its provenance now, its arrays when they are asked for.

    Raises
    ------
    CacheMissError
        No such file.
    CacheMismatchError
        Written by another version of the format.
    CacheCorruptError
        Not a cache, damaged, or built to read outside itself.
    """
    path = user_path(path)
    with _opened(path) as file:
        # Plain values only: an attribute may hold a reference or an object of any shape.
        meta = {name: _attribute(file, name, path) for name in file.attrs}
        if meta.get("format") != FORMAT:
            raise CacheCorruptError(
                f"{path}: expected a featcache file, found HDF5 without its mark (attribute "
                f"format = {FORMAT!r}); name a file that featcache extract wrote"
            )
        if meta.get("format_version") != FORMAT_VERSION:
            raise CacheMismatchError(
                f"{path}: expected format version {FORMAT_VERSION}, found "
                f"{meta.get('format_version')!r}; {_AGAIN}"
            )
        missing = [name for name in _REQUIRED if name not in meta]
        if missing:
            raise CacheCorruptError(
                f"{path}: expected the attribute {missing[0]!r}, found none; {_AGAIN}"
            )
        if fingerprint(meta) != meta["fingerprint"]:
            raise CacheCorruptError(
                f"{path}: expected fields that hash to its fingerprint "
                f"{str(meta['fingerprint'])[:8]}, found fields that do not: someone edited them; "
                f"{_AGAIN}"
            )
        splits = {}
        for role in ("train", "test"):
            features = _plain_dataset(file, f"{role}/features", path)
            if features.ndim != 2 or features.dtype != np.float32:
                raise CacheCorruptError(
                    f"{path}: expected {role}/features as float32 (N, D), found {features.dtype} "
                    f"{features.shape}; {_AGAIN}"
                )
            n, feature_dim = features.shape
            splits[role] = CachedSplit(path, role, n, feature_dim, len(meta["class_names"]))
    return Cache(path, meta, splits)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import h5py

    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise CacheMissError(
            f"{path}: expected a feature cache, found {found}; make one with featcache extract, or "
            "list the folder"
        )
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except CacheError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        # h5py turns whatever libhdf5 finds in a damaged file into any of these.
        raise CacheCorruptError(
            f"{path}: expected a readable HDF5 file, found: {error}; {_AGAIN}"
        ) from None


def _attribute(file: Any, name: str, path: Path) -> Any:
    value = decode_attribute(name, file.attrs[name])
    if not isinstance(value, (str, int, float, list, dict)):
        raise CacheCorruptError(
            f"{path}: expected text or a number in attribute {name!r}, found "
            f"{type(value).__name__}; {_AGAIN}"
        )
    return value


def _plain_dataset(file: Any, name: str, path: Path) -> Any:
    """Return a data set that lies in this file, unfiltered, reached by hard links alone.

    HDF5 can be told to read any file of the machine through links, external
    storage and virtual data sets, and to decompress a few bytes into terabytes.
    """
    import h5py

    node = file
    for part in name.split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            raise CacheMissError(f"{path}: expected {name}, found none in this file; {_AGAIN}")
        if not isinstance(link, h5py.HardLink):
            raise CacheCorruptError(
                f"{path}: expected {name} in the file itself, found a "
                f"{type(link).__name__} to elsewhere; do not use this file"
            )
        node = node[part]
    if not isinstance(node, h5py.Dataset):
        raise CacheCorruptError(f"{path}: expected an array at {name}, found a group; {_AGAIN}")
    if node.external or node.is_virtual or node.chunks or node.dtype.kind not in "fiuS":
        raise CacheCorruptError(
            f"{path}: expected {name} as plain contiguous numbers or text, found external, "
            "virtual, filtered or other storage; do not use this file"
        )
    if node.nbytes > path.stat().st_size:
        raise CacheCorruptError(
            f"{path}: expected {name} to fit into the file, found {node.nbytes:,} bytes declared "
            f"in a file of {path.stat().st_size:,}; {_AGAIN}"
        )
    return node
