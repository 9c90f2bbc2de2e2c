"""One folder per run: a JSON record of what was asked and found, and what it saved.

``cache/runs/20261124-101502-probe-1f3c/run.json`` beside ``head.safetensors`` or
``model.safetensors``. `featcache.compare` finds them again.

There are runs that end in one accuracy, a probe or a fine-tune, and runs that end in a
curve (`CURVES`), accuracies over the number of training images. Both are read by
`load_runs`; a comparison is of the first.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .files import check_writable, write_atomically
from .store import Cache, default_folder

__all__ = ["CURVES", "cache_facts", "load_runs", "new_run", "runs_folder", "save_run"]

RECORD = "run.json"
CURVES = ("few-shot", "learning-curve")  # kinds of runs that end in a curve

_NUMBER = (int, float)
_Shape = Mapping[str, type | tuple[type, ...]]
_SHARED: _Shape = {
    "dataset": str,
    "dataset_digest": str,
    "kind": str,
    "method": str,
    "n_test": int,
    "n_train": int,
    "run": str,
    "size": int,
    "wall_s": _NUMBER,
    "weights": str,
}
_OF_RUN: _Shape = {
    **_SHARED,
    "images_per_s": _NUMBER,
    "n_epochs": int,
    "top1": _NUMBER,
    "top1_interval": list,
}
_OF_CURVE: _Shape = {**_SHARED, "metric": str, "points": list}
_OF_POINT: _Shape = {"interval": list, "mean": _NUMBER, "n_train": int, "scores": list}


def runs_folder(folder: str | Path | None = None) -> Path:
    """Return where runs are kept: ``folder``, else ``runs`` beside the caches."""
    return Path(folder) if folder else default_folder() / "runs"


def new_run(folder: Path, label: str) -> Path:
    """Return the folder of a new run, which its first file makes; its name sorts by time.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    now = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    path = folder / f"{now}-{label}-{secrets.token_hex(2)}"
    check_writable(path)  # and no more: what ends before it has found anything leaves nothing
    return path


def save_run(path: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a finished run into its folder."""
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = json.dumps({"run": path.name, "created": created, **record}, indent=1, default=str)
    write_atomically(path / RECORD, text.encode())


def load_runs(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read every finished run's record.

    Returns
    -------
    records : list of dict
        Oldest first; those whose ``kind`` is one of `CURVES` have ``points`` and ``metric``,
        all others an accuracy.
    problems : list of str
        What stood where a record should be, a line each.
    """
    records, problems = [], []
    for path in sorted(folder.glob(f"*/{RECORD}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            wrong = _wrong(record)
            if wrong:
                raise ValueError(f"no usable {', '.join(wrong)}")
            records.append(record)
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path}: left out, not the record of a run: {error}")
    return records, problems


def _wrong(record: Any) -> list[str]:
    """Return the fields that a record lacks, or has of another type."""
    if not isinstance(record, dict) or record.get("kind") not in CURVES:
        wrong = _missing(record, _OF_RUN)
        return wrong or ["top1_interval"] * (not _are_numbers(record["top1_interval"], 2))
    wrong = _missing(record, _OF_CURVE)
    points = [] if wrong else record["points"]
    sound = all(
        not _missing(point, _OF_POINT)
        and _are_numbers(point["interval"], 2)
        and _are_numbers(point["scores"], len(point["scores"]))
        for point in points
    )
    return wrong or ["points"] * (not points or not sound)


def _are_numbers(values: list[Any], count: int) -> bool:
    return len(values) == count and all(isinstance(value, _NUMBER) for value in values)


def _missing(record: Any, shape: _Shape) -> list[str]:
    return [
        name
        for name, kind in shape.items()
        if not isinstance(record, dict) or not isinstance(record.get(name), kind)
    ]


def cache_facts(cache: Cache) -> dict[str, Any]:
    """Return what the record of a run on a cache says about its features."""
    meta = cache.meta
    return {
        "cache": cache.path,
        "features_wall_s": meta.get("wall_s", 0.0),
        "dataset": meta.get("dataset", "unnamed"),
        "dataset_digest": meta["dataset_digest"],
        "backbone": meta["backbone"],
        "weights": meta.get("weights", "unnamed"),
        "weights_sha256": meta["weights_sha256"],
        "size": meta["preprocess"]["size"],
        "engine": meta["engine"],
        "device": meta["device"],
    }
