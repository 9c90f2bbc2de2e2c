"""The records of `reproduce.py` as a table, a figure and a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Records = Mapping[str, list[dict[str, Any]]]  # row to its runs, one per seed

COLUMNS = ("method", "images", "epochs", "engine", "top-1 (95 %)", "img/s", "wall", "processor")
BRIEF = ("method", "images", "epochs", "engine", "top-1 (95 %)")  # in the README


def table(records: Records, folder: str = "", columns: Sequence[str] = COLUMNS) -> str:
    """Return the records as a Markdown table; each row links to the record of its run."""
    rows = [dict(zip(columns, columns, strict=True)), dict.fromkeys(columns, "---")]
    for name, runs in records.items():
        rows += _cells(name, runs, folder, seeds="img/s" in columns)
    return "".join("| " + " | ".join(row[name] for name in columns) + " |\n" for row in rows)


def _cells(
    name: str, runs: list[dict[str, Any]], folder: str, *, seeds: bool
) -> Iterator[dict[str, str]]:
    """Yield the line of a row, and the line of its cross-check if there is one."""
    first = runs[0]
    links = [f"{folder}{name}-{seed}.json" for seed in range(len(runs))]
    is_extraction = first["kind"] == "features"
    if is_extraction:
        top1 = f"[features]({links[0]})"
    else:
        low, high = (100 * value for value in first["top1_interval"])
        top1 = f"[**{100 * first['top1']:.1f} %**]({links[0]}) ({low:.1f} to {high:.1f})"
    if seeds and len(runs) > 1:
        others = [f"[{100 * r['top1']:.1f}]({link})" for r, link in zip(runs, links, strict=True)]
        top1 += f"; other seeds {', '.join(others[1:])}"
    rates = first["kind"] in ("features", "finetune")
    processor_s = [record["processor_s"] for record in runs if record["processor_s"]]
    yield {
        "method": first["title"],
        "images": f"{first['n_train'] + first['n_test'] * is_extraction:,}",
        "epochs": str(first["n_epochs"]) if _in_epochs(first) else "",
        "engine": _engine(first),
        "top-1 (95 %)": top1,
        "img/s": f"{_median(runs, 'images_per_s'):,.0f}" if rates else "",
        "wall": f"{_median(runs, 'wall_s'):,.1f} s",
        "processor": f"{statistics.median(processor_s):,.0f} s" if processor_s else "",
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


def _median(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(record[name] for record in runs)


def _in_epochs(record: Mapping[str, Any]) -> bool:
    return record["kind"] == "finetune" or record.get("solver") == "sgd"


def _engine(record: Mapping[str, Any]) -> str:
    if record["kind"] in ("features", "finetune"):
        return f"{record['engine']} {record['precision']}"
    return "oneflow f32" if record.get("solver") == "sgd" else "NumPy"


def draw(records: Records) -> Any:
    """Draw each row's accuracy with its interval, those on fewer images hollow."""
    from featcache.reporting.style import SERIES, SURFACE, head, percent_axis, sheet

    shown = [runs for runs in records.values() if "top1" in runs[0]]
    most = max(runs[0]["n_train"] for runs in shown)
    fewer = min(runs[0]["n_train"] for runs in shown)
    colours = {"probe": SERIES[0], "knn": SERIES[2], "finetune": SERIES[1]}
    first = shown[0][0]
    with sheet(6.4, 0.9 + 0.21 * len(shown)) as figure:
        caption = (
            f"ResNet-18 at {first['size']} px; top-1 on {first['n_test']:,} test images with its "
            f"95 % interval, one mark per seed. Blue and green: on cached features; red: end to "
            f"end. Filled: {most:,} training images; hollow: {fewer:,}."
        )
        head(figure, f"{first['dataset']}: every method", caption)
        axes = figure.add_subplot()
        for place, runs in enumerate(shown):
            colour = colours[runs[0]["kind"]]
            inside = colour if runs[0]["n_train"] == most else SURFACE
            axes.plot(runs[0]["top1_interval"], (place, place), color=colour)
            for record in runs:
                axes.plot(record["top1"], place, "o", color=colour, mfc=inside, ms=5)
        axes.set_yticks(range(len(shown)), [_label(runs[0]) for runs in shown])
        axes.invert_yaxis()
        axes.grid(axis="x")
        percent_axis(axes.xaxis, "top-1")
    return figure


def _label(record: Mapping[str, Any]) -> str:
    epochs = f", {record['n_epochs']} epochs" if record["kind"] == "finetune" else ""
    return f"{record['title']}{epochs} ({_engine(record)})"


def write_page(folder: Path, records: Records) -> None:
    """Write the table and the figure beside the records."""
    from featcache.reporting.style import save_figure

    if not any("top1" in runs[0] for runs in records.values()):
        return
    first = next(iter(records.values()))[0]
    save_figure(draw(records), folder / "methods.svg")
    page = (
        f"# {first['dataset']}, ResNet-18 with {first['weights']} at {first['size']} px\n\n"
        "Written by `python benchmarks/reproduce.py`; every accuracy links to the record of its\n"
        "run. The wall time of a probe includes its sweep but not the extraction, that of a\n"
        "fine-tune an evaluation after each epoch. Processor time is that of the whole process.\n\n"
        f"{table(records)}\n![top-1 of every method](methods.svg)\n"
    )
    notes = folder / "notes.txt"  # by the person who ran it
    if notes.exists():
        page += "\n" + notes.read_text(encoding="utf-8")
    (folder / "README.md").write_text(page, encoding="utf-8")
