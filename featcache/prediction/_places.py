"""Which image files were meant: those that were named, and those in folders and archives."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ..datasets import decode_image
from ..datasets._decode import SUFFIXES
from ..datasets._files import HIDDEN, Files, Folder
from ..datasets._remote import RemoteFolder, open_url
from ..datasets._zip import ZipArchive
from ..errors import DatasetError
from ..preprocess import Preprocess
from ..progress import OnNote
from ..remote import RemotePlace, located

__all__ = ["Place", "decode_places", "find_places"]

Place = tuple[Files, str]  # where an image file is, and its name there


def find_places(paths: Sequence[str | Path]) -> list[Place]:
    """Find the image files.

    Parameters
    ----------
    paths : sequence of str or Path
        Files, taken whatever their suffix; folders and ``.zip`` archives, searched at any
        depth for names that end as images do, hidden ones left out. Or the URL of any.

    Returns
    -------
    list of Place
        In the order of ``paths``; inside a folder or archive, of the names.

    Raises
    ------
    DatasetError
        Nothing at a path, no image inside it, an archive that cannot be opened, no path.
    RemoteError
        A URL that cannot be reached, or is refused.
    """
    places: list[Place] = []
    for path in map(located, paths):
        if not isinstance(path, Path):
            places += _behind(path)
            continue
        # os.path says no, where pathlib raises, of a path that nobody may look at.
        folder = os.path.isdir(path)
        if not folder and not os.path.isfile(path):
            found = "something else" if os.path.exists(path) else "nothing"
            raise DatasetError(
                f"{path}: expected an image, a folder or a .zip of images, found {found}; check "
                "the path"
            )
        if not folder and path.suffix.lower() != ".zip":
            places.append((Folder(path.parent), path.name))
            continue
        files: Files = Folder(path) if folder else ZipArchive(path)
        places += _inside(files, path)
    if not places:
        raise DatasetError("images: expected the path of at least one, found none")
    return places


def decode_places(
    places: Sequence[Place], preprocess: Preprocess, on_error: str, on_note: OnNote
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield where each image is and its canonical pixels, uint8 (size, size, 3).

    Raises
    ------
    DatasetError
        A file that does not decode, unless ``on_error`` is ``"skip"``: then ``on_note``
        hears of it.
    """
    for files, name in places:
        where = files.where(name)
        try:
            image = decode_image(files.read(name), where, preprocess.size)
        except DatasetError as error:
            if on_error == "fail":
                raise DatasetError(f"{error}, or use --on-error skip") from None
            on_note(f"skipped: {error}")
            continue
        yield where, preprocess.pixels(image)


def _behind(place: RemotePlace) -> list[Place]:
    """Return the image files behind a URL."""
    if place.suffix in SUFFIXES:
        return [(RemoteFolder(place.parent), place.name)]
    return _inside(open_url(place)[0], place)


def _inside(files: Files, path: Path | RemotePlace) -> list[Place]:
    inside = [(files, name) for name in files.names() if _is_image(name)]
    if not inside:
        raise DatasetError(
            f"{path}: expected images (names that end in {', '.join(sorted(SUFFIXES))}), "
            "found none; name another folder, or the files themselves"
        )
    return inside


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(HIDDEN) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden
