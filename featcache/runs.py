"""Records of runs, one folder each, and their comparison.

``cache/runs/20261124-101502-probe-1f3c/run.json`` stands beside ``head.safetensors`` or
``model.safetensors``, and ``predictions.parquet`` (or ``.csv``): a row per image that was
predicted. A probe or a fine-tune has one accuracy, a curve (`CURVES`) one for each
number of training images. `load_runs` reads both; `compare` compares the first.
"""

from __future__ import annotations

import csv
import io
import json
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from .errors import FeatcacheError, missing_package, one_line, text_of
from .files import check_writable, csv_line, write_atomically
from .metrics import PairedTest, paired_test
from .notebook import Rows
from .progress import OnNote, silent
from .schema import (
    count,
    list_of,
    number,
    object_of,
    optional,
    plain_object,
    text,
    wrong_fields,
)
from .store.cache import Cache
from .store.index import default_folder

RECORD = "run.json"
CURVES = ("few-shot", "learning-curve")  # kinds of runs with a curve
# Kinds of runs without one top-1 that another run's could be compared with.
NOT_COMPARED = (*CURVES, "multilabel", "regression", "cross-validation", "survey")

_SHARE = number(0, 1)
_SHARED = {
    "dataset": text,
    "dataset_digest": text,
    "kind": text,
    "method": text,
    "n_test": count(),
    "n_train": count(),
    "size": count(),
    "wall_s": number(0),
    "weights": text,
}
_OF_RUN = {
    **_SHARED,
    "images_per_s": number(0),
    "n_epochs": count(),
    "top1": _SHARE,
    "top1_interval": list_of(_SHARE, 2),
}
_POINT = object_of(
    {
        "interval": list_of(number(), 2),
        "mean": number(),
        "n_train": count(1),
        "scores": list_of(number()),
    },
    {"shots": optional(count(1)), "wall_s": number(0)},
)
_OF_CURVE = {
    **_SHARED,
    "metric": text,
    "points": lambda value: bool(value) and list_of(_POINT)(value),
}
_ANSWER = object_of(
    {"interval": list_of(_SHARE, 2), "top1": _SHARE, "wall_s": number(0)},
    {"k": optional(count(1)), "run": optional(text), "shots": optional(count(1))},
)
_OF_SURVEY = {
    **_SHARED,
    "answers": lambda value: (
        isinstance(value, dict) and list_of(list_of(_ANSWER))([*value.values()])
    ),
    "rows": list_of(
        object_of(
            {
                "feature_dim": count(1),
                "few_shot": list_of(_ANSWER),
                "images_per_s": optional(number(0)),
                "knn": _ANSWER,
                "name": text,
                "probe": _ANSWER,
                "vs_best": optional(object_of({"difference": number(-1, 1), "p_value": _SHARE})),
            }
        )
    ),
}
_EPOCH = object_of({"epoch": count(), "train_loss": optional(number()), "top1": optional(_SHARE)})
_TRIED = {"C": number(1e-300), "score": number()}
_SWEEP = object_of(
    {"C": number(1e-300), "points": list_of(object_of(_TRIED)), "n_holdout": count()},
    {"at_edge": text},
)
# What commands, figures and tables use where it is there.
_MAYBE = {
    "C": optional(number(0)),
    "backbone": text,
    "best_epoch": optional(count()),
    "cache": optional(text),
    "check": optional(object_of({}, {"agreement": _SHARE})),
    "created": text,
    "cuts": list_of(text),
    "curve_split": optional(text),
    "epochs": lambda value: value in ([], None) or list_of(_EPOCH)(value) or number(0)(value),
    "features_wall_s": optional(number(0)),
    "fit_s": optional(number(0)),
    "gap": optional(number(0)),
    "head": optional(text),
    "init_head": optional(text),
    "k": count(1),
    "metric": text,
    "n_val": optional(count()),
    "recipe": optional(plain_object),
    "s_per_point": optional(number()),
    "scale": text,
    "seed": count(),
    "seeds": count(1),
    "solver": text,
    "sweep": optional(_SWEEP),
    "target": optional(text),
    "task": text,
    "test_cache": optional(text),
}


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


