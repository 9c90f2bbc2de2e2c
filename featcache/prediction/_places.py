"""Which image files were meant: those that were named, and those in folders and archives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..datasets import decode_image
from ..datasets._decode import SUFFIXES
from ..datasets._files import HIDDEN, Files, Folder
from ..datasets._remote import RemoteFolder, open_url
from ..datasets._zip import ZipArchive
from ..errors import DatasetError
from ..remote import RemotePlace, located

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Place", "PlacedImages", "find_places"]

Place = tuple[Files, str]  # where an image file is, and its name there


class PlacedImages:
    """The image files at places of any kind, as `decoded_batches` reads them.

    Parameters
    ----------
    places : sequence of Place
        As `find_places` finds them.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self.remote = any(files.remote for files, _ in places)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._places)

    def read(self, index: int, side: int | None = None) -> Image.Image:
        """Read and decode one image, as `decode_image` does; raises `DatasetError`."""
        files, name = self._places[index]
        return decode_image(files.read(name), files.where(name), side)

    def where(self, index: int) -> str:
        """Say where an image is."""
        files, name = self._places[index]
        return files.where(name)


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
