"""Images on demand: from arrays in memory, or decoded from files and archives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..cores import usable_cores
from ..errors import DatasetError
from ..lookahead import Stop, work_ahead
from ._decode import decode_image
from ._files import Files

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ArrayImages", "FileImages", "Images", "OnHashed", "unheard"]

OnHashed = Callable[[int], None]  # hears how many images are hashed

_TASK_FILES = 64  # per task of hashing: handing it to a thread then costs nothing beside it


def unheard(_: int) -> None:
    """Say nothing."""


class Images(Protocol):
    """N images that are decoded one at a time."""

    def __len__(self) -> int:
        """Return N."""

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image, upright, mode RGB."""

    def read(self, index: int, side: int | None = None) -> Image.Image:
        """Return one image, or its centre square of ``side`` pixels where that is faster."""

    def take(self, rows: np.ndarray) -> Images:
        """Return the images of these rows, in this order."""

    def update_digest(self, digest: hashlib._Hash, on_hashed: OnHashed = ...) -> None:
        """Feed everything that the pixels follow from to a hash."""


@dataclass(frozen=True)
class ArrayImages:
    """Images of one size in memory.

    Parameters
    ----------
    array : numpy.ndarray
        uint8 (N, H, W, 3).
    """

    array: np.ndarray

    def __post_init__(self) -> None:
        """Check dtype and shape."""
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
            raise DatasetError(
                "images: expected an array of uint8 (N, H, W, 3), found "
                f"{self.array.dtype} {self.array.shape}"
            )

    def __len__(self) -> int:
        """Return N."""
        return len(self.array)

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image."""
        return self.read(index)

    def read(self, index: int, side: int | None = None) -> Image.Image:
        """Return one image; there is nothing to decode, and so nothing to hasten."""
        from PIL import Image

        return Image.fromarray(self.array[index])

    def take(self, rows: np.ndarray) -> ArrayImages:
        """Return the images of these rows, in this order."""
        return ArrayImages(self.array[rows])

    def update_digest(self, digest: hashlib._Hash, on_hashed: OnHashed = unheard) -> None:
        """Feed shape and pixels."""
        digest.update(str(self.array.shape).encode())
        digest.update(np.ascontiguousarray(self.array).data)
        on_hashed(len(self))


@dataclass(frozen=True)
class FileImages:
    """Images in files of a folder or archive.

    Parameters
    ----------
    files : Files
        Where they are.
    names : sequence of str
        N names inside it.
    """

    files: Files
    names: Sequence[str]

    def __len__(self) -> int:
        """Return N."""
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image:
        """Read and decode one image."""
        return self.read(index)

    def read(self, index: int, side: int | None = None) -> Image.Image:
        """Read and decode one image, as `decode_image` does."""
        name = self.names[index]
        return decode_image(self.files.read(name), self.files.where(name), side)

    def take(self, rows: np.ndarray) -> FileImages:
        """Return the images of these rows, in this order."""
        return FileImages(self.files, [self.names[row] for row in rows])

    def update_digest(self, digest: hashlib._Hash, on_hashed: OnHashed = unheard) -> None:
        """Feed every file's own SHA-256, so that the same files count the same anywhere."""

        def hash_files(names: Sequence[str], stop: Stop) -> bytes:
            hashes = []
            for name in names:
                if stop.is_set():
                    break
                hashes.append(hashlib.sha256(self.files.read(name)).digest())
            return b"".join(hashes)

        starts = range(0, len(self.names), _TASK_FILES)
        tasks = (self.names[start : start + _TASK_FILES] for start in starts)
        workers = usable_cores()
        with closing(work_ahead(hash_files, tasks, workers=workers, ahead=2 * workers)) as hashed:
            for start, part in zip(starts, hashed, strict=True):
                digest.update(part)
                on_hashed(min(start + _TASK_FILES, len(self.names)))
