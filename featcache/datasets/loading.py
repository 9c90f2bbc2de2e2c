"""A name, a path or a URL becomes a data set."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DatasetError
from ..files import did_you_mean_path
from ..progress import OnProgress, silent
from ..remote import RemotePlace, is_url, located, shown
from .dataset import Dataset
from .folders import load_files
from .hub import hub_source, is_saved, saved_source
from .images import Files, Folder, OnError
from .labelled import load_labelled
from .named import default_data_root, load_cifar10, load_digits
from .sources import Asked, Source, dataset_of
from .tar import find_shards, is_tar_pattern, open_shards, webdataset
from .torchvision_sets import load_torchvision
from .urls import open_url
from .zip import ZipArchive

NAMES = ("cifar10", "digits")
_TABLES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
_EXPECTED = (
    "a folder of images, a .zip or .tar of one, a table of paths, hf:NAME, torchvision:NAME, or "
    f"one of {', '.join(NAMES)}"
)


def load_dataset(
    name_or_path: str | Path,
    *,
    labels: Any = None,
    path_column: str | None = None,
    target: str | None = None,
    split_column: str | None = None,
    group: str | None = None,
    data_root: str | Path | None = None,
    on_error: OnError = "fail",
    on_progress: OnProgress = silent,
) -> Dataset:
    """Find a data set by name, or open a folder or an archive, here or behind a URL.

    Parameters
    ----------
    name_or_path : str or Path
        ``"cifar10"``, ``"digits"``; ``"torchvision:Flowers102"``; ``"hf:NAME"`` or
        ``"hf:NAME:CONFIG"`` of the Hugging Face hub, or a folder that ``save_to_disk`` wrote; a
        folder or a ``.zip`` of images, in class folders or not; ``.tar`` files of class folders or
        as WebDataset has them, a folder of them, or a pattern such as ``"train-{000..012}.tar"``;
        a table of paths or URLs (``.csv``, ``.tsv``, ``.parquet``, ``.jsonl``). Paths may be URLs
        that fsspec knows: ``"s3://bucket/photos"``, ``"https://host/photos.zip"``.
    labels : str, Path, frame or Table, optional
        A table with a row per image, as `featcache.label` takes it. Images without a row are left
        out; a row without its image is an error.
    path_column : str, optional
        The column that names the images, or of a Hugging Face data set the one that has them; by
        default one called ``path``, ``file_name`` or alike.
    target : str, optional
        The column of the classes; by default one called ``label`` or ``class``. Any other can be
        asked for later.
    split_column : str, optional
        The column of ``train``, ``val`` and ``test``; by default one called ``split``.
    group : str, optional
        A column whose values must not be on both sides, such as the patient.
    data_root : str or Path, optional
        Where named data sets and fetched archives are kept: `datasets.default_data_root` by
        default.
    on_error : str
        ``"skip"``: class folders without an image, and images of a class that ``train`` lacks, are
        left out with a note; with ``"fail"`` they are an error, which lists all.
    on_progress : callable
        Called with the progress of downloads.

    Raises
    ------
    DatasetError
        Nothing there, a class without images, an archive that is damaged or cannot be
        downloaded.
    TableError
        A table that cannot be read, a column that is not there or does not fit, a row without
        its image.
    RemoteError
        A URL whose protocol has no package here, that cannot be reached, or is refused.
    """
    asked = Asked(path_column, target, split_column, group)
    text = os.fspath(name_or_path)
    root = Path(data_root) if data_root else default_data_root()
    named = text in NAMES or text.startswith("torchvision:")
    if named and (labels is not None or asked != Asked()):
        raise DatasetError(
            f"{text}: expected images of your own for a table or its columns, found a data set "
            "with labels; extract it, then attach the table with featcache label CACHE TABLE"
        )
    if text == "digits":
        return load_digits()
    if text == "cifar10":
        return load_cifar10(root, on_progress=on_progress)
    if named:
        return load_torchvision(text.partition(":")[2], root)
    if not text.strip():  # Path("") would be the current folder
        raise DatasetError(
            f"data set: expected {_EXPECTED}; found an empty name; try featcache extract digits"
        )
    dataset = _load(name_or_path, labels, asked, root, on_error, on_progress)
    return replace(dataset, path=shown(text))


def _load(
    name_or_path: str | Path,
    labels: Any,
    asked: Asked,
    root: Path,
    on_error: OnError,
    on_progress: OnProgress,
) -> Dataset:
    text = os.fspath(name_or_path)
    if text.startswith("hf:") and not is_url(text):
        return _sampled(hub_source(text.partition(":")[2], asked), labels)
    if is_tar_pattern(text):
        return _shards(find_shards(text), text, labels, asked, root, on_error, on_progress)
    path = located(name_or_path)
    name = path.name
    is_folder = False
    if isinstance(path, Path):
        kind = _kind_of(path)
        if kind not in ("a folder", "a file"):
            meant = did_you_mean_path(path, "try featcache extract digits", NAMES)
            raise DatasetError(f"{path}: expected {_EXPECTED}; found {kind}{meant}")
        is_folder, name = kind == "a folder", path.resolve().name
    stem = name if is_folder else name.rpartition(".")[0] or name
    if path.suffix.lower() in _TABLES and not is_folder:
        if labels is not None:
            raise DatasetError(
                f"{path}: expected a folder or an archive of images beside --labels, found a "
                "table; name one of the two"
            )
        return load_labelled(None, None, stem, name_or_path, asked)
    is_tar = re.search(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2|txz)$", name, re.IGNORECASE)
    if is_tar and not is_folder:  # a compressed one is refused there, with the program to use
        return _shards([path], text, labels, asked, root, on_error, on_progress)
    files: Files
    tars: list[Path | RemotePlace] = []
    if not isinstance(path, Path):
        files, is_folder = open_url(path)
        stem = name if is_folder else stem
        tars = [path.within(one) for one in _tars(files.names())] if is_folder else []
    elif is_folder:
        if is_saved(path):
            return _sampled(saved_source(path, asked), labels)
        files = Folder(path)
        tars = [path / one for one in _tars(files.names())]
    else:
        files = ZipArchive(path)
    if tars:
        return _shards(tars, text, labels, asked, root, on_error, on_progress)
    return _in_files(files, path, stem, labels, asked, on_error, is_folder=is_folder)


def _in_files(
    files: Files,
    path: Path | RemotePlace,
    stem: str,
    labels: Any,
    asked: Asked,
    on_error: OnError,
    *,
    is_folder: bool,
) -> Dataset:
    """Take the labels of files from a table, or from their folders."""
    if labels is not None:
        return load_labelled(files, path, stem, labels, asked)
    for option, value in vars(asked).items():
        if value is not None:
            raise DatasetError(
                f"{path}: expected a table for --{option.replace('_', '-')} {value}, found "
                "images alone; name it with --labels"
            )
    return load_files(files, path, stem, is_folder=is_folder, on_error=on_error)


def _tars(names: list[str]) -> list[str]:
    """Return the shards of a folder that holds little else."""
    tars = [name for name in names if name.lower().endswith(".tar")]
    return tars if 2 * len(tars) > len(names) else []


def _shards(
    shards: Sequence[Path | RemotePlace],
    text: str,
    labels: Any,
    asked: Asked,
    root: Path,
    on_error: OnError,
    on_progress: OnProgress,
) -> Dataset:
    """Open ``.tar`` files: samples, or class folders."""
    files, are_folders = open_shards(shards, root / "shards", on_progress)
    path = located(text)
    stem = re.sub(r"\.tar$", "", re.sub(r"[{*?\[].*", "", path.name), flags=re.IGNORECASE)
    stem = stem.strip("-_.") or "shards"
    if labels is None:
        source = webdataset(files, shown(text), stem, are_folders=are_folders)
        if source is not None:
            return dataset_of(source, asked)
    return _in_files(files, path, stem, labels, asked, on_error, is_folder=False)


def _sampled(asked_source: tuple[Source, Asked], labels: Any) -> Dataset:
    source, asked = asked_source
    if labels is not None:
        raise DatasetError(
            f"{source.source}: expected no other table, found --labels; its own columns are kept, "
            "and featcache label CACHE TABLE replaces them"
        )
    return dataset_of(source, asked)


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
