"""The records of `reproduce.py` as a table, a figure and a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["BRIEF", "COLUMNS", "Records", "table", "write_page"]

Records = Mapping[str, list[dict[str, Any]]]  # of each row, by seed

COLUMNS = ("method", "images", "epochs", "engine", "top-1 (95 %)", "img/s", "wall", "processor")
BRIEF = ("method", "images", "epochs", "engine", "top-1 (95 %)")  # in the README


def table(records: Records, folder: str = "", columns: Sequence[str] = COLUMNS) -> str:
    """Return the records as Markdown; each row leads to the record of its run."""
    rows = [dict(zip(columns, columns, strict=True)), dict.fromkeys(columns, "---")]
    for name, found in records.items():
        rows += _cells(name, found, folder, seeds="img/s" in columns)
    return "".join("| " + " | ".join(row[name] for name in columns) + " |\n" for row in rows)


def _cells(
    name: str, found: list[dict[str, Any]], folder: str, *, seeds: bool
) -> Iterator[dict[str, str]]:
    """Yield a row's line, and that of its check if it was checked."""
    first = found[0]
    links = [f"{folder}{name}-{seed}.json" for seed in range(len(found))]
    made = first["kind"] == "features"
    if made:
        top1 = f"[features]({links[0]})"
    else:
        low, high = (100 * value for value in first["top1_interval"])
        top1 = f"[**{100 * first['top1']:.1f} %**]({links[0]}) ({low:.1f} to {high:.1f})"
    if seeds and len(found) > 1:
        others = [f"[{100 * r['top1']:.1f}]({link})" for r, link in zip(found, links, strict=True)]
        top1 += f"; other seeds {', '.join(others[1:])}"
    rates = first["kind"] in ("features", "finetune")
    used = [record["processor_s"] for record in found if record["processor_s"]]
    yield {
        "method": first["title"],
        "images": f"{first['n_train'] + first['n_test'] * made:,}",
        "epochs": str(first["n_epochs"]) if _in_epochs(first) else "",
        "engine": _computed(first),
        "top-1 (95 %)": top1,
        "img/s": f"{_median(found, 'images_per_s'):,.0f}" if rates else "",
        "wall": f"{_median(found, 'wall_s'):,.1f} s",
        "processor": f"{statistics.median(used):,.0f} s" if used else "",
    }
    check = first.get("check")
    if check:
        yield {
            **dict.fromkeys(COLUMNS, ""),
            "method": "cross-check: scikit-learn at the same C",
            "images": f"{first['n_train']:,}",
            "engine": "scikit-learn",
            "top-1 (95 %)": f"{100 * check['top1']:.1f} %",
            "wall": f"{check['wall_s']:,.1f} s",
        }


def _median(found: list[dict[str, Any]], name: str) -> float:
    return statistics.median(record[name] for record in found)


def _in_epochs(record: Mapping[str, Any]) -> bool:
    return record["kind"] == "finetune" or record.get("solver") == "sgd"


def _computed(record: Mapping[str, Any]) -> str:
    if record["kind"] in ("features", "finetune"):
        return f"{record['engine']} {record['precision']}"
    return "oneflow f32" if record.get("solver") == "sgd" else "NumPy"


def draw(records: Records) -> Any:
    """Draw each row's accuracy with its interval, those on fewer images hollow."""
    from featcache.reporting.style import SERIES, SURFACE, head, percent_axis, sheet

    shown = [found for found in records.values() if "top1" in found[0]]
    most = max(found[0]["n_train"] for found in shown)
    fewer = min(found[0]["n_train"] for found in shown)
    colours = {"probe": SERIES[0], "knn": SERIES[2], "finetune": SERIES[1]}
    first = shown[0][0]
    with sheet(6.4, 0.9 + 0.21 * len(shown)) as figure:
        said = (
            f"ResNet-18 at {first['size']} px; top-1 on {first['n_test']:,} test images with its "
            f"95 % interval, one mark for each seed. Blue and green: on cached features; red: end "
            f"to end. Filled: {most:,} training images; hollow: {fewer:,}."
        )
        head(figure, f"{first['dataset']}: every method", said)
        axes = figure.add_subplot()
        for place, found in enumerate(shown):
            colour = colours[found[0]["kind"]]
            inside = colour if found[0]["n_train"] == most else SURFACE
            axes.plot(found[0]["top1_interval"], (place, place), color=colour)
            for record in found:
                axes.plot(record["top1"], place, "o", color=colour, mfc=inside, ms=5)
        axes.set_yticks(range(len(shown)), [_named(found[0]) for found in shown])
        axes.invert_yaxis()
        axes.grid(axis="x")
        percent_axis(axes.xaxis, "top-1")
    return figure


def _named(record: Mapping[str, Any]) -> str:
    epochs = f", {record['n_epochs']} epochs" if record["kind"] == "finetune" else ""
    return f"{record['title']}{epochs} ({_computed(record)})"


def write_page(folder: Path, records: Records) -> None:
    """Write the table and the figure beside the records."""
    from featcache.reporting.style import save_figure

    if not any("top1" in found[0] for found in records.values()):
        return
    first = next(iter(records.values()))[0]
    save_figure(draw(records), folder / "methods.svg")
    page = (
        f"# {first['dataset']}, ResNet-18 with {first['weights']} at {first['size']} px\n\n"
        "Made by `python benchmarks/reproduce.py`; every accuracy leads to the record of its run.\n"
        "Wall time of a probe counts the sweep and not the features, that of a fine-tune an\n"
        "evaluation after each epoch; processor time counts all of the process.\n\n"
        f"{table(records)}\n![top-1 of every method](methods.svg)\n"
    )
    notes = folder / "notes.txt"  # of whoever ran it
    if notes.exists():
        page += "\n" + notes.read_text(encoding="utf-8")
    (folder / "README.md").write_text(page, encoding="utf-8")
