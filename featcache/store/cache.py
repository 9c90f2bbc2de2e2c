"""The public face of a cache: open it, and read its splits, cuts and views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import (
    CacheCorruptError,
    CacheMismatchError,
    CacheMissError,
    EngineUnavailableError,
    RecipeError,
    missing_package,
)
from ..files import user_path
from ..notebook import facts_table
from ..options import did_you_mean
from ..progress import OnNote, silent
from ..tables.table import Table
from .format import (
    UNLABELLED,
    Index,
    StoredArray,
    array_name,
    decode_id,
    label_names,
    roles_of,
)
from .index import AGAIN, default_folder, is_shards, open_index
from .reader import map_array, read_array
from .remote_caches import cache_file
from .table_file import AttachedTable, attached


def newest_cache(folder: str | Path | None = None) -> Path:
    """Return the cache that was written last.

    Raises
    ------
    CacheMissError
        The folder holds none.
    """
    folder = default_folder() if folder is None else user_path(folder)
    caches = cache_paths(folder)
    if not caches:
        raise CacheMissError(
            f"{folder}: expected a feature cache (*.h5 or *.shards), found none; make one with "
            "featcache extract digits --weights tinyimagenet32"
        )
    return caches[-1]


def cache_paths(folder: Path) -> list[Path]:
    """Return what is called as a cache in a folder, oldest first; none of it was opened.

    Hidden files are unfinished. What cannot be reached, such as a link to nothing, is left out:
    a cache that is named is reported, one among many never stops the rest.
    """
    found = []
    for path in folder.glob("[!.]*"):
        with suppress(OSError):
            if path.suffix == ".h5" or is_shards(path):
                found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


class CachedSplit:
    """Features, labels and ids of one split, read and verified when first asked for.

    Attributes
    ----------
    features : numpy.ndarray
        float32 or float16 (N, D), of the images as they are; read-only. (N, C, H, W)
        where the cache was cut in the middle of the backbone alone.
    labels : numpy.ndarray
        int64 (N,), in [0, number of classes), or -1 for an image without one; read-only.
    ids : tuple of str
        One name per image.
    content_hashes : numpy.ndarray or None
        uint8 (N, 32): SHA-256 of each image's file, which finds an image under any name;
        read-only. None where the cache has none.
    skipped : tuple of str
        Names of images that could not be decoded and were left out.
    """

    def __init__(self, index: Index, role: str, *, mmap: bool) -> None:
        self._path = index.path
        self._role = role
        self._mmap = mmap
        self._class_names: list[str] = index.meta["class_names"]
        self._main_cut: str = index.meta["cuts"][0]
        self._arrays: Mapping[str, StoredArray] = {
            name.removeprefix(f"{role}/"): array
            for name, array in index.arrays.items()
            if name.startswith(f"{role}/")
        }

    def __len__(self) -> int:
        """Return N."""
        return self._arrays["labels"].shape[0]

    def __repr__(self) -> str:
        """Name the file, the role and the shape."""
        shape = " x ".join(str(length) for length in self._arrays["features"].shape)
        return f"<{self._path}/{self._role}: {shape}>"

    @property
    def feature_dim(self) -> int:
        """Numbers per feature: D, or C x H x W."""
        return int(np.prod(self._arrays["features"].row_shape))

    @cached_property
    def features(self) -> np.ndarray:
        """Features of the identity view."""
        return self.cut(self._main_cut)

    @cached_property
    def labels(self) -> np.ndarray:
        """Label of each image."""
        labels = read_array(self._arrays["labels"])
        highest = len(self._class_names) - 1
        if labels.size and not UNLABELLED <= labels.min() <= labels.max() <= highest:
            expected = f"from 0 to {highest}" if highest >= 0 else "of -1, for want of class_names"
            raise CacheCorruptError(
                f"{self._path}: expected labels of {self._role} {expected}, found "
                f"{labels.min()} to {labels.max()} (-1 would be an image without one); {AGAIN}"
            )
        return labels

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Name of each image."""
        return self._names("ids")

    @cached_property
    def content_hashes(self) -> np.ndarray | None:
        """SHA-256 of each image's file."""
        stored = self._arrays.get("content_hashes")
        return None if stored is None else read_array(stored)

    @cached_property
    def skipped(self) -> tuple[str, ...]:
        """Name of each image that was left out."""
        return self._names("skipped") if "skipped" in self._arrays else ()

    def _names(self, array: str) -> tuple[str, ...]:
        return tuple(decode_id(name) for name in read_array(self._arrays[array]).tolist())

    def view(self, name: str) -> np.ndarray:
        """Return the features (N, D) of a flip view.

        Raises
        ------
        CacheMissError
            The cache has no such view.
        """
        return self.features if name == "identity" else self.cut(self._main_cut, name)

    def cut(self, name: str, view: str = "identity") -> np.ndarray:
        """Return the features of a cut: (N, D) of ``"avgpool"``, (N, C, H, W) of a stage.

        Raises
        ------
        CacheMissError
            The cache has no such cut or view.
        """
        stored = self._arrays.get(array_name(name, view, self._main_cut))
        if stored is None:
            raise CacheMissError(
                f"{self._path}: expected the cut {name!r} in the view {view!r}, found "
                f"{', '.join(sorted(self._arrays))} in {self._role}; extract it with --cut and "
                "--views"
            )
        array: np.ndarray = map_array(stored) if self._mmap else read_array(stored)
        return array

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` of the features.

        Returns
        -------
        pandas.DataFrame
            One row per image, its id as the index; columns ``label`` (int64), ``class``
            (its name), ``f0`` to ``f<D-1>`` (of the features' dtype, maps flattened).

        Raises
        ------
        EngineUnavailableError
            pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise missing_package("to_pandas", "pandas", error) from None
        columns = [f"f{number}" for number in range(self.feature_dim)]
        flat = np.asarray(self.features).reshape(len(self), len(columns))
        index = pd.Index(list(self.ids), name="id", dtype=object)
        frame = pd.DataFrame(flat, index=index, columns=columns, copy=True)
        names = np.array(label_names(self._class_names), dtype=object)
        frame.insert(0, "label", self.labels)
        frame.insert(1, "class", names[self.labels])
        return frame

    def to_torch(self) -> tuple[Any, Any]:
        """Return the features and labels as tensors of PyTorch, on the CPU.

        Returns
        -------
        features : torch.Tensor
            float32 or float16 (N, D).
        labels : torch.Tensor
            int64 (N,); together ``torch.utils.data.TensorDataset(*split.to_torch())``.

        Raises
        ------
        EngineUnavailableError
            torch is not installed.
        """
        try:
            import torch
        except ImportError as error:
            raise EngineUnavailableError(
                f"to_torch: expected the package torch, found: {error}; see "
                "https://pytorch.org/get-started/locally"
            ) from None
        # A copy: torch has no tensors that cannot be written to, and a cache's arrays are such.
        features, labels = np.array(self.features), np.array(self.labels)
        return torch.from_numpy(features), torch.from_numpy(labels)


class Cache:
    """A feature cache on disk.

    Attributes
    ----------
    path : Path
        The file, or the folder of shards.
    meta : dict
        Its provenance: backbone, weights, preprocessing, data set, engine, rates.
    class_names : tuple of str
        In label order.
    fingerprint : str
        SHA-256 (hex) of everything that changes a feature.
    train, test : CachedSplit
        The splits to learn from and to report on; either may be empty.
    val : CachedSplit or None
        The split on which a penalty is chosen, where the data set has one.
    """

    def __init__(self, index: Index, *, mmap: bool = False) -> None:
        self.path = index.path
        self.index = index
        self.meta = index.meta
        self.class_names: tuple[str, ...] = tuple(self.meta["class_names"])
        self.fingerprint: str = self.meta["fingerprint"]
        self.train = CachedSplit(index, "train", mmap=mmap)
        self.test = CachedSplit(index, "test", mmap=mmap)
        has_val = "val" in roles_of(index.arrays)
        self.val = CachedSplit(index, "val", mmap=mmap) if has_val else None

    @classmethod
    def from_arrays(
        cls,
        features: Any,
        labels: Any = None,
        *,
        path: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        splits: Sequence[str] | None = None,
        hashes: np.ndarray | None = None,
        made_by: str | None = None,
        name: str = "arrays",
        force: bool = False,
        on_note: OnNote = silent,
    ) -> Cache:
        """Write features that were made elsewhere as a cache, and open it.

        Parameters
        ----------
        features : array_like
            (N, D), or maps (N, C, H, W). float32 and float16 stay as they are; float64 and whole
            numbers become float32.
        labels : array_like, optional
            (N,): whole numbers, -1 for none, or the names of classes, ``""`` or None for none.
        path : str or Path, optional
            A ``.h5`` file or a folder for it; the cache folder by default.
        class_names : sequence of str, optional
            In label order; by default the labels that occur, sorted.
        ids : sequence of str, optional
            N names, each once; by default the numbers of the rows.
        splits : sequence of str, optional
            ``"train"``, ``"val"`` or ``"test"`` of each row. By default a fifth is drawn for test
            from the hashes, or else the ids: a row keeps its side when others are added.
        hashes : numpy.ndarray, optional
            uint8 (N, 32): SHA-256 of each image's file.
        made_by : str, optional
            What made the features. Caches of one name can be merged, and a head of one tested on
            another; without it they are taken as of different backbones.
        name : str
            Name of the data set.
        force : bool
            Replace the file if it exists with other content.
        on_note : callable
            Called with one-line notes, such as on a conversion.

        Raises
        ------
        ShapeMismatchError
            Arrays that do not fit together, or are no features.
        DatasetError
            No rows, ids that occur twice, labels outside of the classes, or NaN or infinity.
        OutputError
            The file exists with other content, or cannot be written.
        """
        from .arrays import Rows, as_classes, checked_hashes, write_rows

        features = np.asarray(features)
        names = None if class_names is None else [*map(str, class_names)]
        numbers = None
        if labels is not None:
            numbers, names = as_classes(labels, names)
        rows = Rows(
            features=[features],
            ids=[*map(str, range(len(features) if features.ndim else 0) if ids is None else ids)],
            labels=numbers,
            class_names=names or (),
            roles=splits,
            hashes=None if hashes is None else checked_hashes(hashes),
            made_by=made_by,
            facts={"imported_from": {"layout": "arrays", "shape": list(features.shape)}},
        )
        written, _ = write_rows(rows, path, name=name, source=name, force=force, on_note=on_note)
        return load(written)

    def splits(self) -> tuple[tuple[str, CachedSplit], ...]:
        """Return (role, split) of every split: train, val where there is one, test."""
        val = () if self.val is None else (("val", self.val),)
        return (("train", self.train), *val, ("test", self.test))

    @cached_property
    def attached_table(self) -> AttachedTable | None:
        """The attached table and where it came from; read when first asked for."""
        n_rows = sum(len(split) for _, split in self.splits())
        return attached(self.path, self.fingerprint, n_rows)

    @property
    def table(self) -> Table | None:
        """What `featcache.label` attached: a row per image, in the order of the splits.

        Raises
        ------
        CacheMismatchError
            The table is of another cache, which had this name before.
        CacheCorruptError
            It is damaged.
        """
        return None if self.attached_table is None else self.attached_table.table

    @property
    def feature_dim(self) -> int:
        """Numbers per feature."""
        return self.train.feature_dim

    @property
    def size_bytes(self) -> int:
        """Bytes on the disk."""
        if self.path.is_dir():
            return sum(file.stat().st_size for file in self.path.iterdir())
        return self.path.stat().st_size

    @property
    def cuts(self) -> tuple[str, ...]:
        """Where in the backbone the features were taken; the first is ``features``."""
        return tuple(self.meta["cuts"])

    @property
    def views(self) -> tuple[str, ...]:
        """The flip views of the training split, ``"identity"`` first."""
        return tuple(self.meta["views"])

    def check_vectors(self, cuts: Sequence[str] = ()) -> None:
        """Refuse feature maps where a linear head or a neighbour search needs vectors.

        Raises
        ------
        RecipeError
            The cache lacks one of these cuts.
        CacheMismatchError
            The features of one of them (by default of the first) are not (N, D).
        """
        for cut in cuts or self.cuts[:1]:
            stored = self.index.arrays.get(f"train/{array_name(cut, 'identity', self.cuts[0])}")
            if stored is None:
                otherwise = f"extract it too, with --cut {','.join((*self.cuts, cut))}"
                raise RecipeError(
                    f"{self.path}: expected the cut {cut!r}, found {', '.join(self.cuts)}"
                    + did_you_mean(cut, self.cuts, otherwise)
                )
            if len(stored.row_shape) != 1:
                raise CacheMismatchError(
                    f"{self.path}: expected features (N, D), found maps (N, "
                    f"{', '.join(map(str, stored.row_shape))}) of the cut {cut}; extract the "
                    f"vectors first: --cut pooled,{cut}"
                )

    def __repr__(self) -> str:
        """Name the file and the sizes."""
        splits = ", ".join(f"{len(split)} {role}" for role, split in self.splits())
        return (
            f"<Cache {self.path}: {splits}, {self.feature_dim}-d, {len(self.class_names)} classes>"
        )

    def _repr_html_(self) -> str:
        """Show a notebook what is in the file and how it was made."""
        facts = {
            "images": ", ".join(f"{len(split):,} {role}" for role, split in self.splits()),
            "feature_dim": self.feature_dim,
            "n_classes": len(self.class_names),
            **{name: value for name, value in self.meta.items() if name != "class_names"},
        }
        return facts_table(f"Cache {self.path}", facts)


def load(path: str | Path, *, mmap: bool = False) -> Cache:
    """Open a cache: its provenance now, its arrays when they are asked for.

    Parameters
    ----------
    path : str or Path
        A file or a folder of shards that `featcache.extract` wrote, or the URL of one: of that,
        a copy is taken into ``remote/`` in the cache folder, once.
    mmap : bool
        Map the features into memory instead of reading them: for a cache larger than
        the memory, or for a few rows of it. Mapped features are *not* verified;
        `featcache.verify` does that.

    Raises
    ------
    CacheMissError
        No such file.
    RemoteError
        A URL that cannot be reached, or is refused.
    CacheMismatchError
        Written by another version of the format.
    CacheCorruptError
        Not a cache, damaged, or built to read outside itself.
    """
    return Cache(open_index(cache_file(path)), mmap=mmap)
