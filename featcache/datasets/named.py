"""Data sets known by name: scikit-learn's digits, and CIFAR-10."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..download import NetworkError, download, file_digest
from ..errors import DatasetError, OutputError, one_line
from ..files import write_atomically
from ..pickles import NUMPY_NAMES, PickleFormat, read_pickle, uint8_array
from ..progress import OnProgress, silent
from ..sampling import stratified_rows
from .dataset import Dataset, Split
from .images import ArrayImages

_DIGITS_TEST = 360
_MAX_ARCHIVE_BYTES = 1 << 28  # it has 170 MB


def default_data_root() -> Path:
    """Return where downloaded data sets are kept: ``$FEATCACHE_DATA`` or the user's cache."""
    if "FEATCACHE_DATA" in os.environ:
        return Path(os.environ["FEATCACHE_DATA"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "featcache" / "data"


def load_digits() -> Dataset:
    """Return scikit-learn's handwritten digits: 1,797 gray images of 8 x 8 pixels.

    1,437 for training, 360 for testing, divided by class with seed 0. The offline data set of
    the demo: it comes with scikit-learn.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    gray = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    images = np.repeat(gray[..., None], 3, axis=-1)
    test = stratified_rows(labels, _DIGITS_TEST, 0, "digits")
    train = np.setdiff1d(np.arange(len(labels)), test)

    def split(role: str, rows: np.ndarray) -> Split:
        ids = tuple(f"{role}/{row:04d}" for row in rows)
        names = tuple(str(digit) for digit in range(10))
        return Split(ArrayImages(images[rows]), labels[rows], names, ids)

    return Dataset("digits", split("train", train), split("test", test), "scikit-learn load_digits")


@dataclass(frozen=True)
class CifarArchive:
    """Where the ``.tar.gz`` comes from, and its files with the MD5 that each must have."""

    url: str
    filename: str
    md5: str
    train: Mapping[str, str]
    test: Mapping[str, str]
    meta: Mapping[str, str]

    folder = "cifar-10-batches-py"

    @property
    def members(self) -> dict[str, str]:
        """Every file of the archive that is read -> its MD5."""
        return {**self.train, **self.test, **self.meta}


# Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; the page of the
# data set gives the archive's MD5, torchvision those of the files.
CIFAR10 = CifarArchive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    filename="cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
)


def load_cifar10(
    root: Path, *, archive: CifarArchive = CIFAR10, on_progress: OnProgress = silent
) -> Dataset:
    """Return CIFAR-10: 50,000 / 10,000 images of 32 x 32 pixels.

    Files in ``root/cifar-10-batches-py`` are used if their checksums match, else the archive in
    ``root``, else it is downloaded. Their pickles are read without running them.
    """
    files = _read_files(root / archive.folder, archive)
    if files is None:
        _unpack(_fetch(root, archive, on_progress), root / archive.folder, archive)
        files = _read_files(root / archive.folder, archive)
    if files is None:
        raise DatasetError(
            f"{root / archive.folder}: expected the files as they were just unpacked, found others;"
            " run it again when nothing else writes there"
        )
    contents = {name: _parsed(root / archive.folder / name, files[name]) for name in files}
    (meta,) = (contents[name] for name in archive.meta)

    def split(role: str, names: Iterable[str]) -> Split:
        try:
            planes = np.concatenate([uint8_array(contents[name]["data"]) for name in names])
            labels = np.concatenate(
                [np.array(contents[name]["labels"], np.int64) for name in names]
            )
            pixels = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            class_names = tuple(map(str, meta["label_names"]))
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            raise DatasetError(
                f"{root / archive.folder}: expected batches with data, labels and label names, "
                f"found others ({one_line(error)}); delete that folder and run it again"
            ) from None
        ids = tuple(f"{role}/{row:05d}" for row in range(len(labels)))
        return Split(ArrayImages(np.ascontiguousarray(pixels)), labels, class_names, ids)

    return Dataset(
        "cifar10", split("train", archive.train), split("test", archive.test), archive.url
    )


# A batch is 31 MB, most of it pixels.
_BATCH = PickleFormat(
    NUMPY_NAMES, DatasetError, "a batch of CIFAR-10", "delete the file and run it again", 64 << 20
)


def _parsed(path: Path, data: bytes) -> dict[Any, Any]:
    content, _ = read_pickle(data, 0, str(path), _BATCH)
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: expected a dictionary, found none; delete the file")
    return content


def _read_files(folder: Path, archive: CifarArchive) -> dict[str, bytes] | None:
    """Return the bytes of every file, or None unless all have their checksums."""
    files = {}
    for name, md5 in archive.members.items():
        try:
            files[name] = (folder / name).read_bytes()
        except OSError:
            return None
        if hashlib.md5(files[name], usedforsecurity=False).hexdigest() != md5:
            return None
    return files


def _fetch(root: Path, archive: CifarArchive, on_progress: OnProgress) -> Path:
    """Return the archive, verified; download it if it is not there."""
    tar = root / archive.filename
    if tar.exists():
        found = file_digest(tar, "md5")
        if found != archive.md5:
            raise DatasetError(
                f"{tar}: expected MD5 {archive.md5}, found {found}; delete the file to have it "
                "downloaded again"
            )
        return tar
    try:
        return download(
            archive.url,
            tar,
            md5=archive.md5,
            max_bytes=_MAX_ARCHIVE_BYTES,
            error=DatasetError,
            on_progress=on_progress,
            stage="download cifar10",
        )
    except DatasetError as failure:
        if not isinstance(failure.__cause__, NetworkError):
            raise
        raise DatasetError(
            f"{failure}; without a network: digits --weights tinyimagenet32, or a folder or "
            ".zip of your own images"
        ) from failure.__cause__


def _unpack(tar: Path, folder: Path, archive: CifarArchive) -> None:
    """Write the known members alone, each after its checksum; others are never looked at."""
    try:
        with tarfile.open(tar, "r:gz") as opened:
            for name, md5 in archive.members.items():
                member = opened.extractfile(f"{archive.folder}/{name}")
                data = member.read(_BATCH.max_bytes) if member else b""
                if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
                    raise DatasetError(f"{tar}!{name}: expected MD5 {md5}, found another")
                write_atomically(folder / name, data)
    except OutputError as error:
        raise OutputError(f"{error}; or give another --data-root") from None
    except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error) as error:
        raise DatasetError(f"{tar}: cannot be unpacked: {error}; delete the file") from None
