"""A name, a path or a URL becomes a data set."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

from ..errors import DatasetError
from ..progress import OnProgress, silent
from ..remote import located, shown
from .dataset import Dataset
from .folders import load_path
from .named import CIFAR10, default_data_root, load_cifar10, load_digits
from .urls import load_url

NAMES = ("cifar10", "digits")


def load_dataset(
    name_or_path: str | Path,
    *,
    data_root: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> Dataset:
    """Find a data set by name, or open a folder or a ``.zip``, here or behind a URL.

    Parameters
    ----------
    name_or_path : str or Path
        ``"cifar10"``, ``"digits"``, a path, or a URL that fsspec knows: ``"s3://bucket/photos"``,
        ``"https://host/photos.zip"``.
    data_root : str or Path, optional
        Where named data sets are kept: `datasets.default_data_root` by default.
    on_progress : callable
        Called with the progress of downloads.

    Raises
    ------
    DatasetError
        Nothing there, no classes, a class without images, an archive that is
        damaged or cannot be downloaded.
    RemoteError
        A URL whose protocol has no package here, that cannot be reached, or is refused.
    """
    if name_or_path == "digits":
        return load_digits()
    if name_or_path == "cifar10":
        root = Path(data_root) if data_root else default_data_root()
        return load_cifar10(root, on_progress=on_progress)
    if not str(name_or_path).strip():  # Path("") would be the current folder
        raise DatasetError(
            f"data set: expected a folder of class folders, a .zip of one, or one of "
            f"{', '.join(NAMES)}; found an empty name; try featcache extract digits"
        )
    path = located(name_or_path)
    if not isinstance(path, Path):
        return replace(load_url(path), path=shown(str(name_or_path)))
    kind = _kind_of(path)
    if kind not in ("a folder", "a file"):
        raise DatasetError(
            f"{path}: expected a folder of class folders, a .zip of one, or one of "
            f"{', '.join(NAMES)}; found {kind}; try featcache extract digits"
        )
    return replace(load_path(path), path=os.fspath(name_or_path))


def _kind_of(path: Path) -> str:
    """Say what is at a path: "a folder", "a file", or why there is neither."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        dangling = os.path.islink(path)
        return f"a link to {os.readlink(path)}, where nothing is" if dangling else "nothing there"
    except (OSError, ValueError) as error:  # ValueError: a null byte
        return f"a path that cannot be followed ({getattr(error, 'strerror', error)})"
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe"}
    return kinds.get(stat.S_IFMT(mode), "a device or a socket")


def named_urls() -> list[str]:
    """Return where the named data sets that are not shipped come from."""
    return [CIFAR10.url]
