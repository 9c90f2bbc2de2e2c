"""Class folders: a directory or a zip archive whose folder names are the classes.

Three layouts are understood, alone or inside one folder that holds nothing else::

    cat/1.jpg  dog/2.jpg                     one set, divided 80 : 20 by class
    train/cat/1.jpg  …  test/cat/9.jpg       both splits given, as Train/ and TEST/ too
    name/train/cat/1.jpg …                   the same one folder down
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ..errors import DatasetError
from ..remote import RemotePlace
from . import Dataset, Split
from ._files import Files, Folder
from ._images import FileImages
from ._layout import Tree, class_tree, find_roles, left_out, list_files
from ._zip import ZipArchive

__all__ = ["load_files", "load_path"]

TEST_SHARE = 0.2
SPLIT_SEED = 0


def load_path(path: Path) -> Dataset:
    """Open a folder or zip of class folders.

    Raises
    ------
    DatasetError
        No classes, a class without images, ``train`` without ``test``, classes
        that differ between the two, a folder that cannot be listed.
    """
    whole, is_folder = path.resolve(), path.is_dir()
    files: Files = Folder(path) if is_folder else ZipArchive(path)
    return load_files(files, path, whole.name if is_folder else whole.stem, is_folder=is_folder)


def load_files(files: Files, path: Path | RemotePlace, stem: str, *, is_folder: bool) -> Dataset:
    """Return the data set that is in a folder or archive.

    Parameters
    ----------
    files : Files
        What is in it.
    path : Path or RemotePlace
        Where it is, for messages and as the data set's source.
    stem : str
        What it is called.
    is_folder : bool
        No archive.

    Raises
    ------
    DatasetError
        As `load_path`.
    """
    listing = list_files(files, path, is_folder=is_folder)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "images"
    spelled = find_roles(listing)
    if not spelled:
        split = _split(files, class_tree(listing, listing.root))
        train, test = _divide(split, path)
        source = f"{path}, divided by class, seed {SPLIT_SEED}"
        return Dataset(name, train, test, source, left_out(listing, set(split.ids)))
    trees = {
        role: class_tree(listing, f"{listing.root}{folder}/") for role, folder in spelled.items()
    }
    if set(trees["train"]) != set(trees["test"]):
        differing = sorted(set(trees["train"]) ^ set(trees["test"]))
        raise DatasetError(
            f"{path}: expected the same class folders in {spelled['train']}/ and "
            f"{spelled['test']}/, found {differing[0]!r} in one alone ({len(differing)} such "
            "classes); add the folder to the other, or remove it"
        )
    train, test = _split(files, trees["train"]), _split(files, trees["test"])
    source = f"{path}, {spelled['train']}/ and {spelled['test']}/ as given"
    return Dataset(name, train, test, source, left_out(listing, {*train.ids, *test.ids}))


def _split(files: Files, tree: Tree) -> Split:
    class_names = tuple(sorted(tree))
    ids = tuple(image for name in class_names for image in tree[name])
    labels = np.repeat(np.arange(len(class_names)), [len(tree[name]) for name in class_names])
    return Split(FileImages(files, ids), labels.astype(np.int64), class_names, ids)


def _divide(whole: Split, path: Path | RemotePlace) -> tuple[Split, Split]:
    counts = np.bincount(whole.labels)
    if counts.min() < 2:
        name = whole.class_names[int(counts.argmin())]
        raise DatasetError(
            f"{path}: expected at least 2 images in every class, so that one can be kept for "
            f"testing, found 1 in {name!r}; add images, or give train/ and test/"
        )
    drawn = []
    for label, count in enumerate(counts):
        rows = np.flatnonzero(whole.labels == label)
        n_test = max(1, round(TEST_SHARE * int(count)))
        drawn.append(np.random.default_rng((SPLIT_SEED, label)).choice(rows, n_test, replace=False))
    test = np.sort(np.concatenate(drawn))
    train = np.setdiff1d(np.arange(len(whole)), test)
    return whole.take(train), whole.take(test)
