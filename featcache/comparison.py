"""Runs on the same data, side by side, and what each point gained over a probe has cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import FeatcacheError
from .notebook import Rows
from .progress import OnNote, silent
from .runs import CURVES, load_runs, runs_folder

__all__ = ["compare", "epochs_of", "price", "run_label", "run_labels"]

_COLUMNS = (  # what a notebook shows of a record
    *("dataset", "method", "top1", "top1_interval", "n_train", "n_test", "n_epochs", "wall_s"),
    *("features_wall_s", "s_per_point", "weights", "size", "run"),
)


def compare(
    dataset: str | None = None,
    *,
    runs: str | Path | None = None,
    on_note: OnNote = silent,
) -> list[dict[str, Any]]:
    """Return the records of finished runs, those on the same data next to each other.

    Few-shot and learning curves end in no single accuracy and are left out:
    `featcache.runs.load_runs` has them too.

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
    records = [
        record
        for record in found
        if record["kind"] not in CURVES and dataset in (None, record["dataset"])
    ]
    if not records:
        raise FeatcacheError(_none_found(folder, dataset, found))
    ordered = sorted(
        records,
        key=lambda record: (record["dataset"], record["dataset_digest"], -record["top1"]),
    )
    return Rows(({**record, "s_per_point": price(record, records)} for record in ordered), _COLUMNS)


def _none_found(folder: Path, dataset: str | None, found: Iterable[Mapping[str, Any]]) -> str:
    """Say what there is instead of what was asked for."""
    there = sorted({record["dataset"] for record in found if record["kind"] not in CURVES})
    if dataset is None or not there:
        return (
            f"{folder}: expected the record of a run, found none; make one with featcache probe "
            "or featcache finetune, or name another --runs"
        )
    return (
        f"{folder}: expected runs on the data set {dataset!r}, found those on "
        f"{', '.join(there)}; name one of these, or another --runs"
    )


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


def epochs_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the epochs of a fine-tune's record, each with ``epoch``, ``train_loss`` and ``top1``.

    Of a probe, or a record that has not these numbers, there are none.
    """
    epochs = record.get("epochs")
    if not isinstance(epochs, (list, tuple)):
        return []
    wanted = ("epoch", "train_loss", "top1")
    sound = all(
        isinstance(epoch, Mapping)
        and all(isinstance(epoch.get(name), (int, float)) for name in wanted)
        for epoch in epochs
    )
    return list(epochs) if sound else []


def run_label(record: Mapping[str, Any]) -> str:
    """Return a run's method, and what sets it apart from others of the method."""
    words = [str(record.get("method", ""))]
    if record.get("kind") == "finetune":
        recipe = record.get("recipe")
        until = recipe.get("freeze_until") if isinstance(recipe, Mapping) else None
        words += [f"above {until}"] * bool(until)
        words += ["cached"] * bool(record.get("cache")) + ["LP-FT"] * bool(record.get("init_head"))
    return " ".join(words)


def run_labels(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a label for each run on a data set, which says where it differs from the others.

    Training images, weights and pixels are said of every run where they are not the same for
    all; epochs, scaling and test images where they set runs of one `run_label` apart.
    """
    plain = [run_label(record) for record in records]
    facts = [_facts(record) for record in records]
    common = [
        name
        for name in ("images", "from", "px")
        if len({fact[name] for fact in facts if fact[name]}) > 1
    ]
    labels = []
    for label, fact in zip(plain, facts, strict=True):
        said = [fact[name] for name in common]
        alike = [
            other
            for other, its in zip(facts, plain, strict=True)
            if its == label and all(other[name] == fact[name] for name in common)
        ]
        for name in ("epochs", "scale", "test"):
            if len({other[name] for other in alike}) > 1:
                said.append(fact[name])
                alike = [other for other in alike if other[name] == fact[name]]
        labels.append(", ".join((label, *filter(None, said))))
    return labels


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """Return in words what a run has in common with others, or has not."""
    scale, n_epochs = record.get("scale", "none"), record["n_epochs"]
    epochs = f"{n_epochs} epoch{'s' * (n_epochs != 1)}"
    return {
        "images": f"{record['n_train'] + (record.get('n_val') or 0):,} images",
        "test": f"{record['n_test']:,} test",
        "from": "" if record.get("method") == "scratch" else str(record.get("weights", "")),
        "px": f"{record.get('size')} px",
        "epochs": epochs if record.get("kind") == "finetune" else "",
        "scale": "" if scale == "none" else str(scale),
    }


def _images(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what two runs must share for the difference of their accuracies to mean something."""
    seen = record["n_train"] + (record.get("n_val") or 0)
    return record["dataset_digest"], seen, record["n_test"], record["size"]


def _seconds(value: Any) -> float:
    """Return a duration that older records lack."""
    return float(value) if isinstance(value, (int, float)) else 0.0