PREDICTIONS = ("predictions.parquet", "predictions.csv")
# Of every file of predictions; those of a multi-label or regression run have more.
_IN_ALL = ("id", "split", "label", "prediction", "correct", "error")


def save_predictions(run: Path, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> Path:
    """Write what a run predicted, a row per image, and return the file.

    Parquet where pyarrow is installed, else CSV. ``columns`` are of one length, ``_IN_ALL`` among
    them: ``error`` is larger the worse a prediction is, from 0 on. A name that is not UTF-8 is
    escaped.
    """
    plain = {
        name: values
        if isinstance(values, np.ndarray)
        else [text_of(one) if isinstance(one, str) else one for one in values]
        for name, values in columns.items()
    }
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        lists = [
            values.tolist() if hasattr(values, "tolist") else values for values in plain.values()
        ]
        lines = [csv_line(list(plain))]
        lines += (csv_line([_in_csv(value) for value in row]) for row in zip(*lists, strict=True))
        path = run / PREDICTIONS[1]
        write_atomically(path, "".join(lines).encode())
        return path
    buffer = io.BytesIO()
    pq.write_table(pa.table(plain), buffer, compression="zstd")
    path = run / PREDICTIONS[0]
    write_atomically(path, buffer.getbuffer())
    return path


def _in_csv(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def load_predictions(run: Path) -> dict[str, list[Any]]:
    """Read what a run predicted, as `save_predictions` was given it; nothing in it is trusted.

    A run that kept none, or a damaged file, is a FeatcacheError.
    """
    for name in PREDICTIONS:
        path = run / name
        if not path.is_file():
            continue
        try:
            columns = _read_columns(path)
            missing = [one for one in _IN_ALL if one not in columns]
            if missing:
                raise ValueError(f"no column {missing[0]!r}")
            for one, kinds in (("id", str), ("split", str), ("correct", bool), ("error", float)):
                if not all(isinstance(value, kinds) for value in columns[one]):
                    raise ValueError(f"other values than {kinds.__name__} in {one!r}")
        except ImportError as error:
            raise missing_package(path, "pyarrow", error, "parquet") from None
        # pyarrow's own errors are ValueError, OSError and others below Exception.
        except Exception as error:
            raise FeatcacheError(
                f"{path}: expected the predictions of a run, found {one_line(error)}; run it again"
            ) from None
        return columns
    raise FeatcacheError(
        f"{run}: expected predictions, found none; probe again: runs keep them since this version"
    )


def _read_columns(path: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]]
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        columns = pq.read_table(path).to_pydict()
        return columns
    with path.open(encoding="utf-8", newline="") as stream:
        names, *rows = csv.reader(stream)
    texts = zip(*rows, strict=True) if rows else ([] for _ in names)
    columns = {name: list(own) for name, own in zip(names, texts, strict=True)}
    for name in ("error", "probability", "label_probability"):
        if name in columns:
            columns[name] = [float(text) if text else math.nan for text in columns[name]]
    columns["correct"] = [{"true": True, "false": False}[text] for text in columns["correct"]]
    return columns


def hits_of(run: Path) -> dict[tuple[str, str], bool]:
    """Return whether a run was right about each test image, by its id and label."""
    kept = load_predictions(run)
    rows = zip(kept["split"], kept["id"], kept["label"], kept["correct"], strict=True)
    return {(id, str(label)): correct for split, id, label, correct in rows if split == "test"}


def compared_hits(
    first: Mapping[tuple[str, str], bool], second: Mapping[tuple[str, str], bool]
) -> PairedTest | None:
    """Compare two runs by their `hits_of`; None unless they are of the same images and labels."""
    if not first or first.keys() != second.keys():
        return None
    return paired_test(
        np.fromiter(first.values(), bool, len(first)),
        np.fromiter((second[image] for image in first), bool, len(first)),
    )


def load_runs(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the record of every finished run, oldest first, and a line for each damaged one.

    Records whose ``kind`` is one of `CURVES` have ``points`` and ``metric``, all others that are
    compared an accuracy.
    """
    records, problems = [], []
    for path in sorted(folder.glob(f"*/{RECORD}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            wrong = _wrong(record)
            if wrong:
                raise ValueError(f"no usable {', '.join(wrong)}")
            # The folder's own name: a copy has another than its record says.
            records.append({**record, "run": path.parent.name})
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path}: left out, not the record of a run: {one_line(error)}")
    return records, problems


def _wrong(record: Any) -> list[str]:
    """Return the fields that are missing, or are not what everybody who reads a record expects."""
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str):
        return ["kind"]
    if kind in CURVES:
        return wrong_fields(record, _OF_CURVE, _MAYBE)
    if kind == "survey":
        return wrong_fields(record, _OF_SURVEY, _MAYBE)
    return wrong_fields(record, _SHARED if kind in NOT_COMPARED else _OF_RUN, _MAYBE)


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
        "size": meta["preprocess"].get("size", 0),  # of imported features it is unknown
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

    Curves, cross-validation, multi-label and regression have no accuracy on one test split and are
    left out.

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
        ``wall_s``, ``weights``, ``dataset``, ``dataset_digest``, ``n_train``, ``n_test``,
        ``s_per_point``: the cost of a fine-tune in seconds per percentage point gained over the
        best probe on the same images, or None; and ``vs_best``: the fields of a `PairedTest` of
        the best run on the data set against this one. That is None for the best run, and where
        they do not compare image by image: a run kept no predictions, or is of other test images
        or labels.

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
        if record["kind"] not in NOT_COMPARED and dataset in (None, record["dataset"])
    ]
    if not records:
        raise FeatcacheError(_none_found(folder, dataset, loaded))
    ordered = sorted(
        records,
        key=lambda record: (record["dataset"], record["dataset_digest"], -record["top1"]),
    )
    return Rows(
        (
            {**record, "s_per_point": price(record, records), "vs_best": versus}
            for record, versus in zip(ordered, _versus_best(folder, ordered), strict=True)
        ),
        _COLUMNS,
    )


def _versus_best(
    folder: Path, ordered: Sequence[Mapping[str, Any]]
) -> Iterable[dict[str, Any] | None]:
    """Yield the paired test of the first run on its data set against each run."""
    digest, best = None, None
    for record in ordered:
        try:
            hits = hits_of(folder / Path(record["run"]).name)
        except FeatcacheError:  # of an older version, of a fine-tune, or damaged
            hits = {}
        if (record["dataset"], record["dataset_digest"]) != digest:
            digest, best = (record["dataset"], record["dataset_digest"]), hits
            yield None
            continue
        tested = compared_hits(best or {}, hits)
        yield None if tested is None else asdict(tested)


def _none_found(folder: Path, dataset: str | None, records: Iterable[Mapping[str, Any]]) -> str:
    """Return an error message that lists the data sets with runs."""
    there = sorted({record["dataset"] for record in records if record["kind"] not in NOT_COMPARED})
    if dataset is None or not there:
        others = sorted({record["kind"] for record in records})
        found = f"only runs of {', '.join(others)}" if others else "none"
        return (
            f"{folder}: expected the record of a run with an accuracy, found {found}; "
            "make one with featcache probe or featcache finetune, or give another --runs"
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
    wall_s: float = record["wall_s"] + (record.get("features_wall_s") or 0)
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
        recipe = record.get("recipe") or {}
        words += [f"above {recipe.get('freeze_until')}"] * bool(recipe.get("freeze_until"))
        words += ["LoRA"] * bool(recipe.get("lora"))
        words += ["cached"] * bool(record.get("cache")) + ["LP-FT"] * bool(record.get("init_head"))
    words += [f"of {one_line(record.get('target'))}"] * bool(record.get("target"))
    cuts = record.get("cuts")
    if isinstance(cuts, (list, tuple)) and list(cuts) not in (["avgpool"], ["pooled"]):
        words.append(f"on {', '.join(map(str, cuts))}")
    return " ".join(words)


_COMMON = ("images", "from", "px")  # in every label where not all runs share them
_SHOWN_OPTIONS = ("distance", "temperature", "metric", "class_weight", "engine", "seed")
_SAID_ELSEWHERE = ("freeze_until", "lora", "epochs", "weight_decay", "target")  # of the options


def run_labels(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a label for each run on a data set, with the facts in which the runs differ.

    Training images, weights and pixels are in every label where they are not the same for all;
    epochs, scaling, test images and options where runs of one `run_label` differ in them.
    """
    plain = [run_label(record) for record in records]
    facts = [_facts(record) for record in records]
    common = [name for name in _COMMON if len({fact[name] for fact in facts if fact[name]}) > 1]
    labels = []
    for label, fact in zip(plain, facts, strict=True):
        shown = [fact[name] for name in common]
        alike = [
            other
            for other, its in zip(facts, plain, strict=True)
            if its == label and all(other[name] == fact[name] for name in common)
        ]
        for name in dict.fromkeys(name for other in alike for name in other):
            if len({other.get(name, "") for other in alike}) > 1:
                shown.append(fact.get(name, ""))
                alike = [other for other in alike if other.get(name, "") == fact.get(name, "")]
        labels.append(", ".join((label, *filter(None, shown))))
    return labels


def fold(records: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], str]]:
    """Return runs on a data set in order, those with one label and one result as one.

    Each is the newest of its kind, with its label, which says how many there are.
    """
    kept: dict[tuple[Any, ...], tuple[Mapping[str, Any], str, int]] = {}
    for record, label in zip(records, run_labels(records), strict=True):
        key = (label, record["top1"], record["n_epochs"])
        other, _, n = kept.get(key, (record, label, 0))
        newest = max(other, record, key=lambda one: str(one.get("created", "")))
        kept[key] = newest, label, n + 1
    return [
        (record, f"{label} ({n} runs)" if n > 1 else label) for record, label, n in kept.values()
    ]


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts of a run in which it may differ from others, in words."""
    scale, n_epochs = record.get("scale", "none"), record["n_epochs"]
    epochs = f"{n_epochs} epoch{'s' * (n_epochs != 1)}"
    given = record.get("kind") == "probe" and not record.get("sweep") and record.get("C")
    options = {
        name: value
        for part in ("recipe", "question")
        if isinstance(record.get(part), Mapping)
        for name, value in record[part].items()
        if name not in _SAID_ELSEWHERE
    }
    options |= {name: record.get(name) for name in _SHOWN_OPTIONS}
    return {
        "images": f"{record['n_train'] + (record.get('n_val') or 0):,} images",
        "from": "" if record.get("method") == "scratch" else weights_label(record),
        "px": f"{record.get('size')} px",
        "epochs": epochs if record.get("kind") == "finetune" else "",
        "scale": "" if scale == "none" else str(scale),
        "test": f"{record['n_test']:,} test",
        "penalty": f"C = {given:.3g}" if given else "",
        **{
            name: f"{name.replace('_', ' ')} {one_line(value)}"
            for name, value in options.items()
            if value is not None and value != ""
        },
    }


def _images(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what two runs must share for a comparison of their accuracies to be valid."""
    seen = record["n_train"] + (record.get("n_val") or 0)
    question = repr(record.get("question") or {})
    return record["dataset_digest"], seen, record["n_test"], record["size"], question
