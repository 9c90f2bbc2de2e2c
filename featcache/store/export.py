"""Exporting a cache to npz, Parquet, CSV, safetensors, or a folder for TensorBoard."""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import OutputError, RecipeError, missing_package, text_of, visible_line
from ..files import (
    check_writable,
    csv_line,
    replace_folder,
    replaced_file,
    told_if_unwritable,
    user_path,
    write_atomically,
)
from ..options import check_choice
from ..progress import OnProgress, Progress, silent
from ..tables.table import Column
from .cache import Cache, load, newest_cache
from .format import ROLES, StoredArray, decode_id, label_names
from .reader import iterate_rows


class Reading:
    """Reads the arrays to be exported, by names such as ``"train_views_hflip"``."""

    def __init__(
        self,
        cache: Cache,
        roles: tuple[str, ...],
        exported: Callable[[str], bool],
        on_progress: OnProgress,
    ) -> None:
        self.cache = cache
        self.roles = roles
        self.arrays = {
            name.replace("/", "_"): array
            for name, array in cache.index.arrays.items()
            if name.partition("/")[0] in roles and exported(name.partition("/")[2])
        }
        self._on_progress = on_progress
        self._done = 0

    @cached_property
    def columns(self) -> Mapping[str, Column]:
        """Columns of the attached table, one value per image of the splits that are exported."""
        table = self.cache.table
        if table is None:
            return {}
        splits = self.cache.splits()
        roles = np.repeat([role for role, _ in splits], [len(split) for _, split in splits])
        return table.take(np.flatnonzero(np.isin(roles, self.roles))).columns

    @property
    def n_rows(self) -> int:
        """Number of images, of all splits."""
        return sum(self.arrays[f"{role}_labels"].shape[0] for role in self.roles)

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """Yield the rows of an array, verified, as `iterate_rows` does."""
        total = sum(array.size_bytes for array in self.arrays.values())
        for piece in iterate_rows(self.arrays[name]):
            yield piece
            self._done += piece.nbytes
            self._on_progress(Progress("exporting", self._done, total, "B"))

    def whole(self, name: str) -> np.ndarray:
        """Return a small array: ids or labels."""
        array = self.arrays[name]
        return np.concatenate([np.empty((0, *array.row_shape), array.dtype), *self.pieces(name)])

    def batches(self, name: str, n_rows: int) -> Iterator[np.ndarray]:
        """Yield the rows of an array, ``n_rows`` at a time; the last batch may be smaller."""
        held: list[np.ndarray] = []
        for piece in self.pieces(name):
            while len(piece):
                room = n_rows - sum(map(len, held))
                held.append(piece[:room])
                piece = piece[room:]
                if sum(map(len, held)) == n_rows:
                    yield np.concatenate(held)
                    held = []
        if held:
            yield np.concatenate(held)


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name when it is complete."""
    with replaced_file(path) as descriptor, os.fdopen(os.dup(descriptor), "wb") as stream:
        yield stream


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with _replaced(path) as stream, io.TextIOWrapper(stream, "utf-8", newline="\n") as text:
        text.writelines(lines)


_ANY_DATE = (1980, 1, 1, 0, 0, 0)  # so that the same cache gives the same bytes


def write_npz(path: Path, reading: Reading) -> None:
    """Write every array uncompressed, ids as Unicode, with ``class_names`` and ``meta`` (JSON)."""
    with _replaced(path) as file, zipfile.ZipFile(file, "w") as archive:

        def write(name: str, like: np.ndarray | StoredArray, pieces: Iterable[np.ndarray]) -> None:
            member = zipfile.ZipInfo(f"{name}.npy", _ANY_DATE)
            member.external_attr = 0o644 << 16
            header = {"descr": like.dtype.str, "fortran_order": False, "shape": like.shape}
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                for piece in pieces:
                    stream.write(piece.reshape(-1).view(np.uint8).data)

        for name, array in reading.arrays.items():
            if array.dtype.kind == "S":
                ids = [decode_id(encoded) for encoded in reading.whole(name).tolist()]
                texts = np.array(ids, dtype=f"<U{max(map(len, ids), default=1) or 1}")
                write(name, texts, [texts])
            else:
                write(name, array, reading.pieces(name))
        class_names = np.array(reading.cache.class_names, dtype=str)
        write("class_names", class_names, [class_names])
        meta = np.array(json.dumps(reading.cache.meta))
        write("meta", meta, [meta])


_GROUP_BYTES = 64 << 20
_GROUP_ROWS = 1 << 16
_REPEATED = ["split", "class"]  # columns of few values, stored as dictionaries


def write_parquet(path: Path, reading: Reading) -> None:
    """Write split, id, label, class, the attached table, features, and each view and cut.

    Features are fixed_size_list<float32>, maps flattened. A view that a split lacks is null there
    and then list<float32>: pyarrow up to 25 does not read nulls among lists of a fixed size. The
    provenance is JSON in the schema's metadata, under ``featcache``.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package("parquet", "pyarrow", error, "parquet") from None

    widths = _widths(reading)
    more = _column_names(reading, widths)
    kinds = {
        "text": pyarrow.string(),
        "number": pyarrow.float64(),
        "list": pyarrow.list_(pyarrow.string()),
    }

    def list_type(name: str) -> Any:
        everywhere = all(f"{role}_{name}" in reading.arrays for role in reading.roles)
        return pyarrow.list_(pyarrow.float32(), widths[name] if everywhere else -1)

    group = max(1, min(_GROUP_ROWS, _GROUP_BYTES // (4 * sum(widths.values()))))
    schema = pyarrow.schema(
        [
            pyarrow.field("split", pyarrow.string()),
            pyarrow.field("id", pyarrow.string()),
            pyarrow.field("label", pyarrow.int64()),
            pyarrow.field("class", pyarrow.string()),
            *(
                pyarrow.field(text_of(name), kinds[reading.columns[own].kind])
                for name, own in more.items()
            ),
            *(pyarrow.field(name, list_type(name)) for name in widths),
        ],
        metadata={"featcache": json.dumps(reading.cache.meta)},
    )
    with (
        _replaced(path) as stream,
        parquet.ParquetWriter(stream, schema, use_dictionary=_REPEATED) as writer,
    ):
        row = 0
        for role in reading.roles:
            for columns in _groups(reading, role, widths, group):
                stop = row + len(columns["label"])
                for name, own in more.items():
                    columns[text_of(name)] = _values(reading.columns[own], slice(row, stop))
                row = stop
                arrays = [_column(pyarrow, columns[field.name], field.type) for field in schema]
                writer.write_table(pyarrow.table(arrays, schema=schema))


def _values(column: Column, rows: slice) -> list[Any]:
    """Return values of a column as pyarrow takes them, None where missing."""
    if column.kind == "number":
        return [None if value != value else value for value in column.values[rows].tolist()]
    if column.kind == "list":
        parts = column.values[rows]
        return [None if part is None else [*map(text_of, part)] for part in parts]
    return [None if text is None else text_of(text) for text in column.values[rows]]


def _widths(reading: Reading) -> dict[str, int]:
    """Return the columns of features, and the numbers that each has per image."""
    return {
        name.partition("_")[2]: int(np.prod(array.row_shape))
        for name, array in reading.arrays.items()
        if array.dtype.kind == "f"
    }


def _groups(
    reading: Reading, role: str, widths: dict[str, int], n_rows: int
) -> Iterator[dict[str, Any]]:
    """Yield the columns of some rows: text, numbers, or (n, width) of features."""
    present = [name for name in ("ids", "labels", *widths) if f"{role}_{name}" in reading.arrays]
    classes = label_names(reading.cache.class_names)
    walks = [reading.batches(f"{role}_{name}", n_rows) for name in present]
    for batch in zip(*walks, strict=True):
        columns: dict[str, Any] = dict(zip(present, batch, strict=True))
        labels = columns.pop("labels")
        rows = len(labels)
        yield {
            "split": [role] * rows,
            "id": [text_of(decode_id(name)) for name in columns.pop("ids").tolist()],
            "label": labels,
            "class": [text_of(classes[label]) for label in labels],
            **{name: (rows, columns.get(name)) for name in widths},
        }


def _column(pyarrow: Any, values: Any, kind: Any) -> Any:
    if not isinstance(values, tuple):
        return pyarrow.array(values, kind)
    n_rows, features = values
    if features is None:
        return pyarrow.nulls(n_rows, kind)
    numbers = pyarrow.array(features.reshape(-1).astype(np.float32, copy=False))
    if pyarrow.types.is_fixed_size_list(kind):
        return pyarrow.FixedSizeListArray.from_arrays(numbers, kind.list_size)
    starts = np.arange(0, len(numbers) + 1, len(numbers) // n_rows, np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(starts), numbers)


_CSV_ROWS = 4096
_FACTS = ("split", "id", "label", "class")


def _column_names(reading: Reading, taken: Iterable[str]) -> dict[str, str]:
    """Return columns of the attached table by name in an export: ``table.X`` if X is taken."""
    reserved = {*_FACTS, *taken}
    return {f"table.{name}" if name in reserved else name: name for name in reading.columns}


def write_csv(path: Path, reading: Reading) -> None:
    """Write split, id, label, class, the attached table, and f0 to f(D-1) of the first cut.

    Nine digits give every float32 back.
    """
    _write_lines(path, _csv_lines(reading))


def _csv_lines(reading: Reading) -> Iterator[str]:
    width = int(np.prod(reading.arrays[f"{reading.roles[0]}_features"].row_shape))
    numbered = [f"f{number}" for number in range(width)]
    more = _column_names(reading, numbered)
    texts = [reading.columns[own].texts() for own in more.values()]
    yield csv_line([*_FACTS, *map(text_of, more), *numbered])
    row = 0
    for role in reading.roles:
        for columns in _groups(reading, role, {"features": width}, _CSV_ROWS):
            rows = columns["features"][1].reshape(-1, width).tolist()
            for *facts, numbers in zip(*(columns[key] for key in _FACTS), rows, strict=True):
                labels = (text_of(column[row] or "") for column in texts)
                numerals = (f"{number:.9g}" for number in numbers)
                yield csv_line([*map(str, facts), *labels, *numerals])
                row += 1


_DTYPES = {"<f4": "F32", "<f2": "F16", "<i8": "I64"}
_ALIGNMENT_BYTES = 8


def write_safetensors(path: Path, reading: Reading) -> None:
    """Write every array under its name; the metadata has ``class_names`` and ``meta`` as JSON.

    The format has no text. Ids are uint8 (N, W), UTF-8 padded with zeros:
    ``ids.numpy().view(f"S{ids.shape[1]}")[:, 0]`` gives the names.
    """
    widths = {
        name: 1 if array.dtype.kind == "S" else array.dtype.itemsize
        for name, array in reading.arrays.items()
    }
    # Wide numbers first, so that each array is aligned.
    names = sorted(widths, key=widths.__getitem__, reverse=True)
    header: dict[str, object] = {
        "__metadata__": {
            "class_names": json.dumps(reading.cache.class_names),
            "meta": json.dumps(reading.cache.meta),
        }
    }
    end = 0
    for name in names:
        array = reading.arrays[name]
        start, end = end, end + array.size_bytes
        header[name] = {
            "dtype": _DTYPES.get(array.dtype.str, "U8"),
            "shape": [*array.shape, *[array.dtype.itemsize] * (array.dtype.kind == "S")],
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    with _replaced(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in reading.pieces(name):
                stream.write(piece.reshape(-1).view("u1").data)


PROJECTOR_ROWS = 10_000  # as many as t-SNE in a browser can process
_CONFIG = "projector_config.pbtxt"
_TENSORS = "tensors.tsv"
_METADATA = "metadata.tsv"
_LIMIT_SEED = 0


def write_projector(folder: Path, reading: Reading, limit: int) -> int:
    """Write a folder for TensorBoard's projector, or replace it; return the number of images.

    One line per image: its features (7 digits), and id, class, label and split.
    """
    labels = {role: reading.whole(f"{role}_labels") for role in reading.roles}
    chosen = _draw(labels, limit)
    with _replaced_folder(folder) as hidden:
        _write_lines(hidden / _TENSORS, _tensor_lines(reading, chosen))
        _write_lines(hidden / _METADATA, _metadata_lines(reading, chosen, labels))
        config = (
            f'embeddings {{\n  tensor_name: "features"\n  tensor_path: "{_TENSORS}"\n'
            f'  metadata_path: "{_METADATA}"\n}}\n'
        )
        write_atomically(hidden / _CONFIG, config.encode())
    return sum(map(len, chosen.values()))


def is_projector(folder: Path) -> bool:
    """Tell whether a folder holds the files of `write_projector` and nothing else."""
    ours = {_CONFIG, _TENSORS, _METADATA}
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= ours


def _draw(labels: dict[str, np.ndarray], limit: int) -> dict[str, np.ndarray]:
    """Return sorted rows of each split: a fixed draw with each class's share to within one image.

    It takes rows at equal distances from all rows, ordered by split and class, else at random.
    """
    splits = np.repeat(np.arange(len(labels)), [len(values) for values in labels.values()])
    rows = np.concatenate([np.arange(len(values)) for values in labels.values()])
    classes = np.concatenate(list(labels.values()))
    order = np.lexsort((np.random.default_rng(_LIMIT_SEED).random(len(rows)), classes, splits))
    n_chosen = min(limit, len(rows))
    taken = order[(2 * np.arange(n_chosen) + 1) * len(rows) // max(2 * n_chosen, 1)]
    return {
        role: np.sort(rows[taken[splits[taken] == number]]) for number, role in enumerate(labels)
    }


def _tensor_lines(reading: Reading, chosen: dict[str, np.ndarray]) -> Iterator[str]:
    for role, rows in chosen.items():
        start = 0
        for piece in reading.pieces(f"{role}_features"):
            here = rows[(rows >= start) & (rows < start + len(piece))] - start
            for features in piece[here]:
                yield "\t".join(f"{number:.7g}" for number in features.ravel().tolist()) + "\n"
            start += len(piece)


def _metadata_lines(
    reading: Reading, chosen: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> Iterator[str]:
    yield "id\tclass\tlabel\tsplit\n"
    names = label_names(reading.cache.class_names)
    for role, rows in chosen.items():
        ids = reading.whole(f"{role}_ids")[rows]
        for name, label in zip(ids.tolist(), labels[role][rows].tolist(), strict=True):
            # Unprintable characters, which could end a cell or a line, are escaped.
            cells = [text_of(visible_line(text)) for text in (decode_id(name), names[label])]
            yield "\t".join((*cells, str(label), role)) + "\n"


@contextmanager
def _replaced_folder(folder: Path) -> Iterator[Path]:
    """Show a folder under its final name when everything in it is on the disk."""
    hidden = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        with told_if_unwritable(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            hidden.mkdir()
            yield hidden
            replace_folder(hidden, folder)
    except OutputError as error:  # of a file in it: replace the temporary name
        raise OutputError(str(error).replace(str(hidden), str(folder))) from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


# Each format with the end of its output's name; TensorBoard's is a folder.
FORMATS = {
    "npz": ".npz",
    "parquet": ".parquet",
    "csv": ".csv",
    "safetensors": ".safetensors",
    "tensorboard": "-projector",
}
SPLITS = ("all", *ROLES)
_WRITERS = {
    "npz": write_npz,
    "parquet": write_parquet,
    "csv": write_csv,
    "safetensors": write_safetensors,
}
# Which arrays go into a format; every array goes into the others.
_EXPORTED: dict[str, Callable[[str], bool]] = {
    "parquet": lambda name: name not in ("skipped", "content_hashes"),
    "csv": lambda name: name in ("features", "ids", "labels"),
    "tensorboard": lambda name: name in ("features", "ids", "labels"),
}


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Parameters
    ----------
    output : Path
        The file, or TensorBoard's folder.
    to : str
        The format.
    n_rows : int
        Number of images.
    feature_dim : int
        Numbers per image and view.
    size_bytes : int
        Size on the disk.
    wall_s : float
        Duration.
    """

    output: Path
    to: str
    n_rows: int
    feature_dim: int
    size_bytes: int
    wall_s: float


def export(
    cache: str | Path | Cache | None = None,
    to: str | None = None,
    output: str | Path | None = None,
    *,
    split: str = "all",
    limit: int | None = None,
    force: bool = False,
    on_progress: OnProgress = silent,
) -> ExportResult:
    """Export a cache to another format, and verify it on the way.

    Memory does not grow with the features of the cache.

    Parameters
    ----------
    cache : str, Path or Cache, optional
        The newest in ``cache/`` by default.
    to : str, optional
        By default what the suffix of ``output`` says, and npz without one.
        ``"npz"``: arrays ``train_features``, ``train_labels``, ``train_ids``, …,
        ``class_names`` and ``meta``, which `numpy.load` opens without pickle.
        ``"safetensors"``: the same arrays, ids as bytes (N, W).
        ``"parquet"``: one row per image, with the attached table; needs pyarrow.
        ``"csv"``: the same, the features of the first cut as ``f0``, ``f1``, ….
        ``"tensorboard"``: a folder for its projector.
    output : str or Path, optional
        A file, or a folder for it; for TensorBoard the folder itself. Beside the cache
        by default.
    split : str
        ``"all"``, ``"train"``, ``"val"`` or ``"test"``.
    limit : int, optional
        For TensorBoard: images at most, drawn with the proportions of the classes;
        10,000 by default.
    force : bool
        Replace ``output`` if it exists.
    on_progress : callable
        Called with the progress in bytes.

    Returns
    -------
    ExportResult

    Raises
    ------
    RecipeError
        An unknown format or split, a suffix of another format, or a limit below 1 or for another
        format.
    CacheError
        The cache is missing or damaged; nothing is written.
    OutputError
        The output exists already, or cannot be written.
    EngineUnavailableError
        The format needs a package that is not installed; the message names it.
    """
    started = time.perf_counter()
    to = chosen_format(to, output)
    for what, value, known in (("to", to, FORMATS), ("split", split, SPLITS)):
        check_choice(what, value, known)
    if limit is not None and (to != "tensorboard" or limit < 1):
        raise RecipeError(
            f"limit: expected 1 image or more, and only for tensorboard, found {limit} for {to}"
        )
    if not isinstance(cache, Cache):
        cache = load(cache if cache is not None else newest_cache())
    splits = {role: part for role, part in cache.splits() if split in ("all", role)}
    if not splits:
        raise RecipeError(f"split: {cache.path} has no split val; export train, test or all")
    path = _output_path(cache, to, output)
    _check_output(path, cache, to, force)
    for part in splits.values():
        part.labels  # noqa: B018 -- raises where a label has no class
    reading = Reading(cache, tuple(splits), _EXPORTED.get(to, lambda name: True), on_progress)
    n_rows = reading.n_rows
    if to == "tensorboard":
        n_rows = write_projector(path, reading, limit or PROJECTOR_ROWS)
    else:
        _WRITERS[to](path, reading)
    files = path.iterdir() if path.is_dir() else (path,)
    return ExportResult(
        output=path,
        to=to,
        n_rows=n_rows,
        feature_dim=cache.feature_dim,
        size_bytes=sum(file.stat().st_size for file in files),
        wall_s=time.perf_counter() - started,
    )


def chosen_format(to: str | None, output: str | Path | None) -> str:
    """Return the format that is asked for, by its name or by the suffix of the output."""
    suffix = "" if output is None else user_path(output).suffix
    named = next((name for name, end in FORMATS.items() if end == suffix.lower()), None)
    if to is None:
        if named or not suffix or user_path(str(output)).is_dir():
            return named or "npz"
        ends = ", ".join(end for end in FORMATS.values() if end[0] == ".")
        raise RecipeError(
            f"{output}: expected a name that ends in {ends}, found {suffix}; name one of these, or "
            "say the format with --to"
        )
    if named not in (None, to) and to in FORMATS:
        raise RecipeError(
            f"{output}: expected a name for {to}, found that of {named}; leave out --to {to}, or "
            f"name it {Path(str(output)).stem}{FORMATS[to]}"
        )
    return to


def _output_path(cache: Cache, to: str, output: str | Path | None) -> Path:
    beside = cache.path.with_name(cache.path.stem + FORMATS[to])
    if output is None:
        return beside
    path = user_path(output)
    if not path.name:  # "." is a folder with a name like any other
        path = Path(os.path.abspath(path))
    return path / beside.name if path.is_dir() and to != "tensorboard" else path


def _check_output(path: Path, cache: Cache, to: str, force: bool) -> None:
    if os.path.realpath(path) == os.path.realpath(cache.path):
        raise OutputError(f"{path}: is the cache itself; name another output")
    if os.path.lexists(path) and not force:
        raise OutputError(
            f"{path}: exists already; use --force to replace it, or name another output"
        )
    if to != "tensorboard":
        check_writable(path)
    elif os.path.lexists(path) and (path.is_symlink() or not is_projector(path)):
        # A folder is replaced as a whole: never one that holds anything else.
        raise OutputError(
            f"{path}: expected a folder with TensorBoard's files alone to replace, found other "
            "things; name another output"
        )
