"""The model card: what a shipped file does, how good it is, and what nobody has tested."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import visible_line
from ..progress import OnNote
from ..runs import RECORD, load_runs, runs_folder
from ..schema import count, list_of, number, object_of, optional, text, wrong_fields

_SHARE = number(0, 1)
_INTERVAL = optional(list_of(number(), 2))
# What the card takes from a record, besides what `load_runs` has checked.
_FIELDS = {
    "evaluation": object_of(
        {},
        {
            "calibration_error": optional(_SHARE),
            "confusion": list_of(list_of(count())),
            "most_confused": list_of(
                object_of({"label": count(), "prediction": count(), "n": count()})
            ),
            "worst_classes": list_of(
                object_of({"label": count(), "n_right": count(), "n": count(1)})
            ),
        },
    ),
    "labels": list_of(
        object_of(
            {"name": text, "n_test": count(), "n_test_positive": count()},
            {
                "average_precision": optional(_SHARE),
                "f1": optional(_SHARE),
                "threshold": optional(_SHARE),
            },
        )
    ),
    "targets": list_of(
        object_of(
            {"name": text, "n_test": count()},
            {"r2": optional(number()), "mae": optional(number(0))},
        )
    ),
    "macro_ap": optional(_SHARE),
    "macro_ap_interval": _INTERVAL,
    "r2": optional(number()),
    "r2_interval": _INTERVAL,
    "split": text,
    "group": optional(text),
    "where": optional(text),
}
_HEADLINES = (("top1", "top-1"), ("macro_ap", "macro average precision"), ("r2", "R²"))
_BELOW = ("measure", "accuracy", "accuracy_interval", "dataset", "n_test")  # with the test split
_LISTED, _NAMED = 10, 100  # pairs of classes, names of classes

USE = """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession({name!r})
image = np.zeros((1, {side}, {side}, 3), np.uint8)  # an upright RGB image{free}
answer, features = session.run(None, {{"image": image}})
"""


def record_of(head: Path, runs: str | Path | None, on_note: OnNote) -> dict[str, Any] | None:
    """Return the record of the run that made a head's file: one with the same bytes."""
    beside = (head.parent / RECORD).is_file()
    folder = head.absolute().parent.parent if beside else runs_folder(runs)
    names = [head.absolute().parent] if beside else folder.glob("*/head.safetensors")
    same = {
        head.absolute().parent.name if beside else path.parent.name
        for path in names
        if beside or filecmp.cmp(head, path, shallow=False)
    }
    for record in reversed(load_runs(folder)[0]):
        if record["run"] in same:
            wrong = wrong_fields(record, {}, _FIELDS)
            if not wrong:
                return record
            on_note(f"{folder / record['run']}: left out, its {wrong[0]} is not what a run writes")
    return None


def headline(record: Mapping[str, Any]) -> tuple[str, float, list[float] | None] | None:
    """Return the name of a run's measure, its value and its interval."""
    for name, shown in _HEADLINES:
        if isinstance(record.get(name), (int, float)):
            interval = record.get(f"{name}_interval")
            return shown, float(record[name]), interval and list(interval)
    return None


