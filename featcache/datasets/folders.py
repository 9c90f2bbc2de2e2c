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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..errors import DatasetError, one_line, shown_place
from ..remote import RemotePlace
from .dataset import UNLABELLED, Dataset, Split, undivided_dataset
from .decoding import HEAD_BYTES, NEEDED, OTHER_IMAGES, image_suffixes, is_image
from .images import FileImages, Files, OnError, images_among, shown_names


def load_files(
    files: Files,
    path: Path | RemotePlace,
    stem: str,
    *,
    is_folder: bool,
    on_error: OnError = "fail",
) -> Dataset:
    """Return the data set that is in a folder or archive; "skip" leaves bad classes out."""
    listing = list_files(files, path, is_folder=is_folder)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "images"
    spelled, labelled = find_roles(listing)
    unused: Sequence[str] = ()
    fewer: Sequence[str] = ()
    if not spelled:
        tree, fewer = _undivided_tree(listing, on_error)
        whole = _split(files, tree, sorted(tree)) if tree else _flat(files, listing.images)
        notes = (*_left_out(listing, set(whole.ids), labelled=bool(tree)), *fewer)
        return undivided_dataset(name, whole, f"{path}, divided by content", notes)
    if labelled:
        splits, unused, fewer = _given(files, listing, spelled, on_error)
    else:
        splits = {role: _flat(files, listing.below(top)) for role, top in spelled.items()}
    train, val, test = splits["train"], splits.get("val"), splits.get("test") or _flat(files, [])
    taken = {image for split in splits.values() for image in split.ids}.union(unused)
    source = f"{path}, {' and '.join(f'{folder}/' for folder in spelled.values())} as given"
    notes = (*_left_out(listing, taken, labelled=labelled), *fewer)
    return Dataset(name, train, test, source, notes, val=val)


def _given(
    files: Files, listing: Listing, spelled: dict[str, str], on_error: OnError
) -> tuple[dict[str, Split], list[str], list[str]]:
    """Return the splits of class folders, images of other classes than train's, and notes."""
    roots = {role: f"{listing.root}{folder}/" for role, folder in spelled.items()}
    trees = {role: _tree(listing, root) for role, root in roots.items()}
    problems, notes, unused = [], [], []
    if empty := _emptied(trees["train"]):
        problems.append(_no_image_in(listing, roots["train"], empty))
    for role, tree in trees.items():
        # An empty folder is as if it were not there: there is nothing to test of its class.
        if (empty := _emptied(tree)) and not tree:
            raise DatasetError(
                f"{listing.path}: expected images in {spelled[role]}/, found "
                f"{_no_image_in(listing, roots[role], empty)}"
            )
        more = sorted(tree.keys() - trees["train"].keys())
        if more:
            images = [image for name in more for image in tree.pop(name)]
            unused += images
            problems.append(
                f"{_count(len(images), 'image')} in {spelled[role]}/ of {_listed(more)}, of which "
                f"{spelled['train']}/ has no image: move some of each there, or remove them"
            )
        fewer = sorted(trees["train"].keys() - tree.keys())
        if fewer:
            notes.append(f"{listing.path}: no image in {spelled[role]}/ of {_listed(fewer)}")
    notes = [*_refuse_or_note(listing, problems, on_error), *notes]
    class_names = sorted(trees["train"])
    if len(class_names) < 2:
        found = _misplaced(listing, trees["train"]) or _one_class(roots["train"], class_names)
        raise DatasetError(f"{listing.path}: {_LAYOUT}; found {found}")
    splits = {role: _split(files, tree, class_names) for role, tree in trees.items()}
    return splits, unused, notes


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
_MOST_ENDS = 20  # of names, of which a file each is looked into
_SHOWN = 5  # classes that a message names
# What a folder of each role may be called, in any case.
_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "dev"),
    "test": ("test", "testing"),
}
ROLE_OF = {spelling: role for role, names in _SPELLINGS.items() for spelling in names}


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
    names, folders, notes = shown_names(files, path)
    images, others = images_among(files, names)
    if not images:
        found = f"{_count(len(names), 'file')}, none of them an image" if names else "no file"
        raise DatasetError(
            f"{path}: {_LAYOUT}; found {found} ({'; '.join([*_unread(names), _endings()])}); try "
            "featcache extract digits"
        )
    notes += _misnamed(files, path, others)
    return Listing(path, is_folder, images, others, folders, notes, _root(images, others))


def _misnamed(files: Files, path: Path | RemotePlace, others: list[str]) -> tuple[str, ...]:
    """Note names that end in an unknown way, where the first file begins as an image does."""
    ends: dict[str, list[str]] = defaultdict(list)
    for name in others:
        ends[os.path.splitext(name)[1].lower()].append(name)
    return tuple(
        f"{path}: {_count(len(names), 'file')} ignored whose names end in {one_line(end)}, though "
        f"{one_line(names[0])} begins as an image does: rename them if they are images"
        for end, names in list(ends.items())[:_MOST_ENDS]
        if end and end not in OTHER_IMAGES and not files.remote
        if is_image(files.head(names[0])[:HEAD_BYTES])
    )


