"""Data sets of torchvision by name, downloaded by torchvision.

Only those whose files are images, arrays, or pickles whose checksums torchvision compares with its
own list before it reads them (CIFAR): none runs code from a file that somebody else could have put
there.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError, one_line
from ..options import did_you_mean
from .dataset import Dataset, Split
from .images import ArrayImages, FileImages, Folder, Images
from .sources import Asked, Source, dataset_of

_TRAIN = {"train": {"train": True}, "test": {"train": False}}
_TWO = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
_WHOLE: dict[str, dict[str, object]] = {"": {}}
# Name -> what makes each role; then where the object has its pixels or paths, and its labels.
_SETS: dict[str, tuple[Mapping[str, Mapping[str, object]], str, str]] = {
    "CIFAR10": (_TRAIN, "data", "targets"),
    "CIFAR100": (_TRAIN, "data", "targets"),
    "Country211": ({**_THREE, "val": {"split": "valid"}}, "samples", ""),
    "DTD": (_THREE, "_image_files", "_labels"),
    "EuroSAT": (_WHOLE, "samples", ""),
    "FGVCAircraft": (_THREE, "_image_files", "_labels"),
    "FashionMNIST": (_TRAIN, "data", "targets"),
    "Flowers102": (_THREE, "_image_files", "_labels"),
    "Food101": (_TWO, "_image_files", "_labels"),
    "GTSRB": (_TWO, "_samples", ""),
    "Imagenette": ({"train": {"split": "train"}, "test": {"split": "val"}}, "_samples", ""),
    "KMNIST": (_TRAIN, "data", "targets"),
    "MNIST": (_TRAIN, "data", "targets"),
    "OxfordIIITPet": (
        {"train": {"split": "trainval"}, "test": {"split": "test"}},
        "_images",
        "_labels",
    ),
    "RenderedSST2": (_THREE, "_samples", ""),
    "STL10": (_TWO, "data", "labels"),
    "SUN397": (_WHOLE, "_image_files", "_labels"),
    "SVHN": (_TWO, "data", "labels"),
    "USPS": (_TRAIN, "data", "targets"),
}


def load_torchvision(name: str, root: Path) -> Dataset:
    """Return one of torchvision's data sets; it is downloaded unless it is below ``root``."""
    where = f"torchvision:{one_line(name)}"
    if name not in _SETS:
        meant = did_you_mean(name, _SETS, "unpack it and name its folder", prefix="torchvision:")
        raise DatasetError(
            f"{where}: expected one of {', '.join(_SETS)}, found none of these{meant}"
        )
    try:
        library = import_module("torchvision.datasets")
    except ImportError as error:
        raise DatasetError(
            f"{where}: cannot be opened: {one_line(error)}; run pip install "
            "'featcache[torchvision]'"
        ) from None
    roles, pixels, labels = _SETS[name]
    folder = root / "torchvision" / name
    made = {}
    for role, options in roles.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Its messages and bars would stand between those of the command, or in its JSON.
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                made[role] = getattr(library, name)(str(folder), download=True, **options)
        except Exception as error:  # of the network, and of every reader
            raise DatasetError(
                f"{where}: cannot be loaded from {folder}: {type(error).__name__}: "
                f"{one_line(error)}; check the network, or delete the folder"
            ) from None
    class_names = _class_names(made, labels, pixels)
    if pixels == "data":
        splits = {
            role: _array_split(role, one.data, getattr(one, labels), class_names)
            for role, one in made.items()
        }
        return Dataset(f"torchvision-{name}", splits["train"], splits["test"], where)
    rows: list[tuple[str, str, int]] = []
    for role, one in made.items():
        paths, targets = _paths(one, pixels, labels)
        rows += [
            (os.path.abspath(path), role, int(y)) for path, y in zip(paths, targets, strict=True)
        ]
    rows.sort()
    top = os.path.commonpath([os.path.dirname(path) for path, *_ in rows])
    ids = tuple(os.path.relpath(path, top).replace(os.sep, "/") for path, *_ in rows)
    images: Images = FileImages(Folder(Path(top)), ids)
    source = Source(
        f"torchvision-{name}",
        images,
        ids,
        where,
        roles=None if "" in roles else [role for _, role, _ in rows],
        labels=np.array([label for *_, label in rows], np.int64),
        class_names=class_names,
    )
    return dataset_of(source, Asked())


def _paths(one: Any, pixels: str, labels: str) -> tuple[list[Any], list[Any]]:
    found = getattr(one, pixels)
    if labels:
        return list(found), list(getattr(one, labels))
    return [path for path, _ in found], [label for _, label in found]


def _class_names(made: Mapping[str, Any], labels: str, pixels: str) -> tuple[str, ...]:
    """Return the names that the library has, or the numbers."""
    n_classes = 1 + max(
        int(np.max(np.asarray(getattr(one, labels) if labels else _paths(one, pixels, "")[1])))
        for one in made.values()
    )
    names = getattr(next(iter(made.values())), "classes", None) or range(n_classes)
    # A name may be several, as of Imagenette, and one may be there twice.
    texts = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    if len(set(texts)) < len(texts) or len(texts) < n_classes:
        texts = [str(number) for number in range(n_classes)]
    return tuple(texts)


def _array_split(role: str, data: Any, labels: Any, class_names: tuple[str, ...]) -> Split:
    """Return images that the library has as an array: gray, or with the channels in front."""
    pixels = np.asarray(data)
    if pixels.ndim == 3:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    elif pixels.shape[-1] != 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    ids = tuple(f"{role}/{row:05d}" for row in range(len(pixels)))
    targets = np.asarray(labels).astype(np.int64)
    return Split(ArrayImages(np.ascontiguousarray(pixels)), targets, class_names, ids)
