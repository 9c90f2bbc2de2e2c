"""Class folders: a directory or a zip archive whose folder names are the classes.

Three layouts are understood, alone or inside one folder that holds nothing else::

    cat/1.jpg  dog/2.jpg                     one set, divided 80 : 20 by class
    train/cat/1.jpg  …  test/cat/9.jpg       both splits given, as Train/ and TEST/ too
    name/train/cat/1.jpg …                   the same one folder down
"""

from __future__ import annotations

import os.path
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np

from ..errors import DatasetError
from ..remote import RemotePlace
from .dataset import Dataset, Split
from .decoding import SUFFIXES
from .images import HIDDEN, FileImages, Files, Folder
from .zip import ZipArchive

TEST_SHARE = 0.2
SPLIT_SEED = 0


def load_path(path: Path) -> Dataset:
    """Open a folder or zip of class folders."""
    whole, is_folder = path.resolve(), path.is_dir()
    files: Files = Folder(path) if is_folder else ZipArchive(path)
    return load_files(files, path, whole.name if is_folder else whole.stem, is_folder=is_folder)


def load_files(files: Files, path: Path | RemotePlace, stem: str, *, is_folder: bool) -> Dataset:
    """Return the data set that is in a folder or archive."""
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


Tree = dict[str, list[str]]  # class name -> names of its image files

_LAYOUT = "expected class folders (cat/1.jpg, dog/2.jpg), or train/ and test/ with class folders"
_ROLES = ("train", "test")
_LIKE_ROLES = frozenset((*_ROLES, "val", "valid", "validation"))
# Images of formats that are not read: a note says so.
# fmt: off
_OTHER_IMAGES = frozenset((
    ".apng", ".arw", ".avif", ".cr2", ".dds", ".dng", ".eps", ".exr",
    ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe",
    ".jpx", ".jxl", ".nef", ".pcx", ".psd", ".raw", ".svg", ".tga",
))
# fmt: on
_ENDINGS = f"images end in {', '.join(sorted(SUFFIXES))}"


@dataclass(frozen=True)
class Listing:
    """The files of a data set that are not hidden."""

    path: Path | RemotePlace  # the folder or archive
    is_folder: bool  # which of the two
    images: list[str]  # files that end as images do, other files, and the folders that are known
    others: list[str]
    folders: list[str]
    root: str  # the folder that holds everything (``"data/"``), or ``""`` where there are several

    def name_it(self, folder: str) -> str:
        """Return the advice that makes a folder inside the data set."""
        if self.is_folder:
            return f"name {str(self.path).rstrip('/')}/{folder}"
        return f"unpack the archive and name its folder {folder}"


def list_files(files: Files, path: Path | RemotePlace, *, is_folder: bool) -> Listing:
    """Look through a folder or archive."""
    names = [name for name in files.names() if not _hidden(name)]
    folders = [name for name in files.folders() if not _hidden(name)]
    suffixes = tuple(SUFFIXES)
    images = [name for name in names if name.lower().endswith(suffixes)]
    others = [name for name in names if not name.lower().endswith(suffixes)]
    if not images:
        found = f"{_count(len(names), 'file')}, none of them an image" if names else "no file"
        raise DatasetError(
            f"{path}: {_LAYOUT}; found {found} ({'; '.join([*_unread(names), _ENDINGS])}); try "
            "featcache extract digits"
        )
    return Listing(path, is_folder, images, others, folders, _common_root(names))


def find_roles(listing: Listing) -> dict[str, str]:
    """Return "train" and "test" -> the folder's own spelling, or nothing where there are none.

    A class may be called train: it is a role where class folders are in it, or where every
    other folder has such a name too.
    """
    deep: dict[str, bool] = dict.fromkeys(_tops(listing.folders, listing.root), False)
    for name in chain(listing.images, listing.others):
        top, slash, rest = name[len(listing.root) :].partition("/")
        if slash and not deep.get(top):
            deep[top] = "/" in rest
    spelled: dict[str, str] = {}
    for top in sorted(deep):
        role = top.lower()
        if role in spelled and role in _ROLES:
            raise DatasetError(
                f"{listing.path}: expected one {role}/, found {spelled[role]}/ and {top}/; put "
                "them together or rename one"
            )
        spelled[role] = top
    roles = {role: spelled[role] for role in _ROLES if role in spelled}
    meant = [role for role, top in roles.items() if deep[top]]
    if len(meant) == 2:
        return roles
    if "train" in meant or (spelled and spelled.keys() <= _LIKE_ROLES):
        _refuse_roles(listing, spelled, [top for role, top in roles.items() if role not in meant])
    return {}


