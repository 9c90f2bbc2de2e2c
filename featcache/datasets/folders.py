"""Folders of images: a directory or a zip archive whose folder names are the classes.

These layouts are understood, alone or inside one folder that holds nothing else::

    cat/1.jpg  dog/2.jpg                     one set, divided by the content of the images
    train/cat/1.jpg  …  test/cat/9.jpg       splits as given, val/ too; spellings in `_SPELLINGS`
    1.jpg  2.jpg                             no labels; train/1.jpg and test/2.jpg too
"""

from __future__ import annotations

import os.path
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..errors import DatasetError
from ..remote import RemotePlace
from .dataset import UNLABELLED, Dataset, Split, undivided_dataset
from .decoding import NEEDED, image_suffixes
from .images import FileImages, Files, images_among, is_hidden


def load_files(files: Files, path: Path | RemotePlace, stem: str, *, is_folder: bool) -> Dataset:
    """Return the data set that is in a folder or archive."""
    listing = list_files(files, path, is_folder=is_folder)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "images"
    spelled, labelled = find_roles(listing)
    if not spelled:
        tree = undivided_tree(listing)
        whole = _split(files, tree, sorted(tree)) if tree else _flat(files, listing.images)
        notes = left_out(listing, set(whole.ids), labelled=bool(tree))
        return undivided_dataset(name, whole, f"{path}, divided by content", notes)
    fewer: tuple[str, ...] = ()
    if labelled:
        splits, fewer = _given(files, listing, spelled)
    else:
        splits = {role: _flat(files, listing.below(top)) for role, top in spelled.items()}
    train, val, test = splits["train"], splits.get("val"), splits.get("test") or _flat(files, [])
    taken = {image for split in splits.values() for image in split.ids}
    source = f"{path}, {' and '.join(f'{folder}/' for folder in spelled.values())} as given"
    notes = (*left_out(listing, taken, labelled=labelled), *fewer)
    return Dataset(name, train, test, source, notes, val=val)


