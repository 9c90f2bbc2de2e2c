"""Records of runs, one folder each, and their comparison.

``cache/runs/20261124-101502-probe-1f3c/run.json`` stands beside ``head.safetensors`` or
``model.safetensors``. A probe or a fine-tune has one accuracy, a curve (`CURVES`) one for each
number of training images. `load_runs` reads both; `compare` compares the first.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .errors import FeatcacheError
from .files import check_writable, write_atomically
from .notebook import Rows
from .progress import OnNote, silent
from .store.cache import Cache
from .store.index import default_folder

RECORD = "run.json"
CURVES = ("few-shot", "learning-curve")  # kinds of runs with a curve

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
    """Return the folder of runs: ``folder``, else ``runs`` beside the caches."""
    return Path(folder) if folder else default_folder() / "runs"


def new_run(folder: Path, label: str) -> Path:
    """Return the folder of a new run, named by time; its first file creates it."""
    now = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    path = folder / f"{now}-{label}-{secrets.token_hex(2)}"
    check_writable(path)  # does not create it: a run without a result leaves nothing behind
    return path


def save_run(path: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a finished run into its folder."""
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = json.dumps({"run": path.name, "created": created, **record}, indent=1, default=str)
    write_atomically(path / RECORD, text.encode())


def load_runs(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the record of every finished run, oldest first, and a line for each damaged one.

    Records whose ``kind`` is one of `CURVES` have ``points`` and ``metric``, others an accuracy.
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
    """Return the fields that are missing or of another type."""
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
    """Return the facts about the features in the record of a run on a cache."""
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


_COLUMNS = (  # of a record in a notebook
    *("dataset", "method", "top1", "top1_interval", "n_train", "n_test", "n_epochs", "wall_s"),
    *("features_wall_s", "s_per_point", "weights", "size", "run"),
)


def compare(
    dataset: str | None = None,
    *,
    runs: str | Path | None = None,
    on_note: OnNote = silent,
) -> list[dict[str, Any]]:
    """Return the records of finished runs, grouped by data set.

    Few-shot and learning curves have no single accuracy and are left out.

    Parameters
    ----------
    dataset : str, optional
        Only runs on the data set of this name.
    runs : str or Path, optional
        Where the records are; ``cache/runs`` by default.
    on_note : callable
        Called with a line for each damaged record, which is left out.

    Returns
    -------
    list of dict
        Sorted by data set (name and digest), then by top-1, the best first. Every record has
        ``method``, ``top1``, ``top1_interval``, ``n_epochs``, ``epochs``, ``images_per_s``,
        ``wall_s``, ``weights``, ``dataset``, ``dataset_digest``, ``n_train``, ``n_test`` and
        ``s_per_point``: the cost of a fine-tune in seconds per percentage point gained over the
        best probe on the same images, or None.

    Raises
    ------
    FeatcacheError
        No run, or none on this data set.
    """
    folder = runs_folder(runs)
    loaded, problems = load_runs(folder)
    for problem in problems:
        on_note(problem)
    records = [
        record
        for record in loaded
        if record["kind"] not in CURVES and dataset in (None, record["dataset"])
    ]
    if not records:
        raise FeatcacheError(_none_found(folder, dataset, loaded))
    ordered = sorted(
        records,
        key=lambda record: (record["dataset"], record["dataset_digest"], -record["top1"]),
    )
    return Rows(({**record, "s_per_point": price(record, records)} for record in ordered), _COLUMNS)


def _none_found(folder: Path, dataset: str | None, records: Iterable[Mapping[str, Any]]) -> str:
    """Return an error message that lists the data sets with runs."""
    there = sorted({record["dataset"] for record in records if record["kind"] not in CURVES})
    if dataset is None or not there:
        return (
            f"{folder}: expected the record of a run, found none; make one with featcache probe "
            "or featcache finetune, or give another --runs"
        )
    return (
        f"{folder}: expected runs on the data set {dataset!r}, found those on "
        f"{', '.join(there)}; give one of these, or another --runs"
    )


def price(record: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the seconds of a fine-tune per percentage point gained over the best probe.

    The time includes that of the extraction where the run started from cached features. Only probes
    on the same images count. None for a probe, without such a probe, and where nothing was gained.
    """
    probes = [
        other["top1"]
        for other in records
        if other["kind"] == "probe" and _images(other) == _images(record)
    ]
    gained = record["top1"] - max(probes, default=math.inf)
    if record["kind"] != "finetune" or gained <= 0:
        return None
    wall_s: float = record["wall_s"] + _seconds(record.get("features_wall_s"))
    return wall_s / (100 * gained)


def epochs_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a fine-tune's epochs, each with ``epoch``, ``train_loss`` and ``top1``, or none."""
    epochs = record.get("epochs")
    if not isinstance(epochs, (list, tuple)):
        return []
    fields = ("epoch", "train_loss", "top1")
    sound = all(
        isinstance(epoch, Mapping)
        and all(isinstance(epoch.get(name), (int, float)) for name in fields)
        for epoch in epochs
    )
    return list(epochs) if sound else []


def weights_label(record: Mapping[str, Any]) -> str:
    """Return what a run's features or network come from: weights, and which backbone's."""
    backbone, weights = str(record.get("backbone", "")), str(record.get("weights", ""))
    if backbone in ("", "resnet18"):
        return weights
    return backbone if weights == "pretrained" else f"{backbone} {weights}"


def run_label(record: Mapping[str, Any]) -> str:
    """Return a run's method with the options that distinguish it from others of the method."""
    words = [str(record.get("method", ""))]
    if record.get("kind") == "finetune":
        recipe = record.get("recipe")
        until = recipe.get("freeze_until") if isinstance(recipe, Mapping) else None
        words += [f"above {until}"] * bool(until)
        words += ["LoRA"] * (isinstance(recipe, Mapping) and bool(recipe.get("lora")))
        words += ["cached"] * bool(record.get("cache")) + ["LP-FT"] * bool(record.get("init_head"))
    cuts = record.get("cuts")
    if isinstance(cuts, (list, tuple)) and list(cuts) not in (["avgpool"], ["pooled"]):
        words.append(f"on {', '.join(map(str, cuts))}")
    return " ".join(words)


def run_labels(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a label for each run on a data set, with the facts in which the runs differ.

    Training images, weights and pixels are in every label where they are not the same for all;
    epochs, scaling and test images where runs of one `run_label` differ in them.
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
        shown = [fact[name] for name in common]
        alike = [
            other
            for other, its in zip(facts, plain, strict=True)
            if its == label and all(other[name] == fact[name] for name in common)
        ]
        for name in ("epochs", "scale", "test"):
            if len({other[name] for other in alike}) > 1:
                shown.append(fact[name])
                alike = [other for other in alike if other[name] == fact[name]]
        labels.append(", ".join((label, *filter(None, shown))))
    return labels


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts of a run in which it may differ from others, in words."""
    scale, n_epochs = record.get("scale", "none"), record["n_epochs"]
    epochs = f"{n_epochs} epoch{'s' * (n_epochs != 1)}"
    return {
        "images": f"{record['n_train'] + (record.get('n_val') or 0):,} images",
        "test": f"{record['n_test']:,} test",
        "from": "" if record.get("method") == "scratch" else weights_label(record),
        "px": f"{record.get('size')} px",
        "epochs": epochs if record.get("kind") == "finetune" else "",
        "scale": "" if scale == "none" else str(scale),
    }


def _images(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what two runs must share for a comparison of their accuracies to be valid."""
    seen = record["n_train"] + (record.get("n_val") or 0)
    return record["dataset_digest"], seen, record["n_test"], record["size"]


def _seconds(value: Any) -> float:
    """Return a duration, 0 where a record lacks it."""
    return float(value) if isinstance(value, (int, float)) else 0.0
