"""Recognising files of features: which array has the features, and what names their rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DatasetError, one_line
from ..store.arrays import checked_hashes
from ..store.format import ROLES
from .hdf5 import read_hdf5
from .tensors import read_csv, read_npy, read_npz, read_parquet, read_pt, read_safetensors

HDF5 = (".h5", ".hdf5", ".h5ad")
_TEXTS = ("file_names.txt", "filenames.txt", "ids.txt", "paths.txt")
# What the arrays of a file are called, the likelier name first.
_FEATURES = ("features", "feats", "embeddings", "embedding", "feature", "emb", "img_emb", "x")
_IDS = ("ids", "id", "names", "filenames", "file_names", "paths", "path", "image_path", "files")
_LABELS = ("labels", "label", "targets", "target", "y", "classes")
_SPLITS = ("splits", "split", "roles")
_READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".npy": read_npy,
    ".npz": read_npz,
    ".safetensors": read_safetensors,
    ".pt": read_pt,
    ".pth": read_pt,
}
_SHOWN = 12  # arrays in a message
_NUMBERED = re.compile(r"f(\d+)")


@dataclass
class Found:
    """Features and what stands beside them, as a layout has them; N rows in all.

    ``columns`` are further columns of the images, each N values, for the table of labels.
    """

    layout: str
    features: list[np.ndarray]
    ids: Sequence[str] = ()  # none where a layout names no rows
    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    roles: Sequence[str] | None = None
    groups: Sequence[str] | None = None
    hashes: np.ndarray | None = None
    columns: dict[str, Sequence[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def n_rows(self) -> int:
        """N."""
        return sum(len(part) for part in self.features if part.ndim)


def recognise(path: Path, array: str | None, scratch: Path) -> Found:
    """Read a file or folder of features, whatever its layout, or raise a DatasetError.

    ``array`` names the array or column that has the features, where there are several;
    ``scratch`` is a folder for the arrays of HDF5 files while they are read.
    """
    if path.is_dir():
        return _folder(path, array, scratch)
    if not path.is_file():
        raise DatasetError(f"{path}: expected a file or folder of features, found none")
    suffix = path.suffix.lower()
    if suffix in HDF5:
        return _hdf5([path], array, scratch)
    if suffix == ".parquet":
        return _table(path, *read_parquet([path]), array)
    if suffix == ".csv":
        return _table(path, read_csv(path), {}, array)
    if suffix not in _READERS:
        raise DatasetError(
            f"{path}: expected features as .npy, .npz, .h5, .h5ad, .parquet, .csv, .safetensors "
            f"or .pt, found {suffix or 'no suffix'}; save them with numpy.save"
        )
    return _arrays(path, _READERS[suffix](path), array)


def _arrays(path: Path, arrays: Mapping[str, Any], array: str | None) -> Found:
    """Recognise named arrays of one file: an export of ours, or features with labels and ids."""
    if array is None and "train_features" in arrays:
        return _by_role(arrays)
    name = _choose(path, arrays, array)
    features = arrays[name]
    layout = "an array (N, D)" if len(arrays) == 1 else f"named arrays, features in {name!r}"
    if len(arrays) > 1:  # in front of the samples: (1, N, D)
        features = features[0] if features.ndim == 3 and len(features) == 1 else features
    found = Found(layout, [features])
    _take(found, {key: value for key, value in arrays.items() if key != name})
    return found


def _choose(path: Path, arrays: Mapping[str, Any], array: str | None) -> str:
    """Return the name of the array that has the features."""
    if array is not None:
        if array not in arrays or not isinstance(arrays[array], np.ndarray):
            raise DatasetError(
                f"{path}: expected an array {array!r}, found {_listed(arrays)}; name one of these"
            )
        return array
    able = [
        name
        for name, value in arrays.items()
        if isinstance(value, np.ndarray) and value.ndim >= 2 and value.dtype.kind == "f"
    ]
    if not able and len(arrays) == 1:  # whole numbers, or a shape that is refused by its name
        able = [name for name, value in arrays.items() if isinstance(value, np.ndarray)]
    known = [name for word in _FEATURES for name in able if name.lower() == word]
    if len(able) == 1 or known:
        return known[0] if known else able[0]
    raise DatasetError(
        f"{path}: expected one array of features (N, D), found {_listed(arrays)}; name it with "
        "--array"
    )


def _listed(arrays: Mapping[str, Any]) -> str:
    """Describe arrays by name, dtype and shape."""
    described = []
    for name, value in list(arrays.items())[:_SHOWN]:
        shown = one_line(name) or "one array"
        if isinstance(value, np.ndarray):
            shown += f" {value.dtype} {value.shape}"
        described.append(shown)
    more = len(arrays) - _SHOWN
    return (", ".join(described) or "nothing") + (f" and {more:,} more" if more > 0 else "")


def _take(found: Found, others: Mapping[str, Any]) -> None:
    """Take what stands beside features: ids, labels, splits, class names, hashes, columns."""
    n_rows = found.n_rows
    for name, value in others.items():
        word = name.lower()
        if word == "class_names" and not isinstance(value, np.ndarray | str):
            found.class_names = [str(one) for one in value]
        elif word == "content_hashes" and isinstance(value, np.ndarray):
            found.hashes = checked_hashes(value)
        elif not _is_column(value, n_rows):
            found.notes.append(f"{one_line(name)} is left out: it has no value for each row")
        elif word in _IDS and not found.ids:
            found.ids = [str(one) for one in _plain(value)]
        elif word in _SPLITS and found.roles is None:
            found.roles = [str(one) for one in _plain(value)]
        elif word in _LABELS and found.labels is None and _may_be_classes(value):
            found.labels = np.asarray(value)
        else:
            found.columns[name] = _plain(value)


def _is_column(value: Any, n_rows: int) -> bool:
    if isinstance(value, np.ndarray):
        return value.shape == (n_rows,)
    return not isinstance(value, str) and len(value) == n_rows


def _plain(value: Any) -> list[Any]:
    return value.tolist() if isinstance(value, np.ndarray) else list(value)


def _may_be_classes(value: Any) -> bool:
    return not isinstance(value, np.ndarray) or value.dtype.kind in "iuUO"


def _by_role(arrays: Mapping[str, Any]) -> Found:
    """Read an export of ours: ``train_features``, ``train_labels``, ``train_ids``, …."""
    roles = [role for role in ROLES if f"{role}_features" in arrays]
    found = Found("featcache export", [arrays[f"{role}_features"] for role in roles])
    found.roles = [
        role for role, part in zip(roles, found.features, strict=True) for _ in range(len(part))
    ]
    whole: dict[str, Any] = {}
    for part in ("ids", "labels", "content_hashes"):
        values = [arrays[f"{role}_{part}"] for role in roles if f"{role}_{part}" in arrays]
        if len(values) < len(roles):
            continue
        if part == "ids":
            whole[part] = [name for value in values for name in _names(value)]
        else:
            whole[part] = np.concatenate(values)
    if "class_names" in arrays:
        whole["class_names"] = list(arrays["class_names"])
    _take(found, whole)
    more = sorted(name for name in arrays if "_views_" in name or "_cuts_" in name)
    if more:
        found.notes.append(f"the first cut's features are taken, not {one_line(', '.join(more))}")
    if len({*found.ids}) < len(found.ids):  # the same in two splits
        found.ids = [f"{role}/{name}" for role, name in zip(found.roles, found.ids, strict=True)]
    return found


def _names(value: Any) -> list[str]:
    """Return ids, which safetensors has as UTF-8, uint8 (N, W), padded with zeros."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 2:
        return [row.tobytes().rstrip(b"\0").decode("utf-8", "surrogateescape") for row in value]
    return [str(one) for one in _plain(value)]


