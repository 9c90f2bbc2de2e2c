"""Write docs/reference.md from the signatures and docstrings of featcache's public names.

    python docs/build_reference.py

Run this after a change of a docstring; a test compares the page. It uses only the standard library,
so that the page can be rebuilt everywhere.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import featcache
from featcache import errors

PAGE = Path(__file__).with_name("reference.md")

GROUPS = {
    "Making caches": (
        *("extract", "extract_share", "pack", "import_features", "label", "merge"),
        *("ExtractOptions", "ExtractResult", "ShareResult", "ImportResult", "LabelResult"),
        "MergeResult",
    ),
    "Reading caches": (
        *("load", "newest_cache", "verify", "diff", "export", "Cache", "CachedSplit"),
        *("VerifyReport", "DiffReport", "ExportResult"),
    ),
    "Heads on features": (
        *("probe", "few_shot", "learning_curve", "knn"),
        *("Question", "ProbeOptions", "ProbeResult", "MultilabelResult", "RegressionResult"),
        *("CrossValidationResult", "KnnResult"),
        *("LinearProbe", "ExactRecipe", "ProbeRecipe"),
    ),
    "Saved heads": (
        *("load_head", "predict", "predict_stream", "evaluate_head", "ship"),
        *("Head", "ShipOptions", "ShipResult"),
    ),
    "Fine-tuning": (
        *("finetune", "fit", "FinetuneResult", "FitResult"),
        *("FinetuneOptions", "FinetuneRecipe", "FitOptions"),
    ),
    "Comparing and looking": (
        *("compare", "survey", "audit", "search", "select", "report", "worst_errors"),
        "text_features",
        *("SurveyOptions", "SurveyResult", "AuditResult", "SearchResult", "SelectResult"),
        *("ReportResult", "ErrorsResult"),
    ),
    "Data, weights, machine": (
        *("load_dataset", "load_weights", "examine", "Dataset", "Split", "Weights"),
        *("Preprocess", "Progress"),
    ),
    "Errors": ("FeatcacheError",),
}
# Types of the results' fields. They are not public names, but users read their fields.
PARTS = {
    "probes.cross_check": ("CheckResult",),
    "metrics": ("Evaluation", "NumberScores", "PairedTest"),
    "probes.sweep": ("Sweep", "SweepPoint"),
    "probes.labels_and_numbers": ("TargetProbe",),
    "probes.multilabel": ("MultilabelScores", "LabelScore", "LabelsCheck"),
    "probes.regression": ("RegressionScores", "NumberScore", "NumbersCheck"),
    "probes.crossval": ("Fold",),
    "probes.curves": ("CurvePoint",),
    "probes.zero_shot": ("ZeroShotResult",),
    "prediction": ("Prediction", "HeadResult"),
    "shipping.check": ("Agreement",),
    "searching": ("Query", "Neighbour"),
    "finetuning.run": ("Epoch",),
    "finetuning.fit": ("Attempt",),
    "auditing.findings": ("DuplicatePair", "DuplicateGroup", "Suspect", "Outlier"),
    "auditing.selection": ("Selected",),
    "reporting.mistakes": ("WorstError",),
    "surveying": ("Surveyed", "Answer"),
    "datasets.images": ("Images", "ArrayImages"),
    "doctor": ("Finding",),
}
LISTS = ("Attributes", "Parameters", "Raises", "Returns", "Yields")

INTRO = """# Python reference

<!-- Written by docs/build_reference.py from the docstrings: change those, then run it. -->

All names below belong to the package `featcache`. Importing it loads no framework, not even NumPy:
a name is imported when it is first used. Everything is typed. Results are frozen dataclasses,
listed with their fields. Letters in shapes: N images, D numbers per feature, K classes, C x H x W a
feature map.