def class_tree(listing: Listing, root: str) -> Tree:
    """Return the images of every class folder in ``root``."""
    tree: Tree = defaultdict(list, {top: [] for top in _tops(listing.folders, root)})
    for names, are_images in ((listing.images, True), (listing.others, False)):
        for name in names:
            if name.startswith(root) and "/" in (inside := name[len(root) :]):
                images = tree[inside.split("/", 1)[0]]
                if are_images:
                    images.append(name)
    if len(tree) < 2:
        raise DatasetError(f"{listing.path}: {_LAYOUT}; found {_too_few(listing, tree, root)}")
    for top in sorted(tree):
        if not tree[top]:
            others = [name for name in listing.others if name.startswith(f"{root}{top}/")]
            raise DatasetError(
                f"{listing.path}: expected images in every class folder, found none in "
                f"{root + top!r} ({'; '.join([*_unread(others), _ENDINGS])}); add images or "
                "remove the folder"
            )
    return dict(tree)


def left_out(listing: Listing, taken: set[str]) -> tuple[str, ...]:
    """Say in a sentence each which images are not in the data set."""
    notes = [f"{listing.path}: {note} ({_ENDINGS})" for note in _unread(listing.others)]
    outside = [name for name in listing.images if name not in taken]
    if outside:
        notes.append(
            f"{listing.path}: {_count(len(outside), 'image')} outside of the class folders "
            f"ignored, {outside[0]} the first"
        )
    return tuple(notes)


def _hidden(name: str) -> bool:
    if not name.startswith(HIDDEN) and "/." not in name and "/__MACOSX" not in name:
        return False  # a million names: most need no second look
    return any(part.startswith(HIDDEN) for part in PurePosixPath(name).parts)


def _common_root(names: list[str]) -> str:
    tops = {name.split("/", 1)[0] for name in names}
    if len(tops) != 1 or min(name.count("/") for name in names) < 2:
        return ""
    top = tops.pop()
    return "" if top.lower() in _ROLES else f"{top}/"


def _tops(folders: list[str], root: str) -> list[str]:
    """Return the folders that are in ``root`` itself."""
    return [
        folder[len(root) :]
        for folder in folders
        if folder.startswith(root) and len(folder) > len(root) and "/" not in folder[len(root) :]
    ]


def _refuse_roles(listing: Listing, spelled: dict[str, str], flat: list[str]) -> NoReturn:
    """Say what is wrong with train/, test/ and what is called like them."""
    alike = {role: top for role, top in spelled.items() if role in _LIKE_ROLES}
    found = " and ".join(f"{top}/" for top in sorted(alike.values()))
    vals = [top for role, top in alike.items() if role not in _ROLES]
    divided = listing.name_it(listing.root + alike.get("train", min(alike.values())))
    if flat:
        problem = (
            "expected class folders in train/ and test/ (train/cat/1.jpg), found none in "
            f"{' and '.join(f'{top}/' for top in flat)}; sort the images into a folder per class"
        )
    elif "train" in alike:
        rename = f"rename {vals[0]}/ to test/" if vals else "rename val/"
        problem = (
            f"expected test/ beside {alike['train']}/, found {found} alone; accuracy is only "
            "reported on images that nothing was chosen on: add test/ with the same class folders "
            f"({rename} if that is what you report), or, to have it divided, {divided}"
        )
    else:
        problem = (
            f"expected train/ and test/, found {found}; rename the one to learn from to train/ "
            f"and the other to test/, or, to have one divided, {divided}"
        )
    raise DatasetError(f"{listing.path}: {problem}")


def _too_few(listing: Listing, tree: Tree, root: str) -> str:
    """Say what was found in place of class folders, and what to do about it."""
    backslashed = next((name for name in listing.images if "\\" in name), None)
    if backslashed:
        return (
            f"names with a backslash where a / belongs ({backslashed}); pack or copy the folders "
            "again with a program that writes /"
        )
    if not tree:
        return (
            f"{_count(len(listing.images), 'image')} in no folder ({listing.images[0]}); put "
            "those of each class into a folder of its own"
        )
    (top,) = tree
    parents = {name.rpartition("/")[0] for name in tree[top]}
    common = os.path.commonpath(parents) if parents else ""
    below = {parent[len(common) + 1 :].partition("/")[0] for parent in parents if parent != common}
    if len(below) > 1:
        return f"{len(below)} folders in {common}/; {listing.name_it(common)}"
    return f"one class alone, {root + top!r}; add the folders of the others"


def _unread(names: list[str]) -> list[str]:
    """Say in a sentence, or in none, how many files are images of formats that are not read."""
    suffixes = (os.path.splitext(name)[1].lower() for name in names)
    counts = Counter(suffix for suffix in suffixes if suffix in _OTHER_IMAGES)
    if not counts:
        return []
    listed = ", ".join(f"{suffix} {count}" for suffix, count in sorted(counts.items()))
    return [f"{_count(counts.total(), 'file')} ignored: {listed}"]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
