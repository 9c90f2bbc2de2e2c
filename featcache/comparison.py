"""Runs on the same data, side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import FeatcacheError
from .runs import load_runs, runs_folder

__all__ = ["compare"]


def _unheard(_: str) -> None:
    """Say nothing."""


def compare(
    dataset: str | None = None,
    *,
    runs: str | Path | None = None,
    on_note: Callable[[str], None] = _unheard,
) -> list[dict[str, Any]]:
    """Return the records of finished runs, those on the same data next to each other.

    Parameters
    ----------
    dataset : str, optional
        Only runs on the data set of this name.
    runs : str or Path, optional
        Where the records are; ``cache/runs`` by default.
    on_note : callable
        Hears of files that are no records; they are left out.

    Returns
    -------
    list of dict
        By data set (name and digest), then by top-1, the best first. Every
        record has ``method``, ``top1``, ``top1_interval``, ``n_epochs``,
        ``epochs``, ``images_per_s``, ``wall_s``, ``weights``, ``dataset``,
        ``dataset_digest``, ``n_train`` and ``n_test``.

    Raises
    ------
    FeatcacheError
        There is no such run.
    """
    folder = runs_folder(runs)
    found, problems = load_runs(folder)
    for problem in problems:
        on_note(problem)
    records = [record for record in found if dataset is None or record["dataset"] == dataset]
    if not records:
        wanted = f" on data set {dataset!r}" if dataset else ""
        raise FeatcacheError(
            f"{folder}: expected the record of a run{wanted}, found none; make one with featcache "
            "probe or featcache finetune"
        )
    return sorted(
        records,
        key=lambda record: (record["dataset"], record["dataset_digest"], -record["top1"]),
    )