def _hdf5(paths: Sequence[Path], array: str | None, scratch: Path) -> Found:
    files = read_hdf5(paths, scratch)
    if len(files) == 1 and files[0].get("@format") == "featcache":
        raise DatasetError(f"{paths[0]}: expected features, found a feature cache; use it as it is")
    if array is None and all("features" in found and "coords" in found for found in files):
        return _patches(paths, files)
    if len(files) == 1:
        found = files[0]
        if array is None and "X" in found and any(name.startswith("obs/") for name in found):
            return _anndata(found)
        if any(name.startswith("X/") for name in found):
            raise DatasetError(
                f"{paths[0]}: expected dense features in X, found a sparse matrix; save "
                "adata.X.toarray()"
            )
        plain = {name: value for name, value in found.items() if "@" not in name}
        return _arrays(paths[0], plain, array)
    return _slides(paths, files, array)


def _patches(paths: Sequence[Path], files: Sequence[Mapping[str, Any]]) -> Found:
    """Read slides of CLAM or TRIDENT: a file each, with features and coords of its patches."""
    found = Found("patches of slides (CLAM, TRIDENT)", [])
    ids: list[str] = []
    slides: list[str] = []
    for path, arrays in zip(paths, files, strict=True):
        features, coords = arrays["features"], arrays["coords"]
        if features.ndim == 3 and len(features) == 1:
            features = features[0]
        if features.ndim != 2 or coords.shape != (len(features), 2):
            raise DatasetError(
                f"{path}: expected features (N, D) and coords (N, 2), found {_listed(arrays)}"
            )
        found.features.append(features)
        ids += [f"{path.stem}/{x}_{y}" for x, y in np.asarray(coords, np.int64).tolist()]
        slides += [path.stem] * len(features)
    found.ids, found.groups = ids, slides
    found.columns["slide"] = slides
    found.notes.append(f"{len(paths):,} slides; the patches of a slide are on one side")
    return found


