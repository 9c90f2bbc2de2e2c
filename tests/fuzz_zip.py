"""Altered zip archives of images."""

from __future__ import annotations

import io
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from fuzz_image import altered_image

from featcache.datasets.loading import load_dataset

_NAMES = (
    "train/a/1.png", "train/b/2.png", "test/a/3.png", "a/1.png", "b/2.png", "README", "../x.png",
    "/x.png", "a\\b.png", "a//b.png", "a/./b.png", "@eaDir/1.png", "__MACOSX/a/1.png", "a/", "",
    "\x1b[31m.png", "a\nb/1.png", "\u202ea/1.png", "\0/1.png", "x" * 60_000 + ".png", "a/" * 9999,
)  # fmt: skip
_NUMBERS = (0, 1, 8, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)
_DIRECTORY, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
# The fields of both headers: where each begins behind the signature, and its bytes.
_FIELDS = {
    _DIRECTORY: ((4, 2), (6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2),
                 (32, 2), (34, 2), (42, 4)),
    _LOCAL: ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x05\x06": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
}  # fmt: skip


def packed(members: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return an archive of files."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, packing)
    return stream.getvalue()


def _bomb(folder: Path) -> Path:
    path = folder / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/1.png", "b/2.png"):
            with archive.open(name, "w", force_zip64=True) as member:
                for _ in range(200):
                    member.write(bytes(1 << 20))
    return path


def _patched(field: int, number: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "patched.zip"
        data = bytearray(packed({"a/1.png": bytes(99), "b/1.png": bytes(99)}))
        struct.pack_into("<I", data, data.index(_DIRECTORY) + field, number)
        path.write_bytes(data)
        return path

    return write


SEEDS: dict[str, Callable[[Path], Path]] = {
    "400 MB in half a megabyte": _bomb,
    "a size of 4 GB": _patched(24, 2**32 - 2),
    "a packed size of 4 GB": _patched(20, 2**32 - 2),
    "a place behind the end": _patched(42, 2**31),
}


def alter(rng: random.Random, folder: Path) -> Path:
    """Write an archive of altered images, whose headers may be altered too."""
    names = rng.sample(_NAMES, rng.randint(1, 6))
    packing = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    data = bytearray(packed({name: altered_image(rng)[1] for name in names}, packing))
    for _ in range(rng.randrange(4)):
        signature = rng.choice(list(_FIELDS))
        places = [at for at in range(len(data)) if data[at : at + 4] == signature]
        if not places:
            continue
        offset, size = rng.choice(_FIELDS[signature])
        at = rng.choice(places) + offset
        data[at : at + size] = (rng.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    path = folder / "altered.zip"
    path.write_bytes(data)
    return path


def read(path: Path) -> None:
    """Open it as extraction does, and decode what it can."""
    from featcache.errors import DatasetError

    dataset = load_dataset(path, on_error=("fail", "skip")[os.path.getsize(path) % 2])
    problem = None
    for split in dataset.listed():
        for row in range(len(split)):
            try:
                split.images[row].close()
            except DatasetError as error:
                problem = error
    if problem:
        raise problem
