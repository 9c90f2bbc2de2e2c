"""A cache in the formats of others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError, RecipeError
from ..files import check_writable, user_path
from ..progress import OnProgress, silent
from ..store import Cache, load, newest_cache
from ._npz import write_npz
from ._parquet import write_parquet
from ._reading import Reading
from ._safetensors import write_safetensors
from ._tensorboard import PROJECTOR_ROWS, is_projector, write_projector

__all__ = ["FORMATS", "SPLITS", "ExportResult", "export"]

# Each format, and how the name of its file ends; TensorBoard wants a folder.
FORMATS = {
    "npz": ".npz",
    "parquet": ".parquet",
    "safetensors": ".safetensors",
    "tensorboard": "-projector",
}
SPLITS = {"all": ("train", "test"), "train": ("train",), "test": ("test",)}
_WRITERS = {"npz": write_npz, "parquet": write_parquet, "safetensors": write_safetensors}
# Arrays that a format has a place for; the others have one for all.
_WANTED: dict[str, Callable[[str], bool]] = {
    "parquet": lambda name: name != "skipped",
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
        Images in it.
    feature_dim : int
        Numbers per image and view.
    size_bytes : int
        On the disk.
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
    to: str = "npz",
    output: str | Path | None = None,
    *,
    split: str = "all",
    limit: int | None = None,
    force: bool = False,
    on_progress: OnProgress = silent,
) -> ExportResult:
    """Write a cache in another format, verified on the way.

    Memory stays the same however large the cache is, but for ids and labels.

    Parameters
    ----------
    cache : str, Path or Cache, optional
        The newest in ``cache/`` by default.
    to : str
        ``"npz"``: arrays ``train_features``, ``train_labels``, ``train_ids``, …,
        ``class_names`` and ``meta``, which `numpy.load` opens without pickle.
        ``"safetensors"``: the same arrays, ids as bytes (N, W).
        ``"parquet"``: one row per image; needs pyarrow.
        ``"tensorboard"``: a folder for its projector.
    output : str or Path, optional
        A file, or a folder for it; for TensorBoard the folder itself. Beside the cache
        by default.
    split : str
        ``"all"``, ``"train"`` or ``"test"``.
    limit : int, optional
        For TensorBoard: images at most, drawn with the proportions of the classes;
        10,000 by default.
    force : bool
        Replace ``output`` if it is there.
    on_progress : callable
        Hears of bytes.

    Returns
    -------
    ExportResult

    Raises
    ------
    RecipeError
        A format, split or limit that there is not.
    CacheError
        The cache is missing or damaged; nothing is written.
    OutputError
        The output is there already, or cannot be written.
    EngineUnavailableError
        The format needs a package that is not installed; the message names it.
    """
    started = time.perf_counter()
    for what, value, known in (("to", to, FORMATS), ("split", split, SPLITS)):
        if value not in known:
            raise RecipeError(f"{what}: expected one of {', '.join(known)}, found {value!r}")
    if limit is not None and (to != "tensorboard" or limit < 1):
        raise RecipeError(
            f"limit: expected 1 image or more, and only for tensorboard, found {limit} for {to}"
        )
    if not isinstance(cache, Cache):
        cache = load(cache if cache is not None else newest_cache())
    path = _output_path(cache, to, output)
    _check_output(path, cache, to, force)
    for role in SPLITS[split]:
        getattr(cache, role).labels  # noqa: B018 -- of a class each, or refused here
    reading = Reading(cache, SPLITS[split], _WANTED.get(to, lambda name: True), on_progress)
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
            f"{path}: is there already; use --force to replace it, or name another output"
        )
    if to != "tensorboard":
        check_writable(path)
    elif os.path.lexists(path) and (path.is_symlink() or not is_projector(path)):
        # A folder is replaced whole: never one that holds something else.
        raise OutputError(
            f"{path}: expected a folder with TensorBoard's files alone to replace, found other "
            "things; name another output"
        )
