"""One folder per run: a JSON record of what was asked and found, and what it saved.

``cache/runs/20261124-101502-probe-1f3c/run.json`` beside ``head.safetensors`` or
``model.safetensors``. `featcache.compare` finds them again.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .errors import FeatcacheError
from .files import check_writable, write_atomically
from .store import Cache, default_folder

__all__ = ["cache_facts", "load_runs", "new_run", "runs_folder", "save_run"]

RECORD = "run.json"


def runs_folder(folder: str | Path | None = None) -> Path:
    """Return where runs are kept: ``folder``, else ``runs`` beside the caches."""
    return Path(folder) if folder else default_folder() / "runs"


def new_run(folder: Path, label: str) -> Path:
    """Make the folder of a new run; its name sorts by time.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    now = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    path = folder / f"{now}-{label}-{secrets.token_hex(2)}"
    check_writable(path)
    return path


def save_run(path: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a finished run into its folder."""
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = json.dumps({"run": path.name, "created": created, **record}, indent=1, default=str)
    write_atomically(path / RECORD, text.encode())


def load_runs(folder: Path) -> list[dict[str, Any]]:
    """Return every finished run's record, oldest first.

    Raises
    ------
    FeatcacheError
        A record that is not JSON.
    """
    records = []
    for path in sorted(folder.glob(f"*/{RECORD}")):
        try:
            records.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise FeatcacheError(
                f"{path}: expected the JSON record of a run, found: {error}; delete that folder"
            ) from None
    return records


def cache_facts(cache: Cache) -> dict[str, Any]:
    """Return what the record of a run on a cache says about its features."""
    meta = cache.meta
    return {
        "cache": cache.path,
        "features_wall_s": meta["wall_s"],
        "dataset": meta["dataset"],
        "dataset_digest": meta["dataset_digest"],
        "backbone": meta["backbone"],
        "weights": meta["weights"],
        "weights_sha256": meta["weights_sha256"],
        "size": meta["preprocess"]["size"],
        "engine": meta["engine"],
        "device": meta["device"],
    }
