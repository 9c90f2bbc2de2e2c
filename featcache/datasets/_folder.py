"""Class folders: a directory or a zip archive whose folder names are the classes.

Three layouts are understood, alone or inside one folder that holds nothing else::

    cat/1.jpg  dog/2.jpg                     one set, divided 80 : 20 by class
    train/cat/1.jpg  …  test/cat/9.jpg       both splits given
    name/train/cat/1.jpg …                   the same one folder down
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np

from ..errors import DatasetError
from . import Dataset, Split
from ._decode import SUFFIXES
from ._files import Files, Folder
from ._images import FileImages
from ._zip import ZipArchive

__all__ = ["load_path"]

TEST_SHARE = 0.2
SPLIT_SEED = 0
_LAYOUT = "expected class folders (cat/1.jpg, dog/2.jpg), or train/ and test/ with class folders"

Tree = dict[str, list[str]]  # class name -> names of its image files


def load_path(path: Path) -> Dataset:
    """Open a folder or zip of class folders.

    Raises
    ------
    DatasetError
        No classes, a class without images, ``train`` without ``test``, classes
        that differ between the two.
    """
    if not path.is_dir() and not path.is_file():
        raise DatasetError(f"{path}: expected a folder or a .zip, found a device or a pipe")
    files: Files = Folder(path) if path.is_dir() else ZipArchive(path)
    names = [name for name in files.names() if not _hidden(name)]
    folders = [name for name in files.folders() if not _hidden(name)]
    root = _common_root(names)
    trees = {
        role: _class_tree(names, folders, f"{root}{role}/")
        for role in ("train", "test")
        if any(
            name.startswith(f"{root}{role}/") and name.count("/") > root.count("/") + 1
            for name in names
        )
    }
    name = (
        re.sub(
            r"[^A-Za-z0-9._-]+", "-", path.resolve().stem if path.is_file() else path.resolve().name
        ).strip("-.")
        or "images"
    )
    if "train" not in trees:
        whole = _split(files, _class_tree(names, folders, root), path)
        train, test = _divide(whole, path)
        return Dataset(name, train, test, f"{path}, divided by class, seed {SPLIT_SEED}")
    if "test" not in trees:
        raise DatasetError(
            f"{path}: expected test/ beside train/, found none; accuracy is only reported on "
            "images that nothing was chosen on: add test/ with the same class folders (rename "
            "val/ if that is what you report), or give train/ itself to have it divided"
        )
    if set(trees["train"]) != set(trees["test"]):
        differing = sorted(set(trees["train"]) ^ set(trees["test"]))
        raise DatasetError(
            f"{path}: expected the same class folders in train/ and test/, found {differing[0]!r} "
            f"in one alone ({len(differing)} such classes)"
        )
    return Dataset(
        name,
        _split(files, trees["train"], path),
        _split(files, trees["test"], path),
        f"{path}, train/ and test/ as given",
    )


def _hidden(name: str) -> bool:
    if not name.startswith((".", "__MACOSX")) and "/." not in name and "/__MACOSX" not in name:
        return False  # a million names: most need no second look
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def _common_root(names: list[str]) -> str:
    """Return the folder that holds everything ("data/"), or "" where there are several."""
    tops = {name.split("/", 1)[0] for name in names}
    if len(tops) != 1 or tops <= {"train", "test"} or min(name.count("/") for name in names) < 2:
        return ""
    return f"{tops.pop()}/"


def _class_tree(names: list[str], folders: list[str], root: str) -> Tree:
    tree: Tree = defaultdict(list)
    suffixes = tuple(SUFFIXES)
    for folder in folders:
        inside = folder[len(root) :]
        if folder.startswith(root) and inside and "/" not in inside:
            tree[inside] = []
    for name in names:
        inside = name[len(root) :]
        if not name.startswith(root) or "/" not in inside:
            continue
        images = tree[inside.split("/", 1)[0]]
        if name.lower().endswith(suffixes):
            images.append(name)
    return dict(tree)


def _split(files: Files, tree: Tree, path: Path) -> Split:
    if len(tree) < 2:
        found = f"one class alone, {next(iter(tree))!r}" if tree else "no folder with images"
        raise DatasetError(f"{path}: {_LAYOUT}; found {found}; try featcache extract digits")
    class_names = tuple(sorted(tree))
    for name in class_names:
        if not tree[name]:
            raise DatasetError(
                f"{path}: expected images in every class folder, found none in {name!r} (images "
                f"end in {', '.join(sorted(SUFFIXES))}); add images or remove the folder"
            )
    ids = tuple(image for name in class_names for image in tree[name])
    labels = np.repeat(np.arange(len(class_names)), [len(tree[name]) for name in class_names])
    return Split(FileImages(files, ids), labels.astype(np.int64), class_names, ids)


def _divide(whole: Split, path: Path) -> tuple[Split, Split]:
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
