"""Runs on the same data, side by side, and what each point gained over a probe has cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import FeatcacheError
from .progress import OnNote, silent
from .runs import load_runs, runs_folder

__all__ = ["compare", "price"]


def compare(
    dataset: str | None = None,
    *,
    runs: str | Path | None = None,
    on_note: OnNote = silent,
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
        ``dataset_digest``, ``n_train`` and ``n_test``; and ``s_per_point`` (`price`).

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
    ordered = sorted(
        records,
        key=lambda record: (record["dataset"], record["dataset_digest"], -record["top1"]),
    )
    return [{**record, "s_per_point": price(record, records)} for record in ordered]


def price(record: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> float | None:
    """Return what a fine-tune cost per percentage point gained over the best probe.

    Parameters
    ----------
    record : mapping
        Of a run.
    records : iterable of mapping
        Of all runs, among them the probes; those on the same images count.

    Returns
    -------
    float or None
        Seconds per point: the run's duration, with that of the features where it began
        with cached ones, by the difference in top-1. None of a probe, without one on the
        same images, and where nothing was gained.
    """
    probes = [
        other["top1"]
        for other in records
        if other["kind"] == "probe" and _images(other) == _images(record)
    ]
    gained = record["top1"] - max(probes, default=math.inf)
    if record["kind"] != "finetune" or gained <= 0:
        return None
    spent: float = record["wall_s"] + _seconds(record.get("features_wall_s"))
    return spent / (100 * gained)


def _images(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what two runs must share for the difference of their accuracies to mean something."""
    seen = record["n_train"] + (record.get("n_val") or 0)
    return record["dataset_digest"], seen, record["n_test"], record["size"]


def _seconds(value: Any) -> float:
    """Return a duration that older records lack."""
    return float(value) if isinstance(value, (int, float)) else 0.0