def _given(
    files: Files, listing: Listing, spelled: dict[str, str]
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Return the splits of class folders, and a note on each that lacks classes of train."""
    trees = {
        role: class_tree(listing, f"{listing.root}{folder}/", least=1 + (role == "train"))
        for role, folder in spelled.items()
    }
    class_names, notes = sorted(trees["train"]), []
    for role, tree in trees.items():
        more = sorted(tree.keys() - trees["train"].keys())
        if more:
            raise DatasetError(
                f"{listing.path}: expected the same class folders in {spelled['train']}/ and "
                f"{spelled[role]}/, found {more[0]!r} in {spelled[role]}/ alone ({len(more)} such "
                "classes); add the folder to the other, or remove it"
            )
        fewer = sorted(trees["train"].keys() - tree.keys())
        if fewer:
            notes.append(
                f"{listing.path}: no image of {_count(len(fewer), 'class')} in {spelled[role]}/, "
                f"{fewer[0]!r} the first"
            )
    return {role: _split(files, tree, class_names) for role, tree in trees.items()}, tuple(notes)


def _split(files: Files, tree: Tree, class_names: list[str]) -> Split:
    ids = tuple(image for name in class_names for image in tree.get(name, ()))
    counts = [len(tree.get(name, ())) for name in class_names]
    labels = np.repeat(np.arange(len(class_names)), counts)
    return Split(FileImages(files, ids), labels.astype(np.int64), tuple(class_names), ids)


def _flat(files: Files, names: list[str]) -> Split:
    """Return images without labels."""
    return Split(FileImages(files, names), np.full(len(names), UNLABELLED), (), tuple(names))


Tree = dict[str, list[str]]  # class name -> names of its image files

_LAYOUT = "expected class folders (cat/1.jpg, dog/2.jpg), or train/ and test/ with class folders"
# What a folder of each role may be called, in any case.
_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "dev"),
    "test": ("test", "testing"),
}
ROLE_OF = {spelling: role for role, names in _SPELLINGS.items() for spelling in names}
# Images of formats that are not read: a note says so.
# fmt: off
_OTHER_IMAGES = frozenset((
    ".apng", ".arw", ".cr2", ".dds", ".dng", ".eps", ".exr", ".hdr",
    ".ico", ".j2k", ".jp2", ".jpx", ".jxl", ".nef", ".pcx", ".psd",
    ".raw", ".svg", ".tga", *NEEDED,
))
# fmt: on


@dataclass(frozen=True)
class Listing:
    """The files of a data set that are not hidden."""

    path: Path | RemotePlace  # the folder or archive
    is_folder: bool  # which of the two
    images: list[str]  # files that end as images do, other files, and the folders that are known
    others: list[str]
    folders: list[str]
    notes: tuple[str, ...]  # what is not listed
    root: str  # the folder that holds everything (``"data/"``), or ``""`` where there are several

    def below(self, top: str) -> list[str]:
        """Return the images in a folder of the root."""
        start = f"{self.root}{top}/"
        return [name for name in self.images if name.startswith(start)]

    def name_it(self, folder: str) -> str:
        """Return the advice that makes a folder inside the data set."""
        if self.is_folder:
            return f"name {str(self.path).rstrip('/')}/{folder}"
        return f"unpack the archive and name its folder {folder}"


def list_files(files: Files, path: Path | RemotePlace, *, is_folder: bool) -> Listing:
    """Look through a folder or archive."""
    names = [name for name in files.names() if not is_hidden(name)]
    folders = [name for name in files.folders() if not is_hidden(name)]
    images, others = images_among(files, names)
    if not images:
        found = f"{_count(len(names), 'file')}, none of them an image" if names else "no file"
        raise DatasetError(
            f"{path}: {_LAYOUT}; found {found} ({'; '.join([*_unread(names), _endings()])}); try "
            "featcache extract digits"
        )
    return Listing(path, is_folder, images, others, folders, files.notes, common_root(names))


def find_roles(listing: Listing) -> tuple[dict[str, str], bool]:
    """Return role -> the folder's own spelling, in their order, and whether classes are in them.

    There are no roles where one set is to be divided. A class may be called train: it is a role
    where class folders are in it, or where every other folder has such a name too.
    """
    deep: dict[str, bool] = dict.fromkeys(_tops(listing.folders, listing.root), False)
    for name in chain(listing.images, listing.others):
        top, slash, rest = name[len(listing.root) :].partition("/")
        if slash and not deep.get(top):
            deep[top] = "/" in rest
    roles: dict[str, list[str]] = {role: [] for role in _SPELLINGS}
    for top in sorted(deep):
        if top.lower() in ROLE_OF:
            roles[ROLE_OF[top.lower()]].append(top)
    roles = {role: tops for role, tops in roles.items() if tops}
    meant = [role for role, tops in roles.items() if any(deep[top] for top in tops)]
    alone = bool(roles) and all(top.lower() in ROLE_OF for top in deep)
    if not alone and "train" not in meant:
        return {}, True
    for role, tops in roles.items():
        if len(tops) > 1:
            found = " and ".join(f"{top}/" for top in tops)
            raise DatasetError(
                f"{listing.path}: expected one {role}/, found {found}; put them together or rename "
                "one"
            )
    spelled = {role: top for role, (top,) in roles.items() if role in meant or listing.below(top)}
    if {"train", "test"} <= set(meant) and spelled.keys() == set(meant):
        return spelled, True
    if not meant and not _loose(listing):
        if len(spelled) == 1:
            return {}, False
        if "train" in spelled:
            return spelled, False
    spelled = {role: top for role, (top,) in roles.items()}
    _refuse_roles(listing, spelled, [top for role, top in spelled.items() if role not in meant])


def undivided_tree(listing: Listing) -> Tree:
    """Return the images of every class folder; nothing where there are none to tell classes by."""
    tree = _tree(listing, listing.root)
    if any(tree.values()) and len(tree) > 1:
        return class_tree(listing, listing.root)
    if problem := _misplaced(listing, tree):
        raise DatasetError(f"{listing.path}: {_LAYOUT}; found {problem}")
    return {}


def class_tree(listing: Listing, root: str, least: int = 2) -> Tree:
    """Return the images of every class folder in ``root``, of which there must be enough."""
    tree = _tree(listing, root)
    if len(tree) < least:
        found = _misplaced(listing, tree) or (
            f"one class alone, {root + next(iter(tree))!r}; add the folders of the others"
        )
        raise DatasetError(f"{listing.path}: {_LAYOUT}; found {found}")
    for top in sorted(tree):
        if not tree[top]:
            others = [name for name in listing.others if name.startswith(f"{root}{top}/")]
            raise DatasetError(
                f"{listing.path}: expected images in every class folder, found none in "
                f"{root + top!r} ({'; '.join([*_unread(others), _endings()])}); add images or "
                "remove the folder"
            )
    return tree


def _tree(listing: Listing, root: str) -> Tree:
    tree: Tree = defaultdict(list, {top: [] for top in _tops(listing.folders, root)})
    for names, are_images in ((listing.images, True), (listing.others, False)):
        for name in names:
            if name.startswith(root) and "/" in (inside := name[len(root) :]):
                images = tree[inside.split("/", 1)[0]]
                if are_images:
                    images.append(name)
    return dict(tree)


def _loose(listing: Listing) -> bool:
    """Tell whether an image is in no folder of the root."""
    return any("/" not in name[len(listing.root) :] for name in listing.images)


def left_out(listing: Listing, taken: set[str], *, labelled: bool) -> tuple[str, ...]:
    """Say in a sentence each which images are not in the data set, and that labels are not."""
    notes = [*listing.notes]
    notes += [f"{listing.path}: {note} ({_endings()})" for note in _unread(listing.others)]
    outside = [name for name in listing.images if name not in taken]
    if outside:
        notes.append(
            f"{listing.path}: {_count(len(outside), 'image')} outside of the "
            f"{'class ' * labelled}folders ignored, {outside[0]} the first"
        )
    if not labelled:
        notes.append(
            f"{listing.path}: no class folders, so the images have no labels; attach a table of "
            "them to the cache with featcache label CACHE TABLE"
        )
    return tuple(notes)


def common_root(names: list[str]) -> str:
    """Return the folder that holds all files, with its ``/``; ``""`` where there are several."""
    tops = {name.split("/", 1)[0] for name in names}
    if len(tops) != 1 or min(name.count("/") for name in names) < 2:
        return ""
    top = tops.pop()
    return "" if ROLE_OF.get(top.lower()) in ("train", "test") else f"{top}/"


def _tops(folders: list[str], root: str) -> list[str]:
    """Return the folders that are in ``root`` itself."""
    return [
        folder[len(root) :]
        for folder in folders
        if folder.startswith(root) and len(folder) > len(root) and "/" not in folder[len(root) :]
    ]


def _refuse_roles(listing: Listing, spelled: dict[str, str], flat: list[str]) -> NoReturn:
    """Say what is wrong with train/, test/ and val/; ``flat`` are those without class folders."""
    found = " and ".join(f"{top}/" for top in sorted(spelled.values()))
    divided = listing.name_it(listing.root + spelled.get("train", min(spelled.values())))
    if "train" in spelled and flat and (len(flat) > 1 or "test" in spelled):
        problem = (
            "expected class folders in train/ and test/ (train/cat/1.jpg), or in none of them, "
            f"found none in {' and '.join(f'{top}/' for top in flat)}; sort the images into a "
            "folder per class"
        )
    elif "train" in spelled:
        rename = f"rename {spelled['val']}/ to test/" if "val" in spelled else "rename val/"
        problem = (
            f"expected test/ beside {spelled['train']}/, found {found} alone; accuracy is only "
            "reported on images that nothing was chosen on: add test/ with the same class folders "
            f"({rename} if that is what you report), or, to have it divided, {divided}"
        )
    else:
        problem = (
            f"expected train/ and test/, found {found}; rename the one to learn from to train/ "
            f"and the other to test/, or, to have one divided, {divided}"
        )
    raise DatasetError(f"{listing.path}: {problem}")


def _misplaced(listing: Listing, tree: Tree) -> str:
    """Say where classes seem to be instead, and what to do; "" where there seem to be none."""
    backslashed = next((name for name in listing.images if "\\" in name), None)
    if backslashed:
        return (
            f"names with a backslash where a / belongs ({backslashed}); pack or copy the folders "
            "again with a program that writes /"
        )
    if len(tree) != 1:
        return ""
    (images,) = tree.values()
    parents = {name.rpartition("/")[0] for name in images}
    common = os.path.commonpath(parents) if parents else ""
    below = {parent[len(common) + 1 :].partition("/")[0] for parent in parents if parent != common}
    return f"{len(below)} folders in {common}/; {listing.name_it(common)}" if len(below) > 1 else ""


def _unread(names: list[str]) -> list[str]:
    """Say in a sentence, or in none, how many files are images of formats that are not read."""
    suffixes = (os.path.splitext(name)[1].lower() for name in names)
    counts = Counter(suffix for suffix in suffixes if suffix in _OTHER_IMAGES)
    if not counts:
        return []
    listed = ", ".join(
        f"{suffix} {count}" + (f" (needs {NEEDED[suffix]})" if suffix in NEEDED else "")
        for suffix, count in sorted(counts.items())
    )
    return [f"{_count(counts.total(), 'file')} ignored: {listed}"]


def _endings() -> str:
    return f"images end in {', '.join(sorted(image_suffixes()))}, or begin as one without an end"


def _count(number: int, what: str) -> str:
    if number == 1:
        return f"{number:,} {what}"
    return f"{number:,} {what}{'es' if what.endswith('s') else 's'}"