def _root(images: list[str], others: list[str]) -> str:
    """Return the folder that holds the data set, whatever other files are beside it."""
    root = common_root(images + [name for name in others if "/" in name])
    if not root and (inner := common_root(images)):
        tops = {name[len(inner) :].partition("/")[0].lower() for name in images}
        root = inner if tops <= ROLE_OF.keys() else ""
    return root


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


def _undivided_tree(listing: Listing, on_error: OnError) -> tuple[Tree, list[str]]:
    """Return the images of every class folder, none where there are no two classes; and notes."""
    tree = _tree(listing, listing.root)
    if len(tree) < 2 or not any(tree.values()):
        if problem := _misplaced(listing, tree):
            raise DatasetError(f"{listing.path}: {_LAYOUT}; found {problem}")
        return {}, []
    empty = _emptied(tree)
    problems = [_no_image_in(listing, listing.root, empty)] if empty else []
    notes = _refuse_or_note(listing, problems, on_error)
    if len(tree) < 2:
        found = _one_class(listing.root, list(tree))
        raise DatasetError(f"{listing.path}: {_LAYOUT}; found {found}")
    return tree, notes


def _emptied(tree: Tree) -> list[str]:
    """Take the classes without an image out of a tree, and return their names."""
    empty = sorted(name for name, images in tree.items() if not images)
    for name in empty:
        del tree[name]
    return empty


def _no_image_in(listing: Listing, root: str, classes: list[str]) -> str:
    starts = tuple(f"{root}{name}/" for name in classes)
    unread = _unread([name for name in listing.others if name.startswith(starts)])
    return (
        f"no image in {_listed([root + name for name in classes])} "
        f"({'; '.join([*unread, _endings()])}): add images or remove the folder"
    )


def _refuse_or_note(listing: Listing, problems: list[str], on_error: OnError) -> list[str]:
    """Raise an error of all problems at once, or return a note on each where they are skipped."""
    if problems and on_error == "fail":
        raise DatasetError(
            f"{listing.path}: expected images in every class folder, found "
            f"{'; and '.join(problems)}; or leave these classes out with --on-error skip"
        )
    return [f"{listing.path}: left out: {problem.rpartition(': ')[0]}" for problem in problems]


def _one_class(root: str, classes: list[str]) -> str:
    found = f"one class alone, {one_line(repr(root + classes[0]))}" if classes else "no class"
    return f"{found}; add the folders of the others"


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


def _left_out(listing: Listing, taken: set[str], *, labelled: bool) -> tuple[str, ...]:
    """Say in a sentence each which images are not in the data set, and that labels are not."""
    notes = [*listing.notes]
    notes += [f"{listing.path}: {note} ({_endings()})" for note in _unread(listing.others)]
    outside = [name for name in listing.images if name not in taken]
    if outside:
        notes.append(
            f"{listing.path}: {_count(len(outside), 'image')} outside of the "
            f"{'class ' * labelled}folders ignored, {shown_place(outside[0])} the first"
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
            f"names with a backslash where a / belongs ({shown_place(backslashed)}); pack "
            "or copy the folders again with a program that writes /"
        )
    if len(tree) != 1:
        return ""
    (images,) = tree.values()
    parents = {name.rpartition("/")[0] for name in images}
    common = os.path.commonpath(parents) if parents else ""
    below = {parent[len(common) + 1 :].partition("/")[0] for parent in parents if parent != common}
    return (
        f"{len(below)} folders in {shown_place(common)}/; {listing.name_it(shown_place(common))}"
        if len(below) > 1
        else ""
    )


def _unread(names: list[str]) -> list[str]:
    """Say in a sentence, or in none, how many files are images of formats that are not read."""
    suffixes = (os.path.splitext(name)[1].lower() for name in names)
    counts = Counter(suffix for suffix in suffixes if suffix in OTHER_IMAGES - image_suffixes())
    if not counts:
        return []
    listed = ", ".join(
        f"{suffix} {count}" + (f" (needs {NEEDED[suffix]})" if suffix in NEEDED else "")
        for suffix, count in sorted(counts.items())
    )
    return [f"{_count(counts.total(), 'file')} ignored: {listed}"]


def _endings() -> str:
    return f"images end in {', '.join(sorted(image_suffixes()))}, or begin as one without an end"


def _listed(classes: list[str]) -> str:
    """Count classes and name the first."""
    named = ", ".join(one_line(repr(name)) for name in classes[:_SHOWN])
    return f"{_count(len(classes), 'class')} ({named}{', …' * (len(classes) > _SHOWN)})"


def _count(number: int, what: str) -> str:
    if number == 1:
        return f"{number:,} {what}"
    return f"{number:,} {what}{'es' if what.endswith('s') else 's'}"