def _slides(paths: Sequence[Path], files: Sequence[Mapping[str, Any]], array: str | None) -> Found:
    """Read a file per image or slide, each with one vector of features."""
    vectors = []
    for path, arrays in zip(paths, files, strict=True):
        numbers = {name: one for name, one in arrays.items() if isinstance(one, np.ndarray)}
        name = array or next((word for word in _FEATURES if word in numbers), "")
        if len(numbers) == 1:
            name = name or next(iter(numbers))
        if name not in numbers:
            raise DatasetError(f"{path}: expected one array of features, found {_listed(numbers)}")
        vectors.append(numbers[name])
    return _one_each(paths, vectors)


def _one_each(paths: Sequence[Path], vectors: Sequence[np.ndarray]) -> Found:
    rows = [np.asarray(one).reshape(1, -1) for one in vectors]
    for path, one, row in zip(paths, vectors, rows, strict=True):
        if one.shape not in ((row.size,), (1, row.size)) or row.size != rows[0].size:
            raise DatasetError(
                f"{path}: expected one vector of {rows[0].size} features as in the other files, "
                f"found {one.dtype} {one.shape}"
            )
    ids = [path.stem for path in paths]
    return Found("a file for each image", [np.concatenate(rows)], ids)


def _anndata(arrays: Mapping[str, Any]) -> Found:
    """Read X and obs of AnnData: categories and columns of obs become columns of the table."""
    found = Found("AnnData (X, obs)", [arrays["X"]])
    index = arrays.get("obs@_index", "_index")
    names = arrays.get(f"obs/{index}")
    if isinstance(names, list):
        found.ids = names
    for name, value in arrays.items():
        _, _, column = name.partition("obs/")
        if not name.startswith("obs/") or "@" in name or column == index:
            continue
        base, slash, part = column.rpartition("/")
        if not slash:
            found.columns[column] = _plain(value)
        elif part == "codes":
            texts = [str(one) for one in _plain(arrays[f"obs/{base}/categories"])]
            found.columns[base] = [texts[code] if code >= 0 else None for code in value.tolist()]
    n_rows = len(arrays["X"])
    found.columns = {name: one for name, one in found.columns.items() if len(one) == n_rows}
    return found


def _table(
    path: Path, columns: Mapping[str, Any], facts: Mapping[str, str], array: str | None
) -> Found:
    """Read a column of lists, or columns f0, f1, …; the other columns stand beside them."""
    numbered = {int(match[1]): name for name in columns if (match := _NUMBERED.fullmatch(name))}
    lists = [name for name, one in columns.items() if isinstance(one, np.ndarray) and one.ndim == 2]
    if array is None and not lists and sorted(numbered) == list(range(len(numbered))) != []:
        features = np.stack([np.asarray(columns[numbered[n]]) for n in sorted(numbered)], axis=1)
        rest = {name: one for name, one in columns.items() if not _NUMBERED.fullmatch(name)}
        found = Found("a table with columns f0, f1, …", [features])
    else:
        name = _choose(path, columns, array)
        features = columns[name]
        rest = {key: one for key, one in columns.items() if key != name and key not in lists}
        found = Found(f"a table, features in {name!r}", [features])
        left = [key for key in lists if key != name]
        if left:
            found.notes.append(f"left out: {one_line(', '.join(left))}")
    if "label" in rest and "class" in rest:
        found.layout = "featcache export"
        found.class_names = _class_names(rest["label"], rest.pop("class"), facts)
    _take(found, rest)
    return found


