"""Data sets known by name: scikit-learn's digits, and CIFAR-10 through flowvision."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np

from ..download import download
from ..errors import DatasetError, OutputError
from ..frameworks import import_flowvision
from ..progress import OnProgress, silent
from ..sampling import stratified_rows
from .dataset import Dataset, Split
from .images import ArrayImages

_DIGITS_TEST = 360


def default_data_root() -> Path:
    """Return where downloaded data sets are kept: ``$FEATCACHE_DATA`` or the user's cache."""
    if "FEATCACHE_DATA" in os.environ:
        return Path(os.environ["FEATCACHE_DATA"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "featcache" / "data"


def load_digits() -> Dataset:
    """Return scikit-learn's handwritten digits: 1,797 gray images of 8 x 8 pixels.

    1,437 for training, 360 for testing, divided by class with seed 0. The
    offline data set of the demo: it comes with scikit-learn.
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
    """Where CIFAR-10 comes from and what its files must hash to.

    Parameters
    ----------
    url, filename, md5 : str
        Of the ``.tar.gz``.
    train, test, meta : mapping of str to str
        Name of each file in ``cifar-10-batches-py/`` -> its MD5.
    """

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
# data set gives the archive's MD5, flowvision and torchvision those of the files.
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
    """Return CIFAR-10 through flowvision's loader: 50,000 / 10,000 images of 32 x 32 pixels.

    Files already in ``root/cifar-10-batches-py`` are used after their checksums
    are verified; else the archive in ``root``; else it is downloaded.

    Raises
    ------
    DatasetError
        A checksum differs, or there is no network and no archive.
    EngineUnavailableError
        flowvision is not installed here.
    """
    loader = _flowvision_loader(archive)
    _fetch(root, archive, on_progress)

    def split(role: str) -> Split:
        try:
            raw = loader(str(root), train=role == "train", download=False)
        except RuntimeError as error:  # flowvision's word for a checksum that differs
            raise DatasetError(
                f"{root / archive.folder}: flowvision could not read it: {error}; delete that "
                "folder and run the command again"
            ) from None
        ids = tuple(f"{role}/{row:05d}" for row in range(len(raw.targets)))
        images = ArrayImages(np.ascontiguousarray(raw.data))
        return Split(images, np.asarray(raw.targets, np.int64), tuple(raw.classes), ids)

    return Dataset("cifar10", split("train"), split("test"), archive.url)


def _flowvision_loader(archive: CifarArchive) -> type:
    """Return flowvision's CIFAR10, reading the files of this archive."""
    base = import_flowvision().datasets.CIFAR10
    ((meta_name, meta_md5),) = archive.meta.items()
    contents = {
        "train_list": [list(item) for item in archive.train.items()],
        "test_list": [list(item) for item in archive.test.items()],
        "meta": {"filename": meta_name, "key": "label_names", "md5": meta_md5},
    }
    return type("CIFAR10", (base,), contents)


def _fetch(root: Path, archive: CifarArchive, on_progress: OnProgress) -> None:
    """Make sure that every file of the archive is in place and whole."""
    folder = root / archive.folder
    if all(_md5(folder / name) == md5 for name, md5 in archive.members.items()):
        return
    tar = root / archive.filename
    if tar.exists():
        found = _md5(tar)
        if found != archive.md5:
            raise DatasetError(
                f"{tar}: expected MD5 {archive.md5}, found {found}; delete the file to have it "
                "downloaded again"
            )
    else:
        try:
            download(
                archive.url,
                tar,
                md5=archive.md5,
                error=DatasetError,
                on_progress=on_progress,
                stage="download cifar10",
            )
        except DatasetError as failure:
            if not isinstance(failure.__cause__, URLError):
                raise
            raise DatasetError(
                f"{failure}; without a network: digits --weights tinyimagenet32, or a folder or "
                ".zip of your own images"
            ) from failure.__cause__
    _unpack(tar, folder, archive)


def _unpack(tar: Path, folder: Path, archive: CifarArchive) -> None:
    """Write the known members alone, each after its checksum: the rest is never looked at."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(tar, "r:gz") as opened:
            for name, md5 in archive.members.items():
                member = opened.extractfile(f"{archive.folder}/{name}")
                data = member.read() if member else b""
                if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
                    raise DatasetError(f"{tar}!{name}: expected MD5 {md5}, found another")
                part = folder / f"{name}.part"
                part.write_bytes(data)
                os.replace(part, folder / name)
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise DatasetError(f"{tar}: cannot be unpacked: {error}; delete the file") from None
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written: {error.strerror}; give another --data-root"
        ) from None


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return "no such file"
    return digest.hexdigest()