def card(
    title: str,
    facts: Mapping[str, Any],
    ends: Sequence[tuple[str, str, str]],
    record: Mapping[str, Any] | None,
    use: str,
) -> str:
    """Return the page; ``ends`` are the name, type and meaning of each input and output."""
    parts = [
        f"# {_plain(title)}",
        "Made by featcache. Everything that it needs is inside: the resizing of images, the "
        "backbone and the head.",
        "## Use",
        _table(("tensor", "type", "is"), ends),
        f"```python\n{use}```" if use else "",
        "Images are upright RGB, 0 to 255, as they were decoded: rotate a photograph as its EXIF "
        "says first. Where featcache lets the decoder of JPEG shrink a large photograph, this file "
        "gets it whole; its answers then differ a little.",
        "## What it is made of",
        _table(
            ("", ""),
            [
                (name.replace("_", " "), _shown(one))
                for name, one in facts.items()
                if name not in _BELOW
            ],
        ),
        "## How good it is",
        *(_measured(record, facts["classes"]) if record else _UNKNOWN),
        "## What it was not tested on",
        *_untested(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_UNKNOWN = (
    "No record of its training run was found, so nothing is known here: measure it on images with "
    "labels that it was not trained on.",
)


def _measured(record: Mapping[str, Any], names: Sequence[str]) -> Iterable[str]:
    found = headline(record)
    facts = [
        ("data set", record.get("dataset")),
        ("images to train on", record.get("n_train")),
        ("of these, held out to choose by", record.get("n_val") or None),
        ("images to test on", record.get("n_test")),
        ("target", record.get("target")),
        ("split", record.get("split")),
        ("groups kept on one side", record.get("group")),
        ("only images with", record.get("where")),
    ]
    if found:
        measure, value, interval = found
        ends = f" (95 %: {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
        facts.append((measure, f"{value:.4f}{ends}"))
    evaluation = record.get("evaluation") or {}
    error = evaluation.get("calibration_error")
    if error is not None:
        facts.append(("expected calibration error, 15 bins", f"{error:.4f}"))
    yield _table(("", ""), [(name, _shown(one)) for name, one in facts if one is not None])
    if found and found[0] == "top-1" and error is None:
        yield "How far its probabilities can be trusted was not measured."
    yield from _by_class(evaluation, names)
    yield from _by_target(record)


def _by_class(evaluation: Mapping[str, Any], names: Sequence[str]) -> Iterable[str]:
    matrix = evaluation.get("confusion") or []
    rows = [(at, row[at], sum(row)) for at, row in enumerate(matrix) if at < len(row)]
    worst = evaluation.get("worst_classes") or []
    rows = rows or [(one["label"], one["n_right"], one["n"]) for one in worst]
    rows = [row for row in rows if row[0] < len(names) and row[2]]
    if rows:
        yield "Of each class:" if matrix else f"The {len(rows)} classes of lowest accuracy:"
        shown = [(names[at], f"{right / n:.4f}", f"{n:,}") for at, right, n in rows]
        yield _table(("class", "accuracy", "test images"), shown)
    pairs = [
        (names[one["label"]], names[one["prediction"]], f"{one['n']:,}")
        for one in evaluation.get("most_confused") or []
        if max(one["label"], one["prediction"]) < len(names) and one["n"]
    ]
    if pairs:
        yield "Most often confused:"
        yield _table(("class", "taken for", "images"), pairs[:_LISTED])


def _by_target(record: Mapping[str, Any]) -> Iterable[str]:
    columns = {
        "labels": ("n_test", "n_test_positive", "average_precision", "f1", "threshold"),
        "targets": ("n_test", "r2", "mae"),
    }
    for kind, names in columns.items():
        rows = [
            (one["name"], *(_shown(one.get(name)) for name in names))
            for one in record.get(kind) or []
        ]
        if rows:
            yield _table((kind[:-1], *(name.replace("_", " ") for name in names)), rows)


def _untested(record: Mapping[str, Any] | None) -> Iterable[str]:
    data = _plain(str(record.get("dataset"))) if record else "its own data set"
    lines = [
        f"Images that were not taken as those of {data} were: other cameras, places, people.",
        "Images of none of its classes. It answers all the same, and may be sure of it.",
        "Images that somebody made in order to mislead it.",
    ]
    if record and not record.get("group"):
        lines.append(
            "Whether train and test share people, scenes or sites: no column of groups was named."
        )
    if record and record.get("where"):
        lines.append("Images that the condition above leaves out.")
    return ["\n".join(f"- {line}" for line in lines)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        more = f" and {len(value) - _NAMED:,} more" if len(value) > _NAMED else ""
        return ", ".join(map(_shown, value[:_NAMED])) + more
    return "none" if value is None else str(value)


def _plain(words: str) -> str:
    """Return foreign text as Markdown that says just that, on one line."""
    line = visible_line(words).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|`*_\[\]#~])", r"\\\1", line)
