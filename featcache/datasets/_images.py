"""Images on demand: from arrays in memory, or decoded from files and archives."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import DatasetError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ArrayImages", "FileImages", "Folder", "Images", "ZipArchive", "decode_image"]

# What may be decoded. Pillow knows some forty formats; these are the ones that data sets
# come in, and their decoders are the ones that are tested and fuzzed the most.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


class Images(Protocol):
    """N images that are decoded one at a time."""

    def __len__(self) -> int:
        """Return N."""

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image, upright, mode RGB."""

    def take(self, rows: np.ndarray) -> Images:
        """Return the images of these rows, in this order."""

    def update_digest(self, digest: hashlib._Hash) -> None:
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
        from PIL import Image

        return Image.fromarray(self.array[index])

    def take(self, rows: np.ndarray) -> ArrayImages:
        """Return the images of these rows, in this order."""
        return ArrayImages(self.array[rows])

    def update_digest(self, digest: hashlib._Hash) -> None:
        """Feed shape and pixels."""
        digest.update(str(self.array.shape).encode())
        digest.update(np.ascontiguousarray(self.array).data)


class Folder:
    """Files below a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[str] = []
        self._folders: list[str] = []
        seen = set()
        # Links to folders are followed, as a person would, but into each folder once.
        for folder, below, files in os.walk(path, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            inside = Path(folder).relative_to(path)
            self._folders += [(inside / name).as_posix() for name in below]
            self._files += [(inside / name).as_posix() for name in files]

    def names(self) -> list[str]:
        """List every file below, as paths with ``/``."""
        return sorted(self._files)

    def folders(self) -> list[str]:
        """List every folder below: an empty one is somebody's mistake worth telling."""
        return sorted(self._folders)

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        try:
            if not stat.S_ISREG(os.stat(self.path / name).st_mode):
                raise OSError(None, "it is a pipe or a device")
            return (self.path / name).read_bytes()
        except OSError as error:
            raise DatasetError(
                f"{self.where(name)}: cannot be read: {error.strerror}; restore or remove it"
            ) from None

    def where(self, name: str) -> str:
        """Say where a file is, for a message."""
        return str(self.path / name)


class ZipArchive:
    """Files inside a ``.zip``, read in place: nothing is ever extracted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DatasetError(
                f"{path}: expected a folder or a .zip of class folders, found a file that is not "
                f"a readable zip archive ({error}); give the folder itself, or download it again"
            ) from None

    def names(self) -> list[str]:
        """List every file inside."""
        return sorted(info.filename for info in self._zip.infolist() if not info.is_dir())

    def folders(self) -> list[str]:
        """List the folders that have an entry of their own."""
        return sorted(info.filename.rstrip("/") for info in self._zip.infolist() if info.is_dir())

    def read(self, name: str) -> bytes:
        """Return a file's bytes; its CRC is checked."""
        try:
            return self._zip.read(name)
        except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, EOFError) as error:
            raise DatasetError(
                f"{self.where(name)}: cannot be read: {error}; the archive is damaged or "
                "encrypted: download it again"
            ) from None

    def where(self, name: str) -> str:
        """Say where a file is, for a message."""
        return f"{self.path}!{name}"


@dataclass(frozen=True)
class FileImages:
    """Images in files of a folder or archive.

    Parameters
    ----------
    files : Folder or ZipArchive
        Where they are.
    names : sequence of str
        N names inside it.
    """

    files: Folder | ZipArchive
    names: Sequence[str]

    def __len__(self) -> int:
        """Return N."""
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image:
        """Read and decode one image."""
        name = self.names[index]
        return decode_image(self.files.read(name), self.files.where(name))

    def take(self, rows: np.ndarray) -> FileImages:
        """Return the images of these rows, in this order."""
        return FileImages(self.files, [self.names[row] for row in rows])

    def update_digest(self, digest: hashlib._Hash) -> None:
        """Feed every file's own SHA-256, so that the same files count the same anywhere."""
        for name in self.names:
            digest.update(hashlib.sha256(self.files.read(name)).digest())


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decode an image file the way a person expects to see it.

    Turned upright by its EXIF orientation; transparency laid on white; gray,
    16-bit gray, palette and CMYK turned to RGB; the first frame of several.

    Parameters
    ----------
    data : bytes
        A file in one of the formats of `FORMATS`.
    where : str
        Its path, for the message.

    Returns
    -------
    PIL.Image.Image
        Mode RGB.

    Raises
    ------
    DatasetError
        Not an image, a damaged one, another format, or one of more than 179 million
        pixels, Pillow's limit: half a gigabyte as RGB.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        upright: Image.Image = ImageOps.exif_transpose(image) or image
    except Image.DecompressionBombError as error:
        raise DatasetError(
            f"{where}: expected at most 179 million pixels, found more ({error}); scale the "
            "image down or leave it out"
        ) from None
    except Exception as error:  # decoders raise whatever they like on damaged files
        why = type(error).__name__
        if not isinstance(error, UnidentifiedImageError):  # whose text is an address in memory
            why += f": {error}"
        raise DatasetError(
            f"{where}: expected an image ({', '.join(FORMATS)}), found {len(data)} bytes that do "
            f"not decode ({why}); replace or remove the file"
        ) from None
    return _to_rgb(upright)


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # Pillow clips 16-bit gray at 255, which turns every photo white.
        gray = np.asarray(image, dtype=np.float64)
        if image.mode == "F":
            gray = np.clip(gray, 0, 1) * 65535 if gray.max(initial=0) <= 1 else gray
        brightest = max(65535.0, float(gray.max(initial=0)))  # a 32-bit image may go beyond
        shades = (np.clip(gray, 0, brightest) * (255 / brightest)).round().astype(np.uint8)
        return Image.fromarray(shades).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