def _class_names(labels: Any, names: Any, facts: Mapping[str, str]) -> list[str] | None:
    """Return the class names of an export: those of its cache, or by label where all occur."""
    try:
        known = json.loads(facts["featcache"])["class_names"]
        return [str(name) for name in known]
    except (KeyError, TypeError, ValueError, RecursionError):
        by_label = {int(label): str(name) for label, name in zip(labels, names, strict=True)}
        by_label.pop(-1, None)
        whole = sorted(by_label) == list(range(len(by_label)))
        return [by_label[label] for label in sorted(by_label)] if whole else None


def _folder(path: Path, array: str | None, scratch: Path) -> Found:
    """Recognise a folder: clip-retrieval, thingsvision, slides, arrays by file, a file each."""
    if (path / "img_emb").is_dir():
        return _clip_retrieval(path)
    for inner in ("h5_files", "features"):
        if (path / inner).is_dir():
            return _folder(path / inner, array, scratch)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name[0] != ".")
    found = _files(path, files, array, scratch)
    texts = [file for file in files if file.name in _TEXTS]
    if texts:
        found.ids = read_lines(texts[0])
    if (path / "file_names.txt").is_file():
        found.layout = "thingsvision"
    return found


def _files(path: Path, files: Sequence[Path], array: str | None, scratch: Path) -> Found:
    """Read the files of a folder that may have features, of the first suffix that there is."""
    by_suffix: dict[str, list[Path]] = {}
    for file in files:
        by_suffix.setdefault(file.suffix.lower(), []).append(file)
    hdf5 = [file for suffix in HDF5 for file in by_suffix.get(suffix, ())]
    if hdf5:
        return _hdf5(hdf5, array, scratch)
    if ".parquet" in by_suffix:
        return _table(path, *read_parquet(by_suffix[".parquet"]), array)
    arrays = {
        file.relative_to(path).with_suffix("").as_posix(): read_npy(file)[""]
        for file in by_suffix.get(".npy", ())
    }
    if len(arrays) > 1 and array is None and all(one.ndim == 1 for one in arrays.values()):
        found = _one_each(by_suffix[".npy"], list(arrays.values()))
        found.ids = list(arrays)
        return found
    if arrays:
        return _arrays(path, arrays, array)
    others = [file for file in files if file.suffix.lower() in _READERS]
    if len(others) == 1:
        return recognise(others[0], array, scratch)
    shown = ", ".join(one_line(file.name) for file in files[:_SHOWN]) or "no files"
    raise DatasetError(
        f"{path}: expected a folder of features (features.npy and file_names.txt, img_emb/ and "
        f"metadata/, a .h5 file per slide, .parquet files), found {shown}; name one file"
    )


def _clip_retrieval(path: Path) -> Found:
    """Read clip-retrieval: img_emb/img_emb_N.npy, and metadata/metadata_N.parquet beside them."""

    def numbered(folder: str, suffix: str) -> list[Path]:
        found = [file for file in (path / folder).glob(f"*{suffix}") if file.name[0] != "."]
        return sorted(found, key=lambda file: [int(n) for n in re.findall(r"\d+", file.stem)])

    places = numbered("img_emb", ".npy")
    if not places:
        raise DatasetError(f"{path / 'img_emb'}: expected img_emb_0.npy, found no .npy file")
    found = Found("clip-retrieval", [read_npy(place)[""] for place in places])
    tables = numbered("metadata", ".parquet")
    if tables:
        columns, _ = read_parquet(tables)
        n_rows = {len(one) for one in columns.values()}
        if n_rows != {found.n_rows}:
            raise DatasetError(
                f"{path}: expected as many rows in metadata/ as in img_emb/ ({found.n_rows:,}), "
                f"found {sum(n_rows):,}; copy the folder again"
            )
        _take(found, columns)
    return found


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8, or the texts of a ``.npy`` file."""
    try:
        if path.suffix.lower() == ".npy":
            return [str(one) for one in read_npy(path)[""].tolist()]
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: expected UTF-8, found the byte {error.object[error.start]:#04x} at "
            f"{error.start}; save it as UTF-8"
        ) from None
    except OSError as error:
        raise DatasetError(
            f"{path}: expected a file with one id per line, found: {error.strerror}; check its name"
        ) from None
    return text.splitlines()
