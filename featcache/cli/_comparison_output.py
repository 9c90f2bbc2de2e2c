"""How runs are shown side by side."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ._output import encoding, name, width
from ._sparkline import sparkline

__all__ = ["comparison_tables"]

_WIDE = 120  # columns of a terminal on which the names of runs have room
_ROOMY = 96  # on which curves have
_CURVE = 10


def comparison_tables(records: list[dict[str, Any]]) -> list[Any]:
    """Return one table per data set: accuracies on different data are never side by side."""
    from ..comparison import epochs_of, run_label

    tables: list[Any] = []
    for (dataset, digest), group in groupby(
        records, key=lambda record: (record["dataset"], record["dataset_digest"])
    ):
        rows = list(group)
        weights = [f"{record['weights']} {record['size']} px" for record in rows]
        # What is the same in every row goes above them: 80 columns are soon full.
        shared = f", {weights[0]}" if len(set(weights)) == 1 else ""
        columns = ["method", "top-1 % (95 %)", "train", "test", "ep", "wall s", "img/s", "s/point"]
        curves = [[epoch["top1"] for epoch in epochs_of(record)] for record in rows]
        columns += ["curve"] * (width() >= _ROOMY and max(map(len, curves)) > 1)
        columns += ["weights"] * (not shared) + ["run"] * (width() >= _WIDE)
        title = Text(f"{dataset} ({digest[:8]}){shared}")
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in columns:
            figures = column in columns[1:8]
            table.add_column(column, justify="right" if figures else "left", no_wrap=figures)
        for record, checkpoint, curve in zip(rows, weights, curves, strict=True):
            low, high = record["top1_interval"]
            wall = _short(record["wall_s"])
            if record.get("features_wall_s"):
                wall = f"{_short(record['features_wall_s'])} + {wall}"
            price = record["s_per_point"]
            cells = [
                run_label(record),
                f"{100 * record['top1']:.2f} ({100 * low:.1f}-{100 * high:.1f})",
                f"{record['n_train']:,}",
                f"{record['n_test']:,}",
                str(record["n_epochs"]),
                wall,
                f"{record['images_per_s']:,.0f}",
                "-" if price is None else _short(price),
            ]
            cells += [sparkline(curve, encoding(), _CURVE)] * ("curve" in columns)
            cells += [checkpoint] * ("weights" in columns) + [record["run"]] * ("run" in columns)
            table.add_row(*(name(cell) for cell in cells))
        tables.append(table)
    said = (
        "ep: epochs; wall: features once + training; img/s: training images; "
        "s/point: wall for each percentage point over the best probe on the same images, - of a "
        "probe, without one, and where nothing was gained"
    )
    tables.append(Text(said, style="dim"))
    return tables


def _short(seconds: float) -> str:
    """Return seconds with a decimal as long as it means something."""
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"