`on_progress` is called with a `Progress`, `on_note` receives one-line notes; by default both do
nothing.
"""


def build() -> str:
    """Return the page."""
    listed = [name for names in GROUPS.values() for name in names]
    missing = sorted(set(featcache.__all__) ^ set(listed))
    if missing or len(set(listed)) != len(listed):
        raise SystemExit(
            f"GROUPS: expected each public name once, found a difference in {', '.join(missing)}"
        )
    parts = [INTRO]
    for title, names in GROUPS.items():
        links = ", ".join(f"[`{name}`](#{name.lower()})" for name in names)
        parts.append(f"- **{title}**: {links}")
    for title, names in GROUPS.items():
        parts.append(f"\n## {title}")
        for name in names:
            parts.extend(_entry(name, getattr(featcache, name)))
        if title == "Errors":
            tree = inspect.getdoc(errors).split("::\n\n")[1].split("\n\nA message")[0]
            parts.append(f"In `featcache.errors`:\n\n```text\n{inspect.cleandoc(tree)}\n```")
    parts.append("\n## Parts of results\n\nTypes of the fields above; they are not public names.")
    for room, names in PARTS.items():
        for name in names:
            parts.extend(_entry(name, getattr(importlib.import_module(f"featcache.{room}"), name)))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def _entry(name: str, item: Any) -> Iterator[str]:
    """Yield the entry of a function or class, followed by the methods of a class."""
    docstring = inspect.getdoc(item) or ""
    yield f"\n### {name}\n"
    if not (inspect.isclass(item) and issubclass(item, (Exception, Protocol))):
        yield f"```text\n{_signature(name, item)}\n```\n"
    yield _markdown(docstring)
    if inspect.isclass(item):
        for member, value in vars(item).items():
            if not re.search(rf"^(.*, )?{member}(,.*)? : ", docstring, flags=re.MULTILINE):
                yield from _member(name, member, value)


def _member(owner: str, name: str, value: Any) -> Iterator[str]:
    """Yield the entry of a public method or property that the class defines itself."""
    if name.startswith("_"):
        return
    if isinstance(value, (property, cached_property)):
        yield f"\n**`{owner}.{name}`**\n\n{_markdown(inspect.getdoc(value) or '')}"
    elif inspect.isfunction(value):
        signature = _signature(name, value, drop_self=True)
        if "\n" in signature:
            yield f"\n**`{owner}.{name}`**\n\n```text\n{signature}\n```\n"
        else:
            yield f"\n**`{owner}.{signature}`**\n"
        yield _markdown(inspect.getdoc(value) or "")


def _signature(name: str, item: Any, *, drop_self: bool = False) -> str:
    """Return ``name(parameters) -> type``, with one parameter per line if it is long."""
    signature = inspect.signature(item)
    parameters = list(signature.parameters.values())[drop_self:]
    words, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            starred = True
        elif parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        words.append(_parameter(parameter))
    returned = ""
    if not inspect.isclass(item) and signature.return_annotation is not inspect.Signature.empty:
        returned = f" -> {signature.return_annotation}"
    short = f"{name}({', '.join(words)}){returned}"
    if len(short) <= 88:
        return short
    return f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){returned}"


def _parameter(parameter: inspect.Parameter) -> str:
    text = ("*" if parameter.kind is parameter.VAR_POSITIONAL else "") + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {parameter.annotation}"
    if parameter.default is not parameter.empty:
        default = "..." if parameter.default is ... else repr(parameter.default)
        text += f" = {getattr(parameter.default, '__name__', default)}"
    return text


def _markdown(docstring: str) -> str:
    """Return a NumPy docstring as Markdown, with bold sections and lists of fields."""
    text = re.sub(r"(`?`)([^`]+)\1", r"`\2`", docstring)
    first, *sections = re.split(r"^([A-Z][A-Za-z ]+)\n-{3,}\n", text, flags=re.MULTILINE)
    parts = [_prose(first)]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        parts.append(f"**{title}**\n\n{_fields(body) if title in LISTS else _prose(body)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _prose(text: str) -> str:
    """Return paragraphs, with the code after ``::`` or ``>>>`` in fences."""
    lines, in_code = [], False
    for line in text.strip().replace("::\n", ":\n").splitlines():
        code = line.startswith((">>>", "...", "    "))
        if code != in_code and (code or line):
            lines.append("```text" if code else "```\n")
            in_code = code
        lines.append(line)
    return "\n".join([*lines, "```"] if in_code else lines)


def _fields(body: str) -> str:
    """Return each ``name : type`` and its indented text as one list item."""
    items: list[tuple[str, list[str]]] = []
    for line in filter(None, body.splitlines()):
        if line.startswith(" "):
            items[-1][1].append(line.strip())
        else:
            names, _, kind = line.partition(" : ")
            items.append((f"**{names}** ({kind})" if kind else f"`{names}`", []))
    return "\n".join(f"- {name}" + (f": {' '.join(text)}" if text else "") for name, text in items)


if __name__ == "__main__":
    PAGE.write_text(build(), encoding="utf-8")
    print(f"{PAGE}: {PAGE.stat().st_size:,} bytes")
